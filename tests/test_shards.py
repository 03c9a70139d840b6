"""A denoiser split over processes trains as a whole one does, keeps 1/N of it in each, and becomes an ordinary model."""

import dataclasses
import json
import sys
import time
import types

import forked
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, picture
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import distributed
from training_runs import assert_same_weights, make_run, settings, steps, tiny_training, weights

import dreambooth_implementation as db

SPLIT = db.Levers(shard=True)
IN_TWO = [(family, method, precision) for precision in ("no", "bf16") for family in ("sd1", "z-image") for method in ("full", "lora")]
IN_FOUR = [("sd1", "full", "no"), ("z-image", "full", "no")]  # a LoRA of rank 2 has too few rows for four


def kept_by(run):
    """{"weights", "gradients", "state": bytes} of this process in a step, and {"all-gather", "reduce-scatter": bytes} that it sent."""
    found, step, others = {"all-gather": 0, "reduce-scatter": 0}, run.optimizer.step, run.accelerator.num_processes - 1
    parameters = [p for group in run.groups for p in group.parameters]
    real = distributed.all_gather_single, distributed.reduce_scatter_single

    def gathering(output_tensor, input_tensor, *rest, **options):
        found["all-gather"] += input_tensor.nbytes * others
        return real[0](output_tensor, input_tensor, *rest, **options)

    def scattering(output, input, *rest, **options):
        found["reduce-scatter"] += output.nbytes * others
        return real[1](output, input, *rest, **options)

    def look():
        found["gradients"] = sum(db.own_share(p.grad).nbytes for p in parameters)
        step()
    run.optimizer.step, distributed.all_gather_single, distributed.reduce_scatter_single = look, gathering, scattering
    db.train_step(run, 2)
    run.optimizer.step, distributed.all_gather_single, distributed.reduce_scatter_single = step, *real
    states = [value for state in run.optimizer.state.values() for value in state.values()]
    found["weights"] = sum(db.own_share(p).nbytes for p in run.models.denoiser.parameters())
    return found | {"state": sum(db.own_share(value).nbytes for value in states if value.dim())}


def both_ways(models, trainings):
    """In each of several processes: three steps, whole and split; what came of both and what each kept, in files."""
    for training in trainings:
        for way, levers in (("whole", db.Levers()), ("split", SPLIT)):
            method, family, precision = training[1], training[0], training[2]
            run = make_run(models.get, method, family, precision, levers)
            named, rank = db.trained_parameters(run.groups), run.accelerator.process_index
            start = {f"start {name}": db.whole(parameter.detach()).clone() for name, parameter in named.items()}
            measured = steps(run, 0, 2)
            kept = kept_by(run) | {"numbers": sum(p.numel() for p in run.models.denoiser.parameters()),
                                   "trained": sum(p.numel() for p in named.values())}
            weights = {name: db.whole(parameter.detach()).clone() for name, parameter in named.items()}
            if rank == 0:
                save_file(start | weights | {"measured": measured}, f"{'-'.join(training)}-{way}.safetensors")
            with open(f"{'-'.join(training)}-{way}-{rank}.json", "w") as file:
                json.dump(kept, file)


@pytest.mark.long
@pytest.mark.parametrize("number, trainings", [(2, IN_TWO), (4, IN_FOUR)], ids=["2", "4"])
def test_three_steps_split_are_three_steps_whole(number, trainings, tmp_path, tiny_model):
    """Each process keeps its share alone, of the frozen base as well, and sends what is told on paper."""
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    from several_gpus import traffic

    statuses, said = forked.together(number, tmp_path, both_ways, {family: tiny_model(family) for family, _, _ in trainings}, trainings)
    assert statuses == [0] * number, said
    for training in trainings:
        name, (_, method, precision) = "-".join(training), training
        whole, split = (load_file(tmp_path / f"{name}-{way}.safetensors") for way in ("whole", "split"))
        assert whole.keys() == split.keys() and len(whole) > 40
        names = [name for name in whole if f"start {name}" in whole]
        assert all(torch.equal(whole[f"start {name}"], split[f"start {name}"]) for name in names)
        moved, apart = (torch.cat([(whole[name] - other[f"{mark}{name}"]).flatten() for name in names]).norm()
                        for other, mark in ((whole, "start "), (split, "")))
        assert 0 < moved and apart <= (1e-3 if precision == "no" else 0.3) * moved, (training, moved, apart)
        torch.testing.assert_close(split["measured"], whole["measured"], rtol=1e-4 if precision == "no" else 0.05, atol=1e-5)
        kept = {way: [json.loads((tmp_path / f"{name}-{way}-{rank}.json").read_text()) for rank in range(number)]
                for way in ("whole", "split")}
        for what in ("weights", "gradients", "state"):
            shares = [each[what] for each in kept["split"]]
            if precision == "no":
                assert sum(shares) == kept["whole"][0][what], (training, what)
            assert max(shares) <= 1.15 * sum(shares) / number, (training, what, shares)
        for each in kept["split"]:
            paper = traffic(each["numbers"], each["trained"], number, 2 if precision == "bf16" else 4)
            assert 1 <= each["reduce-scatter"] / paper["reduce-scatter"] <= 1.1, (training, each, paper)
            least = 1 if method == "full" else 0.5  # what comes before the first layer that trains is needed forward alone
            assert least <= each["all-gather"] / paper["all-gather"] <= 1.2, (training, each, paper)


# ---- whole trainings by the program


def several(*commands):
    """The exit status of the first of these command lines that fails, or 0."""
    return next((status for words in commands if (status := db.main(list(words)))), 0)


def worded(*words):
    return list(map(str, words))


@pytest.fixture
def photo(tmp_path):
    (tmp_path / "photo").mkdir()
    picture(3, (32, 32)).save(tmp_path / "photo" / "0.png")
    return tmp_path / "photo"


COMMON = ["--class_prompt", "a dog", "--num_class_images", 2, "--identifier", "zwx", "--num_inference_steps", 2, "--resolution", 32,
          "--validation_prompt", "a dog", "--num_validation_images", 1, "--steps", 4, "--learning_rate", "1e-3"]
ALL = ["--use_ema", "--gradient_accumulation_steps", 2, "--gradient_checkpointing", "--validation_steps", 2, "--checkpointing_steps", 2,
       "--split_batch"]


def close(one, other, bound):
    """Whether two folders have the same weights but for a part `bound` of how far the first ones are from nothing."""
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    apart, size = (torch.cat([tensor.float().flatten() for tensor in tensors]).norm()
                   for tensors in ([one[name].float() - other[name].float() for name in one], one.values()))
    return apart <= bound * size


def drawn(folder):
    return np.asarray(Image.open(next(path for path in sorted(folder.glob("*.png")) if "grid" not in path.name))).astype(int)


@pytest.mark.long
def test_a_split_training_by_the_program(tmp_path, tiny_model, photo, run):
    """It ends as a whole one does, draws on the way, goes on to the bit from a checkpoint, in two processes; and then in one, whole.

    With an average, accumulated gradients, gradient checkpointing, and photos and class images in turns.
    """
    from diffusers import DiffusionPipeline

    flags = worded("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photo, *COMMON, *ALL)
    again = worded(*flags, "--resume", "split/checkpoints/step-000002")
    statuses, said = forked.together(2, tmp_path, several, [*flags, "--output_dir", "whole"], [*flags, "--shard", "--output_dir", "split"],
                                     [*again, "--shard", "--output_dir", "again"])
    assert statuses == [0, 0], said
    checkpoint = tmp_path / "split" / "checkpoints" / "step-000002"
    assert len(list(checkpoint.glob("*.safetensors"))) == 2 and {path.suffix for path in checkpoint.iterdir()} == {".safetensors", ".json"}
    assert close(tmp_path / "whole", tmp_path / "split", 1e-4)
    assert_same_weights(tmp_path / "split", tmp_path / "again")
    samples = [drawn(tmp_path / name / "samples" / "step-000004") for name in ("whole", "split", "again")]
    assert np.abs(samples[0] - samples[1]).max() <= 2 and (samples[1] == samples[2]).all()
    assert (tmp_path / "split" / "samples" / "step-000002").is_dir()

    status, out, err = run(*again, "--output_dir", "alone", "--shard")
    assert status == 0 and "one process alone" in out and "step-000002 is of 2 processes, and there are 1 now" in out, err
    assert "a step sees 2 photos instead of 4" in out
    status, _, err = run("--infer", "--model_path", "split", "--prompt", "a zwx dog", "--num_images", 1, "--num_inference_steps", 2,
                         "--guidance_scale", 4, "--image_dir", "drawn")
    assert status == 0, err
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "split")
    by_diffusers = pipeline("a zwx dog", num_inference_steps=2, guidance_scale=4.0, generator=torch.Generator().manual_seed(0)).images[0]
    assert np.abs(drawn(tmp_path / "drawn") - np.asarray(by_diffusers).astype(int)).max() <= 1


@pytest.mark.long
def test_a_split_lora_in_bf16_goes_on_in_four_processes(tmp_path, tiny_model, photo, run):
    """Of a family whose text encoder comes and goes, with the frozen model's predictions for the class's targets."""
    from diffusers import DiffusionPipeline

    flags = worded("--train", "--model_name", tiny_model("z-image"), "--instance_data_dir", photo, *COMMON, "--method", "lora",
                   "--checkpointing_steps", 2, "--mixed_precision", "bf16", "--prior", "frozen")
    statuses, said = forked.together(2, tmp_path, several, [*flags, "--output_dir", "whole"],
                                     [*flags, "--shard", "--output_dir", "split"])
    assert statuses == [0, 0], said
    assert close(tmp_path / "whole", tmp_path / "split", 0.02)
    statuses, said = forked.together(4, tmp_path, several, [*flags, "--resume", "split/checkpoints/step-000002", "--shard"])
    assert statuses == [0] * 4 and "is of 2 processes, and there are 4 now" in said, said
    pipeline = DiffusionPipeline.from_pretrained(tiny_model("z-image"))
    pipeline.load_lora_weights(tmp_path / "output")
    assert load_file(tmp_path / "output" / db.LORA_FILE).keys() == load_file(tmp_path / "whole" / db.LORA_FILE).keys()


@pytest.mark.long
def test_a_process_that_dies_ends_a_split_training_with_one_line(tmp_path, tiny_model, photo):
    flags = worded("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photo, *COMMON, "--shard", "--steps", 10**6,
                   "--checkpointing_steps", 2, "--no-with_prior_preservation")
    with forked.as_many(2) as environments:
        first, second = (forked.start(tmp_path, *flags, **each) for each in environments)
        while not db.checkpoints_in(tmp_path / "output.partial"):
            assert first.is_alive()
            time.sleep(0.05)
        second.kill()
        (status, _), said = forked.finish([first, second], tmp_path)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and "another of the 2 processes that train together is gone" in errors[0], said
    assert "Traceback" not in said and not (tmp_path / "output").exists()
    assert db.read_state(db.checkpoints_in(tmp_path / "output.partial")[-1])["processes"] == 2


# ---- what is asked for, and what is refused


def test_a_configuration_of_accelerate_for_fsdp_is_followed(monkeypatch, capsys):
    monkeypatch.setattr(db, "processes", lambda: 2)
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true",
                        "FSDP_OFFLOAD_PARAMS": "true"}.items():
        monkeypatch.setenv(name, value)
    s = db.with_configuration(settings())
    assert s.shard and s.gradient_checkpointing and "ACCELERATE_USE_FSDP" not in db.os.environ
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "split by FSDP2, as with --shard" in out and "FSDP_OFFLOAD_PARAMS=true: not followed" in out
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert db.with_configuration(settings(shard=False)).shard is False
    assert db.with_configuration(settings()).shard is None  # it is followed once


def test_a_folder_that_a_process_does_not_see_is_named(tmp_path):
    alone = types.SimpleNamespace(num_processes=1)
    db.check_shared(tmp_path, alone)
    with pytest.raises(db.UserError, match="elsewhere is not there for process 0 of 1.*a disk that all machines see"):
        db.check_shared(tmp_path / "elsewhere", alone)


@pytest.mark.parametrize("kind, name", [("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")])
def test_other_ways_of_splitting_are_refused_with_the_way_to_go(kind, name, flags, run, monkeypatch, tmp_path):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    monkeypatch.setattr(db, "load_models", None)  # nothing is read
    status, _, err = run(*flags("full"))
    assert status == 2 and f"configuration says {name}; here FSDP2 splits a model: give --shard" in err and err.count("\n") == 1


@pytest.mark.parametrize("given, precision, said", [
    ({"optimizer": "adamw8bit"}, "bf16", "--optimizer adamw8bit"), ({"optimizer": "prodigy"}, "no", "--optimizer prodigy"),
    ({"fused_backward": True}, "no", "leave out --fused_backward"), ({"method": "lora", "base_precision": "int8"}, "bf16", "int8 cannot"),
    ({}, "fp16", "--mixed_precision bf16 or no"), ({"train_text_encoder": True}, "no", "--train_text_encoder"),
    ({"method": "pivotal"}, "no", "--method pivotal"), ({"prior": "frozen"}, "no", "--prior frozen"), ({"select_best": True}, "no", "--select_best"),
    ({"compile": True}, "no", "--compile"), ({"channels_last": True}, "no", "--channels_last")])
def test_what_cannot_be_split_is_refused_by_its_name(given, precision, said):
    s = settings(shard=True, **given)
    with pytest.raises(db.UserError, match=f"^--shard: .*{said}"):
        db.check_levers(s, db.ZImage() if "base_precision" in given else db.StableDiffusion(), db.Plan(torch.device("cpu"), precision))


def test_every_family_names_blocks_that_leave_little():
    """Of the full-size denoisers, without memory: the largest of what is gathered together is small beside the whole."""
    import diffusers

    kinds = {db.ZImage: "ZImageTransformer2DModel", db.Flux: "FluxTransformer2DModel", db.Flux2Dev: "Flux2Transformer2DModel",
             db.QwenImage: "QwenImageTransformer2DModel", db.StableDiffusion3: "SD3Transformer2DModel",
             db.StableDiffusion: "UNet2DConditionModel"}
    assert {type(family).__mro__[-3] for family in db.FAMILIES} <= {kind.__mro__[-3] for kind in kinds}
    for family, kind in kinds.items():
        with torch.device("meta"):
            together = db.parameters_together(family(), getattr(diffusers, kind)())
        sizes = [sum(p.numel() for p in some) for some in together]
        assert len(sizes) > 15 and sizes[-1] < 0.02 * sum(sizes) and max(sizes) < 0.06 * sum(sizes), (kind, sizes)


def test_the_plan_splits_what_does_not_fit_whole(tiny_model, monkeypatch, capsys):
    """Of two processes, where a plain step takes too much; and it says what it would take whole."""
    monkeypatch.setattr(db, "RESERVE", 0)
    s, models, subjects, recipe, plan = tiny_training(tiny_model, precision="bf16")
    monkeypatch.setattr(db, "processes", lambda: 2)
    rows = [row for row in db.plans(s, models.family, plan) if not row.fused_backward]
    needs = [sum(db.estimate(db.survey(s, models, subjects, recipe, 64, plan, row), row).values()) for row in rows]
    first = next(i for i, row in enumerate(rows) if row.shard)
    assert not any(row.shard for row in rows[:first]) and needs[first] < min(needs[:first])
    limit = dataclasses.replace(s, max_vram=repr((needs[first] + 1) / db.GIB))
    assert db.choose_levers(limit, models, subjects, recipe, 64, plan) == rows[first]
    out = capsys.readouterr().out
    assert "2 processes: the model is split over them (FSDP2), whole it would take 0.0" in out and "--shard" in out
    assert db.choose_levers(dataclasses.replace(s, max_vram="1"), models, subjects, recipe, 64, plan) == db.Levers()
    assert "2 processes: each trains the whole model (DDP), which fits" in capsys.readouterr().out


def test_what_fits_on_several_gpus_alone_is_told(tiny_model, monkeypatch):
    s, models, subjects, recipe, plan = tiny_training(tiny_model)
    monkeypatch.setattr(db, "estimate", lambda demand, levers, number=1: {"all": db.GIB * (9 if number < 8 else 1)})
    with pytest.raises(db.UserError, match="or split it over 8 such GPUs .`accelerate launch --num_processes 8`"):
        db.choose_levers(dataclasses.replace(s, max_vram="2"), models, subjects, recipe, 64, plan)


def test_a_share_of_all_is_estimated():
    """1/N of weights, gradients, moments and what is frozen; beside it what is gathered."""
    some = db.Demand(((4, 25),), 800, 1, (("gradient", 400, None),), 70)
    one, eight = (db.estimate(some, db.Levers(shard=True), number) for number in (1, 8))
    for what in ("weights", "gradients", "frozen"):
        assert eight[what] == one[what] / 8 > 0
    assert eight["optimizer"] == one["optimizer"] / 8 and eight["gathered"] == one["gathered"] == 70 and eight["exchange"] == 0

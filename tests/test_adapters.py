"""--adapter_type: OFT and LoKr are trained, drawn, exported or refused, and PEFT alone loads them."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_runs import SHORT, far_apart, make_run, steps, survey, tiny_training, trained

import dreambooth_implementation as db

FLAGS = ["--resolution", 32, "--identifier", "zwx", "--no-samples", "--no-with_prior_preservation", "--learning_rate", "5e-2"]


@pytest.fixture
def teach(run, tiny_model, photos):
    """teach(family, kind, *flags) -> what `run` returns of three steps."""
    def call(family, kind, *flags, method="lora"):
        return run("--train", "--model_name", tiny_model(family), "--instance_data_dir", photos, *SHORT, *FLAGS, "--steps", 3, "--rank", 4,
                   "--method", method, "--adapter_type", kind, *flags)

    return call


@pytest.fixture
def drawn(run, tmp_path):
    """drawn(*flags) -> the picture that --infer draws."""
    count = iter(range(100))

    def call(*flags):
        folder = tmp_path / f"drawn{next(count)}"
        status, out, err = run("--infer", "--prompt", "a zwx dog", "--num_images", 1, "--seed", 5, "--num_inference_steps", 2, "--height", 32,
                               "--width", 32, "--image_dir", folder, "--mixed_precision", "no", *flags)
        assert status == 0, err
        return Image.open(next(path for path in folder.glob("*.png") if not path.name.startswith("grid")))

    return call


def by_diffusers(pipeline, folder=None):
    """The same picture by plain diffusers, with what PEFT loads of a folder."""
    from peft import PeftModel

    for part in sorted(path.parent.name for path in folder.glob("*/adapter_model.safetensors")) if folder else ():
        setattr(pipeline, part, PeftModel.from_pretrained(getattr(pipeline, part), folder, subfolder=part))
    pipeline.set_progress_bar_config(disable=True)
    guided = db.family_of(pipeline).call_options(db.family_of(pipeline).guidance, None) if not folder else by_diffusers.options
    by_diffusers.options = guided
    return pipeline(prompt=["a zwx dog"], num_inference_steps=2, height=32, width=32, generator=[torch.Generator().manual_seed(5)],
                    **guided).images[0]


@pytest.mark.parametrize("family, text", [("sd1", ["--train_text_encoder"]), ("flux2-klein", [])])
@pytest.mark.parametrize("kind", ["oft", "lokr"])
def test_peft_alone_draws_what_was_trained_as_the_program_does(kind, family, text, teach, drawn, tiny_model, tmp_path):
    from diffusers import DiffusionPipeline

    status, out, err = teach(family, kind, "--lora_target", "all", *text)
    assert status == 0, err
    before = by_diffusers(DiffusionPipeline.from_pretrained(tiny_model(family)))
    expected = by_diffusers(DiffusionPipeline.from_pretrained(tiny_model(family)), tmp_path / "output")
    ours = drawn("--model_path", "output")
    assert far_apart(ours, expected) <= 2 < far_apart(ours, before)
    beside = drawn("--model_path", tiny_model(family), "--adapter", "output")
    assert far_apart(beside, expected) <= 2
    card = (tmp_path / "output" / "README.md").read_text()
    assert "PeftModel.from_pretrained(pipe." in card and "load_lora_weights" not in card and ("text_encoder = PeftModel" in card) == bool(text)
    assert (tmp_path / "output" / "kohya_lora.safetensors").exists() == (kind == "lokr" and family == "sd1")


def test_a_lokr_has_a_strength_and_an_oft_has_none(teach, drawn, run, tiny_model, tmp_path, monkeypatch):
    assert teach("sd1", "lokr")[0] == 0
    shutil.move("output", "kr")
    base, whole, half, none = drawn("--model_path", tiny_model("sd1")), *(drawn("--model_path", "kr", "--lora_scale", x) for x in (1, 0.5, 0))
    assert far_apart(none, base) <= 1 < far_apart(half, base) and far_apart(half, whole) > 1
    assert far_apart(drawn("--model_path", tiny_model("sd1"), "--adapter", "kr=0.5"), half) <= 1
    assert teach("sd1", "oft")[0] == 0
    monkeypatch.setattr(db, "load_pipeline", None)  # nothing is read
    for flags, remedy in ((["--model_path", "output", "--lora_scale", 0.5], "leave out --lora_scale"),
                          (["--model_path", tiny_model("sd1"), "--adapter", "output=0.5"], "leave out what follows the =")):
        status, _, err = run("--infer", "--prompt", "a zwx dog", *flags)
        assert status == 2 and "has no strength" in err and remedy in err and err.count("\n") == 1, err


def test_adapters_of_several_kinds_are_drawn_together(teach, drawn, tiny_model):
    """Whatever their order: what is merged goes first, and a LoRA stands beside it."""
    for kind in ("lora", "lokr", "oft"):
        assert teach("sd1", kind, "--output_dir", kind)[0] == 0
    model = ["--model_path", tiny_model("sd1")]
    one = drawn(*model, "--adapter", "lora=0.7", "--adapter", "lokr=0.8", "--adapter", "oft")
    assert far_apart(one, drawn("--model_path", "lora", "--lora_scale", 0.7, "--adapter", "lokr=0.8", "--adapter", "oft")) <= 1
    assert all(far_apart(one, drawn(*model, "--adapter", kind)) > 1 for kind in ("lora", "lokr", "oft"))


def test_pivotal_tuning_takes_them_too(teach, drawn, tmp_path):
    status, _, err = teach("sd1", "lokr", "--identifier", "<zwx>", method="pivotal")
    assert status == 0, err
    assert (tmp_path / "output" / "learned_embeds.safetensors").is_file() and drawn("--model_path", "output", "--prompt", "a <zwx> dog")


def test_an_exported_lokr_is_the_one_that_was_trained(tiny_model, tmp_path):
    """By LyCORIS's formula: kron(w1, w2), scaled by alpha / rank if either is a product of two."""
    run = make_run(tiny_model, "lora", adapter_type="lokr", lora_alpha=6, learning_rate=1e-2, train_text_encoder=True, text_encoder_lr=1e-2)
    steps(run, 0, 2)
    db.unwrap(run)
    db.save_lora(tmp_path, run.models, [], {})
    tensors = load_file(tmp_path / "kohya_lora.safetensors")
    parts = {"lora_unet": run.models.pipeline.unet, "lora_te": run.models.pipeline.text_encoder}
    layers = {f"{prefix}_{'text_model_' * (prefix == 'lora_te' and not name.startswith('text_model'))}{name.replace('.', '_')}": layer
              for prefix, module in parts.items() for name, layer in module.named_modules() if hasattr(layer, "get_delta_weight")}
    assert {name.split(".")[0] for name in tensors} == set(layers) and len(layers) > 8
    for name, layer in layers.items():
        w1 = tensors.get(f"{name}.lokr_w1")
        w2, pair = tensors.get(f"{name}.lokr_w2"), [tensors.get(f"{name}.lokr_w2_{part}") for part in "ab"]
        scale = tensors[f"{name}.alpha"] / pair[1].shape[0] if w2 is None else 1
        w2 = pair[0] @ pair[1] if w2 is None else w2
        w1 = w1.reshape(*w1.shape, *[1] * (w2.dim() - 2))
        expected = layer.get_delta_weight("default")
        assert expected.abs().max() > 0
        torch.testing.assert_close(scale * torch.kron(w1, w2.contiguous()).reshape(expected.shape), expected)


def test_a_lokr_of_low_rank_is_scaled_once(tiny_model):
    run = make_run(tiny_model, "lora", adapter_type="lokr", lora_alpha=6)
    config = run.models.pipeline.unet.peft_config["default"]
    tensors = {"mid.lokr_w1": torch.ones(2, 2), "mid.lokr_w2_a": torch.ones(3, config.r), "mid.lokr_w2_b": torch.ones(config.r, 3)}
    named = db.lycoris_names("lora_unet_", tensors, config)
    assert named["lora_unet_mid.alpha"] == config.r and torch.equal(named["lora_unet_mid.lokr_w1"], torch.full((2, 2), 3.0))
    assert torch.equal(named["lora_unet_mid.lokr_w2_a"], tensors["mid.lokr_w2_a"])


def test_export_of_each(teach, run, tmp_path):
    assert teach("sd1", "lokr", "--export", "kr.safetensors")[0] == 0
    assert any("lokr_w1" in name for name in load_file(tmp_path / "kr.safetensors"))
    assert teach("sd1", "oft", "--output_dir", "turned")[0] == 0
    status, _, err = run("--export", "o.safetensors", "--model_path", "turned")
    assert status == 2 and "train with --adapter_type lora or lokr" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("flags, said", [
    (["oft", "--use_dora"], "--use_dora with --adapter_type oft"), (["lokr", "--use_dora"], "--use_dora with --adapter_type lokr"),
    (["lokr", "--lora_dropout", "0.1"], "--lora_dropout"), (["oft", "--lora_alpha", "8"], "--lora_alpha"), (["oft", "--rank", "1"], "--rank 1"),
    (["oft", "--export", "o.safetensors"], "--export with --adapter_type oft"),
    (["lokr", "--method", "full"], "--adapter_type"), (["loha"], "invalid choice"),
])
def test_what_has_no_meaning_beside_them_is_refused(flags, said, teach, monkeypatch):
    monkeypatch.setattr(db, "load_models", None)
    status, _, err = teach("sd1", *flags)
    assert status == 2 and said in err and err.count("\n") == 1, err


def test_fewer_bits_are_for_loras_alone():
    s = db.Settings("train", method="lora", adapter_type="lokr", base_precision="int8")
    flux = next(family for family in db.FAMILIES if family.name == "flux")
    assert "--adapter_type lokr needs the weights themselves" in db.objection(s, flux, db.Levers(base_precision="int8"), "bf16")


@pytest.mark.parametrize("kind", ["oft", "lokr"])
def test_an_adapter_begins_with_nothing_and_leaves_the_model(kind, tiny_model):
    """Before it trains, and whenever it is off, the model is as it was; only it trains."""
    run = make_run(tiny_model, "lora", adapter_type=kind, learning_rate=1e-2, prior="frozen")
    sign, unet = db.ADAPTER_TYPES[kind].sign, run.models.pipeline.unet
    frozen = {name: parameter.detach().clone() for name, parameter in unet.named_parameters() if sign not in name}
    before = trained(run)
    measured = steps(run, 0, 3)
    assert measured[0, 1] < 1e-6 < measured[2, 1]
    assert all(torch.equal(dict(unet.named_parameters())[name], kept) for name, kept in frozen.items())
    assert all(not torch.equal(before[name], tensor) for name, tensor in trained(run).items() if tensor.dim() == 2 and tensor.numel() > 1)
    assert survey(tiny_training(tiny_model, "lora", adapter_type=kind)).trained == tuple(tuple(t.shape) for t in before.values())


def test_an_adapter_of_another_model_is_refused(teach, run, tiny_model, tmp_path):
    assert teach("sd1", "lokr")[0] == 0
    (tmp_path / "output" / "dreambooth.json").unlink()
    status, _, err = run("--infer", "--model_path", tiny_model("sdxl"), "--adapter", "output", "--prompt", "a dog")
    assert status == 2 and "a LoKr, does not fit" in err and err.count("\n") == 1, err
    (tmp_path / "output" / "unet" / "adapter_model.safetensors").unlink()
    status, _, err = run("--infer", "--model_path", tiny_model("sd1"), "--adapter", "output", "--prompt", "a dog")
    assert status == 2 and err.count("\n") == 1, err


def test_a_lost_part_is_told(teach, run, tmp_path):
    assert teach("sd1", "oft")[0] == 0
    shutil.rmtree(tmp_path / "output" / "unet")
    status, _, err = run("--infer", "--model_path", "output", "--prompt", "a dog")
    assert status == 2 and "adapter_model.safetensors is missing" in err, err
    record = json.loads((tmp_path / "output" / "dreambooth.json").read_text())
    record["settings"]["adapter_type"] = ["oft"]
    (tmp_path / "output" / "dreambooth.json").write_text(json.dumps(record))
    status, _, err = run("--infer", "--model_path", "output", "--prompt", "a dog")
    assert status == 2 and "damaged" in err and err.count("\n") == 1, err

"""Blocks of a frozen transformer that wait in the CPU's memory and come, as copies, when it is their turn."""

import dataclasses
import json
import signal
import weakref

import pytest
import torch
from conftest import picture
from training_runs import assert_same_weights, interrupt

import dreambooth_implementation as db

CPU = torch.device("cpu")
SMALL = ["--class_prompt", "a dog", "--resolution", 32, "--num_class_images", 2, "--num_inference_steps", 2, "--method", "lora",
         "--learning_rate", "1e-2"]
WAITING = ["--gradient_checkpointing", "--offload_blocks"]
ROW = db.Levers(gradient_checkpointing=True, split_batch=True, offload_blocks=True)


def late_run(model, levers, precision="no", **flags):
    """A Run of a LoRA's training on a late model's latents of two made-up pictures, each a photo or a class image."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    s, plan = db.Settings("train", method="lora", mixed_precision=precision, rank=2, max_grad_norm=0, **flags), db.Plan(CPU, precision)
    models, prompts = db.load_late(str(model), plan.dtype), ["a sks dog", "a dog"]
    models.book.learn(models, prompts, CPU)
    models = db.with_denoiser(models, plan.dtype, levers.base_precision, CPU if levers.offload_blocks else None)
    if levers.base_precision == "bf16":  # elsewhere in memory than a file's tensors are, which matrix products can tell in a last bit
        for weight in models.denoiser.parameters():
            weight.data = weight.data.clone()
    torch.manual_seed(0)
    recipe = dataclasses.replace(models.family.recipes["lora"], learning_rate=1e-2)
    groups = db.parameter_groups(s, models, [db.Subject("sks", "a dog", "a sks dog", "dog")], recipe)
    shape = models.family.latent_shape(models.pipeline, 32)
    latents = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    cache = db.LatentCache(latents, torch.full_like(latents, 0.1), torch.full((4, 6), 32.0), torch.tensor([0, 0, 1, 1]), prompts, [[0, 1]],
                           [[2, 3]])
    return db.prepare_training(s, db.Course(4, 32, precision, levers, "constant"), models, groups, cache, db.make_accelerator(s, plan), {})


def learnt(run, count=2):
    """(what so many steps measured, {name: trained tensor} after them), given that each of these has changed."""
    start = {name: tensor.clone() for name, tensor in db.trained_tensors(run.groups).items()}
    measured = torch.stack([db.train_step(run, step)[-1] for step in range(count)])
    end = {name: tensor.clone() for name, tensor in db.trained_tensors(run.groups).items()}
    assert sum(not torch.equal(start[name], end[name]) for name in end) > 0.8 * len(end)  # a last block may give nothing to the text
    return measured, end


def assert_same(one, other):
    """Of two results of learnt(), to the bit."""
    assert torch.equal(one[0], other[0]) and one[1].keys() == other[1].keys()
    assert all(torch.equal(tensor, other[1][name]) for name, tensor in one[1].items())


@pytest.mark.parametrize("family", ["z-image", "flux", "qwen-image", "sd3", "flux2-klein"])
@pytest.mark.parametrize("precision, base", [("no", "bf16"), ("bf16", "bf16"), ("bf16", "int8")])
def test_what_is_learnt_is_the_same_to_the_bit(family, precision, base, tiny_model):
    if base != "bf16":
        pytest.importorskip("torchao")
    assert_same(*(learnt(late_run(tiny_model(family), dataclasses.replace(ROW, offload_blocks=waits, base_precision=base), precision))
                  for waits in (False, True)))


def test_a_dora_is_the_same_too(tiny_model):
    assert_same(*(learnt(late_run(tiny_model("qwen-image"), dataclasses.replace(ROW, offload_blocks=waits), use_dora=True))
                  for waits in (False, True)))


class Counted:
    """Counts the blocks whose copies are alive, now and at most, as Turns fetches them."""

    def __init__(self, monkeypatch):
        self.alive, self.most, self.fetched, fetch = {}, 0, [], db.Turns.fetch

        def counting(turns, number):
            copies, arrival = fetch(turns, number)
            for copy in copies:
                weakref.finalize(copy, self.gone, number)
            self.alive[number] = self.alive.get(number, 0) + len(copies)
            self.fetched.append(number)
            self.most = max(self.most, self.blocks())
            return copies, arrival
        monkeypatch.setattr(db.Turns, "fetch", counting)

    def gone(self, number):
        self.alive[number] -= 1

    def blocks(self):
        return sum(count > 0 for count in self.alive.values())


def with_ahead(monkeypatch, ahead):
    """Have blocks be fetched ahead, as on a GPU, or not."""
    init = db.Turns.__init__
    monkeypatch.setattr(db, "side_stream", lambda device: None)
    monkeypatch.setattr(db.Turns, "__init__", lambda turns, blocks, device, ahead=ahead, given=ahead: init(turns, blocks, device, given))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("family, blocks", [("z-image", 4), ("flux", 4), ("qwen-image", 2), ("sd3", 2), ("flux2-klein", 2)])
def test_one_block_is_there_and_the_next_one(ahead, family, blocks, tiny_model, monkeypatch):
    with_ahead(monkeypatch, ahead)
    counted, run = Counted(monkeypatch), late_run(tiny_model(family), ROW)
    forward, after = run.denoiser, []

    def noting(*args):
        result = forward(*args)
        after.append(counted.blocks())
        return result
    monkeypatch.setattr(db.Run, "denoiser", lambda run, *args: noting(*args))
    db.train_step(run, 0)
    assert len(db.recomputed_blocks(run.models.denoiser)) == blocks
    assert after == [0] * 2 and counted.blocks() == 0  # of photos and class images: after the first pass, and after the second
    assert counted.most == 1 + (ahead and blocks > 1)
    every = list(range(blocks))
    if not ahead:  # the first block's input trains nothing, but its LoRA does
        assert counted.fetched == 2 * [*every, *reversed(every)]
    else:  # the last one of a first pass is fetched for the second again
        assert sorted(counted.fetched) == sorted(2 * [*every, *every])


def test_what_is_merged_or_stands_beside_goes_where_the_denoiser_goes(tiny_model):
    """The weights of blocks alone stay, and follow in precision."""
    denoiser = late_run(tiny_model("z-image"), ROW).models.denoiser
    own = [weight for block in db.recomputed_blocks(denoiser) for name, weight in block.named_parameters() if "lora_" not in name]
    denoiser.to("meta")
    assert all(weight.device == CPU for weight in own) and own
    others = {name: weight for name, weight in denoiser.named_parameters() if all(weight is not each for each in own)}
    assert all(weight.is_meta for weight in others.values()) and any("lora_" in name for name in others)
    denoiser.to(torch.bfloat16)
    assert all(weight.device == CPU and weight.dtype == torch.bfloat16 for weight in own)


@pytest.mark.parametrize("base", ["bf16", "int8"])
def test_weights_lie_in_pieces_that_are_locked(base, tiny_model, monkeypatch, capsys):
    if base == "int8":
        pytest.importorskip("torchao")
    pieces, shelf = [], db.Shelf(str(tiny_model("flux")), "", None)
    denoiser = shelf.read(shelf.denoiser, torch.bfloat16, **db.quantization(base, torch.bfloat16, shelf.hollow(torch.bfloat16)))
    waiting = [leaf for block in db.recomputed_blocks(denoiser) for weight in block.parameters() for leaf in db.leaves(weight)]
    before = [leaf.clone() for leaf in waiting]
    monkeypatch.setattr(db, "PIECE", 2**16)
    monkeypatch.setattr(db, "page_locked", lambda size: pieces.append(torch.empty(size, dtype=torch.uint8)) or pieces[-1])
    db.lock(waiting)
    assert len(pieces) > 1 and sum(map(len, pieces)) < 1.5 * sum(leaf.nbytes for leaf in waiting) + 512 * len(waiting)
    inside = [range(piece.data_ptr(), piece.data_ptr() + len(piece)) for piece in pieces]
    assert all(torch.equal(leaf, was) and any(leaf.data_ptr() in piece for piece in inside) for leaf, was in zip(waiting, before))
    assert len({leaf.data_ptr() for leaf in waiting}) == len(waiting) and all(leaf.data_ptr() % 4 == 0 for leaf in waiting)

    def full(size):
        raise RuntimeError("CUDA error: out of memory")
    monkeypatch.setattr(db, "page_locked", full)
    db.lock(waiting)
    assert all(map(torch.equal, waiting, before)) and "cannot be locked" in capsys.readouterr().out


def test_an_interrupted_training_goes_on_to_the_same_weights_and_draws(tiny_model, run, tmp_path, monkeypatch):
    """To the bit, on one thread, with samples on the way and class images."""
    (tmp_path / "photos").mkdir()
    picture(0, size=(32, 32)).save(tmp_path / "photos" / "0.png")
    flags = ["--train", "--model_name", tiny_model("z-image"), "--instance_data_dir", tmp_path / "photos", *SMALL, "--steps", 3, *WAITING,
             "--validation_steps", 2, "--validation_prompt", "a dog", "--num_validation_images", 1]
    assert run(*flags, "--output_dir", "whole")[0] == 0
    undo = interrupt(monkeypatch, 2, signal.SIGTERM)
    assert run(*flags)[0] == 128 + signal.SIGTERM
    undo()
    status, out, err = run(*flags, "--resume")
    assert status == 0 and "after step 2" in out and "wait in the CPU's memory" in out, err
    assert_same_weights(tmp_path / "output", tmp_path / "whole")
    assert json.loads((tmp_path / "output" / "dreambooth.json").read_text())["used"]["offload_blocks"]
    drawn = []
    for more in ([], ["--offload_blocks"]):
        status, out, err = run("--infer", "--model_path", "output", "--prompt", "a dog", "--num_images", 1, "--num_inference_steps", 2,
                               "--image_dir", f"drawn{len(drawn)}", *more)
        assert status == 0 and ("wait in the CPU's memory" in out) == bool(more), err
        drawn.append(next((tmp_path / f"drawn{len(drawn)}").glob("a-dog*.png")).read_bytes())
    assert drawn[0] == drawn[1]


def test_the_plan_has_blocks_wait_only_where_nothing_else_fits(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(db, "RESERVE", 0)
    monkeypatch.setattr(db, "missing_package", lambda levers: None)
    models, plan = db.load_late(str(tiny_model("qwen-image")), torch.bfloat16), db.Plan(CPU, "bf16")
    s, subjects = db.Settings("train", method="lora", mixed_precision="bf16", rank=2), [db.Subject("sks", "a dog", "a sks dog", "dog")]
    models, surveyed, ask = with_many_blocks(models), {}, db.survey
    monkeypatch.setattr(db, "survey", lambda *args: surveyed.get(args[6]) or surveyed.setdefault(args[6], ask(*args)))
    rows = db.plans(s, models.family, plan)
    assert [row.offload_blocks for row in rows] == [False] * (len(rows) - 2) + [True] * 2
    kept = {dataclasses.replace(ROW, base_precision=base, offload_blocks=waits) for base in ("bf16", "int8") for waits in (False, True)}
    monkeypatch.setattr(db, "PLANS", tuple(row for row in db.PLANS if row in kept))  # the others take time, too
    recipe, rows = models.family.recipes["lora"], db.plans(s, models.family, plan)
    demands = [db.survey(s, models, subjects, recipe, 32, plan, row, models.book.told["a sks dog"]) for row in rows]
    needs = [sum(db.estimate(demand, row).values()) for demand, row in zip(demands, rows)]
    assert needs[-1] < needs[-2] < min(needs[:-2]) and not any(demand.waiting for demand in demands[:-2])

    def choice(bytes_needed, **more):
        limited = dataclasses.replace(s, max_vram=repr(bytes_needed * (1 + 1e-9) / db.GIB), **more)
        return db.choose_levers(limited, models, subjects, recipe, 32, plan)
    assert choice(min(needs[:-2])).offload_blocks is False
    assert choice(needs[-2]) == rows[-2] and "--offload_blocks" in capsys.readouterr().out
    assert choice(needs[-1]) == rows[-1]
    assert choice(max(needs), offload_blocks=True).offload_blocks is True
    with pytest.raises(db.UserError, match="the most frugal plan takes"):
        choice(needs[-2], offload_blocks=False)
    monkeypatch.setattr(db, "cpu_memory", lambda: (demands[-1].waiting + demands[-2].waiting) / 2 / db.CPU_SHARE)
    assert choice(needs[-2]) == rows[-1]
    monkeypatch.setattr(db, "cpu_memory", lambda: demands[-1].waiting)
    with pytest.raises(db.UserError, match="--offload_blocks would have 0.0 GiB wait in the CPU's memory"):
        choice(needs[-2])


def with_many_blocks(models, count=8):
    """Late models whose denoiser, without memory, has more blocks."""
    with torch.device("meta"):
        denoiser = type(models.denoiser).from_config({**models.denoiser.config, "num_layers": count}).to(torch.bfloat16)
    models.pipeline.register_modules(transformer=denoiser.requires_grad_(False))
    models.book.learn(models, ["a sks dog"], CPU)
    return dataclasses.replace(models, denoiser=denoiser)


@pytest.mark.parametrize("flags, said", [
    (["--offload_blocks"], "give --gradient_checkpointing, too"), ([*WAITING, "--base_precision", "nf4"], "give int8 or bf16"),
    ([*WAITING, "--compile"], "leave out --compile"),
    ([*WAITING, "--method", "full"], "has no meaning with --method full")])
def test_what_does_not_go_with_it_is_one_line(flags, said, tiny_model, photos, run):
    status, _, err = run("--train", "--model_name", tiny_model("z-image"), "--instance_data_dir", photos, *SMALL, *flags)
    assert status == 2 and "--offload_blocks" in err and said in err and err.count("\n") == 1, err


@pytest.mark.parametrize("family, flags", [("sd1", []), ("flux", ["--train_text_encoder"])])
def test_blocks_of_what_is_never_without_its_text_encoder_do_not_wait(family, flags, tiny_model, photos, run):
    status, _, err = run("--train", "--model_name", tiny_model(family), "--instance_data_dir", photos, *SMALL, *WAITING, *flags)
    assert status == 2 and "--offload_blocks: for a LoRA of a transformer whose text encoders do not train" in err and err.count("\n") == 1
    status, _, err = run("--infer", "--model_path", tiny_model("sd1"), "--prompt", "a dog", "--offload_blocks")
    assert status == 2 and "--offload_blocks: for transformers that draw without" in err and err.count("\n") == 1


def test_several_processes_do_not_wait_for_blocks(monkeypatch):
    s, levers = db.Settings("train", method="lora"), ROW
    assert db.objection(s, db.ZImage(), levers, "bf16") is None
    assert "for one process alone" in db.objection(s, db.ZImage(), dataclasses.replace(levers, shard=True), "bf16")
    monkeypatch.setattr(db, "processes", lambda: 2)
    assert "for one process alone" in db.objection(s, db.ZImage(), levers, "bf16")


def test_copies_count_while_their_block_is_recomputed():
    """And not among what a layer has in hand: three times the largest activation."""
    events = ("kept", 5, None), ("copied", 100, 1), ("kept", 10, 1), ("kept", 4, None), ("copied", 60, 4), ("kept", 10, 4)
    assert db.peak_of(db.Demand(((4, 25),), 0, 1, events), ROW)["activations"] == 5 + 100 + 10 + 30

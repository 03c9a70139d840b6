"""Blocks of a frozen transformer that wait in the CPU's memory and come, as copies, when it is their turn."""

import dataclasses
import json
import signal
import weakref

import pytest
import torch
from conftest import picture
from tiny_families import TINY
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


def learnt(run, count=3):
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

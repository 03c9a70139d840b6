"""What a training needs memory for, counted on a model that has none."""

import pytest
import torch
from training_runs import survey, tiny_training

import dreambooth_implementation as db


@pytest.mark.parametrize("method, family, precision, checkpointing", [
    ("full", "sdxl", "no", False), ("full", "sdxl", "bf16", True), ("full", "sd1", "fp16", False),
    ("full", "sd1", "no", True)])
def test_activations_take_what_was_estimated(method, family, checkpointing, precision, tiny_model):
    """Against torch's own count of the tensors of a real forward and backward pass, at its peak."""
    from torch.distributed._tools.mem_tracker import MemTracker

    training = s, models, subjects, recipe, plan = tiny_training(tiny_model, method, family, precision, train_batch_size=3)
    levers = db.Levers(gradient_checkpointing=checkpointing)
    demand = survey(training, levers, resolution=128)
    groups = db.parameter_groups(s, models, subjects, recipe)
    for parameter in groups[0].parameters:
        parameter.requires_grad_(True)
    if checkpointing:
        db.set_checkpointing(models, groups)
    with torch.no_grad():
        told = models.family.encode(models, ["a dog"] * 6)
    batch = torch.randn(6, 4, 64, 64), torch.zeros(6, dtype=torch.long)
    tracker = MemTracker()
    tracker.track_external(models.denoiser)
    with tracker:
        with torch.autocast("cpu", plan.dtype, precision != "no", cache_enabled=False):
            out = models.family.predict(models, *batch, told, torch.zeros(6, 6))
        out.float().square().mean().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    real = peak - sum(t.nbytes for t in (*models.denoiser.parameters(), *models.denoiser.buffers()))
    assert sum(db.peak_of(demand, levers).values()) == pytest.approx(real, rel=0.1)


def test_on_cuda_autocast_normalizes_in_float32(tiny_model):
    for precision, levers in (("no", db.Levers()), ("fp16", db.Levers()), ("bf16", db.Levers(gradient_checkpointing=True))):
        training = tiny_training(tiny_model, "full", "sdxl", precision)
        cuda = *training[:-1], db.Plan(torch.device("cuda", 0), precision)
        cpu, cuda = survey(training, levers), survey(cuda, levers)
        kept = [sum(size for what, size, _ in d.events if what == "kept") for d in (cpu, cuda)]
        assert (cuda.trained, cuda.frozen) == (cpu.trained, cpu.frozen)
        assert kept[0] == kept[1] if precision == "no" else 1.1 * kept[0] < kept[1] < 2 * kept[0]

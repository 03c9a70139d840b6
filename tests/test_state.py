"""Every optimizer's state goes to a checkpoint and back."""

import pytest
import torch
from safetensors.torch import load_file
from training_runs import make_run, need, steps, trained

import dreambooth_implementation as db


@pytest.mark.parametrize("precision, levers", [
    ("no", db.Levers("adamw8bit")), ("no", db.Levers("adafactor")), ("no", db.Levers("prodigy")),
    ("no", db.Levers(fused_backward=True)), ("no", db.Levers(fused_backward=True, offload_optimizer=True)),
    ("bf16", db.Levers("adamw8bit", "bf16", fused_backward=True)), ("bf16", db.Levers("adamw", "bf16", fused_backward=True)),
    ("bf16", db.Levers("adafactor", "bf16", fused_backward=True)),
    ("bf16", db.Levers("adamw8bit", "bf16", fused_backward=True, offload_optimizer=True))], ids=str)
def test_every_optimizer_resumes_exactly(precision, levers, tiny_model, tmp_path):
    need(levers.optimizer)
    options = dict(precision=precision, levers=levers, optimizer=levers.optimizer, train_text_encoder=True)
    whole = make_run(tiny_model, **options)
    steps(whole, 0, 4)
    first = make_run(tiny_model, **options)
    steps(first, 0, 2)
    db.write_checkpoint(first, tmp_path)
    checkpoint, = (tmp_path / "checkpoints").iterdir()
    assert {p.suffix for p in checkpoint.iterdir()} == {".safetensors", ".json"}
    second = make_run(tiny_model, **options)
    db.load_checkpoint(second, checkpoint)
    half = trained(second)
    steps(second, 2, 4)
    expected = trained(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained(second).items())
    assert not any(torch.equal(tensor, half[name]) for name, tensor in expected.items() if tensor.ndim > 1)
    codes = [t for name, t in load_file(checkpoint / db.TENSORS_FILE).items() if name.endswith(".codes")]
    assert (levers.optimizer == "adamw8bit") == bool(codes) and all(t.dtype == torch.uint8 and t.any() for t in codes)

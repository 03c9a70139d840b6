"""The optimizers."""

import pytest
import torch
from training_runs import make_run, need, steps, trained

import dreambooth_implementation as db


def test_optimizers_differ(tiny_model):
    results = []
    for optimizer in db.OPTIMIZERS:
        need(optimizer)
        run = make_run(tiny_model, "lora", levers=db.Levers(optimizer), optimizer=optimizer)
        assert (run.groups[0].lr == 1.0) == (optimizer == "prodigy")
        steps(run, 0, 2)
        results.append(torch.cat([tensor.flatten() for tensor in trained(run).values()]))
    assert len({tuple(result.tolist()) for result in results}) == 4


@pytest.mark.parametrize("device, lacking, compiles, said", [
    ("cuda", None, True, "first step takes longer"), ("cuda", "triton", False, "needs triton"), ("cpu", None, False, "")])
def test_8_bit_adamw_is_compiled_where_it_can_be(device, lacking, compiles, said, monkeypatch, capsys):
    pytest.importorskip("torchao")
    monkeypatch.setattr(db, "missing_compiler", lambda device: lacking)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 1e-4}]
    optimizer = db.make_adamw8bit(groups, 0.0, torch.device(device))
    assert ("step" not in vars(optimizer)) == compiles
    assert said in capsys.readouterr().out

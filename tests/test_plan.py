"""The first plan that fits is taken, followed and recorded."""

import dataclasses
import json

import pytest
import torch
from training_runs import ALONE, need, survey, tiny_training

import dreambooth_implementation as db


@pytest.mark.parametrize("by_hand", [{}, {"optimizer": "adafactor", "split_batch": False}])
def test_the_first_plan_that_fits_is_taken(by_hand, tiny_model, capsys, monkeypatch):
    need("adamw8bit")
    monkeypatch.setattr(db, "RESERVE", 0)
    surveyed, ask = {}, db.survey
    monkeypatch.setattr(db, "survey", lambda *args: surveyed.get(args[6]) or surveyed.setdefault(args[6], ask(*args)))
    training = s, models, subjects, recipe, plan = tiny_training(tiny_model, precision="bf16", train_batch_size=2, **by_hand)
    rows = db.plans(s, db.StableDiffusion(), db.Plan(torch.device("cpu"), "bf16"))
    assert all(getattr(row, name) == value for row in rows for name, value in by_hand.items())
    assert by_hand or rows == [row for row in db.PLANS if row.base_precision == "bf16" and not (row.shard or row.offload_blocks)]
    needs = [sum(db.estimate(survey(training, row), row).values()) for row in rows]
    assert needs[0] > min(needs) and max(needs) < db.GIB
    for bytes_needed in needs:
        limit = dataclasses.replace(s, max_vram=repr(bytes_needed / db.GIB))
        taken = db.choose_levers(limit, models, subjects, recipe, 64, plan)
        first = next(other for other, n in zip(rows, needs) if n <= bytes_needed * (1 + 1e-12))
        assert taken == first
        line = capsys.readouterr().out
        assert line.startswith("Memory plan: ") and line.count("\n") == 1
        assert db.flags_of(first) in line and "weights 0.0" in line
    with pytest.raises(db.UserError, match="the most frugal plan takes .* more than there are"):
        db.choose_levers(dataclasses.replace(s, max_vram=repr(min(needs) / 2 / db.GIB)), models, subjects, recipe, 64, plan)


def test_plans_that_need_what_is_not_installed_come_last(tiny_model, capsys, monkeypatch):
    s, models, subjects, recipe, plan = tiny_training(tiny_model, precision="bf16")
    monkeypatch.setattr(db, "missing_package", lambda levers: "torchao" if levers.optimizer == "adamw8bit" else None)

    def sizes(demand, levers):
        return {"all": fits.get(levers.optimizer, 2) * db.GIB}
    monkeypatch.setattr(db, "estimate", sizes)
    s = dataclasses.replace(s, max_vram="1")
    fits = {"adamw8bit": 0.9, "adafactor": 0.8}
    assert db.choose_levers(s, models, subjects, recipe, 64, plan) == db.Levers(
        "adafactor", gradient_checkpointing=True, fused_backward=True)
    assert "--split_batch would do, too, but needs torchao: pip install torchao." in capsys.readouterr().out
    fits = {"adamw8bit": 0.9}
    with pytest.raises(db.UserError, match="adamw8bit needs torchao: pip install torchao"):
        db.choose_levers(s, models, subjects, recipe, 64, plan)


def test_what_cannot_fit_ends_before_anything_is_drawn(flags, run, tmp_path):
    status, _, err = run(*flags("full"), "--max_vram", 0.05)
    assert status == 2 and "--max_vram 0.05: the most frugal plan takes 0.3" in err and err.count("\n") == 1, err
    assert not (tmp_path / "class_images").exists() and not list(tmp_path.glob("output*"))


def test_a_plan_is_followed_and_recorded(flags, run, tmp_path, tiny_model):
    """0.33 GiB: beside the reserve of 0.3 too little for a plain step on pictures of 160 pixels."""
    status, out, err = run(*flags("full"), "--max_vram", 0.33, "--resolution", 160, "--steps", 1, *ALONE)
    assert status == 0, err
    line = next(line for line in out.splitlines() if line.startswith("Memory plan: "))
    used = json.loads((tmp_path / "output" / "dreambooth.json").read_text())["used"]
    assert used["gradient_checkpointing"] and "--gradient_checkpointing" in line and "of 0.33 GiB (weights" in line
    assert "Peak memory of training: " in out


def test_without_a_gpu_and_a_limit_nothing_is_planned(flags, run, monkeypatch):
    monkeypatch.setattr(db, "survey", lambda *args: pytest.fail("surveyed"))
    status, out, err = run(*flags("lora"), "--steps", 1, *ALONE)
    assert status == 0 and "Memory plan" not in out, err


def test_full_memory_names_the_next_plan(flags, run, monkeypatch, tmp_path):
    step = db.train_step

    def fail(state, number):
        if number == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(state, number)
    monkeypatch.setattr(db, "train_step", fail)
    status, _, err = run(*flags("full"), "--checkpointing_steps", 2, *ALONE, "--gradient_checkpointing")
    assert status == 2 and "try --gradient_checkpointing --split_batch" in err.splitlines()[-1], err
    assert "step-000002 is intact" in err and (tmp_path / "output.partial" / "checkpoints" / "step-000002").is_dir()

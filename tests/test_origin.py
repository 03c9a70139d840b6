"""A checkpoint of a training with other settings is refused."""

import pytest
from training_runs import interrupt

import dreambooth_implementation as db


def test_other_settings_are_refused(flags, run, tmp_path, monkeypatch, photos):
    undo = interrupt(monkeypatch, 3)
    assert run(*flags("lora"))[0] == 130
    undo()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "output.partial").rglob("*")}
    monkeypatch.setattr(db, "optimize", lambda *args: pytest.fail("trained"))
    status, _, err = run(*flags("lora"), "--resume", "--rank", 4, "--seed", 1, "--prior_loss_weight", 0.5)
    assert status == 2 and err.count("\n") == 1
    assert all(part in err for part in ("--rank (2, now 4)", "--seed (0, now 1)", "--prior_loss_weight (1.0, now 0.5)"))
    (photos / "1.txt").write_text("a [identifier] dog asleep")
    status, _, err = run(*flags("lora"), "--resume")
    assert status == 2 and "photos" in err, err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "output.partial").rglob("*")}.items() >= {
        path: at for path, at in before.items() if "checkpoints" in path.parts and path.is_file()}.items()


def test_another_optimizer_is_not_gone_on_with(flags, run, monkeypatch):
    undo = interrupt(monkeypatch, 2)
    assert run(*flags("lora"), "--optimizer", "adafactor")[0] == 130
    undo()
    status, _, err = run(*flags("lora"), "--resume")
    assert status == 2 and "the optimizer (adafactor, now adamw)" in err, err


def test_what_the_memory_decided_of_the_base_is_compared_and_not_its_flag():
    """Without --base_precision a run may take int8 where memory is short, and the next one bf16."""
    s = db.Settings("train", method="lora")
    bf16, int8 = (db.origin_of(s, db.Course(1, 32, "bf16", db.Levers(base_precision=bits)), [], "model", "photos", 1) for bits in ("bf16", "int8"))
    assert {key for key in bf16 if bf16[key] != int8[key]} == {"the base precision"}
    assert "--base_precision" not in bf16

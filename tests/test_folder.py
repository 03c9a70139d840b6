"""The output folder: whole or not there, and an earlier one is never lost."""

import re
import shutil

import pytest
from safetensors.torch import load_file
from training_runs import interrupt, steps_saved, weights

import dreambooth_implementation as db


def test_an_earlier_output_is_kept_unless_overwritten(train, tmp_path):
    assert train()[0] == 0
    (tmp_path / "output" / "mark").write_text("first")
    status, out, _ = train()
    assert status == 0 and "kept as output-1" in out
    assert (tmp_path / "output-1" / "mark").read_text() == "first" and not (tmp_path / "output" / "mark").exists()
    assert train("sd1", "--overwrite")[0] == 0
    assert sorted(p.name for p in tmp_path.glob("output*")) == ["output", "output-1"]


@pytest.mark.parametrize("broken", ["optimize", "save_output"])
def test_a_failing_run_leaves_the_earlier_output(broken, train, tmp_path, monkeypatch):
    assert train()[0] == 0
    (tmp_path / "output" / "mark").write_text("first")

    def fail(*args, **options):
        raise RuntimeError("power cut")

    monkeypatch.setattr(db, broken, fail)
    with pytest.raises(RuntimeError, match="power cut"):
        train("sd1", "--overwrite")
    assert (tmp_path / "output" / "mark").read_text() == "first"
    assert sorted(p.name for p in tmp_path.glob("output*")) == ["output"]


def test_an_output_that_cannot_be_renamed_is_not_lost(train, tmp_path, monkeypatch):
    from pathlib import Path

    assert train()[0] == 0
    (tmp_path / "output" / "mark").write_text("first")
    rename = Path.rename

    def fail(path, target):
        if "partial" in path.name:
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    status, _, err = train()
    kept = re.search(r"complete in (\S+)", err)[1]
    assert status == 2 and (Path(kept) / "dreambooth.json").exists()
    assert (tmp_path / "output" / "mark").read_text() == "first"


def test_without_resume_an_interrupted_training_is_kept(flags, run, tmp_path, monkeypatch):
    both = ["output.partial-1", "output.partial-2"]
    for more, kept in (([], both[:1]), ([], both), (["--overwrite"], both)):
        undo = interrupt(monkeypatch, 3)
        assert run(*flags("lora"))[0] == 130
        undo()
        status, out, _ = run(*flags("lora"), *more)
        assert status == 0 and "interrupted training of step-000003" in out
        assert sorted(p.name for p in tmp_path.glob("output.partial*")) == kept
    assert steps_saved(tmp_path / "output.partial-2") == [3]


def test_the_disk_is_measured_before_training(flags, run, tmp_path, monkeypatch):
    monkeypatch.setattr(db, "optimize", lambda *args: pytest.fail("trained"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    status, _, err = run(*flags("full"))
    assert status == 2 and re.search(r"--output_dir ./output: output and checkpoints need \d+\.\d GB", err)
    assert not list(tmp_path.glob("output*"))


@pytest.mark.parametrize("more", [[], ["--use_ema"], [
    "--optimizer", "adafactor", "--weights", "bf16", "--fused_backward", "--mixed_precision", "bf16"]], ids=" ".join)
def test_output_and_checkpoints_take_the_disk_that_was_expected(more, flags, run, tmp_path, monkeypatch):
    """To the byte of every tensor."""
    expected, ask = [], db.disk_sizes
    monkeypatch.setattr(db, "disk_sizes", lambda *args: expected.append(ask(*args)) or expected[-1])
    status, _, err = run(*flags("full"), *more, "--steps", 2, "--checkpointing_steps", 1)
    assert status == 0, err

    def size_of(paths):
        return sum(tensor.nbytes for path in paths for tensor in load_file(path).values())
    checkpoint = tmp_path / "output" / "checkpoints" / "step-000001"
    parts = [next((tmp_path / "output" / part).glob("*.safetensors")) for part in ("unet", "vae", "text_encoder")]
    assert [sizes[:2] for sizes in expected] == [(size_of(parts), size_of([checkpoint / db.TENSORS_FILE]))]


def test_two_trainings_do_not_share_an_output(flags, run, tmp_path):
    from filelock import FileLock

    (tmp_path / "output.partial").mkdir()
    with FileLock(tmp_path / "output.partial" / ".lock"):
        status, _, err = run(*flags("lora"))
    assert status == 2 and "another training is writing" in err and err.count("\n") == 1
    assert run(*flags("lora"))[0] == 0


def test_an_output_that_was_complete_gets_its_name_later(flags, run, tmp_path, monkeypatch):
    """Killed between the last byte and the renaming: the next command finishes it."""
    monkeypatch.setattr(db, "finish_renaming", lambda s: None)
    monkeypatch.setattr(db, "draw_samples", lambda *args: None)
    run(*flags("lora"))
    assert not (tmp_path / "output").exists() and (tmp_path / "output.partial" / "dreambooth.json").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*flags("lora"), "--resume")
    assert status == 0 and "complete already" in out, err
    assert weights(tmp_path / "output") and not (tmp_path / "output.partial").exists()

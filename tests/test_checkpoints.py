"""Checkpoints: what an interrupted training goes on from, to the very same weights."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
from conftest import FAMILIES
from training_runs import METHODS, STEPS, assert_same_weights, interrupt, steps_saved

import dreambooth_implementation as db


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(method, flags, run, tmp_path, monkeypatch):
    family = random.Random(method).choice(FAMILIES)
    options = flags(method, family, "--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine", "--lr_warmup_steps", 2)
    assert run(*options, "--output_dir", "whole")[0] == 0
    for step, number in ((1, signal.SIGINT), (5, signal.SIGTERM), (STEPS - 1, signal.SIGINT)):
        undo = interrupt(monkeypatch, step, number)
        status, out, err = run(*options, "--resume")
        undo()
        assert status == 128 + number, err
        assert err.splitlines()[-1].startswith(f"interrupted after step {step} of {STEPS}; ") and "--resume" in err
        assert steps_saved(tmp_path / "output.partial") == [step] and not (tmp_path / "output").exists()
    status, out, err = run(*options, "--resume")
    assert status == 0 and f"after step {STEPS - 1}" in out, err
    assert_same_weights(tmp_path / "output", tmp_path / "whole")
    whole, resumed = (json.loads((tmp_path / name / "dreambooth.json").read_text())["loss"] for name in ("whole", "output"))
    assert whole == resumed
    assert not (tmp_path / "output.partial").exists()


def test_checkpoints_come_regularly_and_the_newest_are_kept(flags, run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(*flags("lora"), "--checkpointing_steps", 2, "--checkpoints_total_limit", 3)[0] == 0
    assert steps_saved(tmp_path / "output") == [4, 6, 8]
    path = tmp_path / "output" / "checkpoints" / "step-000006"
    status, out, err = run(*flags("lora"), "--resume", path, "--output_dir", "again")
    assert status == 0 and "after step 6" in out, err
    assert_same_weights(tmp_path / "output", tmp_path / "again")
    log = EventAccumulator(str(tmp_path / "output" / "logs")).Reload()
    assert [event.step for event in log.Scalars("gradient_norm")] == list(range(1, STEPS + 1))
    assert all(event.value > 0 for event in log.Scalars("gradient_norm"))


def test_a_finished_training_is_not_repeated_but_can_be_prolonged(flags, run, tmp_path):
    options = [*flags("lora"), "--checkpointing_steps", 4]
    assert run(*options)[0] == 0
    status, out, _ = run(*options, "--resume")
    assert status == 0 and "complete already" in out and not (tmp_path / "output-1").exists()
    status, out, _ = run(*options, "--resume", "--steps", STEPS + 4)
    assert status == 0 and "after step 8 of 13" in out
    assert run(*options, "--steps", STEPS + 4, "--output_dir", "whole")[0] == 0
    assert_same_weights(tmp_path / "output", tmp_path / "whole")
    status, _, err = run(*options, "--steps", 5, "--resume", tmp_path / "output" / "checkpoints" / "step-000012")
    assert status == 2 and "--steps" in err


def test_damaged_checkpoints_are_passed_over(flags, run, tmp_path, monkeypatch):
    options = [*flags("lora"), "--checkpointing_steps", 2, "--checkpoints_total_limit", 9]
    assert run(*options, "--output_dir", "whole")[0] == 0
    undo = interrupt(monkeypatch, 8)
    assert run(*options)[0] == 130
    undo()
    folder = tmp_path / "output.partial" / "checkpoints"
    with open(folder / "step-000008" / db.TENSORS_FILE, "r+b") as file:  # one byte differs
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    (folder / "step-000006" / db.STATE_FILE).write_text('{"sha256": ')
    (folder / "step-000004" / db.TENSORS_FILE).unlink()
    (folder / ".step-000010.new").mkdir()  # left by a kill
    status, out, err = run(*options, "--resume")
    assert status == 0, err
    assert all(f"Skipped the checkpoint output.partial/checkpoints/step-00000{n}" in out for n in (8, 6, 4))
    assert "after step 2" in out
    assert_same_weights(tmp_path / "output", tmp_path / "whole")
    status, _, err = run(*options, "--resume", folder)
    assert status == 2 and "missing or damaged" in err and err.count("\n") == 1


def test_resume_with_nothing_to_resume_begins_at_the_beginning(flags, run, tmp_path):
    status, out, _ = run(*flags("textual_inversion"), "--resume")
    assert status == 0 and "starting at the beginning" in out and (tmp_path / "output" / "dreambooth.json").exists()


@pytest.mark.parametrize("where", ["checkpoint", "output"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(where, flags, run, tmp_path, monkeypatch):
    import safetensors.torch

    assert run(*flags("lora"))[0] == 0
    (tmp_path / "output" / "mark").write_text("first")
    save_file, written = safetensors.torch.save_file, []

    def full(tensors, path, *rest, **options):
        if len(written) == {"checkpoint": 1, "output": 4}[where]:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path, *rest, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    status, _, err = run(*flags("lora"), "--checkpointing_steps", 2)
    assert status == 2 and err.splitlines()[-1].startswith("error: the disk is full"), err
    assert (tmp_path / "output" / "mark").read_text() == "first"
    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    status, out, err = run(*flags("lora"), "--checkpointing_steps", 2, "--resume")
    assert status == 0 and f"after step {2 if where == 'checkpoint' else 8}" in out, err
    assert_same_weights(tmp_path / "output", tmp_path / "output-1")

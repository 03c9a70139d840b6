"""Nothing is lost: checkpoints, exact resume, signals, kills, full disks, weights that are no longer numbers."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import killed
import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file

import dreambooth_implementation as db

STEPS = 9
METHODS = {"full": ["--train_text_encoder"], "lora": ["--rank", "2", "--train_text_encoder", "--use_dora"],
           "textual_inversion": ["--num_vectors", "2"], "pivotal": ["--embedding_frac", "0.4", "--use_ema"]}


@pytest.fixture
def flags(tiny_model, photos):
    """flags(method, family="sd1", ...) -> the flags of a short training."""
    def make(method, family="sd1", *more):
        return ["--train", "--model_name", tiny_model(family), "--instance_data_dir", photos, "--class_prompt", "a dog",
                "--num_class_images", 2, "--num_inference_steps", 1, "--steps", STEPS, "--method", method, *METHODS[method],
                *more]

    return make


def weights(folder):
    """{"file/tensor": value} of what was saved in `folder`, checkpoints aside."""
    files = [path for path in sorted(folder.rglob("*.safetensors")) if "checkpoints" not in path.parts]
    assert files
    return {f"{path.relative_to(folder)}/{name}": tensor for path in files for name, tensor in load_file(path).items()}


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different[:3]


def interrupt(monkeypatch, step, number=signal.SIGINT):
    """Send this process a signal in the middle of that step, once."""
    train_step = db.train_step

    def interrupted(run, index):
        if index + 1 == step:
            os.kill(os.getpid(), number)
        return train_step(run, index)

    monkeypatch.setattr(db, "train_step", interrupted)
    return lambda: monkeypatch.setattr(db, "train_step", train_step)


def steps_saved(folder):
    return [int(path.name.removeprefix("step-")) for path in db.checkpoints_in(folder)]


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


def test_a_second_signal_stops_at_once(flags, run, tmp_path, monkeypatch):
    monkeypatch.setattr(db, "train_step", lambda *args: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])
    status, _, err = run(*flags("lora"))
    assert status == 143 and err.splitlines()[-1].startswith("terminated")
    assert not list(tmp_path.glob("output*"))


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


def test_resume_with_nothing_to_resume_begins_at_the_beginning(flags, run, tmp_path):
    status, out, _ = run(*flags("textual_inversion"), "--resume")
    assert status == 0 and "starting at the beginning" in out and (tmp_path / "output" / "dreambooth.json").exists()


def test_what_is_not_finite_is_never_saved(flags, run, tmp_path, monkeypatch):
    """NaN from some step on, first in the loss, then in the gradient alone, then in the weights alone."""
    train_step = db.train_step

    def poisoned(what):
        def step(state, index):
            measured = train_step(state, index)
            if index == 5 and what == "weights":
                state.groups[0].parameters[0].data.view(-1)[0] = float("inf")
            elif index == 5:
                measured[0][{"loss": 0, "gradient": 2}[what]] = float("nan")
            return measured
        return step

    for what, message in (("loss", "instance loss is nan at step 6"), ("gradient", "gradient norm is nan at step 6"),
                          ("weights", "no longer finite")):
        monkeypatch.setattr(db, "train_step", poisoned(what))
        status, _, err = run(*flags("full"), "--checkpointing_steps", 3, "--output_dir", what, "--steps", 6 + (what != "weights"))
        assert status == 2 and message in err and "--learning_rate" in err, err
        assert (what == "weights") or f"{what}.partial/checkpoints/step-000003" in err
        assert not (tmp_path / what).exists() and steps_saved(tmp_path / f"{what}.partial") == [3]
        saved = load_file(tmp_path / f"{what}.partial" / "checkpoints" / "step-000003" / db.TENSORS_FILE)
        assert all(tensor.isfinite().all() for tensor in saved.values())


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


@pytest.mark.parametrize("method", METHODS)
def test_kills_at_any_moment(method, flags, tmp_path):
    """20 kills through class images, training, checkpoints and saving: each time --resume goes on, to the very same weights."""
    options = [*flags(method), "--checkpointing_steps", 2, "--checkpoints_total_limit", 2]
    (whole := tmp_path / "whole").mkdir()
    assert (process := killed.start(whole, *options)).join() is None and process.exitcode == 0, (whole / "log.txt").read_text()
    started = time.monotonic()
    shutil.rmtree(whole / "class_images", ignore_errors=True)
    killed.start(whole, *options).join()
    seconds = time.monotonic() - started

    (folder := tmp_path / "killed").mkdir()
    chance, kills, reached = random.Random(method), 0, set()
    while kills < 20:
        before = steps_saved(folder / "output.partial")
        process = killed.start(folder, *options, "--resume")
        if kills % 2:  # at any time at all
            process.join(chance.uniform(0.1, 1.1) * seconds)
        else:  # soon after the next checkpoint, or in the middle of the one after that
            while process.is_alive() and steps_saved(folder / "output.partial") in (before, []):
                time.sleep(0.002)
            process.join(chance.uniform(0, 0.05))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            reached |= set(steps_saved(folder / "output.partial"))
        else:
            assert process.exitcode == 0, (folder / "log.txt").read_text()[-2000:]
        if (folder / "output").exists():
            assert_same_weights(folder / "output", whole / "output")
            shutil.rmtree(folder / "output")
            shutil.rmtree(folder / "class_images", ignore_errors=True)
            shutil.rmtree(folder / "output.partial", ignore_errors=True)
    (last := killed.start(folder, *options, "--resume")).join()
    assert last.exitcode == 0, (folder / "log.txt").read_text()[-2000:]
    assert_same_weights(folder / "output", whole / "output")
    assert len(reached) > 1, "no kills came between checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["class_images", "log.txt", "output"] or method == "textual_inversion"


def test_a_loop_of_killed_trainings_needs_no_hand(flags, tmp_path):
    """30 trainings one after the other in one folder, most of them killed, none of them told that another came before."""
    chance, kills = random.Random(0), 0
    options = [*flags("lora"), "--checkpointing_steps", 3]
    for seed in range(30):
        process = killed.start(tmp_path, *options, "--seed", seed, *(["--resume"] if seed % 5 == 4 else []),
                               *(["--overwrite"] if seed % 3 == 2 else []))
        process.join(chance.uniform(0.1, 4))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:  # --resume of another seed's checkpoint is refused, in one line
            assert process.exitcode == 0 or seed % 5 == 4, (tmp_path / "log.txt").read_text()[-2000:]
    assert kills >= 10
    (last := killed.start(tmp_path, *options)).join()
    assert last.exitcode == 0 and "Traceback" not in (tmp_path / "log.txt").read_text()
    assert weights(tmp_path / "output") and not (tmp_path / "output.partial").exists()

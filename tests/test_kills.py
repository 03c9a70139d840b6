"""Kills at any moment lose nothing."""

import itertools
import random
import shutil
import time

import forked
import pytest
from training_runs import METHODS, assert_same_weights, steps_saved, weights


def seconds_of(folder, *options):
    """How long a training takes that nobody kills, in an empty folder."""
    folder.mkdir()
    started = time.monotonic()
    status, said = forked.program(folder, *options)
    assert status == 0, said
    return time.monotonic() - started


@pytest.mark.long
@pytest.mark.parametrize("method, kills", [
    ("pivotal", 3), *(pytest.param(method, 20, marks=pytest.mark.slow) for method in METHODS)])
def test_kills_at_any_moment(method, kills, flags, tmp_path):
    """Through class images, training, checkpoints and saving: each time --resume goes on, to the very same weights."""
    options = [*flags(method), "--checkpointing_steps", 2, "--checkpoints_total_limit", 2]
    seconds_of(tmp_path / "first", *options)  # with what starts only once
    seconds = seconds_of(whole := tmp_path / "whole", *options)

    (folder := tmp_path / "killed").mkdir()
    chance, wanted, kills, reached = random.Random(method), kills, 0, set()
    while kills < wanted:
        before = steps_saved(folder / "output.partial")
        process = forked.start(folder, *options, "--resume")
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
            assert process.exitcode == 0, (folder / forked.LOG).read_text()[-2000:]
        if (folder / "output").exists():
            assert_same_weights(folder / "output", whole / "output")
            shutil.rmtree(folder / "output")
            shutil.rmtree(folder / "class_images", ignore_errors=True)
            shutil.rmtree(folder / "output.partial", ignore_errors=True)
    status, said = forked.program(folder, *options, "--resume")
    assert status == 0, said[-2000:]
    assert_same_weights(folder / "output", whole / "output")
    assert len(reached) > (wanted > 10), "no kills came between checkpoints"
    left = {path.name for path in folder.iterdir()} - {"class_images"}  # which textual inversion does without
    assert left == {forked.LOG, "output"}


@pytest.mark.long
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_loop_of_killed_trainings_needs_no_hand(kills, flags, tmp_path):
    """One after the other in one folder, most of them killed, none of them told that another came before."""
    chance, wanted, kills = random.Random(0), kills, 0
    options = [*flags("lora"), "--checkpointing_steps", 3]
    seconds = seconds_of(tmp_path / "whole", *options)
    (folder := tmp_path / "killed").mkdir()
    for seed in itertools.count():
        resumes = seed % 3 == 1
        process = forked.start(folder, *options, "--seed", seed, *(["--resume"] if resumes else []),
                               *(["--overwrite"] if seed % 4 == 2 else []))
        process.join(chance.uniform(0.1, 1.1) * seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:  # --resume of another seed's checkpoint is refused, in one line
            assert process.exitcode == 0 or resumes, (folder / forked.LOG).read_text()[-2000:]
        if kills >= wanted and seed > 2:
            break
    status, said = forked.program(folder, *options)
    assert status == 0 and "Traceback" not in said, said
    assert weights(folder / "output") and not (folder / "output.partial").exists()

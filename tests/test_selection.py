"""--select_best keeps what scored best."""

import json
import os
import signal

import pytest
import torch
from training_runs import METHODS, assert_same_weights

import dreambooth_implementation as db


def scores(monkeypatch, *values):
    """Have the samples score these values, one after the other; the step tells which."""
    score = db.score_samples

    def scored(viewer, pictures, seed):
        assert 0 <= score(viewer, pictures, seed)["score"] <= 1
        rest.append(rest.pop(0))
        return {"dino": rest[-1], "clip_t": rest[-1], "score": rest[-1]}
    rest = list(values)
    monkeypatch.setattr(db, "score_samples", scored)


# What --select_best makes of a full training of a small model.
AS_SELECTING = ["--lr_scheduler", "constant", "--use_ema"]


@pytest.mark.parametrize("method", METHODS)
def test_the_best_weights_are_the_output(method, train_scored, tmp_path, monkeypatch):
    both = ["--lr_scheduler", "constant"] if method == "textual_inversion" else []  # whose rate falls with the steps otherwise
    same = AS_SELECTING if method == "full" else both
    assert train_scored(method, "--steps", 4, "--output_dir", "four", *same)[0] == 0
    scores(monkeypatch, 0.3, 0.8, 0.79, 0.5)
    status, out, err = train_scored(method, "--steps", 8, "--validation_steps", 2, "--select_best", "--embedding_frac" if
                             method == "pivotal" else "--seed", 1 if method == "pivotal" else 0, *both)
    assert status == 0, err
    if method != "pivotal":  # there the words' part of the run is longer with more steps
        assert_same_weights(tmp_path / "four", tmp_path / "output")
    words = [line.split(maxsplit=4)[4] for line in out.splitlines() if line.split()[:1] and line.split()[0] in "2468"]
    assert words == ["too few steps", "best, kept", "good", "overfitted"], out
    assert json.loads((tmp_path / "output" / "dreambooth.json").read_text())["used"]["selected_step"] == 4
    assert not list((tmp_path / "output").glob("checkpoints/*"))


@pytest.mark.parametrize("values, best", [((0.3, 0.8, 0.2, 0.5), 4), ((0.3, 0.2, 0.8, 0.5), 6), ((0.9, 0.1, 0.2, 0.3), 2)])
def test_the_best_survives_an_interruption(values, best, train_scored, tmp_path, monkeypatch):
    """Whether the best came before the checkpoint that training goes on from, or after it and before the kill."""
    assert train_scored("full", "--steps", best, "--output_dir", "whole", *AS_SELECTING)[0] == 0
    flags = ["--steps", 8, "--validation_steps", 2, "--select_best", "--checkpointing_steps", 3]
    train_step = db.train_step

    def killed(run, index):
        if index == 6:  # after the scores of step 6, whose checkpoint is lost
            raise RuntimeError("killed")
        return train_step(run, index)
    scores(monkeypatch, *values)
    monkeypatch.setattr(db, "train_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train_scored("full", *flags)
    import shutil
    for path in db.checkpoints_in(tmp_path / "output.partial")[-1:]:
        shutil.rmtree(path)
    assert not db.checkpoints_in(tmp_path / "output.partial")
    monkeypatch.setattr(db, "train_step", train_step)
    scores(monkeypatch, *values)
    assert train_scored("full", *flags, "--resume")[0] == 0  # from the beginning: what is left from before must not disturb
    assert_same_weights(tmp_path / "whole", tmp_path / "output")

    def interrupted(run, index):
        if index == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(run, index)
    scores(monkeypatch, *values[:2])
    monkeypatch.setattr(db, "train_step", interrupted)
    assert train_scored("full", *flags, "--overwrite")[0] == 130
    monkeypatch.setattr(db, "train_step", train_step)
    scores(monkeypatch, *values[2:])
    status, out, err = train_scored("full", *flags, "--overwrite", "--resume")
    assert status == 0 and "after step 5" in out, err
    assert_same_weights(tmp_path / "whole", tmp_path / "output")


def test_the_best_comes_along_from_a_training_elsewhere(train_scored, tmp_path, monkeypatch):
    """The best of the steps before the checkpoint lies in the folder that is gone on from."""
    assert train_scored("full", "--steps", 2, "--output_dir", "whole", *AS_SELECTING)[0] == 0
    flags, train_step = ["--steps", 6, "--validation_steps", 2, "--select_best"], db.train_step

    def interrupted(run, index):
        if index == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(run, index)
    scores(monkeypatch, 0.9, 0.2)
    monkeypatch.setattr(db, "train_step", interrupted)
    assert train_scored("full", *flags)[0] == 130
    monkeypatch.setattr(db, "train_step", train_step)
    (tmp_path / "output.partial").rename(tmp_path / "elsewhere")
    scores(monkeypatch, 0.3)
    status, out, err = train_scored("full", *flags, "--resume", tmp_path / "elsewhere" / "checkpoints" / "step-000005")
    assert status == 0 and "after step 5" in out, err
    assert_same_weights(tmp_path / "whole", tmp_path / "output")
    assert len(db.best_files(tmp_path / "elsewhere")) == 1 and not list((tmp_path / "output").glob("checkpoints/best*"))


def test_scores_are_means_over_subjects_of_means_over_prompts():
    class Fixed:
        def images(self, pictures):
            return torch.stack([torch.tensor(p[0]) for p in pictures]), torch.stack([torch.tensor(p[1]) for p in pictures])

        def texts(self, prompts):
            return torch.tensor([[1.0, 0.0]])
    viewer = db.Viewer((), 8, 1, Fixed(), (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])),
                       ((0, "p", "c"), (0, "q", "c"), (1, "r", "c")))
    x, y = [1.0, 0.0], [0.0, 1.0]
    pictures = {(prompt, 5 + i): (dino, clip) for i in range(4)
                for prompt, dino, clip in (("p", x, x), ("q", y, x), ("r", y, y))}
    assert db.score_samples(viewer, pictures, 5) == {"dino": 0.75, "clip_t": 0.5, "score": pytest.approx(0.6)}

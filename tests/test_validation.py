"""Samples on the way change nothing, and --select_best keeps what scored best."""

import json
import os
import signal

import pytest
import torch
from PIL import Image
from test_resume import assert_same_weights

import dreambooth_implementation as db

METHODS = {"full": ["--train_text_encoder"], "textual_inversion": ["--num_vectors", "2"], "pivotal": ["--rank", "2"]}


@pytest.fixture
def train(run, tiny_model, photos, networks):
    def call(method, *flags, family="sd1"):
        best = ["--dino_model", networks / "vit", "--clip_model", networks / "clip"] if "--select_best" in flags else []
        return run("--train", "--model_name", tiny_model(family), "--instance_data_dir", photos, "--class_prompt", "a dog",
                   "--num_class_images", 2, "--num_inference_steps", 1, "--method", method, *METHODS[method], *best, *flags)

    return call


@pytest.mark.parametrize("method, saves", [*((method, []) for method in METHODS), ("full", ["--fused_backward", "--use_ema"]),
                                           ("pivotal", ["--gradient_checkpointing"])])
def test_drawing_on_the_way_changes_nothing(method, saves, train, tmp_path):
    """Not even where memory is saved, and the parts of the model take turns to draw."""
    assert train(method, "--steps", 5, "--output_dir", "blind", *saves, family="sdxl")[0] == 0
    status, _, err = train(method, "--steps", 5, "--validation_steps", 2, "--validation_prompt", "a [identifier] dog", *saves,
                           family="sdxl")
    assert status == 0, err
    assert_same_weights(tmp_path / "blind", tmp_path / "output")
    samples = tmp_path / "output" / "samples"
    assert sorted(p.name for p in samples.glob("step-*")) == ["step-000002", "step-000004", "step-000005"]
    assert Image.open(samples / "timeline.png").size == (60 + 4 * 34, 3 * 34)
    at = [next((samples / f"step-00000{step}").glob("*.png")).read_bytes() for step in (2, 5)]
    assert at[0] != at[1]  # the weights in between were drawn with
    # the last row of the timeline is what the output itself draws
    final = sorted((samples / "step-000005").glob("*.png"))[0]
    again = next(p for p in samples.glob("a-*-0.png"))
    assert Image.open(final).convert("RGB").tobytes() == Image.open(again).convert("RGB").tobytes()


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
def test_the_best_weights_are_the_output(method, train, tmp_path, monkeypatch):
    same = AS_SELECTING if method == "full" else []
    assert train(method, "--steps", 4, "--output_dir", "four", *same)[0] == 0
    scores(monkeypatch, 0.3, 0.8, 0.79, 0.5)
    status, out, err = train(method, "--steps", 8, "--validation_steps", 2, "--select_best", "--embedding_frac" if
                             method == "pivotal" else "--seed", 1 if method == "pivotal" else 0)
    assert status == 0, err
    if method != "pivotal":  # there the words' part of the run is longer with more steps
        assert_same_weights(tmp_path / "four", tmp_path / "output")
    words = [line.split(maxsplit=4)[4] for line in out.splitlines() if line.split()[:1] and line.split()[0] in "2468"]
    assert words == ["too few steps", "best, kept", "good", "overfitted"], out
    assert json.loads((tmp_path / "output" / "dreambooth.json").read_text())["used"]["selected_step"] == 4
    assert not list((tmp_path / "output").glob("checkpoints/*"))


@pytest.mark.parametrize("values, best", [((0.3, 0.8, 0.2, 0.5), 4), ((0.3, 0.2, 0.8, 0.5), 6), ((0.9, 0.1, 0.2, 0.3), 2)])
def test_the_best_survives_an_interruption(values, best, train, tmp_path, monkeypatch):
    """Whether the best came before the checkpoint that training goes on from, or after it and before the kill."""
    assert train("full", "--steps", best, "--output_dir", "whole", *AS_SELECTING)[0] == 0
    flags = ["--steps", 8, "--validation_steps", 2, "--select_best", "--checkpointing_steps", 3]
    train_step = db.train_step

    def killed(run, index):
        if index == 6:  # after the scores of step 6, whose checkpoint is lost
            raise RuntimeError("killed")
        return train_step(run, index)
    scores(monkeypatch, *values)
    monkeypatch.setattr(db, "train_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train("full", *flags)
    import shutil
    for path in db.checkpoints_in(tmp_path / "output.partial")[-1:]:
        shutil.rmtree(path)
    assert not db.checkpoints_in(tmp_path / "output.partial")
    monkeypatch.setattr(db, "train_step", train_step)
    scores(monkeypatch, *values)
    assert train("full", *flags, "--resume")[0] == 0  # from the beginning: what is left over from before must not disturb
    assert_same_weights(tmp_path / "whole", tmp_path / "output")

    def interrupted(run, index):
        if index == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(run, index)
    scores(monkeypatch, *values[:2])
    monkeypatch.setattr(db, "train_step", interrupted)
    assert train("full", *flags, "--overwrite")[0] == 130
    monkeypatch.setattr(db, "train_step", train_step)
    scores(monkeypatch, *values[2:])
    status, out, err = train("full", *flags, "--overwrite", "--resume")
    assert status == 0 and "after step 5" in out, err
    assert_same_weights(tmp_path / "whole", tmp_path / "output")


def test_harmonic_mean_wants_both():
    assert db.harmonic_mean(0.6, 0.3) == pytest.approx(0.4)
    assert db.harmonic_mean(0.9, 0.0) == db.harmonic_mean(-0.1, 0.9) == 0.0
    rows = [{"step": 2, "score": 0.5}, {"step": 4, "score": 0.5}, {"step": 6, "score": 0.4}]
    assert db.best_of(rows)["step"] == 2


def test_scores_are_means_over_subjects_of_means_over_prompts():
    class Fixed:
        def images(self, pictures):
            return torch.stack([torch.tensor(p[0]) for p in pictures]), torch.stack([torch.tensor(p[1]) for p in pictures])

        def texts(self, prompts):
            return torch.tensor([[1.0, 0.0]])
    viewer = db.Viewer((), 8, 1, Fixed(), (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])),
                       ((0, "p", "c"), (0, "q", "c"), (1, "r", "c")))
    x, y = [1.0, 0.0], [0.0, 1.0]
    pictures = {(prompt, 5 + i): (dino, clip) for prompt, dino, clip in (("p", x, x), ("q", y, x), ("r", y, y)) for i in range(4)}
    assert db.score_samples(viewer, pictures, 5) == {"dino": 0.75, "clip_t": 0.5, "score": pytest.approx(0.6)}


@pytest.mark.parametrize("flags, said", [
    (["--select_best", "--validation_prompt", "a dog"], "--validation_prompt"),
    (["--validation_prompt", "a [identifier:tom] dog"], "[identifier:tom]"),
    (["--validation_steps", 0], "--validation_steps 0"),
])
def test_prompts_that_cannot_be_used_are_refused_before_training(flags, said, train, monkeypatch):
    monkeypatch.setattr(db, "optimize", lambda *args: pytest.fail("trained"))
    status, _, err = train("full", "--steps", 2, *flags)
    assert status == 2 and said in err.splitlines()[-1], err

"""Pictures that the untouched model begins."""

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import FAMILIES, build_pipeline
from PIL import Image
from tiny_families import TINY

import dreambooth_implementation as db

DOG = db.Subject("sks", "a dog", "a sks dog", "dog")
JOBS = [("a sks dog at night", 3), ("a red dog", 4)]
PLAIN = [("a dog at night", 3), ("a red dog", 4)]


def whole(family, seed=0):
    """A tiny pipeline as load_pipeline() gives it: nothing in it is left to chance."""
    pipeline = build_pipeline(family, seed)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline


def drawn(pipeline, jobs, start=None, steps=4):
    """Pixels of the pictures, all in one batch."""
    look = dict(steps=steps, guidance_scale=3.0, height=32, width=32, batch_size=2)
    return np.stack([np.asarray(picture) for picture in db.draw(pipeline, jobs, start=start, **look)])


@contextlib.contextmanager
def counted(*denoisers):
    """Within the block, a list of how often each denoiser has computed."""
    counts, own = [0] * len(denoisers), [denoiser.forward for denoiser in denoisers]

    def counting(number):
        def forward(*given, **named):
            counts[number] += 1
            return own[number](*given, **named)
        return forward
    for number, denoiser in enumerate(denoisers):
        denoiser.forward = counting(number)
    yield counts


@pytest.mark.parametrize("family", (*FAMILIES, *TINY))
def test_the_untouched_model_takes_the_first_steps(family):
    trained, untouched, other = (whole(family, seed) for seed in (0, 0, 1))
    denoiser_of = db.family_of(trained).denoiser_of
    denoiser_of(trained).load_state_dict(denoiser_of(other).state_dict())
    with counted(denoiser_of(trained), denoiser_of(untouched)) as counts:
        own, its = drawn(trained, JOBS), drawn(untouched, PLAIN)
        alone = list(counts)
        assert np.array_equal(own, drawn(trained, JOBS, db.Start(0.0, untouched, (DOG,))))
        assert np.array_equal(own, drawn(trained, JOBS, db.Start(0.1, untouched, (DOG,))))  # no whole step
        counts[:] = 0, 0
        assert np.array_equal(its, drawn(trained, JOBS, db.Start(1.0, untouched, (DOG,))))
        assert counts == [0, alone[1]]
        counts[:] = 0, 0
        half = drawn(trained, JOBS, db.Start(0.5, untouched, (DOG,)))
        assert sum(counts) == alone[0] and 0 < counts[1] <= counts[0]  # no step twice
    assert not np.array_equal(half, own) and not np.array_equal(half, its)
    assert np.array_equal(own, drawn(trained, JOBS))  # nothing of it is left


def test_steps_in_two_parts_are_the_same_steps():
    """Begun by the very model that ends them, pictures are what they would be."""
    pipeline = whole("sd2")
    assert np.array_equal(drawn(pipeline, PLAIN), drawn(pipeline, PLAIN, db.Start(0.5, whole("sd2"), (DOG,))))


@pytest.mark.parametrize("prompt, plain", [
    ("a sks dog on the moon", "a dog on the moon"), ("a red sks dog", "a red dog"), ("a SKS, big", "a dog, big"),
    ("photo of a sks at night", "photo of a dog at night"), ("a dog", "a dog"), ("a sksdog", "a sksdog")])
def test_prompts_without_the_subjects_word(prompt, plain):
    assert db.Start(0.5, None, (DOG,)).plain(prompt) == plain


def test_other_nouns_and_several_subjects():
    subjects = (db.Subject("sks", "an owl", ""), db.Subject("ohwx", "glasses", ""), db.Subject("style", "", ""))
    plain = db.Start(0.5, None, subjects).plain
    assert plain("a sks owl with a ohwx glasses, style") == "an owl with glasses, "


@pytest.mark.parametrize("method, more", [("full", []), ("lora", []), ("lora", ["--adapter_type", "lokr"]), ("textual_inversion", [])])
def test_a_training_is_drawn_with_its_base(train_adapter, train, run, tiny_model, tmp_path, method, more):
    train("sd1", "--learning_rate", "0.01") if method == "full" else train_adapter("sd1", method, *more)
    draw = ["--infer", "--num_images", 1, "--num_inference_steps", 4, "--sample_batch_size", 1]

    def picture(prompt, name, *flags):
        status, _, err = run(*draw, "--prompt", prompt, "--image_dir", name, *flags)
        assert status == 0, err
        (path,) = [path for path in (tmp_path / name).iterdir() if not path.name.startswith("grid")]
        return Image.open(path)
    word = json.loads((tmp_path / "output" / "dreambooth.json").read_text())["subjects"][0]["identifier"]
    shown = f"a {word} at night" if method == "textual_inversion" else f"a {word} dog at night"
    usual, none, half, whole = (picture(shown, name, *flags) for name, flags in (
        ("usual", []), ("none", ["--subject_start", 0]), ("half", ["--subject_start", 0.5]), ("whole", ["--subject_start", 1])))
    untouched = picture("a dog at night", "untouched", "--model_path", tiny_model("sd1"))
    assert usual.tobytes() == none.tobytes() and whole.tobytes() == untouched.tobytes()
    assert half.tobytes() not in (usual.tobytes(), whole.tobytes())
    assert "Subject start: 0.5" in half.info["parameters"] and "Subject start" not in usual.info["parameters"]


def test_a_base_that_is_gone_or_another_now(train, run, tiny_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model("sd1"), base)
    assert train("sd1", "--model_name", base)[0] == 0
    draw = ["--infer", "--prompt", "a dog", "--num_images", 1, "--num_inference_steps", 2]
    assert run(*draw, "--subject_start", 0.5)[0] == 0
    shutil.rmtree(base)
    shutil.copytree(tiny_model("sd1", seed=1), base)
    status, _, err = run(*draw, "--subject_start", 0.5)
    assert status == 2 and str(base) in err and "other weights" in err and len(err.splitlines()) == 1
    shutil.rmtree(base)
    status, _, err = run(*draw, "--subject_start", 0.5)
    assert status == 2 and str(base) in err and "--subject_start 0" in err and len(err.splitlines()) == 1
    assert run(*draw)[0] == 0


def test_where_nobody_asked_for_it_a_lost_base_is_said(train, run, tiny_model, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(tiny_model("sd1"), base)
    assert train("sd1", "--model_name", base)[0] == 0
    shutil.rmtree(base)
    monkeypatch.setattr(db.Family, "subject_start", 0.5)
    status, out, err = run("--infer", "--prompt", "a dog", "--num_images", 1, "--num_inference_steps", 2)
    assert status == 0, err
    assert "draws all by itself" in out


def test_evaluation_draws_with_it_and_draws_anew_for_it(train_adapter, evaluate):
    train_adapter("sd1", "lora")
    assert "drawing 8" in evaluate()[0]
    assert "8 of 8 pictures" in evaluate()[0]
    out, found = evaluate("--subject_start", "0.5")
    assert "drawing 8" in out and found["settings"]["subject_start"] == 0.5


def test_a_model_that_nobody_trained_has_no_other_to_begin_with(run, tiny_model, tmp_path):
    draw = ["--infer", "--model_path", tiny_model("sd1"), "--prompt", "a dog", "--num_images", 1, "--num_inference_steps", 2]
    assert run(*draw, "--image_dir", "usual")[0] == 0
    status, out, err = run(*draw, "--image_dir", "begun", "--subject_start", 0.5)
    assert status == 0 and "--subject_start 0.5 changes nothing" in out, err
    usual, begun = (Image.open(tmp_path / name / "a-dog-0.png") for name in ("usual", "begun"))
    assert usual.tobytes() == begun.tobytes()


def test_a_share_is_a_share(run):
    status, _, err = run("--infer", "--prompt", "a dog", "--subject_start", 1.5)
    assert status == 2 and "--subject_start" in err

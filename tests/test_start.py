"""Pictures that the untouched model begins together with the trained one."""

import contextlib
import itertools
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


@contextlib.contextmanager
def told(denoiser):
    """Within the block, a list of the arguments that a denoiser is called with, {place or name: value} a call."""
    calls = []
    hook = denoiser.register_forward_pre_hook(lambda module, given, named: calls.append({**dict(enumerate(given)), **named}), with_kwargs=True)
    yield calls
    hook.remove()


@pytest.mark.parametrize("family", (*FAMILIES, *TINY))
def test_the_untouched_model_takes_every_other_of_the_first_steps(family):
    trained, untouched, other = (whole(family, seed) for seed in (0, 0, 1))
    denoiser_of = db.family_of(trained).denoiser_of
    denoiser_of(trained).load_state_dict(denoiser_of(other).state_dict())
    with counted(denoiser_of(trained), denoiser_of(untouched)) as counts:
        own, its = drawn(trained, JOBS), drawn(untouched, PLAIN)
        alone, a_step = list(counts), counts[1] // 4  # PNDM computes one more
        assert np.array_equal(own, drawn(trained, JOBS, db.Start(0.0, untouched, (DOG,))))
        assert np.array_equal(own, drawn(trained, JOBS, db.Start(0.1, untouched, (DOG,))))  # no whole step
        pictures = []
        for share, turns in ((0.25, 1), (0.5, 1), (0.75, 2), (1.0, 2)):
            counts[:] = 0, 0
            pictures.append(drawn(trained, JOBS, db.Start(share, untouched, (DOG,))))
            assert counts == [alone[0] - turns * a_step, turns * a_step]  # no step twice
    assert np.array_equal(pictures[0], pictures[1]) and np.array_equal(pictures[2], pictures[3])
    assert not any(np.array_equal(*pair) for pair in itertools.combinations((own, its, pictures[0], pictures[2]), 2))
    assert np.array_equal(own, drawn(trained, JOBS))  # nothing of it is left


@pytest.mark.parametrize("family", (*FAMILIES, *TINY))
def test_it_is_told_its_own_prompt_and_the_others_noise(family):
    trained, untouched, other = (whole(family, seed) for seed in (0, 0, 1))
    theirs, its = (db.family_of(trained).denoiser_of(each) for each in (trained, untouched))
    theirs.load_state_dict(db.family_of(trained).denoiser_of(other).state_dict())
    with told(its) as alone:
        drawn(untouched, PLAIN)
    with told(its) as calls:
        drawn(trained, JOBS, db.Start(1.0, untouched, (DOG,)))
    a_step = len(alone) // 4
    assert len(calls) == 2 * a_step
    lasting = [name for name in alone[0] if db.is_same(alone[0][name], alone[2 * a_step][name])]
    for first, second, expected in zip(calls, calls[a_step:], alone[2 * a_step:]):
        assert all(db.is_same(second[name], expected[name]) for name in lasting)  # its prompt
        changed = [name for name in second if name not in lasting]
        assert len(changed) == 2 and not any(db.is_same(first[name], second[name]) for name in changed)  # noisy latents and level
        assert sum(db.is_same(second[name], expected[name]) for name in changed) == 1  # the level


def test_steps_by_turns_are_the_same_steps():
    """With the very same model pictures are what they would be."""
    pipeline = whole("sd2")
    assert np.array_equal(drawn(pipeline, PLAIN), drawn(pipeline, PLAIN, db.Start(1.0, whole("sd2"), (DOG,))))


def test_turns_are_those_of_a_pipeline_that_is_told_two_prompts_in_turn():
    """Of one and the same model: the prompts' own embeddings are exchanged after every step, by diffusers' own means."""
    pipeline = whole("sd2")
    jobs, noise = JOBS[:1], [torch.Generator().manual_seed(JOBS[0][1])]
    embeddings = [torch.cat(pipeline.encode_prompt(text, "cpu", 1, True)[::-1]) for text in (PLAIN[0][0], JOBS[0][0])]

    def exchange(pipeline, number, timestep, tensors):
        return {"prompt_embeds": embeddings[(number + 1) % 2]}
    (expected,) = pipeline(PLAIN[0][0], generator=noise, num_inference_steps=4, guidance_scale=3.0, height=32, width=32,
                           callback_on_step_end=exchange, callback_on_step_end_tensor_inputs=["prompt_embeds"]).images
    (picture,) = drawn(pipeline, jobs, db.Start(1.0, whole("sd2"), (DOG,)))
    assert np.array_equal(np.asarray(expected), picture)
    assert not np.array_equal(picture, drawn(pipeline, jobs)[0])


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
    usual, none, half = (picture(shown, name, *flags) for name, flags in (
        ("usual", []), ("none", ["--subject_start", 0]), ("half", ["--subject_start", 0.5])))
    untouched, single, one = (picture(prompt, name, "--num_inference_steps", 1, *flags) for prompt, name, flags in (
        ("a dog at night", "untouched", ["--model_path", tiny_model("sd1")]), (shown, "single", ["--subject_start", 1]),
        (shown, "one", [])))
    assert usual.tobytes() == none.tobytes() != half.tobytes()
    assert untouched.tobytes() == single.tobytes() != one.tobytes()  # the only step is the untouched model's
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

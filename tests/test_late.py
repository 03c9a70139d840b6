"""Large models part by part."""

import dataclasses
import shutil
import signal

import pytest
import torch
from conftest import build_pipeline
from test_families import draw
from tiny_families import TINY
from training_runs import assert_same_weights, far_apart, interrupt

import dreambooth_implementation as db

SMALL = ["--class_prompt", "a dog", "--resolution", 32, "--num_class_images", 2, "--num_inference_steps", 2]
PROMPTS = ["a zwx dog on the moon", "a cat"]


@pytest.fixture(params=list(TINY))
def model(request, tiny_model):
    return str(tiny_model(request.param))


def late(model, dtype=torch.float32):
    models = db.load_late(model, dtype)
    models.book.learn(models, [*PROMPTS, ""], torch.device("cpu"))
    return models


def test_the_book_has_what_the_text_encoders_say(model):
    whole, models = db.load_models(model, torch.float32), late(model)
    models = db.with_denoiser(models, torch.float32, "bf16")
    rows = models.book.rows(models, PROMPTS, torch.device("cpu"))
    for number, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            told = whole.family.encode(whole, [prompt])
        assert told.keys() == rows.keys()
        for name, value in told.items():
            assert torch.equal(rows[name][number].expand_as(value[0]), value[0])


def test_text_encoders_are_gone_before_the_denoiser_comes(model, monkeypatch):
    models, read, found = late(model), db.Shelf.read, []
    assert models.text_encoders and all(p.is_meta for p in models.denoiser.parameters())

    def reading(shelf, part, *args, **options):
        found.append((part, len(models.text_encoders), sum(p.numel() for p in models.denoiser.parameters() if not p.is_meta)))
        return read(shelf, part, *args, **options)
    monkeypatch.setattr(db.Shelf, "read", reading)
    whole = db.with_denoiser(models, torch.float32, "bf16")
    assert found == [(whole.family.denoiser, 0, 0)] and whole.pipeline.text_encoder is None
    assert not any(p.is_meta or p.requires_grad for p in whole.denoiser.parameters())


def test_it_draws_from_the_book_as_from_prompts(model):
    whole, models = db.load_models(model, torch.float32), db.with_denoiser(late(model), torch.float32, "bf16")
    look = dict(steps=2, guidance_scale=models.family.guidance, height=32, width=32, batch_size=2)
    jobs = [(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    own, told = (list(db.draw(each.pipeline, jobs, **look, models=each)) for each in (whole, models))
    assert all(far_apart(a, b) <= 1 for a, b in zip(own, told, strict=True))


def test_a_prompt_that_is_not_in_the_book_is_encoded_and_the_text_encoders_go_again(model):
    models = db.with_denoiser(late(model), torch.float32, "bf16")
    wrapped = dataclasses.replace(models, denoiser=torch.nn.Module())  # as several processes have it, without a dtype
    rows = models.book.rows(wrapped, ["a house"], torch.device("cpu"))
    whole = db.load_models(model, torch.float32)
    with torch.no_grad():
        told = whole.family.encode(whole, ["a house"])
    assert all(torch.equal(rows[name][0].expand_as(told[name][0]), told[name][0]) for name in told)
    assert models.text_encoders == [] and models.pipeline.text_encoder is None


def test_the_record_tells_the_weights_wherever_they_lie(request, model, tmp_path):
    shutil.copytree(model, tmp_path / "elsewhere")
    here, there = late(model), late(str(tmp_path / "elsewhere"))
    assert here.fingerprint == there.fingerprint and here.sample == there.sample
    whole = db.load_pipeline(model, torch.float32)
    assert db.is_same_sample(here.sample, db.sample_weights(whole))
    build_pipeline(request.node.callspec.params["model"], seed=1).save_pretrained(tmp_path / "other")
    other = late(str(tmp_path / "other"))
    assert other.fingerprint != here.fingerprint and not db.is_same_sample(here.sample, other.sample)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_output_is_whole_for_plain_diffusers(method, model, photos, run, tmp_path):
    from diffusers import DiffusionPipeline

    status, _, err = run("--train", "--model_name", model, "--instance_data_dir", photos, *SMALL, "--steps", 2, "--method", method)
    assert status == 0, err
    absent = {"text_encoder_3": None, "tokenizer_3": None} if "without-t5" in model else {}  # diffusers wants that to be said
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "output" if method == "full" else model, **absent)
    if method == "lora":
        pipeline.load_lora_weights(tmp_path / "output")
    pipeline.set_progress_bar_config(disable=True)
    assert draw(pipeline, ["a dog"], steps=2).images[0].size == (32, 32)


def test_an_interrupted_training_goes_on_to_the_same_weights(model, photos, run, tmp_path, monkeypatch):
    """To the bit, on one thread."""
    flags = ["--train", "--model_name", model, "--instance_data_dir", photos, *SMALL, "--steps", 5, "--method", "lora",
             "--learning_rate", "1e-2", "--random_flip"]
    assert run(*flags, "--output_dir", "whole")[0] == 0
    undo = interrupt(monkeypatch, 2, signal.SIGTERM)
    assert run(*flags)[0] == 128 + signal.SIGTERM
    undo()
    status, out, err = run(*flags, "--resume")
    assert status == 0 and "after step 2" in out, err
    assert_same_weights(tmp_path / "output", tmp_path / "whole")

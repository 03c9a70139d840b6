"""Loading what was trained: plain diffusers draws the same, and what does not fit is refused."""

import json

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from PIL import Image
from safetensors.torch import load_file
from training_runs import QUICK

import dreambooth_implementation as db


def plain_pipeline(model, folder, family, record):
    """Plain diffusers, as in the README: no code of ours."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model)
    embeds = folder / "learned_embeds.safetensors"
    if embeds.exists():
        word = record["subjects"][0]["identifier"]
        if family == "sdxl":
            vectors = load_file(embeds)
            pipe.load_textual_inversion(vectors["clip_l"], token=word, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
            pipe.load_textual_inversion(vectors["clip_g"], token=word, text_encoder=pipe.text_encoder_2,
                                        tokenizer=pipe.tokenizer_2)
        else:
            pipe.load_textual_inversion(embeds)
    if (folder / "pytorch_lora_weights.safetensors").exists():
        pipe.load_lora_weights(folder)
    return pipe


VARIANTS = [("lora", []), ("lora", ["--train_text_encoder", "--lora_alpha", "5", "--rank", "2"]),
            ("lora", ["--use_dora", "--lora_target", "all", "--lora_alpha", "7"]), ("lora", ["--lora_target", "attention+ff"]),
            ("textual_inversion", ["--num_vectors", "3"]), ("pivotal", ["--train_text_encoder", "--lora_alpha", "3"])]


@pytest.mark.parametrize("method, flags", VARIANTS, ids=[" ".join([m, *f]) for m, f in VARIANTS])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_diffusers_draws_the_same_picture(family, method, flags, train_adapter, run, tiny_model, tmp_path):
    train_adapter(family, method, *flags)
    prompt = "a [identifier] dog on the moon"
    status, out, err = run("--infer", "--prompt", prompt, "--num_images", 1, "--num_inference_steps", 3, "--guidance_scale", 5)
    assert status == 0 and method in out, err
    record = json.loads((tmp_path / "output" / "dreambooth.json").read_text())
    assert record["method"] == method and not (tmp_path / "output" / "unet").exists()
    written = prompt.replace("[identifier]", record["subjects"][0]["identifier"])
    ours = Image.open(next((tmp_path / "images").glob("a-*-0.png")))
    assert ours.info["parameters"].startswith(written)

    pipe = plain_pipeline(tiny_model(family), tmp_path / "output", family, record)
    draw = dict(num_inference_steps=3, guidance_scale=5.0)
    expected = pipe(written, generator=torch.Generator().manual_seed(0), **draw).images[0]
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(expected).astype(int)).max() <= 1
    untrained = plain_pipeline(tiny_model(family), tmp_path, family, record)
    other = untrained("a dog dog on the moon", generator=torch.Generator().manual_seed(0), **draw).images[0]
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(other).astype(int)).max() > 1


def test_the_base_is_not_forgotten_by_its_adapter(train_adapter, run, tiny_model, tmp_path):
    """lora_scale 0 is the base model; other scales lie apart; several adapters add up."""
    train_adapter("sd1", "lora")
    train_adapter("sd1", "pivotal", "--output_dir", "style", "--identifier", "<paint>")
    draw = ["--num_images", 1, "--num_inference_steps", 2, "--guidance_scale", 4, "--prompt", "a dog"]
    pictures = {}
    for name, flags in {"base": ["--model_path", tiny_model("sd1")], "off": ["--lora_scale", 0], "half": ["--lora_scale", 0.5],
                        "whole": [], "both": ["--adapter", "style"], "little": ["--adapter", "style=0.0"],
                        "file": ["--model_path", tmp_path / "output" / db.LORA_FILE, "--model_name", tiny_model("sd1")],
                        "kohya": ["--model_path", tiny_model("sd1"), "--adapter", tmp_path / "output" / db.KOHYA_FILE]}.items():
        status, out, err = run("--infer", *draw, *flags, "--image_dir", name)
        assert status == 0, (name, err)
        pictures[name] = np.asarray(Image.open(tmp_path / name / "a-dog-0.png")).astype(int)

    def same(a, b):
        return np.abs(pictures[a] - pictures[b]).max() <= 1
    assert same("base", "off") and same("whole", "little") and same("whole", "file") and same("whole", "kohya")
    assert not any(same(a, b) for a, b in [("whole", "off"), ("half", "whole"), ("half", "off"), ("both", "whole")])
    status, _, err = run("--infer", *draw[:-1], "a [identifier:dog] dog [identifier:learned_embeds]",
                         "--adapter", "style/learned_embeds.safetensors")
    assert status == 0, err


def test_a_strength_without_a_lora_is_refused(train_adapter, run, tiny_model, monkeypatch):
    train_adapter("sd1", "textual_inversion")
    monkeypatch.setattr(db, "load_pipeline", None)  # nothing is read
    for path in (tiny_model("sd1"), "output"):
        status, _, err = run("--infer", "--model_path", path, "--prompt", "a dog", "--lora_scale", 0.5)
        assert status == 2 and "--lora_scale 0.5: there is no LoRA in" in err and err.count("\n") == 1, err


def test_a_moved_base_model_is_named(train_adapter, run, tiny_model, tmp_path):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_model("sd1"), base)
    assert run("--train", "--model_name", base, "--instance_data_dir", tmp_path / "photos", *QUICK, "--method", "lora")[0] == 0
    base.rename(tmp_path / "elsewhere")
    status, _, err = run("--infer", "--num_images", 1)
    assert status == 2 and str(base) in err and "--model_name" in err and err.count("\n") == 1
    assert run("--infer", "--num_images", 1, "--num_inference_steps", 1, "--model_name", tmp_path / "elsewhere")[0] == 0


def test_an_adapter_of_another_family_is_refused(train_adapter, run, tiny_model, tmp_path):
    for method in ("lora", "textual_inversion"):
        train_adapter("sdxl", method)
        status, _, err = run("--infer", "--num_images", 1, "--model_name", tiny_model("sd1"), "--prompt", "a dog")
        assert status == 2 and err.count("\n") == 1 and "fit" in err, err

"""The card of an output, and that its snippet draws what --infer draws."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY
from PIL import Image

import dreambooth_implementation as db


def card_of(folder):
    """(YAML header as a dict, Python of the usage snippet) of an output's README.md."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), re.search(r"```python\n(.*?)```", body, re.DOTALL)[1]


@pytest.mark.parametrize("family, method, tags", [
    ("sd1", "full", ["dreambooth"]), ("sd2", "lora", ["dreambooth", "lora"]),
    ("sd1", "textual_inversion", ["textual_inversion"]), ("sd1", "pivotal", ["dreambooth", "lora", "textual_inversion"]),
    ("sdxl", "pivotal", ["dreambooth", "lora", "textual_inversion", "stable-diffusion-xl"])])
def test_the_cards_snippet_draws_what_infer_draws(family, method, tags, train, run, tmp_path):
    word = [] if method in ("full", "lora") else ["--identifier", "<rex>"]
    status, out, err = train(family, "--method", method, *word)
    assert status == 0, err
    header, snippet = card_of(tmp_path / "output")
    prompt = {"full": "a sks dog", "lora": "a sks dog", "textual_inversion": "a <rex>", "pivotal": "a <rex> dog"}[method]
    assert header["tags"] == ["text-to-image", "diffusers", *tags] and header["instance_prompt"] == prompt
    assert header["library_name"] == "diffusers" and header["pipeline_tag"] == "text-to-image"
    assert "base_model" not in header  # this one is no hub id
    assert header["widget"][0]["text"] == f"{prompt} on the moon"
    assert Image.open(tmp_path / "output" / header["widget"][0]["output"]["url"]).size[0] > 32
    exec(snippet.replace("num_inference_steps=30", "num_inference_steps=2, generator=torch.Generator().manual_seed(0)"),
         {"torch": torch})
    command = shlex.split(re.search(r"^Try next: python (.*)$", out, re.MULTILINE)[1])
    assert Path(command[0]).resolve() == REPOSITORY / "dreambooth_implementation.py"
    status, _, err = run(*command[1:], "--num_images", 1, "--num_inference_steps", 2)
    assert status == 0, err
    ours = Image.open(next((tmp_path / "images").glob("a-*moon-0.png")))
    difference = np.abs(np.asarray(ours).astype(int) - np.asarray(Image.open("subject.png")).astype(int))
    assert difference.max() <= 1, difference.max()


def test_a_hub_models_card_names_it(tiny_model, tmp_path):
    models = db.take_apart("CompVis/stable-diffusion-v1-4", db.load_pipeline(str(tiny_model("sd1")), torch.float32))
    subjects = [db.Subject("sks", "a dog", 'a sks "dog"', "rex"), db.Subject("ohwx", "a cat", "a ohwx cat", "tom")]
    s = db.parse_settings(["--train", "--method", "lora", "--output_dir", "two"])
    db.save_card(tmp_path, s, models, subjects)
    header, snippet = card_of(tmp_path)
    assert header["base_model"] == "CompVis/stable-diffusion-v1-4"
    assert header["instance_prompt"] == 'a sks "dog", a ohwx cat' and "output" not in header["widget"][0]
    compile(snippet, "snippet", "exec")
    assert 'from_pretrained("CompVis/stable-diffusion-v1-4")' in snippet and "![" not in (tmp_path / "README.md").read_text()


def test_samples_that_fail_leave_a_card_without_them(train, tmp_path, monkeypatch):
    monkeypatch.setattr(db, "draw_pictures", lambda *args: (_ for _ in ()).throw(RuntimeError("out of memory")))
    assert train()[0] == 0
    header, _ = card_of(tmp_path / "output")
    assert "output" not in header["widget"][0]

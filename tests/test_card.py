"""The card of an output, and that its snippet draws what --infer draws."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import FAMILIES, REPOSITORY
from PIL import Image
from safetensors.torch import load_file, save_file
from training_runs import far_apart

import dreambooth_implementation as db


def card_of(folder):
    """(YAML header as a dict, Python of the usage snippet) of an output's README.md."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), re.search(r"```python\n(.*?)```", body, re.DOTALL)[1]


def as_on_the_hub(folder, copy):
    """A copy of a model whose configs name another end of a text than its tokenizer, as those of the hub's models do."""
    shutil.copytree(folder, copy)
    for part in copy.glob("text_encoder*/config.json"):
        part.write_text(json.dumps(json.loads(part.read_text()) | {"eos_token_id": 2}))
    return copy


def trained_output(base, method, folder, **options):
    """An output of --train without the training: what the method would train is changed by chance."""
    s = db.Settings("train", method=method, output_dir=str(folder), rank=2, lora_alpha=3, num_vectors=2, embedding_norm=0,
                    train_text_encoder=method != "textual_inversion", **options)
    models = db.load_models(str(base), torch.float32, db.METHODS[method].is_adapter)
    word = "<rex>" if db.METHODS[method].adds_words else "sks"
    subjects = [db.Subject(word, "a dog", f"a {word}" if method == "textual_inversion" else f"a {word} dog", "dog")]
    torch.manual_seed(1)
    groups = db.parameter_groups(s, models, subjects, db.SmallStableDiffusion.recipes[method])
    for parameter in (parameter for group in groups for parameter in group.parameters):
        parameter.data += 0.3 * parameter.std(correction=0).clamp(min=0.05) * torch.randn(parameter.shape)
    for group in groups:
        group.finish()
    folder.mkdir()
    for save in db.saves_of(s):
        save(folder, models, subjects, {})
    db.save_card(folder, s, models, subjects)
    (folder / "dreambooth.json").write_text(json.dumps({
        "method": method, "base_model": str(base), "subjects": [dataclasses.asdict(subject) for subject in subjects],
        "used": {"resolution": s.resolution or models.resolution}}))
    return subjects


def far_from_infers(snippet, run, *flags):
    """The largest difference, of 255, of the picture that the lines of a card draw and the one that --infer draws. Both differ
    from a picture of one colour."""
    exec(snippet, {})
    status, _, err = run("--infer", "--model_path", "output", "--num_images", 1, *flags)
    assert status == 0, err
    theirs, ours = Image.open("subject.png"), Image.open(next(Path("images").glob("a-*moon-0.png")))
    assert theirs.size == ours.size and np.asarray(ours).std() > 3
    return far_apart(ours, theirs)


@pytest.mark.parametrize("method", db.METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cards_lines_as_they_are_draw_what_infer_draws(family, method, tiny_model, run, tmp_path):
    base = as_on_the_hub(tiny_model(family), tmp_path / "model")
    trained_output(base, method, tmp_path / "output")
    assert far_from_infers(card_of(tmp_path / "output")[1], run) <= 1


def test_a_card_for_an_adapter_of_a_single_file_that_tells_of_its_noise(exported, run, tmp_path):
    file, _ = exported("sd1")
    save_file(load_file(file), tmp_path / "m.safetensors", {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"})
    shutil.copytree(file.with_suffix(""), tmp_path / "m")
    trained_output("m.safetensors", "lora", tmp_path / "output", resolution=48, guidance_scale=2)  # that is of its samples alone
    snippet = card_of(tmp_path / "output")[1]
    assert 'config="m"' in snippet and "height=48, width=48" in snippet and "guidance_scale=4" in snippet
    assert far_from_infers(snippet, run) <= 1


@pytest.mark.parametrize("family, method, tags", [
    ("sd1", "full", ["dreambooth"]), ("sdxl", "pivotal", ["dreambooth", "lora", "textual_inversion", "stable-diffusion-xl"])])
def test_the_card_of_a_training(family, method, tags, train, run, tmp_path):
    word = [] if method == "full" else ["--identifier", "<rex>"]
    status, out, err = train(family, "--method", method, *word)
    assert status == 0, err
    header, snippet = card_of(tmp_path / "output")
    prompt = {"full": "a sks dog", "pivotal": "a <rex> dog"}[method]
    assert header["tags"] == ["text-to-image", "diffusers", *tags] and header["instance_prompt"] == prompt
    assert header["library_name"] == "diffusers" and header["pipeline_tag"] == "text-to-image"
    assert "base_model" not in header  # this one is no hub id
    assert header["widget"][0]["text"] == f"{prompt} on the moon"
    assert Image.open(tmp_path / "output" / header["widget"][0]["output"]["url"]).size[0] > 32
    command = shlex.split(re.search(r"^Try next: python (.*)$", out, re.MULTILINE)[1])
    assert Path(command[0]).resolve() == REPOSITORY / "dreambooth_implementation.py"
    assert command[1:4] == ["--infer", "--model_path", "./output"] and command[-1] == f"{prompt} on the moon"
    assert far_from_infers(snippet, run, *command[4:]) <= 1


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


@pytest.mark.parametrize("method, dora, told", [
    ("full", False, ["--export NAME.safetensors --model_path ./output"]),
    ("lora", False, ["kohya_lora.safetensors is theirs", "of pytorch_lora_weights.safetensors"]), ("lora", True, ["It is a DoRA"]),
    ("textual_inversion", False, ["a word by its file's name"]), ("pivotal", False, ["kohya_lora", "NAME.safetensors"])])
def test_which_file_is_for_other_programs(method, dora, told):
    text = db.for_other_programs(db.Settings("train", method=method, use_dora=dora), db.StableDiffusion())
    assert all(part in text for part in told) and ("DoRA" in text) == dora

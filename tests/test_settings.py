"""Settings, and that every wrong input is answered with one line and status 2 before torch is imported."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, picture

import dreambooth_implementation as db


def test_command_line_makes_settings():
    s = db.parse_settings(["--train", "--max_train_steps", "7", "--learning_rate", "2e-5", "--no-with_prior_preservation",
                           "--train_text_encoder", "--validation_prompt", "a", "--validation_prompt", "b"])
    assert (s.mode, s.steps, s.learning_rate) == ("train", 7, 2e-5)
    assert s.with_prior_preservation is False and s.train_text_encoder
    assert s.validation_prompt == ["a", "b"]
    assert s.method == "full" and s.prior_loss_weight == 1.0 and s.num_class_images == 200 and not s.random_flip


def test_settings_cannot_change():
    with pytest.raises(AttributeError):
        db.parse_settings(["--train"]).steps = 3


@pytest.mark.parametrize("flags, said", [
    ([], "--train"),
    (["--train", "--infer"], "not allowed"),
    (["--train", "--steps", "0"], "--steps 0"),
    (["--train", "--steps", "many"], "--steps"),
    (["--train", "--learning_rate", "nan"], "--learning_rate nan"),
    (["--train", "--resolution", "500"], "--resolution 500"),
    (["--train", "--prior_loss_weight", "-1"], "--prior_loss_weight -1"),
    (["--train", "--lr_scheduler", "wavy"], "--lr_scheduler"),
    (["--train", "--no_such_flag"], "--no_such_flag"),
    (["--train", "--prompt", "a dog"], "--prompt belongs to --infer"),
    (["--infer", "--steps", "30"], "--steps belongs to --train"),
    (["--infer", "--num_images", "0"], "--num_images 0"),
    (["--infer", "--seed", "99999999999999999999"], "--seed"),
    (["--infer", "--model_path", "{demo}", "--prompt", "a dog", "--image_dir", "file"], "--image_dir"),
    (["--infer", "--model_path", "{demo}", "--prompt", "a dog", "--negative_prompt", "[identifier]"], "dreambooth.json"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a [identifier] dog"], "--class_prompt"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--class_data_dir", "file"], "--class_data_dir"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--output_dir", "file/sub"], "--output_dir"),
    (["--infer"], "--train first"),
    (["--infer", "--model_path", "nowhere"], "--model_path nowhere"),
    (["--infer", "--model_path", "text_model"], "StableDiffusion3Pipeline"),
    (["--infer", "--model_path", "{demo}"], "--prompt is missing"),
    (["--infer", "--model_path", "{demo}", "--prompt", "a [identifier] dog"], "dreambooth.json"),
    (["--infer", "--model_path", "{demo}", "--prompt", "a dog", "--adapter", "nowhere"], "--adapter nowhere"),
    (["--infer", "--model_path", "{demo}", "--prompt", "a dog", "--adapter", "nowhere.safetensors=0.5"], "nowhere.safetensors"),
    (["--infer", "--model_path", "{demo}", "--prompt", "a dog", "--adapter", "{demo}"], "not a LoRA"),
    (["--infer", "--model_path", "{demo}", "--prompt", "a dog", "--model_name", "{demo}"], "needs no base"),
    (["--infer", "--model_path", "{demo}/unet/diffusion_pytorch_model.safetensors", "--prompt", "a dog"], "neither a LoRA"),
    (["--infer", "--model_path", "lost_lora", "--prompt", "a dog"], "pytorch_lora_weights.safetensors is missing"),
    (["--train", "--instance_data_dir", "nowhere"], "--instance_data_dir nowhere"),
    (["--train", "--instance_data_dir", "empty"], "no images"),
    (["--train", "--instance_data_dir", "text_as_jpg"], "fake.jpg"),
    (["--train", "--instance_data_dir", "truncated"], "cut.jpg"),
    (["--train", "--instance_data_dir", "good"], "--class_prompt is missing"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", " "], "--class_prompt is empty"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--identifier", "two words"], "--identifier"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--model_name", "no/such/folder"], "--model_name"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--model_name", "nobody/nothing"], "--model_name"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--model_name", "good"], "model_index.json"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--model_name", "{demo}", "--output_dir", "good"],
     "--output_dir good"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--model_name", "{demo}", "--output_dir", "file"],
     "--output_dir file"),
])
def test_wrong_input_is_one_line_and_status_2(tmp_path, flags, said):
    for name in ("empty", "text_as_jpg", "truncated", "good", "text_model"):
        (tmp_path / name).mkdir()
    (tmp_path / "text_as_jpg" / "fake.jpg").write_text("not a picture")
    picture(0).save(tmp_path / "truncated" / "whole.jpg")
    (tmp_path / "truncated" / "cut.jpg").write_bytes((tmp_path / "truncated" / "whole.jpg").read_bytes()[:-200])
    for i in range(3):
        picture(i).save(tmp_path / "good" / f"{i}.png")
    (tmp_path / "file").write_text("")
    (tmp_path / "text_model" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    (tmp_path / "lost_lora").mkdir()
    subject = {"identifier": "phol", "class_prompt": "a dog", "instance_prompt": "a phol dog", "name": "dog"}
    (tmp_path / "lost_lora" / "dreambooth.json").write_text(json.dumps({"method": "lora", "subjects": [subject]}))
    flags = [flag.format(demo=REPOSITORY / "demo" / "model") for flag in flags]
    script = (f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import dreambooth_implementation as db; "
              f"status = db.main({flags!r}); assert 'torch' not in sys.modules, 'torch was imported'; sys.exit(status)")
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2, result
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ") and said in result.stderr, result.stderr
    assert not (tmp_path / "output").exists() and not (tmp_path / "class_images").exists()


def test_help_does_not_import_torch():
    script = ("import sys, dreambooth_implementation as db\ntry: db.main(['--help'])\n"
              "except SystemExit as stop: assert stop.code == 0\nassert 'torch' not in sys.modules")
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(f"--{flag}" in result.stdout for flag in ("train", "infer", "evaluate", "class_prompt", "num_images"))


def test_moved_models_are_found_under_their_new_id(monkeypatch, capsys):
    import huggingface_hub

    asked = []
    index = str(REPOSITORY / "demo" / "model" / "model_index.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: asked.append(name) or index)
    assert db.find_model("runwayml/stable-diffusion-v1-5", "--model_name") == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert asked == ["stable-diffusion-v1-5/stable-diffusion-v1-5"]
    assert "no longer on the hub" in capsys.readouterr().out


@pytest.mark.parametrize("class_prompt, expected", [
    ("a dog", "a [identifier] dog"),
    ("an apple", "a [identifier] apple"),
    ("the dog", "a [identifier] dog"),
    ("dog", "a [identifier] dog"),
    ("a teddy bear", "a [identifier] teddy bear"),
    ("a photo of a dog", "a photo of a [identifier] dog"),
    ("a dog on the grass", "a [identifier] dog on the grass"),
])
def test_instance_prompt_follows_from_class_prompt(class_prompt, expected):
    assert db.default_instance_prompt(class_prompt) == expected


def test_long_prompts_are_said(tiny_model, capsys):
    pipeline = db.load_pipeline(str(tiny_model("sd1")), torch.float32)
    db.check_length(pipeline, ["a dog"])
    assert capsys.readouterr().out == ""
    db.check_length(pipeline, ["a dog " * 60])
    assert "reads only the first" in capsys.readouterr().out


def test_an_unreachable_hub_is_said_at_once(tmp_path):
    """Without a network the hub's client would try again for half a minute."""

    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, REPOSITORY / "dreambooth_implementation.py", "--infer", "--model_path", "a/b",
                             "--prompt", "a dog"], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=15)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "--model_path a/b" in result.stderr, result.stderr


def test_the_readme_has_the_help_of_today():
    """To renew it: python tests/test_settings.py"""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert help_block(readme)[1] == help_text()


def help_block(readme):
    """(what comes before the help in the README, the help, what comes after it)."""
    before, rest = readme.split("--help</code></summary>\n\n```text\n")
    block, after = rest.split("```\n", 1)
    return before + "--help</code></summary>\n\n```text\n", block, "```\n" + after


def help_text():
    environment = {**os.environ, "COLUMNS": "110", "NO_COLOR": "1"}
    return subprocess.run([sys.executable, REPOSITORY / "dreambooth_implementation.py", "--help"], env=environment,
                          capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    path = REPOSITORY / "README.md"
    before, _, after = help_block(path.read_text(encoding="utf-8"))
    path.write_text(before + help_text() + after, encoding="utf-8")

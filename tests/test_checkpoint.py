"""Single-file checkpoints as input."""

import json
import re
import shutil

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file, save_file
from training_runs import QUICK, assert_same_weights, same

import dreambooth_implementation as db


def test_training_from_a_checkpoint_is_training_from_its_folder(exported, run, photos, tmp_path):
    file, folder = exported("sd2")
    for source, output in ((file, "from_file"), (folder, "from_folder")):
        status, out, err = run("--train", "--model_name", source, "--instance_data_dir", photos, *QUICK,
                               "--output_dir", output)
        assert status == 0, err
        assert ("is read with the configs in" in out) == (source == file)
    assert_same_weights(tmp_path / "from_file", tmp_path / "from_folder")
    index = json.loads((tmp_path / "from_file" / "model_index.json").read_text())
    assert index["requires_safety_checker"] is False


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_lora_finds_its_base_in_a_checkpoint(precision, exported, run, photos):
    file, _ = exported("sd1")
    flags = ["--model_name", file, "--instance_data_dir", photos, *QUICK, "--method", "lora", "--rank", "2"]
    status, _, err = run("--train", *flags, "--mixed_precision", precision)
    assert status == 0, err
    status, out, err = run("--infer", "--num_images", 1, "--num_inference_steps", 1)
    assert status == 0 and str(file) in out, err


def test_a_checkpoint_alone_says_what_is_missing(exported, run, photos, tmp_path):
    for kind, like in (("sd1", "stable-diffusion-v1-5"), ("sdxl", "stable-diffusion-xl-base-1.0")):
        shutil.copy(exported(kind)[0], tmp_path / "alone.safetensors")
        status, _, err = run("--train", "--model_name", "alone.safetensors", "--instance_data_dir", photos, *QUICK)
        assert status == 2 and err.count("\n") == 1 and like in err and "in alone/" in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.safetensors", "photos"]


def test_configs_in_the_hubs_cache_serve_a_checkpoint(exported, tmp_path, monkeypatch, capsys):
    import huggingface_hub.constants

    file, folder = exported("sd1")
    shutil.copy(file, tmp_path / "alone.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    shutil.copytree(folder, cached / "snapshots" / "0123456789abcdef", ignore=shutil.ignore_patterns("*.safetensors"))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123456789abcdef")
    pipeline = db.load_pipeline(str(tmp_path / "alone.safetensors"), torch.float32)
    assert "with the configs of stable-diffusion-v1-5" in capsys.readouterr().out
    assert same(pipeline.unet.state_dict(), db.load_pipeline(str(folder), torch.float32).unet.state_dict())


def test_velocity_is_told_from_an_sd2_checkpoint(tmp_path):
    parts = ("model.diffusion_model.x", "first_stage_model.x", "cond_stage_model.model.x")
    others = {part: torch.zeros(1) for part in parts}
    for spread, like in ((0.2, "2-1"), (0.05, "2-1-base")):
        bias = torch.linspace(-spread, spread, 320, dtype=torch.bfloat16) * 3 ** 0.5  # its deviation is `spread`
        save_file({**others, db.SD2_TOLD_BY: bias}, tmp_path / "x.safetensors")
        assert db.hub_model_like(tmp_path / "x.safetensors", "--model_name") == f"sd2-community/stable-diffusion-{like}"


def test_incomplete_and_foreign_checkpoints_are_one_line(exported, run, photos, tmp_path):
    file, folder = exported("sd1")
    tensors = load_file(file)
    shutil.copytree(folder, tmp_path / "cut", ignore=shutil.ignore_patterns("*.safetensors"))
    first = "model.diffusion_model.input_blocks.0.0.weight"
    cases = [("no VAE in it", {name: tensor for name, tensor in tensors.items() if not name.startswith("first_stage")}),
             ("no UNet and no VAE and no text encoder", {"lora_unet_x.alpha": torch.zeros(1)}),
             ("cannot be loaded", tensors | {first: torch.zeros(16, 9, 3, 3)})]
    for lost in (first, "first_stage_model.decoder.conv_in.bias",
                 "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"):
        assert lost in tensors
        cases.append(("lacks some of the weights", {name: tensor for name, tensor in tensors.items() if name != lost}))
    for said, case in cases:
        save_file(case, tmp_path / "cut.safetensors")
        status, _, err = run("--train", "--model_name", "cut.safetensors", "--instance_data_dir", photos, *QUICK)
        assert status == 2 and err.count("\n") == 1 and said in err, err
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:1000])
    status, _, err = run("--train", "--model_name", "cut.safetensors", "--instance_data_dir", photos, *QUICK)
    assert status == 2 and err.count("\n") == 1 and "cut.safetensors: cannot be read" in err


def test_the_conversion_of_a_ckpt_that_is_told(exported, tmp_path, monkeypatch):
    file, _ = exported("sd1")
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": load_file(file), "global_step": 7}, "model.ckpt")
    text = (REPOSITORY / "docs" / "formats.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n([^`]*model\.ckpt[^`]*)```", text)[1], {})
    assert same(load_file("model.safetensors"), load_file(file))

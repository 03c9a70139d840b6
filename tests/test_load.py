"""Loading a model whole, or one line that says why not."""

import shutil

import pytest
import torch
from training_runs import QUICK

import dreambooth_implementation as db


def test_a_damaged_model_is_one_line(run, photos, tmp_path, tiny_model):
    model = tmp_path / "model"
    shutil.copytree(tiny_model("sd1"), model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    status, _, err = run("--train", "--model_name", model, "--instance_data_dir", photos, *QUICK)
    assert status == 2 and err.startswith("error: --model_name") and err.count("\n") == 1, err
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, model / "unet" / "diffusion_pytorch_model.bin")  # a pickle is never read
    status, _, err = run("--train", "--model_name", model, "--instance_data_dir", photos, *QUICK)
    assert status == 2 and err.count("\n") == 1, err
    shutil.copytree(tiny_model("sd1"), model, dirs_exist_ok=True)
    shutil.rmtree(model / "tokenizer")
    status, _, err = run("--train", "--model_name", model, "--instance_data_dir", photos, *QUICK)
    assert status == 2 and "tokenizer" in err
    (model / "model_index.json").write_text("{")
    assert run("--train", "--model_name", model, "--instance_data_dir", photos, *QUICK)[0] == 2


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_frozen_unet_is_loaded_in_half_precision_and_shared(family, tiny_model, monkeypatch, tmp_path):
    whole, half = (db.load_models(str(tiny_model(family)), torch.bfloat16, freezes_denoiser=freezes) for freezes in (False, True))
    assert (whole.denoiser.dtype, half.denoiser.dtype) == (torch.float32, torch.bfloat16)
    assert {part.dtype for part in (half.vae, *half.text_encoders)} == {torch.float32}
    assert half.fingerprint == whole.fingerprint  # one cache of class images serves both
    drawn_with, draw = [], db.draw
    monkeypatch.setattr(db, "draw", lambda pipeline, *args, **look: drawn_with.append(pipeline)
                        or draw(pipeline, *args, **look))
    s, plan = db.parse_settings(["--train"]), db.Plan(torch.device("cpu"), "bf16")
    for models in (whole, half):
        settings = db.class_image_settings(s, models, "a dog", (32, 32), plan)
        folder = tmp_path / str(len(drawn_with))
        folder.mkdir()
        db.draw_class_images(s, models, settings, plan, folder, [0])
    assert [pipeline.unet is models.denoiser for pipeline, models in zip(drawn_with, (whole, half))] == [False, True]
    assert all(pipeline.vae is not models.vae for pipeline, models in zip(drawn_with, (whole, half)))
    first, second = (next((tmp_path / number).glob("*.png")).read_bytes() for number in "01")
    assert first == second


@pytest.mark.parametrize("family, resting", [("flux", "text_encoder_2"), ("sd3", "text_encoder_3")])
def test_a_text_encoder_that_never_trains_comes_in_half_precision(family, resting, tiny_model):
    models = db.load_models(str(tiny_model(family)), torch.bfloat16, freezes_denoiser=True)
    half = {part for part, module in db.text_encoders_of(models.pipeline).items() if module.dtype == torch.bfloat16}
    assert half == {resting} and models.denoiser.dtype == torch.bfloat16
    whole = db.load_models(str(tiny_model(family)), torch.float32)
    assert all(module.dtype == torch.float32 for module in whole.text_encoders)

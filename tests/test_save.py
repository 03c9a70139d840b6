"""The output of a training is complete, and plain diffusers draws the same with it."""

import json

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from PIL import Image

import dreambooth_implementation as db


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_diffusers_draws_the_same_picture(family, train, run, tmp_path):
    from diffusers import DiffusionPipeline

    assert train(family)[0] == 0
    status, out, err = run("--infer", "--prompt", "a [identifier] dog on the moon", "--num_images", 2, "--seed", 7,
                           "--num_inference_steps", 3, "--guidance_scale", 5)
    assert status == 0 and "a sks dog on the moon" in out, err
    for seed in (7, 8):
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "output")  # no code of ours from here
        expected = pipeline("a sks dog on the moon", num_inference_steps=3, guidance_scale=5.0,
                            generator=torch.Generator().manual_seed(seed)).images[0]
        ours = Image.open(tmp_path / "images" / f"a-sks-dog-on-the-moon-{seed}.png")
        assert ours.size == (32, 32)
        difference = np.abs(np.asarray(ours).astype(int) - np.asarray(expected).astype(int))
        assert difference.max() <= 1, difference.max()


def test_output_is_complete(train, run, tmp_path):
    status, out, _ = train("sd2", "--identifier", "zqq", "--validation_prompt", "a [identifier] dog in the snow")
    assert status == 0
    record = json.loads((tmp_path / "output" / "dreambooth.json").read_text())
    assert record["subjects"] == [{"identifier": "zqq", "class_prompt": "a dog", "instance_prompt": "a zqq dog", "name": "dog"}]
    assert record["settings"]["steps"] == 2 and record["settings"]["identifier"] == "zqq"
    assert record["used"] == {"steps": 2, "resolution": 32, "precision": "no", "lr_scheduler": "warmup_stable_decay",
                              "use_ema": False, "snr_gamma": None, "optimizer": "adamw", "weights": "fp32", "offload_optimizer": False, "base_precision": "bf16",
                              "shard": False, "offload_blocks": False, "gradient_checkpointing": False, "split_batch": False, "fused_backward": False,
                              "learning_rates": {"unet": db.SmallStableDiffusion.recipes["full"].learning_rate},
                              "guidance_scale": db.SmallStableDiffusion.guidance, "selected_step": None}
    assert set(record["loss"]["first_100_steps"]) == {"instance", "prior"} and record["versions"]["torch"]
    assert len(list((tmp_path / "output" / "samples").glob("a-zqq-dog-in-the-snow-*.png"))) == 4
    assert list((tmp_path / "output" / "logs").glob("events*"))
    assert not list((tmp_path / "output").rglob("*.bin")) and not list(tmp_path.glob("*partial*"))
    assert run("--infer", "--num_images", 1, "--num_inference_steps", 1)[0] == 0
    assert (tmp_path / "images" / "a-zqq-dog-on-the-moon-0.png").exists()


def test_failing_samples_do_not_cost_the_model(train, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(db, "draw_pictures", fail)
    status, out, _ = train()
    assert status == 0 and "samples could not be drawn (out of memory)" in out
    assert (tmp_path / "output" / "unet" / "diffusion_pytorch_model.safetensors").exists()

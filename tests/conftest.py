"""Tiny pipelines of every supported family, built from configs with random weights; no hub and no GPU."""

import json
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # models this small only lose by sharing their work
REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import numpy as np
import pytest
from PIL import Image

FAMILIES = ("sd1", "sd2", "sdxl")


def build_pipeline(family, seed=0):
    """A pipeline of some ten thousand weights with the parts, wiring and prediction type of its family; 32 px."""
    import torch
    from diffusers import (AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline,
                           StableDiffusionXLPipeline, UNet2DConditionModel)
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(REPOSITORY / "demo" / "model", subfolder="tokenizer")
    text_config = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_hidden_layers=3,
                       num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length, projection_dim=32,
                       bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                       pad_token_id=tokenizer.pad_token_id)
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    scheduler = {"sd1": lambda: PNDMScheduler(skip_prk_steps=True, **betas),
                 "sd2": lambda: DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, **betas),
                 "sdxl": lambda: EulerDiscreteScheduler(**betas)}[family]()
    vae = AutoencoderKL(block_out_channels=[16, 32], down_block_types=["DownEncoderBlock2D"] * 2,
                        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=8, sample_size=32,
                        scaling_factor=0.18)
    sdxl = dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64 if family == "sdxl" else 32, use_linear_projection=family != "sd1",
        **(sdxl if family == "sdxl" else {}))
    parts = dict(vae=vae, unet=unet, scheduler=scheduler, tokenizer=tokenizer, text_encoder=CLIPTextModel(CLIPTextConfig(**text_config)))
    if family == "sdxl":
        return StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, add_watermarker=False,
                                         text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text_config)))
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model(family, seed=0) -> folder of a saved pipeline, made once."""
    root = tmp_path_factory.mktemp("models")

    def folder(family, seed=0):
        path = root / f"{family}-{seed}"
        if not path.exists():
            build_pipeline(family, seed).save_pretrained(path)
        return path

    return folder


def picture(seed, size=(48, 40)):
    """A colourful picture that no other seed makes."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path):
    """A folder of three photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*flags) -> (exit status, standard output, standard error) of the program, in an empty working folder."""
    import dreambooth_implementation as db
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(tmp_path)

    def call(*flags):
        AcceleratorState._reset_state(reset_partial_state=True)  # it is one per process, and keeps the first precision
        capsys.readouterr()  # what building a model printed is not the program's
        status = db.main([str(flag) for flag in flags])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """Folders of a random ViTModel and a random CLIPModel that see 16 pixels."""
    import torch
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    root = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=1.0)
    pixels = dict(image_size=16, patch_size=8)
    ViTModel(ViTConfig(**tower, **pixels), add_pooling_layer=False).save_pretrained(root / "vit")
    look = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (root / "vit" / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor", **look}))
    text = dict(tower, vocab_size=397, max_position_embeddings=32, bos_token_id=395, eos_token_id=396, pad_token_id=396)
    CLIPModel(CLIPConfig(text_config=text, vision_config=tower | pixels, projection_dim=8)).save_pretrained(root / "clip")
    (root / "clip" / "preprocessor_config.json").write_text(json.dumps(
        {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, **look}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPOSITORY / "demo" / "metrics" / "clip" / name, root / "clip")
    return root

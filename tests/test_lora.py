"""LoRA, and its file in Kohya's layout."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dreambooth_implementation as db


@pytest.mark.parametrize("flags", [["--use_dora", "--lora_target", "all", "--lora_alpha", "5"], ["--lora_target", "all"]],
                         ids=" ".join)
def test_the_kohya_file_makes_the_same_weights(flags, train_adapter, tiny_model, tmp_path):
    """Merged as ComfyUI merges it, scale * up @ down and then DoRA's norm per output, it is what diffusers fuses."""
    from diffusers import StableDiffusionPipeline

    train_adapter("sd1", "lora", *flags)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model("sd1"))
    unet = pipe.unet
    names = {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": name for name in unet.state_dict()}
    expected = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    kohya = load_file(tmp_path / "output" / db.KOHYA_FILE)
    layers = {name.split(".")[0] for name in kohya}
    for layer in layers:
        weight, up, down = expected[names[layer]], kohya[f"{layer}.lora_up.weight"], kohya[f"{layer}.lora_down.weight"]
        scale = kohya[f"{layer}.alpha"] / len(down)
        new = weight + scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        if f"{layer}.dora_scale" in kohya:
            norm = new.flatten(1).norm(dim=1).reshape(-1, *[1] * (new.dim() - 1))
            assert kohya[f"{layer}.dora_scale"].shape == norm.shape
            new = new * kohya[f"{layer}.dora_scale"] / norm
        expected[names[layer]] = new
    pipe.load_lora_weights(tmp_path / "output")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = unet.state_dict()
    assert len(layers) > 20 and fused.keys() == expected.keys()
    for name in fused:
        torch.testing.assert_close(fused[name], expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("flags", [["--lora_alpha", "5", "--rank", "2"], ["--lora_target", "all"]], ids=" ".join)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_kohya_file_is_the_same_lora(family, flags, train_adapter, tiny_model, tmp_path):
    """Loaded by diffusers, which converts Kohya's names, it gives the same UNet output as its own file."""
    from diffusers import DiffusionPipeline

    train_adapter(family, "lora", "--train_text_encoder", *flags)
    names = load_file(tmp_path / "output" / db.KOHYA_FILE)
    parts = {name.split("_down_blocks")[0].split("_text_model")[0] for name in names
             if "down_blocks" in name or "text_model" in name}
    assert parts == ({"lora_unet", "lora_te1", "lora_te2"} if family == "sdxl" else {"lora_unet", "lora_te"})
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight" in names
    alpha = float(flags[1]) if flags[0] == "--lora_alpha" else 16.0
    assert {tensor.item() for name, tensor in names.items() if name.endswith(".alpha")} == {alpha}

    pictures = []
    for file in (db.LORA_FILE, db.KOHYA_FILE):
        pipe = DiffusionPipeline.from_pretrained(tiny_model(family))
        pipe.load_lora_weights(tmp_path / "output", weight_name=file)
        look = dict(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
        pictures.append(pipe("a dog", **look).images)
    np.testing.assert_allclose(pictures[0], pictures[1], atol=1e-4)

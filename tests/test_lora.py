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


# ---- transformers, whose layers other programs call otherwise

QKV, TEXT_QKV = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def within(stem, *ends):
    return [stem + end for end in ends]


NAMES = {
    "z-image": {"diffusion_model.layers.1.attention.to_q": (("layers.1.attention.to_q",), (32, 32)),
                "diffusion_model.context_refiner.0.feed_forward.w2": (("context_refiner.0.feed_forward.w2",), (32, 85))},
    "flux": {"lora_unet_double_blocks_1_img_attn_qkv": (within("transformer_blocks.1.attn.", *QKV), (96, 32)),
             "lora_unet_double_blocks_0_txt_mod_lin": (("transformer_blocks.0.norm1_context.linear",), (192, 32)),
             "lora_unet_single_blocks_1_linear1": (
                 (*within("single_transformer_blocks.1.attn.", *QKV), "single_transformer_blocks.1.proj_mlp"), (224, 32))},
    "flux2-klein": {
        "lora_unet_double_blocks_0_txt_attn_qkv": (within("transformer_blocks.0.attn.", *TEXT_QKV), (96, 32)),
        "lora_unet_single_blocks_0_linear1": (("single_transformer_blocks.0.attn.to_qkv_mlp_proj",), (288, 32)),
        "lora_unet_double_stream_modulation_img_lin": (("double_stream_modulation_img.linear",), (192, 32))},
    "qwen-image": {"lora_unet_transformer_blocks_1_attn_to_out_0": (("transformer_blocks.1.attn.to_out.0",), (32, 32)),
                   "lora_unet_transformer_blocks_0_img_mod_1": (("transformer_blocks.0.img_mod.1",), (192, 32))},
    "sd3.5-without-t5": {
        "lora_unet_joint_blocks_0_x_block_attn2_qkv": (within("transformer_blocks.0.attn2.", *QKV), (192, 64)),
        "lora_unet_joint_blocks_1_context_block_attn_qkv": (within("transformer_blocks.1.attn.", *TEXT_QKV), (192, 64))}}
NAMES["flux2"], NAMES["sd3"] = NAMES["flux2-klein"], {}


def lora_of_whole_numbers(tiny_model, family, target, rank=4, alpha=2):
    """(models, {layer: (down, up)} with random whole numbers, whose products are exact, the file for other programs)."""
    from peft import get_peft_model_state_dict

    models = db.load_models(str(tiny_model(family)), torch.float32)
    s = db.Settings("train", method="lora", rank=rank, lora_alpha=alpha)
    db.add_adapter(s, models.denoiser, target_modules=models.family.lora_targets[target])
    torch.manual_seed(1)
    tensors = {name: torch.randint(-8, 9, tensor.shape).float()
               for name, tensor in get_peft_model_state_dict(models.denoiser, save_embedding_layers=False).items()}
    pairs = {name.removesuffix(".lora_A.weight"): (tensor, tensors[name.replace("lora_A", "lora_B")])
             for name, tensor in tensors.items() if "lora_A" in name}
    return models, pairs, db.lora_elsewhere(models.family, models, models.family.denoiser, tensors, alpha)


def product(file, layer):
    down = file[f"{layer}.lora_down.weight"]
    return file[f"{layer}.alpha"] / len(down) * (file[f"{layer}.lora_up.weight"] @ down)


@pytest.mark.parametrize("target", ["attention", "all"])
@pytest.mark.parametrize("family", NAMES)
def test_layers_have_other_programs_names_and_change_as_much(family, target, tiny_model):
    """Each product, times alpha / rank, is what the layers' own are, below each other; a layer without LoRA changes by nothing."""
    models, pairs, file = lora_of_whole_numbers(tiny_model, family, target)
    layers = {name.rsplit(".lora_down", 1)[0] for name in file if "lora_down" in name}
    assert len(file) == 3 * len(layers) and sum(product(file, layer).any() for layer in layers) == len(layers)
    whole = sum((2 / 4 * (up @ down)).double().square().sum() for down, up in pairs.values())
    assert sum(product(file, layer).double().square().sum() for layer in layers) == whole
    for layer, (ours, shape) in NAMES[family].items():
        if not set(ours) & set(pairs):
            assert target == "attention"
            continue
        wanted = [2 / 4 * pairs[name][1] @ pairs[name][0] if name in pairs else
                  torch.zeros_like(models.denoiser.get_submodule(name).weight) for name in ours]
        assert product(file, layer).shape == shape and torch.equal(product(file, layer), torch.cat(wanted))
        assert file[f"{layer}.alpha"].item() == 2 * sum(name in pairs for name in ours)
    if target == "all":
        assert set(NAMES[family]) <= layers


@pytest.mark.parametrize("family", ["sd3", "sd3.5-without-t5"])
def test_stable_diffusion_3s_last_text_layer_has_the_shift_first(family, tiny_model):
    _, pairs, file = lora_of_whole_numbers(tiny_model, family, "all")
    for number, is_swapped in ((0, False), (1, True)):
        down, up = pairs[f"transformer_blocks.{number}.norm1_context.linear"]
        first, second = up.chunk(2)
        wanted = torch.cat([second, first]) if is_swapped else up
        assert torch.equal(file[f"lora_unet_joint_blocks_{number}_context_block_adaLN_modulation_1.lora_up.weight"], wanted)

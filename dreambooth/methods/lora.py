"""LoRA (Hu et al., arXiv 2106.09685): low-rank changes beside the layers, saved as diffusers and as Kohya's tools load them."""

import re

from dreambooth.base import default
from dreambooth.methods.groups import ParameterGroup
from dreambooth.models.notes import with_kind
from dreambooth.models.parts import layers_read, text_encoders_of

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LORA_TARGETS = {
    "attention": ATTENTION,
    "attention+ff": [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"],
    "all": [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "conv",
            "time_emb_proj"],
}


def add_lora(s, module, **options):
    """Give `module` a LoRA (Hu et al., arXiv 2106.09685) that changes nothing yet; returns its parameters."""
    from peft import LoraConfig

    module.add_adapter(LoraConfig(r=s.rank, lora_alpha=s.lora_alpha or s.rank, init_lora_weights="gaussian",
                                  lora_dropout=s.lora_dropout or 0.0, **options))
    return [parameter for name, parameter in module.named_parameters() if "lora_" in name]


def unet_lora(s, models, subjects, recipe):
    """Low-rank changes of the UNet's layers."""
    parameters = add_lora(s, models.unet, target_modules=LORA_TARGETS[recipe.lora_target], use_dora=s.use_dora)
    return ParameterGroup("unet_lora", [models.unet], parameters, default(s.learning_rate, recipe.learning_rate))


def text_encoder_lora(s, models, subjects, recipe):
    """Low-rank changes of the text encoders' attention; never DoRA, whose magnitudes diffusers would not load again."""
    parameters = [parameter for text_encoder in models.text_encoders for parameter in add_lora(
        s, text_encoder, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"],
        layers_to_transform=list(range(layers_read(models, text_encoder))), layers_pattern="layers")]
    return ParameterGroup("text_encoder_lora", models.text_encoders, parameters,
                          default(s.text_encoder_lr, recipe.text_encoder_lr))


LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya_lora.safetensors"


def save_lora(folder, models, subjects, notes):
    """Write the LoRA twice: as diffusers loads it, with its alpha as metadata, and as Kohya's tools, ComfyUI and A1111 do, with
    {note: text} of its model."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    parts = {"unet": models.unet, **text_encoders_of(models.pipeline)}
    parts = {part: module for part, module in parts.items() if hasattr(module, "peft_config")}
    weights, kohya = {}, {}
    for part, module in parts.items():
        tensors = get_peft_model_state_dict(module, save_embedding_layers=False)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        if part != "unet":  # transformers 5.6 dropped this prefix; every tool knows it
            tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
        config = module.peft_config["default"]
        weights[f"{part}_lora_layers"] = tensors
        kohya |= kohya_lora(kohya_prefix(models, part), tensors, config.lora_alpha)
    type(models.pipeline).save_lora_weights(folder, **weights, **_collate_lora_metadata(parts))
    save_file(kohya, folder / KOHYA_FILE, with_kind(notes, "lora", {
        "ss_network_module": "networks.lora", "ss_network_dim": str(config.r), "ss_network_alpha": str(config.lora_alpha)}))


def kohya_lora(prefix, tensors, alpha):
    """A LoRA's tensors under Kohya's names: lora_unet_down_blocks_0_..._to_q.lora_down.weight, .lora_up.weight, .alpha."""
    import torch

    renamed = {}
    for name, tensor in tensors.items():
        layer, kind = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", name).groups()
        layer = f"{prefix}_{layer.replace('.', '_')}"
        if kind == "lora_magnitude_vector":
            renamed[f"{layer}.dora_scale"] = tensor.reshape(-1, *[1] * max(1, tensor.dim() - 1))  # [out, 1(, 1, 1)]
        else:
            renamed[f"{layer}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = tensor
            renamed[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return renamed


def kohya_prefix(models, part):
    """What Kohya's tools call a part of a model: lora_unet, lora_te, and for SDXL lora_te1 and lora_te2."""
    if part == "unet":
        return "lora_unet"
    return "lora_te" if len(models.text_encoders) == 1 else {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[part]

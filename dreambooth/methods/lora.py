"""LoRA (Hu et al., arXiv 2106.09685): low-rank changes beside the layers, saved as diffusers and as Kohya's tools load them."""

import re

from dreambooth.base import default
from dreambooth.methods.groups import ParameterGroup
from dreambooth.models.families.family import text_encoders_of
from dreambooth.models.notes import with_kind


def add_lora(s, module, **options):
    """Give `module` a LoRA (Hu et al., arXiv 2106.09685) that changes nothing yet; returns its parameters."""
    from peft import LoraConfig

    module.add_adapter(LoraConfig(r=s.rank, lora_alpha=s.lora_alpha or s.rank, init_lora_weights="gaussian",
                                  lora_dropout=s.lora_dropout or 0.0, **options))
    return [parameter for name, parameter in module.named_parameters() if "lora_" in name]


def denoiser_lora(s, models, subjects, recipe):
    """Low-rank changes of the denoiser's layers."""
    parameters = add_lora(s, models.denoiser, target_modules=models.family.lora_targets[recipe.lora_target], use_dora=s.use_dora)
    return ParameterGroup(f"{models.family.denoiser}_lora", [models.denoiser], parameters, default(s.learning_rate, recipe.learning_rate))


def text_encoder_lora(s, models, subjects, recipe):
    """Low-rank changes of the text encoders' attention; never DoRA, whose magnitudes diffusers would not load again."""
    text_encoders = [text_encoder for _, text_encoder in models.readers]
    parameters = [parameter for text_encoder in text_encoders for parameter in add_lora(
        s, text_encoder, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"],
        layers_to_transform=list(range(models.family.text_layers(models, text_encoder))), layers_pattern="layers")]
    return ParameterGroup("text_encoder_lora", text_encoders, parameters,
                          default(s.text_encoder_lr, recipe.text_encoder_lr))


LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya_lora.safetensors"


def save_lora(folder, models, subjects, notes):
    """Write the LoRA twice: as diffusers loads it, with its alpha as metadata, and as Kohya's tools, ComfyUI and A1111 do, with
    {note: text} of its model."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    family = models.family
    parts = {family.denoiser: models.denoiser, **text_encoders_of(models.pipeline)}
    parts = {part: module for part, module in parts.items() if hasattr(module, "peft_config")}
    weights, kohya = {}, {}
    for part, module in parts.items():
        tensors = get_peft_model_state_dict(module, save_embedding_layers=False)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        if part != family.denoiser:  # transformers 5.6 dropped this prefix; every tool knows it
            tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
        config = module.peft_config["default"]
        weights[f"{part}_lora_layers"] = tensors
        if prefix := family.kohya_prefix(models, part):
            kohya |= kohya_lora(prefix, tensors, config.lora_alpha)
    type(models.pipeline).save_lora_weights(folder, **weights, **_collate_lora_metadata(parts))
    if kohya:
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

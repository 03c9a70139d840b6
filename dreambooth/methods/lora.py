"""LoRA (Hu et al., arXiv 2106.09685): low-rank changes beside the layers, saved as diffusers and as other programs load them.

What --adapter_type puts in its place, which diffusers does not load, is saved in PEFT's own folders.
"""

import copy

from dreambooth.base import default
from dreambooth.methods.adapters import add_adapter, lycoris_names
from dreambooth.methods.groups import ParameterGroup
from dreambooth.methods.lora_elsewhere import lora_elsewhere
from dreambooth.models.families.family import text_encoders_of
from dreambooth.models.notes import with_kind


def denoiser_lora(s, models, subjects, recipe):
    """Low-rank changes of the denoiser's layers."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = models.family.lora_targets[recipe.lora_target]
    unread = [layer for layer in models.family.unread_layers(models.denoiser)
              if check_target_module_exists(LoraConfig(target_modules=targets), layer)]  # PEFT warns of others
    parameters = add_adapter(s, models.denoiser, target_modules=targets, use_dora=s.use_dora, exclude_modules=unread or None)
    return ParameterGroup(f"{models.family.denoiser}_{s.adapter_type or 'lora'}", [models.denoiser], parameters,
                          default(s.learning_rate, recipe.learning_rate))


def text_encoder_lora(s, models, subjects, recipe):
    """Low-rank changes of the text encoders' attention; never DoRA, whose magnitudes diffusers would not load again."""
    text_encoders = [text_encoder for _, text_encoder in models.readers]
    parameters = [parameter for text_encoder in text_encoders for parameter in add_adapter(
        s, text_encoder, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"],
        layers_to_transform=list(range(models.family.text_layers(models, text_encoder))), layers_pattern="layers")]
    return ParameterGroup(f"text_encoder_{s.adapter_type or 'lora'}", text_encoders, parameters,
                          default(s.text_encoder_lr, recipe.text_encoder_lr))


LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya_lora.safetensors"
PEFT, PEFT_CONFIG, PEFT_FILE = "base_model.model.", "adapter_config.json", "adapter_model.safetensors"


def adapted_parts(models):
    """{part of the pipeline: module} of those that have an adapter."""
    parts = {models.family.denoiser: models.family.denoiser_of(models.pipeline), **text_encoders_of(models.pipeline)}
    return {part: module for part, module in parts.items() if hasattr(module, "peft_config")}


def save_lora(folder, models, subjects, notes):
    """Write what stands beside the layers: of a LoRA the files of save_as_lora(), of anything else those of save_in_folders()."""
    kinds = {config.peft_type.value for module in adapted_parts(models).values() for config in module.peft_config.values()}
    (save_as_lora if kinds == {"LORA"} else save_in_folders)(folder, models, notes)


def save_in_folders(folder, models, notes):
    """Write an adapter as PeftModel.from_pretrained() loads it, a folder for each part of the model, and a LoKr as ComfyUI and A1111
    do, too, with {note: text} of its model."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    others = {}
    for part, module in adapted_parts(models).items():
        config = copy.copy(module.peft_config["default"])
        config.inference_mode = True
        tensors = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(module).items()}
        config.save_pretrained(folder / part)
        save_file({f"{PEFT}{name}": tensor for name, tensor in tensors.items()}, folder / part / PEFT_FILE, {"format": "pt"})
        if "lokr" in models.family.exports and config.peft_type.value == "LOKR":
            known = tensors if part == models.family.denoiser else {as_tools_know(name): tensor for name, tensor in tensors.items()}
            others |= lycoris_names(models.family.lora_prefixes[part], known, config)
    if others:
        save_file(others, folder / KOHYA_FILE, with_kind(notes, "lora", {
            "ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "lokr"}', "ss_network_dim": str(config.r),
            "ss_network_alpha": str(config.r)}))


def as_tools_know(name):
    """The name of a text encoder's tensor with a prefix that every tool knows; transformers 5.6 dropped it."""
    return f"text_model.{name.removeprefix('text_model.')}"


def save_as_lora(folder, models, notes):
    """Write the LoRA twice: as diffusers loads it, with its alpha as metadata, and, if its family exports it, as ComfyUI and others
    do, with {note: text} of its model."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    family, parts = models.family, adapted_parts(models)
    kind = "dora" if any(module.peft_config["default"].use_dora for module in parts.values()) else "lora"
    weights, elsewhere = {}, {}
    for part, module in parts.items():
        tensors = get_peft_model_state_dict(module, save_embedding_layers=False)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        if part != family.denoiser:
            tensors = {as_tools_know(name): tensor for name, tensor in tensors.items()}
        config = module.peft_config["default"]
        weights[f"{part}_lora_layers"] = tensors
        if kind in family.exports:
            elsewhere |= lora_elsewhere(family, models, part, tensors, config.lora_alpha)
    type(models.pipeline).save_lora_weights(folder, **weights, **_collate_lora_metadata(parts))
    if elsewhere:
        save_file(elsewhere, folder / KOHYA_FILE, with_kind(notes, "lora", {
            "ss_network_module": "networks.lora", "ss_network_dim": str(config.r), "ss_network_alpha": str(config.lora_alpha)}))

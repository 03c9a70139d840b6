"""What a folder or a file holds that is no whole Stable Diffusion model, and what to do with it: tables of signs."""

import re

from dreambooth.models.headers import read_json

# What somebody names as a model: a pattern that some tensor's name has -> what it is. The first that fits.
FOREIGN_KINDS = (
    (r"distilled_guidance_layer\.", "a Chroma model"),
    (r"\bdouble_stream_modulation_img\.", "a FLUX.2 model"),
    (r"\bdouble_blocks\.0\.img_attn|\bsingle_transformer_blocks\.0\.", "a model of the Flux kind"),
    (r"\bjoint_blocks\.0\.", "a Stable Diffusion 3 model"),
    (r"\btransformer_blocks\.0\.img_mod\.1\.", "a Qwen-Image model"),
    (r"\bnoise_refiner\.0\.adaLN_modulation\.0\.", "a Z-Image model"))
# Those of them that are trained as a whole: {what it is: the hub id of a diffusers pipeline}.
PIPELINES_OF_KINDS = {"a FLUX.2 model": "black-forest-labs/FLUX.2-klein-base-4B", "a model of the Flux kind": "black-forest-labs/FLUX.1-dev",
                      "a Stable Diffusion 3 model": "stabilityai/stable-diffusion-3.5-medium", "a Qwen-Image model": "Qwen/Qwen-Image",
                      "a Z-Image model": "Tongyi-MAI/Z-Image"}
PART_KINDS = (
    (r"lora_(up|down|A|B)\b|\.lora\.(up|down)|hada_w1_a|lokr_w1|oft_blocks|\.diff(_b)?$|_lora\.", "a LoRA or the like, to be added to "
     "a model with --adapter when drawing"),
    (r"^conditioner\.embedders\.0\.model\.", "an SDXL refiner, which only finishes pictures"),
    (r"^control_model\.|controlnet_cond_embedding|^zero_convs|^input_hint_block", "a ControlNet"),
    (r"^emb_params$|^string_to_param|^clip_[lg]$", "an embedding, to be added to a model with --adapter when drawing"),
    (r"^(model\.)?(transformer_blocks|blocks|layers)\.\d+\.|^net\.|pipe\.|patch_embed|x_embedder", "a transformer model of another kind"),
    (r"^down_blocks\.\d+\.(resnets|attentions)", "a UNet alone, as diffusers names it"),
    (r"^(en|de)coder\.(down|up|mid|conv_in|mid_block|down_blocks|up_blocks)", "a VAE alone"),
    (r"^(text_model\.)?encoder\.layers\.\d+|^transformer\.resblocks", "a text encoder alone"))
# The same for a folder: a class that a config.json names.
FOLDER_KINDS = {"UNet2DConditionModel": "a UNet alone", "ControlNetModel": "a ControlNet", "AutoencoderKL": "a VAE alone",
                "CLIPTextModel": "a text encoder alone", "CLIPTextModelWithProjection": "a text encoder alone"}
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json")


def kind_of_file(names, kinds):
    """What a file with tensors of these names is, as a phrase; "" if nothing known."""
    return next((kind for sign, kind in kinds if any(re.search(sign, name) for name in names)), "")


def kind_of_folder(folder):
    """What a folder without a model_index.json is, and what to give instead, as a phrase."""
    if any((folder / file).is_file() for file in LORA_FILES):
        return f"it holds a LoRA, to be added to a model with --adapter {folder} when drawing; give a diffusers pipeline folder"
    config = read_json(folder / "config.json")
    kind = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    if kind:
        parent = f", such as {folder.parent}" if (folder.parent / "model_index.json").is_file() else ""
        return f"it holds {FOLDER_KINDS.get(kind, f'a {kind}')}; give a whole diffusers pipeline folder{parent}"
    if files := sorted(path for path in folder.iterdir() if path.suffix.lower() == ".safetensors" and path.is_file()):
        return f"it holds single files; give one of them, such as {files[0]}"
    return "give a diffusers pipeline folder"

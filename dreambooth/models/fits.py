"""Whether the parts of a pipeline fit together, and whether they are such as this program trains: asked of their configs.

A model that draws well may still be one that must not be trained here, since its noise is not that of DDPM (Ho et al., arXiv
2006.11239) or its latents are shifted: it would learn from made-up noise, without a sign of it.
"""

import math
import re
from pathlib import Path

from dreambooth.base import UserError, say
from dreambooth.models.headers import read_json
from dreambooth.models.inventory import CONFIGS, parts_of

TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
# What a UNet takes beside or instead of noise and text: its config's key and value -> what that makes it.
OTHER_CHANNELS = {9: "an inpainting model", 5: "a depth model", 8: "a model that edits pictures", 7: "an upscaler"}
SCALES = (0.18215, 0.13025)  # of the latents of Stable Diffusion 1.x and 2.x, of SDXL
DISTILLED_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
DISTILLED_NAME = r"turbo|lightning|hyper-?sd|(?<![a-z])(lcm|dmd2?|schnell|distilled)(?![a-z])"


def numbers(value):
    """The different numbers in a config's value, which is one or a list of them: 768, or [768, 768]."""
    return sorted({value} if isinstance(value, (int, float)) else {part for part in value or [] if isinstance(part, (int, float))})


def check_fit(folder, name, flag):
    """UserError unless the configs in a pipeline's folder are those of parts that fit together."""
    index = read_json(Path(folder) / "model_index.json")
    configs = {part: read_json(Path(folder) / part / CONFIGS[part]) for part in parts_of(index) if part in CONFIGS}
    for part, config in configs.items():
        if not config:
            raise UserError(f"{flag} {name}: its {part}/{CONFIGS[part]} cannot be read; copy or download it again")
        if config.get("quantization_config"):
            raise UserError(f"{flag} {name}: its {part} is quantized; give the model in float32, bf16 or fp16")
    is_xl = index.get("_class_name") == "StableDiffusionXLPipeline"
    wanted = ["unet", "vae", "text_encoder"] + ["text_encoder_2"] * is_xl
    if lost := [part for part in wanted if part not in configs]:
        raise UserError(f"{flag} {name}: its model_index.json lists no {lost[0]}"
                        + (" (an SDXL refiner?)" if is_xl and "text_encoder_2" in configs else "") + "; give a whole text-to-image model")
    try:
        trouble = misfit(configs, is_xl)
    except TypeError:
        trouble = "one of its configs has something else where a number belongs; copy or download it again"
    if trouble:
        raise UserError(f"{flag} {name}: {trouble}")


def misfit(configs, is_xl):
    """What does not fit between the parts of a pipeline, with a remedy, as a phrase; "" if all does."""
    unet, latents = configs["unet"], configs["vae"].get("latent_channels", 4)
    channels = unet.get("in_channels", 4)
    if channels != latents:
        kind = OTHER_CHANNELS.get(channels)
        kind = f"{kind}?" if kind else f"its VAE makes {latents}; is that of another kind of model?"
        return f"its UNet takes {channels} channels ({kind}); give a text-to-image model"
    if is_xl != (unet.get("addition_embed_type") == "text_time"):
        return f"its UNet is {'not ' if is_xl else ''}one of SDXL, but the rest is{'' if is_xl else ' not'}; give parts of one model"
    if unet.get("class_embed_type") or unet.get("num_class_embeds"):
        return "its UNet wants a class or a noise level beside the prompt (an upscaler?); give a text-to-image model"
    widths = [configs[part].get("hidden_size") for part in ("text_encoder", "text_encoder_2") if part in configs]
    takes = numbers(unet.get("encoder_hid_dim") or unet.get("cross_attention_dim", 1280))
    if None not in widths and takes != [sum(widths)]:
        return (f"its UNet attends to {' or '.join(map(str, takes))} text channels, but its text encoder{'s make' if is_xl else ' makes'} "
                f"{' + '.join(map(str, widths))}; the parts are of different models")
    return ""


def check_trainable(pipeline, name, flag="--model_name"):
    """UserError unless a loaded pipeline's noise, latents and text are those that the loss is made for."""
    scheduler, config, vae = type(pipeline.scheduler).__name__, pipeline.scheduler.config, pipeline.vae.config
    has_betas = config.get("beta_start") is not None or config.get("trained_betas") is not None
    flows = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if not has_betas or flows or "FlowMatch" in scheduler or scheduler.startswith("EDM"):
        raise UserError(f"{flag} {name}: its scheduler, {scheduler}, is not of the DDPM kind (it has no betas: EDM or flow matching), and "
                        f"training with made-up noise would spoil the model; give a model of the DDPM kind")
    if config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise UserError(f"{flag} {name}: prediction type {config.prediction_type} is not supported; give a model that predicts epsilon or "
                        f"velocity")
    if type(pipeline.vae).__name__ != "AutoencoderKL":
        raise UserError(f"{flag} {name}: its VAE is an {type(pipeline.vae).__name__}, which only draws; give a model with an AutoencoderKL")
    shifted = {"latents_mean": 0, "latents_std": 1, "shift_factor": 0}
    if own := [key for key, usual in shifted.items() if vae.get(key) is not None and numbers(vae[key]) != [usual]]:
        raise UserError(f"{flag} {name}: its VAE has {' and '.join(own)} of its own, which training does not know; give a model whose "
                        f"VAE has a scaling_factor alone")
    scale, is_xl = vae.get("scaling_factor"), pipeline.components.get("text_encoder_2") is not None
    if not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
        raise UserError(f"{flag} {name}: the scaling_factor of its VAE is {scale}; write the right one into vae/config.json "
                        f"(Stable Diffusion's is 0.18215, SDXL's 0.13025)")
    if math.isclose(scale, SCALES[not is_xl], rel_tol=0.001):
        say(f"Note: {name}: its VAE has the scaling_factor of {'Stable Diffusion' if is_xl else 'SDXL'}, {scale}; if it is that "
            f"one's VAE, what is learnt is spoilt.")
    for part in ("text_encoder", "text_encoder_2"):
        kind = type(pipeline.components.get(part)).__name__
        if kind not in (*TEXT_ENCODERS, "NoneType"):
            raise UserError(f"{flag} {name}: its {part} is a {kind}; give a model with CLIP's")


def is_distilled(pipeline, name):
    """Whether a model seems to be distilled for few steps: by its scheduler, its UNet, or the last part of its name."""
    scheduler, config = type(pipeline.scheduler).__name__, pipeline.scheduler.config
    is_turbo = scheduler == "EulerAncestralDiscreteScheduler" and config.get("timestep_spacing") == "trailing"
    return (scheduler in DISTILLED_SCHEDULERS or is_turbo or bool(pipeline.unet.config.get("time_cond_proj_dim"))
            or bool(re.search(DISTILLED_NAME, Path(name).name.lower())))


def say_if_distilled(pipeline, name, trains):
    """Say what follows where a model seems to be distilled for few steps."""
    if is_distilled(pipeline, name):
        advice = ("training undoes that, so the result needs as many steps as any, and the model that it was distilled from learns "
                  "better" if trains else "--num_inference_steps 4 --guidance_scale 1, or what its card says, suit it better than many")
        say(f"Note: {name} seems to be distilled for few steps: {advice}.")

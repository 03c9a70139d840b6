"""Whether the parts of a pipeline fit together, and whether it was distilled for few steps: asked of configs."""

import re
from pathlib import Path

from dreambooth.base import UserError, say
from dreambooth.models.families.known import family_named, family_of
from dreambooth.models.headers import read_json
from dreambooth.models.inventory import CONFIGS, parts_of

DISTILLED_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
DISTILLED_NAME = r"turbo|lightning|hyper-?sd|(?<![a-z])(lcm|dmd2?|schnell|distilled)(?![a-z])"


def check_fit(folder, name, flag):
    """UserError unless the configs in a pipeline's folder are those of parts that fit together."""
    index = read_json(Path(folder) / "model_index.json")
    configs = {part: read_json(Path(folder) / part / CONFIGS[part]) for part in parts_of(index) if part in CONFIGS}
    for part, config in configs.items():
        if not config:
            raise UserError(f"{flag} {name}: its {part}/{CONFIGS[part]} cannot be read; copy or download it again")
        if config.get("quantization_config"):
            raise UserError(f"{flag} {name}: its {part} is quantized; give the model in float32, bf16 or fp16")
    family = family_named(index.get("_class_name"))
    if lost := [part for part in family.parts if part not in configs]:
        refiner = " (an SDXL refiner?)" if "text_encoder" not in configs and "text_encoder_2" in configs else ""
        raise UserError(f"{flag} {name}: its model_index.json lists no {lost[0]}{refiner}; give a whole text-to-image model")
    try:
        trouble = family.misfit(index, configs)
    except TypeError:
        trouble = "one of its configs has something else where a number belongs; copy or download it again"
    if trouble:
        raise UserError(f"{flag} {name}: {trouble}")


def is_distilled(pipeline, name):
    """Whether a model seems to be distilled for few steps: by its scheduler, its denoiser, or the last part of its name."""
    scheduler, config = type(pipeline.scheduler).__name__, pipeline.scheduler.config
    denoiser = family_of(pipeline).denoiser_of(pipeline)
    is_turbo = scheduler == "EulerAncestralDiscreteScheduler" and config.get("timestep_spacing") == "trailing"
    return (scheduler in DISTILLED_SCHEDULERS or is_turbo or bool(denoiser.config.get("time_cond_proj_dim"))
            or is_distilled_name(name))


def is_distilled_name(name):
    """Whether the last part of a model's name says that it was distilled."""
    return bool(re.search(DISTILLED_NAME, Path(name).name.lower()))


def say_if_distilled(pipeline, name, trains):
    """Say what follows where a model seems to be distilled for few steps."""
    if is_distilled(pipeline, name):
        advice = ("training undoes that, so the result needs as many steps as any, and the model that it was distilled from learns "
                  "better" if trains else "--num_inference_steps 4 --guidance_scale 1, or what its card says, suit it better than many")
        say(f"Note: {name} seems to be distilled for few steps: {advice}.")

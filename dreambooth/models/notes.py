"""What a file for other programs says of itself in its header, as Stability's ModelSpec and Kohya's tools write it.

A1111 and Forge sort LoRAs by it and show it; pages of models read it. Sources: github.com/Stability-AI/ModelSpec,
github.com/kohya-ss/sd-scripts (library/sai_model_spec.py, train_network.py).
"""

import json
import re
from pathlib import Path

from dreambooth.models.hub import HUB_ID, split_revision

CODE = "https://github.com/Stability-AI/generative-models"  # whose layout is meant
# (channels of the text that a UNet attends to, whether it predicts velocity): (ModelSpec's name, Kohya's) of the architecture. Of
# others, such as the bundled model, nothing is claimed, since no other program has them.
ARCHITECTURES = {(768, False): ("stable-diffusion-v1", "sd_v1"), (768, True): ("stable-diffusion-v1", "sd_v1_v"),
                 (1024, False): ("stable-diffusion-v2-512", "sd_v2"), (1024, True): ("stable-diffusion-v2-768-v", "sd_v2_v"),
                 (2048, False): ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
                 (2048, True): ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")}


def notes_of(unet_config, scheduler, base, subjects, side=None):
    """{note: text} for the header of a model; with_kind() makes them those of something trained on it.

    Two configs, the name of the model that training began with or None, what was learnt, the pixels of the pictures' side or None.
    """
    velocity = scheduler.get("prediction_type") == "v_prediction"
    architecture, version = ARCHITECTURES.get((text_channels(unet_config), velocity), (None, None))
    prompts = [subject.instance_prompt for subject in subjects]
    notes = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": architecture and CODE,
        "modelspec.title": ", ".join(prompts),
        "modelspec.trigger_phrase": ", ".join(prompts),
        "modelspec.resolution": side and f"{side}x{side}",
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        "ss_base_model_version": version,
        "ss_v2": version and str(version.startswith("sd_v2")),
        "ss_sd_model_name": base and name_of(base),
        "ss_resolution": side and f"({side}, {side})",
        "ss_zero_terminal_snr": "True" if scheduler.get("rescale_betas_zero_snr") else None,
        "ss_tag_frequency": json.dumps({subject.name: {subject.instance_prompt: 1} for subject in subjects}) if subjects else None}
    return {key: value for key, value in notes.items() if value}


def name_of(model):
    """What a model is called elsewhere: its id on the hub, or of a folder or file here the last name alone."""
    place = split_revision(model)[0]
    return place if re.fullmatch(HUB_ID, place) and not Path(place).exists() else Path(place).name


def text_channels(unet_config):
    """How many channels the text has that a UNet attends to; None where its layers differ, as no published model's do."""
    width = unet_config.get("cross_attention_dim")
    widths = set(width) if isinstance(width, (list, tuple)) else {width}
    return widths.pop() if len(widths) == 1 else None


def with_kind(notes, kind, more=()):
    """A model's notes as those of a "lora" or "textual-inversion" for it, and some `more`."""
    architecture = notes.get("modelspec.architecture")
    return {**notes, **({"modelspec.architecture": f"{architecture}/{kind}"} if architecture else {}), **dict(more)}

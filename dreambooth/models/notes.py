"""What a file for other programs says of itself in its header, as Stability's ModelSpec and Kohya's tools write it.

A1111 and Forge sort LoRAs by it and show it; pages of models read it. Sources: github.com/Stability-AI/ModelSpec,
github.com/kohya-ss/sd-scripts (library/sai_model_spec.py, train_network.py).
"""

import json
import re
from pathlib import Path

from dreambooth.models.hub import HUB_ID, split_revision


def notes_of(family, config, scheduler, base, subjects, side=None):
    """{note: text} for the header of a model; with_kind() makes them those of something trained on it.

    The configs of the denoiser and the scheduler, the name of the model that training began with or None, what was learnt, the pixels of the pictures' side or None.
    """
    prompts = ", ".join(subject.instance_prompt for subject in subjects)
    notes = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": prompts,
        "modelspec.trigger_phrase": prompts,
        "modelspec.resolution": side and f"{side}x{side}",
        "ss_sd_model_name": base and name_of(base),
        "ss_resolution": side and f"({side}, {side})",
        "ss_tag_frequency": json.dumps({subject.name: {subject.instance_prompt: 1} for subject in subjects}) if subjects else None}
    return {key: value for key, value in {**notes, **family.notes(config, scheduler)}.items() if value}


def name_of(model):
    """What a model is called elsewhere: its id on the hub, or of a folder or file here the last name alone."""
    place = split_revision(model)[0]
    return place if re.fullmatch(HUB_ID, place) and not Path(place).exists() else Path(place).name


def with_kind(notes, kind, more=()):
    """A model's notes as those of a "lora" or "textual-inversion" for it, and some `more`."""
    architecture = notes.get("modelspec.architecture")
    return {**notes, **({"modelspec.architecture": f"{architecture}/{kind}"} if architecture else {}), **dict(more)}

"""What the page knows of the program: how it is called, the fields of its trainings, and what it takes where one is left empty."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import dreambooth_implementation as db

# The fields of a training, in the order of the page; what they mean and may be is the program's.
FIELDS = ("class_prompt", "method", "model_name", "steps", "validation_steps", "train_text_encoder", "num_class_images",
          "learning_rate", "text_encoder_lr", "embedding_lr", "rank", "num_vectors", "resolution", "train_batch_size",
          "random_flip", "select_best", "identifier", "instance_prompt", "max_vram", "seed")
USUAL_MODELS = {"sd14": (db.StableDiffusion(), 512), "sd15": (db.StableDiffusion(), 512), "sd21": (db.StableDiffusion(), 768),
                "sdxl": (db.StableDiffusionXL(), 1024)}  # family and size of those that may not be on this machine yet


def command(flags):
    """What to type, as a list."""
    return [sys.executable, db.__file__, *flags]


def environment():
    """The environment of a command: what it prints comes in UTF-8 on every system, with a bar that moves once a second."""
    return dict(os.environ) | {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace", "DREAMBOOTH_PROGRESS": "bar",
                               "TQDM_MININTERVAL": "1"}


def as_flags(values):
    """Flags of {name: value}; empty ones are left to the program. Each in one piece, so that no text can pass for a flag."""
    flags = []
    for name, value in values.items():
        for part in value if isinstance(value, list) else [value]:
            if part is True:
                flags.append(f"--{name}")
            elif part not in (None, "", False):
                flags.append(f"--{name}={part}")
    return flags


def check_flags(flags):
    """db.UserError, with the program's own line, unless it takes these flags."""
    db.parse_settings([str(flag) for flag in flags])


def field_kinds():
    """[{name, kind, choices, methods, default}] of the fields of a training, out of the program's own list of flags."""
    known = {field.name: field for field in dataclasses.fields(db.Settings)}
    return [kind_of(known[name]) for name in FIELDS]


def kind_of(field):
    kind, _ = db._value_type(field.type)
    choices = field.metadata.get("choices")
    kinds = {bool: "switch", int: "number", float: "number"}
    return {"name": field.name, "kind": "choice" if choices else kinds.get(kind, "text"), "choices": choices or [],
            "methods": field.metadata.get("methods") or [], "default": field.default}


def recipe(values, has_gpu):
    """{field: what the program takes if it is left empty} for a training with these values; only what can be told beforehand."""
    usual = {name: getattr(db.Settings("train"), name) for name in FIELDS}
    shown = {name: value for name, value in usual.items() if value not in (None, "auto") and not isinstance(value, bool)}
    method, with_text = values.get("method") or "full", bool(values.get("train_text_encoder"))
    if method not in db.METHODS:
        return shown
    if not db.METHODS[method].changes_class:
        shown["num_class_images"] = None  # none are drawn
    shown["model_name"] = "sd15" if has_gpu else "demo"
    family, side = look_of_model(values.get("model_name") or shown["model_name"])
    if family is None or method not in family.recipes:
        return shown
    own = db.recipe_for(family, db.Settings("train", method=method, select_best=bool(values.get("select_best"))))
    rates = {"learning_rate": own.learning_rate_with_text_encoder if with_text else own.learning_rate,
             "text_encoder_lr": own.text_encoder_lr if with_text else None, "embedding_lr": own.embedding_lr}
    return shown | {"steps": own.steps, "num_vectors": own.num_vectors, "resolution": side,
                    **{name: rate and f"{rate:g}" for name, rate in rates.items()}}


def look_of_model(name):
    """(family, pixels) of a model by its configs, if they are on this machine, else (None, None)."""
    if name in USUAL_MODELS:
        return USUAL_MODELS[name]
    place = str(db.SHORT_NAMES.get(name, name))
    try:
        index = Path(place) / "model_index.json" if Path(place).is_dir() else db.cached_file(place, "model_index.json")
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
        parts = db.family_named(kind).denoiser, "vae"
        denoiser, vae = (json.loads((index.parent / part / "config.json").read_text(encoding="utf-8")) for part in parts)
        family = db.family_of_configs(kind, denoiser)
        if "unet" in parts:
            return family, denoiser["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
        return family, vae.get("sample_size") or family.side_of_its_own
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return None, None


def machine():
    """{name, has_gpu} of this machine, as the program calls it. Imports torch, for which `look` has a process of its own."""
    import torch

    return {"name": db.machine_name(db.plan_device(db.Settings("infer")).device), "has_gpu": torch.cuda.is_available()}

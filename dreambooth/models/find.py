"""Where a model is: a folder, a hub id, a file or a short name. Nothing is loaded, and torch is not imported."""

import re
from pathlib import Path

from dreambooth.base import UserError, say, say_once, short_path
from dreambooth.models.addresses import is_single_file, located, refuse_other_file, refuse_pickle
from dreambooth.models.checkpoint import checkpoint_configs
from dreambooth.models.families.known import PIPELINES, family_named, known_kinds
from dreambooth.models.fits import check_fit, is_distilled_name
from dreambooth.models.headers import read_json
from dreambooth.models.hub import (
    BUNDLED_MODEL,
    DEFAULT_MODEL,
    HUB_ID,
    MOVED_MODELS,
    SHORT_NAMES,
    hub_file,
    hub_refusal,
    where_cached,
)
from dreambooth.models.inventory import CONFIGS, check_folder, denoiser_of_index
from dreambooth.models.kinds import kind_of_folder


def default_model():
    """Stable Diffusion 1.5 on a CUDA GPU, else the bundled model; says which."""
    import torch

    if torch.cuda.is_available():
        say(f"No --model_name given: using {DEFAULT_MODEL}.")
        return DEFAULT_MODEL
    check_bundled("--model_name is missing, and there is no CUDA GPU")
    say(f"No --model_name and no CUDA GPU: using the small bundled model, {short_path(BUNDLED_MODEL)}, which knows only "
        f"emoji. Give --model_name {DEFAULT_MODEL} for the real one (hours on a CPU).")
    return short_path(BUNDLED_MODEL)


def check_bundled(asked):
    """UserError unless the bundled model is there; `asked` says who wants it."""
    if not BUNDLED_MODEL.is_dir():
        raise UserError(f"{asked}: the bundled model is not beside this program, in {short_path(BUNDLED_MODEL)}; bring the folder "
                        f"demo from the program's repository, or give another model")


def is_short(name):
    """Whether a name, in whatever capitals, is short for a model, and there is no model of that name here."""
    return name.lower() in SHORT_NAMES and not (Path(name) / "model_index.json").is_file()


def named_model(name, flag):
    """What a short name, or the id of a model that moved, stands for; else the name itself. Says so.

    With it, its model_index.json if the cache was asked for that and has it, else None.
    """
    if is_short(name):
        short, name = name, SHORT_NAMES[name.lower()]
        if name == BUNDLED_MODEL:
            check_bundled(f"{flag} {short}")
            name = short_path(name)
        say_once(f"{short} is {name}.")
    if Path(name).exists() or name not in (*MOVED_MODELS, *MOVED_MODELS.values()):
        return name, None
    found, index = where_cached(MOVED_MODELS.get(name, name))
    if name in MOVED_MODELS:
        say_once(f"{name} is no longer on the hub; using " + (f"{found}, the same weights." if found != name else "it from the cache."))
    elif found != name:
        say_once(f"{name} is not in the cache; using {found}, the same weights.")
    return found, index


def find_model(name, flag, revision=None):
    """Folder, hub id (with @REVISION) or file of a model, without importing torch. UserError if there is none of a supported
    kind."""
    name, index = named_model(name if is_short(name) else located(name, flag), flag)
    refuse_pickle(name, flag)
    refuse_other_file(name, flag)
    if revision not in (None, "main"):
        name, index = with_revision(name, revision), None
    index = index or model_index(name, flag)
    kind = read_json(index).get("_class_name")
    if not isinstance(kind, str):
        raise UserError(f"{flag} {name}: its model_index.json cannot be read; the model is damaged")
    if kind not in PIPELINES:
        raise UserError(f"{flag} {name}: it is a {kind}; {known_kinds()} pipelines are supported")
    if Path(name).is_dir():
        check_folder(name, name, flag)
    if Path(name).exists():
        check_fit(index.parent, name, flag)
    return name


def family_at(name, flag):
    """A family of the pipeline that find_model() found; of those of its class, for questions that all answer alike."""
    return family_named(read_json(model_index(name, flag)).get("_class_name"))


def check_undistilled(name, flag):
    """UserError if a model to be trained was distilled for few steps, as far as its name and the configs that are there say.

    Only of families whose models all that is learnt upsets: training is at other noise than the few steps that they know.
    """
    index, family = model_index(name, flag), family_at(name, flag)
    config = read_json(index.parent / family.denoiser / CONFIGS[family.denoiser])
    if family.base_of_distilled and (family.distilled(read_json(index), config) or is_distilled_name(name)):
        raise UserError(f"{flag} {name}: it was distilled for few steps, which training would undo; train {family.base_of_distilled}, which "
                        f"it was made of or is like")


def with_revision(name, revision):
    """ID@REVISION of a hub id; says that a folder or file has no revisions."""
    if Path(name).exists() or name.endswith(".safetensors"):
        say(f"--revision {revision}: no effect, {name} is no repository of the hub but lies here.")
        return name
    if "@" in name and not name.endswith(f"@{revision}"):
        raise UserError(f"--revision {revision}: --model_name {name} names another; leave one out")
    return name if "@" in name else f"{name}@{revision}"


def check_variant(name, variant):
    """UserError if a folder has no weights of --variant."""
    part = denoiser_of_index(read_json(Path(name) / "model_index.json"))
    if variant and Path(name).is_dir() and not any(Path(name).glob(f"{part}/*.{variant}*.safetensors")):
        raise UserError(f"--variant {variant}: {name} has no {part}/*.{variant}.safetensors; leave the flag out")
    if variant and name.endswith(".safetensors"):
        raise UserError(f"--variant {variant}: {name} is one file, which has no variants; leave the flag out")


def model_index(name, flag):
    """Path of the model_index.json of a folder, hub id or file. UserError if there is none."""
    if is_single_file(name):
        return checkpoint_configs(name, flag) / "model_index.json"
    if Path(name).is_dir():
        index = Path(name) / "model_index.json"
        if not index.is_file():
            raise UserError(f"{flag} {name}: this folder has no model_index.json; {kind_of_folder(Path(name))}")
        return index
    if Path(name).exists() or not re.fullmatch(HUB_ID + r"(@[\w./-]+)?", name):
        raise UserError(f"{flag} {name}: not a folder; give a diffusers pipeline folder, a .safetensors "
                        f"checkpoint, {', '.join(SHORT_NAMES)}, or a hub id such as {DEFAULT_MODEL}")
    try:
        return hub_file(name, "model_index.json")
    except Exception as problem:  # whatever the hub's client raises
        raise UserError(f"{flag} {name}: neither a local folder nor in the cache, and {hub_refusal(problem, name)}, or give a folder "
                        f"with this model"
                        + (f", or {short_path(BUNDLED_MODEL)}, which came with the program" if BUNDLED_MODEL.is_dir() else ""),
                        ) from None

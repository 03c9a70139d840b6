"""Networks that look at pictures, each a folder or a hub id: loaded whole and from safetensors, or not at all."""

import json
from pathlib import Path

from safetensors import SafetensorError

from dreambooth.base import UserError
from dreambooth.models.hub import hub_file, hub_refusal

SAFETENSORS_AT = {  # main has only pickles
    "facebook/dino-vits16": "refs/pr/1", "openai/clip-vit-base-patch32": "refs/pr/15", "CIDAS/clipseg-rd64-refined": "refs/pr/5",
    "Salesforce/blip-image-captioning-base": "refs/pr/38"}


def revision_of(name):
    return {"revision": SAFETENSORS_AT[name]} if name in SAFETENSORS_AT and not Path(name).is_dir() else {}


def check_network(flag, name, kind):
    """UserError unless a network of this model_type is at hand, or the hub has one. Neither torch nor the network is loaded."""
    try:
        path = Path(name) / "config.json" if Path(name).is_dir() else hub_file(name, "config.json", **revision_of(name))
        found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except Exception as problem:  # of the file, or whatever the hub's client raises
        raise UserError(f"{flag} {name}: neither a folder with a config.json nor in the cache, and "
                        f"{hub_refusal(problem, name, 'config.json')}; or give another folder or hub id") from None
    if found != kind:
        raise UserError(f"{flag} {name}: a model of type {found}; give one of type {kind}")


def load_network(flag, name, kind, *others, **options):
    """[model of class `kind`, what each of `others` loads beside it]; from the hub only what the cache lacks."""
    import torch
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)  # what goes wrong is raised as well
    transformers.logging.disable_progress_bar()
    for cached_only in (True,) if Path(name).is_dir() else (True, False):
        where = {"local_files_only": cached_only, **revision_of(name)}
        try:
            model, report = kind.from_pretrained(name, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
                                                 **options, **where)
            if report["missing_keys"]:  # transformers would make them up
                raise ValueError(f"its weights lack {min(report['missing_keys'])}")
            return [model.eval(), *(other.from_pretrained(name, **where) for other in others)]
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as problem:
            reason = " ".join(str(problem).split())[:300]
    raise UserError(f"{flag} {name}: cannot be loaded ({reason})")

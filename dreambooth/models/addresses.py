"""Where a model is when somebody gives an address from the browser, a file inside it or a folder around it.

Everything that names a model or an adapter passes through here first.
"""

import re
from pathlib import Path

from dreambooth.base import UserError, say_once, short_path
from dreambooth.models.hub import hub_file, hub_refusal

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
_SOURCE = "give the diffusers folder or .safetensors file it was made of"
OTHER_FILES = {  # suffixes -> what such a file is, and what to give instead
    (".gguf",): f"a GGUF file, in which weights are quantized for other programs; {_SOURCE}",
    (".zip", ".7z", ".rar", ".tar", ".gz", ".tgz", ".xz"): "an archive; unpack it, and give what is in it",
    (".crdownload", ".part", ".partial", ".download", ".incomplete", ".aria2"): "a download that is not finished; download it again",
    (".onnx", ".engine", ".trt", ".tflite", ".mlmodel"): f"a model made for running alone; {_SOURCE}"}
ITSELF = ("model_index.json", "dreambooth.json")  # files that make a folder a model
QUOTES = " \t\r\n\"'`\u2018\u2019\u201c\u201d"
HUB = r"(?:(?:https?:)?//)?(?:www\.)?(?:huggingface\.co|hf\.co|hf-mirror\.com)/|hf://(?:models/)?"


def is_single_file(name):
    """Whether a name is that of a .safetensors file, and not of a folder called so."""
    return name.lower().endswith(".safetensors") and not Path(name).is_dir()


def refuse_other_file(name, flag):
    """UserError for a file that is no model as it lies there."""
    what = next((what for suffixes, what in OTHER_FILES.items() if name.lower().endswith(suffixes)), None)
    if what and Path(name).is_file():
        raise UserError(f"{flag} {name}: {what}")


def refuse_pickle(name, flag):
    """UserError for the name of a file that can run code when it is opened."""
    if name.lower().endswith(PICKLES) and not Path(name).is_dir():
        raise UserError(f"{flag} {name}: not opened, since a {Path(name).suffix} file can run any code on this machine; "
                        f"give its .safetensors form (docs/formats.md says how to convert it)")


def located(name, flag):
    """The folder, hub id or file that a text means: what is pasted is made a name, and what is there is looked at.

    Says what it takes a text for, if it is another. Raises UserError for an address that cannot be taken.
    """
    plain = name.strip(QUOTES)
    if not plain:
        raise UserError(f"{flag}: it is empty; give a folder, a file or a hub id")
    if Path(name).exists():
        plain = name
    else:
        plain = from_address(plain, flag) if re.match(rf"{HUB}|\w+://|www\.", plain, re.IGNORECASE) else local_name(plain)
    found = pipeline_at(plain, flag) if Path(plain).exists() else plain
    if found != name:
        say_once(f"{name} is {found}.")
    return found


def local_name(name):
    """A name without a slash at its end, and with those of this system, if that is where something is."""
    turned = name.replace("\\", "/")
    name = turned if Path(turned).exists() else name
    return name if Path(name).exists() else name.rstrip("/\\")


def from_address(address, flag):
    """The hub id in an address of the hub, or the file in the cache that it names. UserError for other addresses."""
    match = re.fullmatch(rf"(?:{HUB})([^?#]*).*", address, re.IGNORECASE)
    parts = [part for part in match[1].split("/") if part] if match else []
    if address.lower().startswith("file://"):
        return address[7:]
    if not match or len(parts) < 2 or parts[0] in ("spaces", "datasets", "collections", "docs", "papers"):
        raise UserError(f"{flag} {address}: nothing is taken from this address; download the .safetensors file or the diffusers folder "
                        f"from that page and give its path, or give a hub id such as owner/name")
    name, revision, file = "/".join(parts[:2]), parts[3:4], "/".join(parts[4:])
    if revision not in ([], ["main"]):
        raise UserError(f"{flag} {address}: it names the revision {revision[0]}; fetch that with `hf download {name} --revision "
                        f"{revision[0]} --local-dir {parts[1]}` and give the folder {parts[1]}")
    refuse_pickle(file, flag)
    if not is_single_file(file):
        return name
    try:
        return str(hub_file(name, file))
    except Exception as problem:  # whatever the hub's client raises
        raise UserError(f"{flag} {address}: {file} is not in the cache, and {hub_refusal(problem, name, file)}") from None


def pipeline_at(name, flag):
    """The pipeline that a path which exists is, lies in, or holds alone; else the path itself."""
    path = Path(name)
    if path.name in ITSELF and path.is_file():
        return short_path(path.parent)
    if not path.is_dir() or any((path / file).is_file() for file in ITSELF) or any(path.glob("*.safetensors")):
        return name
    within = [folder for pattern in ("*/model_index.json", "snapshots/*/model_index.json") for folder in path.glob(pattern)]
    if (path / "refs" / "main").is_file():  # a model's folder in the hub's cache: the snapshot that is today's
        today = path / "snapshots" / (path / "refs" / "main").read_text(encoding="utf-8").strip()
        within = [index for index in within if index.parent == today] or within
    if len(within) > 1:
        names = ", ".join(sorted(short_path(index.parent) for index in within)[:5])
        raise UserError(f"{flag} {name}: it holds several models; give one of them, such as {names}")
    return short_path(within[0].parent) if within else name

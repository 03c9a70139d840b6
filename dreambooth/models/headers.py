"""What a .safetensors file says of itself: names, shapes and notes of its header. No tensor is read, and torch is not imported."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dreambooth.base import UserError

# What files begin with that have the name of a .safetensors file and are none.
IMPOSTORS = {b"version https://git-lfs": "it is a pointer of git-lfs, not the file: run `git lfs pull` in its repository",
             b"../": "it is a text in place of a link, as in a copy of the hub's cache: copy that with links followed (cp -rL)",
             b"<": "it is a web page, not the file; download it again",
             b"PK\x03\x04": "it is a pickle under another name, which can run any code, and is not opened",
             b"\x80\x02": "it is a pickle under another name, which can run any code, and is not opened",
             b"\x80\x04": "it is a pickle under another name, which can run any code, and is not opened",
             b"GGUF": "it is a GGUF file; give the .safetensors form"}


def read_header(path, flag):
    """({tensor name: shape}, {note: text}) of a .safetensors file. Raises UserError if it cannot be read, whatever it is."""
    if trouble := trouble_with(Path(path)):
        raise UserError(f"{flag} {path}: cannot be read ({trouble})")
    try:
        with safe_open(path, "np") as file:  # tells at once of a header that is damaged, and of a file that is cut off
            notes = file.metadata() or {}
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, notes
    except (OSError, SafetensorError) as problem:
        raise UserError(f"{flag} {path}: cannot be read ({problem}); download or copy it again") from None


def trouble_with(path):
    """Why a path is not a .safetensors file, as far as its first bytes tell; "" if they do not."""
    if not path.exists():
        return "no such file"
    if path.is_dir():
        return "it is a folder"
    try:
        with open(path, "rb") as file:
            start = file.read(32)
    except OSError as problem:
        return problem.strerror
    if not start:
        return "it is empty; download or copy it again"
    length = int.from_bytes(start[:8], "little")
    if len(start) > 8 and start[8:9] == b"{":
        missing = 8 + length - path.stat().st_size
        return f"it is cut off, {missing:,} bytes before its header ends; download or copy it again" if missing > 0 else ""
    return next((trouble for sign, trouble in IMPOSTORS.items() if start.startswith(sign)), "")


def read_json(path):
    """The object in a JSON file; {} where there is none, or something else. UserError for one that this user may not read."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except PermissionError:
        raise UserError(f"{path}: you may not read this file; give yourself the right to, or copy the model") from None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

"""Files that are whole or not there at all, and what can be told of one without loading it.

Knows nothing of what is in them.
"""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from dreambooth.base import UserError, short_path


def read_text(path, flag=""):
    """Text of a file a person wrote. Raises UserError, which begins with `flag`, if it cannot be read or is not UTF-8."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        text = "\0"
    except (OSError, ValueError) as problem:
        raise UserError(f"{flag} {path}: cannot be read ({getattr(problem, 'strerror', None) or problem})".lstrip()) from None
    if "\0" in text:  # UTF-16, most of which passes for UTF-8
        raise UserError(f"{flag} {path}: not UTF-8 text; save it as UTF-8".lstrip())
    return text


def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_sums(path):
    """{file name: sha256} from a file that `sha256sum` could have written; {} where there is none. Last line wins."""
    if not Path(path).is_file():
        return {}
    lines = (line.split(maxsplit=1) for line in Path(path).read_text(encoding="utf-8").splitlines())
    return {parts[1].strip(): parts[0] for parts in lines if len(parts) == 2}


def save_tensors(tensors, path):
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@contextlib.contextmanager
def renamed_when_complete(path):
    """A folder to write files into that takes the name `path` once they are safely on the disk."""
    new = path.with_name(f".{path.name}.new")
    for leftover in (new, path):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    for place in (*new.iterdir(), new):
        flush(place)
    new.rename(path)
    flush(path.parent)


def flush(path):
    """Have the system write a file, or a folder's list of files, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such thing for folders
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_file(path):
    """A name beside `path` to write to, which becomes `path` if the block succeeds."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_file(path, write):
    """Let `write` make a file under another name that then becomes `path`. UserError if it cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_file(path) as part:
            write(part)
    except (OSError, SafetensorError) as problem:
        raise UserError(f"{path}: cannot be written ({problem})") from None


def check_writable(path, flag):
    """UserError unless `path` is, or can be made, a folder to write in."""
    whole = Path(path).resolve()
    existing = next(p for p in (whole, *whole.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        problem = "is write-protected" if existing.is_dir() else "is a file"
        raise UserError(f"{flag} {path}: {short_path(existing)} {problem}; give another folder")


def tidy(folder, keep):
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def unused_name(path):
    """`path` with the first number that makes it new: output-1, output-2, ..."""
    return next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}-{n}")).exists())

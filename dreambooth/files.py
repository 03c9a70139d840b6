"""Files that are whole or not there at all, and what can be told of one without loading it.

Knows nothing of what is in them.
"""

import contextlib
import errno
import glob
import hashlib
import os
import re
import shutil
import stat
import time
import unicodedata
from pathlib import Path

from safetensors import SafetensorError

from dreambooth.base import UserError, say_once, short_path


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


UNSEEN = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")  # joiners, which shape letters, stay
BLANKS = re.compile("[\u00a0\u2000-\u200a\u202f\u205f\u3000]")
LONGEST_NAME = 255  # bytes, on nearly every file system


def given_path(text, flag):
    """A path as a person gave it, with ~ and $NAME replaced as a shell does outside quotes. UserError if nothing can have that
    name."""
    short = ascii(text[:40] + "..." if len(text) > 43 else text)
    if not text.strip():
        raise UserError(f"{flag} is empty; give a path, or leave it out")
    try:
        path = text if "$" in text and os.path.lexists(text) else os.path.expandvars(os.path.expanduser(text))
        longest = max(len(os.fsencode(name)) for name in re.split(r"[/\\]" if os.name == "nt" else "/", path))
    except ValueError:
        path, longest = "\0", 0
    if "\0" in path:
        raise UserError(f"{flag} {short}: no file can have this name; write it anew")
    if longest > LONGEST_NAME or len(os.fsencode(path)) > 4000:
        raise UserError(f"{flag} {short}: too long for a path, of which each part may have {LONGEST_NAME} bytes; give another")
    if unknown := re.match(r"~(?=/|$)|\$(\w+|{\w+})", path):
        if not os.path.lexists(path):
            raise UserError(f"{flag} {short}: {unknown[0]} is not known here; write out what it stands for")
    return path


def given_text(text, flag):
    """A text as a person gave it, without what does not show. UserError if it is not UTF-8, as where a console writes something else."""
    try:
        text.encode()
        return visible(text)
    except UnicodeEncodeError:
        with contextlib.suppress(UnicodeError):
            return visible(os.fsencode(text).decode())  # typed in UTF-8 where the system takes ASCII
        raise UserError(f"{flag} {ascii(text)}: not UTF-8 text; type it in a terminal that is set to UTF-8") from None


def visible(text):
    """`text` as the eye sees it: accents composed, all blanks the usual one, and nothing between letters that pages copy along."""
    return unicodedata.normalize("NFC", UNSEEN.sub("", BLANKS.sub(" ", text)))


def check_room(path, flag, added):
    """UserError unless the file system takes the name of `path` with `added` more letters, for the time of writing."""
    if len(os.fsencode(Path(path).resolve().name)) + added > LONGEST_NAME:
        raise UserError(f"{flag} {ascii(str(path)[:40])}...: the name is too long; leave {added} of the {LONGEST_NAME} bytes that "
                        f"file systems take")


def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_sums(path):
    """{file name: sha256} from a file that `sha256sum` could have written; {} where there is none. Last line wins."""
    if not Path(path).is_file():
        return {}
    lines = (line.split(maxsplit=1) for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines())
    return {parts[1].strip(): parts[0] for parts in lines if len(parts) == 2}


def load_tensors(path, flag):
    """{name: tensor} of a .safetensors file. UserError if it cannot be read."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as problem:
        raise UserError(f"{flag} {path}: cannot be read ({problem}); it is damaged") from None


def save_tensors(tensors, path):
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def share(place):
    """Let others read the files at `place`, a file or folder, as far as the umask has it: safetensors writes for its owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in (place, *place.rglob("*")) if place.is_dir() else (place,):
        with contextlib.suppress(OSError):  # a disk that knows no permissions
            if stat.S_IMODE(path.stat().st_mode) == 0o600 and path.is_file():
                path.chmod(0o666 & ~mask)


def hidden_name(path):
    """What a folder is called until it is complete."""
    return path.with_name(f".{path.name}.new")


@contextlib.contextmanager
def renamed_when_complete(path):
    """A folder to write files into that takes the name `path` once they are safely on the disk."""
    new = hidden_name(path)
    for leftover in (new, path):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        share(new)
        for place in (*new.iterdir(), new):
            flush(place)
        new.rename(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # on a full disk it would be in the way
        raise
    flush(path.parent)


LOSSES = (errno.EIO, errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # what writing to the disk fails with


def flush(path):
    """Have the system write a file, or a folder's list of files, to the disk, where it can be asked to."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such thing for folders
    try:
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno in LOSSES:  # anything else: the file system has no such thing, as some on networks
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_file(path):
    """A name beside `path` to write to, which becomes `path` if the block succeeds."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # two trainings may write the same file
    try:
        yield part
        share(part)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def delete(place):
    """Delete a file or folder; where that is refused, say so and go on."""
    try:
        shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink(missing_ok=True)
    except OSError as problem:
        say_once(f"Note: {short_path(place)} cannot be deleted ({problem.strerror}); delete it when it is no longer in use.")


def write_file(path, write):
    """Let `write` make a file under another name that then becomes `path`. UserError if it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            if time.time() - part.stat().st_mtime > 3600:  # a process that was killed has left it
                delete(part)
        with whole_file(path) as part:
            write(part)
    except (OSError, SafetensorError) as problem:
        raise UserError(f"{path}: cannot be written ({problem})") from None


def check_writable(path, flag):
    """UserError unless `path` is, or can be made, a folder to write in."""
    try:
        whole = Path(path).resolve()
        existing = next(p for p in (whole, *whole.parents) if p.exists())
        is_folder = existing.is_dir()
    except (OSError, RuntimeError) as problem:  # a folder that may not be looked into, links in a circle
        reason = getattr(problem, "strerror", None) or problem
        raise UserError(f"{flag} {path}: cannot be reached ({reason}); give another folder") from None
    if not is_folder or not os.access(existing, os.W_OK | os.X_OK):
        problem = "is write-protected" if is_folder else "is a file"
        raise UserError(f"{flag} {path}: {short_path(existing)} {problem}; give another folder")


def tidy(folder, keep):
    for path in folder.iterdir():
        if path.name not in keep:
            delete(path)


def unused_name(path):
    """`path` with the first number that makes it new: output-1, output-2, ..."""
    return next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}-{n}")).exists())

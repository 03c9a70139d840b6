"""What goes wrong outside of this program - disks, memory, other packages - in one line that names it and the remedy.

Knows nothing of what was being done.
"""

import errno
import importlib
import importlib.metadata
import os
import re
import traceback

from dreambooth.base import HERE, UserError, processes

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

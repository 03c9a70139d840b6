"""Where and in which precision to compute, a CUDA GPU, Apple's or the CPU, and how much memory there is.

Knows nothing of what is computed.
"""

import importlib.util
import math
import os
import shutil
import sys
import typing
from dataclasses import dataclass

from dreambooth.base import GIB, UserError, place_among_processes

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

"""The frozen weights that a LoRA stands on, in fewer bits: by torchao or bitsandbytes, through diffusers' own configs.

The LoRA trains in float32 beside them; the base only passes gradients on (QLoRA, arXiv 2305.14314). A transformer that draws and
has no room otherwise comes in fewer bits, too.
"""

import importlib.util
import typing
from dataclasses import dataclass


def int8_config(dtype):
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


def fp8_config(dtype):
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig

    return TorchAoConfig(Float8WeightOnlyConfig(version=2))


def nf4_config(dtype):
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


@dataclass(frozen=True)
class Base:
    """A precision of the frozen base."""

    bytes_per_weight: float | None = None  # of a linear layer, with its scales; None: as they are
    package: str | None = None  # what to install for it
    config: typing.Callable | None = None  # dtype of the arithmetic -> diffusers' config


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


def quantization(base_precision, dtype):
    """Options of diffusers' from_pretrained() that read a part in so many bits; {} for the precision of the arithmetic."""
    config = BASES[base_precision].config
    return {"quantization_config": config(dtype)} if config else {}


def in_fewer_bits(module, base_precision):
    """The weights of a module that are in fewer bits with this precision: those of its linear layers."""
    import torch

    if base_precision == "bf16":
        return set()
    return {part.weight for part in module.modules() if isinstance(part, torch.nn.Linear)}

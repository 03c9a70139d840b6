"""The frozen weights that a LoRA stands on, in fewer bits: by torchao or bitsandbytes, through diffusers' own configs.

The LoRA trains in float32 beside them; the base only passes gradients on (QLoRA, arXiv 2305.14314). A transformer that draws and
has no room otherwise comes in fewer bits, too. What stands outside its blocks keeps its precision: these layers are few, and what they
read and say all blocks pass on (docs/memory.md has what each way leaves of the output).
"""

import importlib.util
import typing
from dataclasses import dataclass

from dreambooth.models.streamed_blocks import recomputed_blocks


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

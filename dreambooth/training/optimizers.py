"""The optimizers, each of some library, as a table: how each is made and what it remembers."""

import contextlib
import math
import types
import typing
from dataclasses import dataclass

from dreambooth.base import default, say
from dreambooth.device import missing_compiler
from dreambooth.training.levers import BYTES


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

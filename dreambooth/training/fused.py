"""Steps within the backward pass: each gradient is used and freed as soon as it is there."""

import contextlib
import functools
import math

from dreambooth.training.levers import Levers
from dreambooth.training.optimizers import OPTIMIZERS
from dreambooth.training.precision import rounded_by_chance


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

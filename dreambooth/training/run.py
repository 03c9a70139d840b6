"""A training under way: everything that its loop needs, in one place."""

import contextlib
import dataclasses
import typing
from dataclasses import dataclass

from dreambooth.data.latents import LatentCache
from dreambooth.methods.groups import trained_tensors
from dreambooth.models.parts import Models
from dreambooth.settings import Settings
from dreambooth.training.course import Course


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

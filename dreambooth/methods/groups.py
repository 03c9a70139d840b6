"""Weights that train together. The training loop sees nothing of a method but a list of these."""

import typing
from dataclasses import dataclass

from dreambooth.base import UserError


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

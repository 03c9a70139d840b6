"""What a training will be, settled wherever the flags leave it open."""

import dataclasses
from dataclasses import dataclass

from dreambooth.base import UserError
from dreambooth.models.recipes import RECIPES
from dreambooth.training.levers import Levers
from dreambooth.training.optimizers import OPTIMIZERS


@dataclass(frozen=True)
class Course:
    """What a training will be, settled wherever the flags leave it open."""

    steps: int
    resolution: int  # pixels
    precision: str  # of the arithmetic, in accelerate's words
    levers: Levers = Levers()
    lr_scheduler: str = "constant"
    use_ema: bool = False


def recipe_for(family, s):
    """The Recipe of this training on a model of `family`; what the flags say takes its place, but for learning rates."""
    recipe = with_own_rate(RECIPES[family][s.method], s)
    flags = {name: value for name in ("steps", "lora_target", "lr_scheduler", "use_ema") if (value := getattr(s, name)) is not None}
    return dataclasses.replace(recipe, **(dict(recipe.selecting) if s.select_best else {}) | flags)


def with_own_rate(recipe, s):
    """`recipe` with the learning rate of an optimizer that has its own."""
    lr = OPTIMIZERS[s.optimizer or Levers.optimizer].lr
    rates = ("learning_rate", "learning_rate_with_text_encoder", "text_encoder_lr", "embedding_lr")
    return dataclasses.replace(recipe, **{rate: lr for rate in rates if lr and getattr(recipe, rate)})


def check_rates(s, groups):
    """UserError if an optimizer that sees all tensors at once is given several learning rates."""
    if s.optimizer and not OPTIMIZERS[s.optimizer].by_tensor and len({group.lr for group in groups}) > 1:
        raise UserError(f"--optimizer {s.optimizer} has one learning rate for all that trains; give the same to each: "
                        + ", ".join(f"{group.name} {group.lr:g}" for group in groups))


def decisions(course, groups):
    """{name: value} of all that was settled for a training."""
    settled = dataclasses.asdict(course)
    levers = settled.pop("levers")
    return settled | levers | {"learning_rates": {group.name: group.lr for group in groups}}

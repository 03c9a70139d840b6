"""What a training will be, settled wherever the flags leave it open."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from dreambooth.base import UserError, default, processes, say
from dreambooth.methods.table import has_class_images
from dreambooth.subjects.class_folders import own_class_images
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

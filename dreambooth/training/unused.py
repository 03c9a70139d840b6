"""What a training leaves unused of what a person gave it is said."""

import dataclasses

from dreambooth.base import say
from dreambooth.methods.table import has_class_images


def tell_unused(s, concepts):
    """Say which of what was given for class images goes unused."""
    if has_class_images(s):
        return
    if s.prior_loss_weight == 0 and s.with_prior_preservation is not False:
        say("Note: --prior_loss_weight 0: class images would weigh nothing, so there are none, as with "
            "--no-with_prior_preservation.")
    defaults = {f.name: f.default for f in dataclasses.fields(s)}
    unused = [f"--{name}" for name in ("class_data_dir", "num_class_images", "class_guidance_scale")
              if getattr(s, name) != defaults[name]]
    unused += [f"{name} in {s.concepts}" for name in ("class_data_dir", "num_class_images")
               if any(getattr(concept, name) != getattr(s, name) for concept in concepts)]
    if unused:
        say(f"Note: {', '.join(unused)}: not used, since there are no class images in this training.")


def tell_unseen(s, course, photos, class_images, processes):
    """Say if a training is too short to show every picture of these pools once."""
    draws = course.steps * s.gradient_accumulation_steps * s.train_batch_size * processes
    for kind, pools, remedy in (("photos", photos, "--steps"),
                                ("class images", class_images, "--steps or fewer --num_class_images")):
        largest = max(map(len, pools), default=0)
        if pools and draws // len(pools) < largest:
            say(f"Note: {course.steps} steps show {draws // len(pools)} of the {largest} {kind} of a subject; more {remedy}.")

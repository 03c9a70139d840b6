"""The methods as a table: what each trains, what it saves, and what else has to be known of it."""

import dataclasses
from dataclasses import dataclass

from dreambooth.base import default, processes
from dreambooth.methods.full import full_denoiser, full_text_encoder, save_pipeline
from dreambooth.methods.lora import denoiser_lora, save_lora, text_encoder_lora
from dreambooth.methods.new_words import new_words, pivotal_words, save_words


@dataclass(frozen=True)
class Method:
    """What a method trains and what it saves. The training loop sees nothing of it but the parameter groups."""

    trains: tuple  # functions (s, models, subjects, recipe) -> ParameterGroup
    with_text_encoder: tuple  # those that join them with --train_text_encoder
    saves: tuple  # functions (folder, models, subjects, notes)
    is_adapter: bool = True  # the model's own weights stay as they are
    adds_words: bool = False
    changes_class: bool = True  # else there is no prior to preserve
    names_class: bool = True  # prompts name the class beside the identifier


METHODS = {
    "full": Method((full_denoiser,), (full_text_encoder,), (save_pipeline,), is_adapter=False),
    "lora": Method((denoiser_lora,), (text_encoder_lora,), (save_lora,)),
    "textual_inversion": Method((new_words,), (), (save_words,), adds_words=True, changes_class=False, names_class=False),
    "pivotal": Method((pivotal_words, denoiser_lora), (text_encoder_lora,), (save_lora, save_words), adds_words=True),
}


def preserves_prior(s):
    """Whether the class is trained beside the photos; a class that weighs nothing is not."""
    return default(s.with_prior_preservation, METHODS[s.method].changes_class) and s.prior_loss_weight > 0


def has_class_images(s):
    """Whether it is trained by class images. Otherwise no class has any, or the frozen model's predictions stand for them."""
    return preserves_prior(s) and s.prior != "frozen"


def parameter_groups(s, models, subjects, recipe):
    """What --method trains, made ready in `models`, with the learning rates of this batch size if they are to follow it."""
    method = METHODS[s.method]
    trains = method.trains + (method.with_text_encoder if s.train_text_encoder else ())
    factor = s.train_batch_size * s.gradient_accumulation_steps * processes() if s.scale_lr else 1
    groups = [group(s, models, subjects, recipe) for group in trains]
    return [dataclasses.replace(group, lr=group.lr * factor) for group in groups]


def saves_of(s):
    """The functions that save what --method trained, (folder, models, subjects, notes) each."""
    return METHODS[s.method].saves + ((save_pipeline,) if s.save_as_full_pipeline else ())

"""The paper's method: every layer trains, and a whole pipeline is saved (paper, section 3.2)."""

from dreambooth.base import default
from dreambooth.methods.groups import ParameterGroup
from dreambooth.models.parts import text_encoder_parameters


def full_unet(s, models, subjects, recipe):
    """The paper's method: every layer of the UNet (paper section 3.2)."""
    lr = recipe.learning_rate_with_text_encoder if s.train_text_encoder else recipe.learning_rate
    return ParameterGroup("unet", [models.unet], list(models.unet.parameters()), default(s.learning_rate, lr))


def full_text_encoder(s, models, subjects, recipe):
    """Every layer of the text encoders that the UNet reads."""
    return ParameterGroup("text_encoder", models.text_encoders, text_encoder_parameters(models),
                          default(s.text_encoder_lr, recipe.text_encoder_lr))


def save_pipeline(folder, models, subjects, notes):
    """Write the whole pipeline as diffusers loads it, which has no place for notes."""
    models.pipeline.save_pretrained(folder, safe_serialization=True)

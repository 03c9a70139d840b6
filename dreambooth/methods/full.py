"""The paper's method: every layer trains, and a whole pipeline is saved (paper, section 3.2)."""

from dreambooth.base import default
from dreambooth.methods.groups import ParameterGroup


def full_denoiser(s, models, subjects, recipe):
    """The paper's method: every layer of the denoiser that reaches what it predicts (paper section 3.2)."""
    lr = recipe.learning_rate_with_text_encoder if s.train_text_encoder else recipe.learning_rate
    unread = models.family.unread_layers(models.denoiser)
    parameters = [parameter for name, parameter in models.denoiser.named_parameters() if name.rpartition(".")[0] not in unread]
    return ParameterGroup(models.family.denoiser, [models.denoiser], parameters, default(s.learning_rate, lr))


def full_text_encoder(s, models, subjects, recipe):
    """Every layer of the text encoders that the denoiser reads."""
    return ParameterGroup("text_encoder", [text_encoder for _, text_encoder in models.readers], models.family.text_parameters(models),
                          default(s.text_encoder_lr, recipe.text_encoder_lr))


def save_pipeline(folder, models, subjects, notes):
    """Write the whole pipeline as diffusers loads it, which has no place for notes."""
    if models.book:
        models.book.bring(models)
    models.pipeline.save_pretrained(folder, safe_serialization=True)

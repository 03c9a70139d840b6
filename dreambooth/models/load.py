"""Loading a pipeline, whole and from safetensors alone, to draw with it or to train it."""

import dataclasses
import functools
from pathlib import Path

from safetensors import SafetensorError

from dreambooth.base import UserError, default
from dreambooth.models.checkpoint import load_single_file
from dreambooth.models.hub import split_revision
from dreambooth.models.parts import take_apart, text_encoders_of


def load_pipeline(name, dtype, flag="--model_name", unet=None, unet_dtype=None, variant=None):
    """The diffusers pipeline in a folder, of a hub id or in a file, in `dtype`, on the CPU, without a safety checker.

    Its UNet in `unet_dtype`, if given, or `unet` in its place; its weights from the files of `variant`. Only safetensors are
    read. The network is asked only for what the cache lacks.
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(library.utils.logging.CRITICAL)  # what goes wrong is raised as well
        library.utils.logging.disable_progress_bar()
    load = functools.partial(
        diffusers.DiffusionPipeline.from_pretrained, use_safetensors=True, safety_checker=None, feature_extractor=None,
        image_encoder=None, requires_safety_checker=False)
    if name.endswith(".safetensors"):
        load = functools.partial(load_single_file, flag=flag)
    parts = {} if unet is None else {"unet": unet}
    place, revision = split_revision(name)
    parts |= {key: value for key, value in (("revision", revision), ("variant", variant)) if value}
    dtypes = {"default": dtype, "unet": default(unet_dtype, dtype)}
    for cached_only in (True,) if Path(name).exists() else (True, False):
        try:
            pipeline = load(place, dtype=dtypes, local_files_only=cached_only, **parts)
            # transformers makes up a tokenizer of two words where its files are missing
            if len(pipeline.tokenizer) < pipeline.text_encoder.config.vocab_size // 2:
                raise ValueError("the files of its tokenizer are missing")
            break
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as problem:
            reason = " ".join(str(problem).split())[:300]
    else:
        raise UserError(f"{flag} {name}: cannot be loaded ({reason})")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()  # decode a batch one by one: at 1024 px its activations outweigh the UNet's
    pipeline.watermark = None  # SDXL marks its pictures where invisible-watermark is installed; SD never does
    for part, text_encoder in text_encoders_of(pipeline).items():
        # Older configs name another id, and then the highest one is taken for the end of the text: with words added to
        # the vocabulary that would be the new word, and SDXL's pooled embedding would miss all that follows it.
        end = getattr(pipeline, part.replace("text_encoder", "tokenizer")).eos_token_id
        text_encoder.config.eos_token_id = getattr(text_encoder, "text_model", text_encoder).eos_token_id = end
    return pipeline


def load_models(name, arithmetic, freezes_unet=False, variant=None):
    """Load a pipeline for training in float32 and take it apart. Raises UserError if it cannot be trained here.

    A UNet that stays as it is comes in the precision of the arithmetic: half the memory of the CPU, too.
    """
    import torch

    unet_dtype = arithmetic if freezes_unet else torch.float32
    models = dataclasses.replace(take_apart(name, load_pipeline(name, torch.float32, unet_dtype=unet_dtype, variant=variant)),
                                 arithmetic=arithmetic)
    if models.unet.config.in_channels != models.vae.config.latent_channels:
        raise UserError(f"--model_name {name}: its UNet takes {models.unet.config.in_channels} channels (an inpainting or "
                        f"depth model?); give a text-to-image model")
    if models.noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"--model_name {name}: prediction type {models.noise_scheduler.config.prediction_type} "
                        f"is not supported")
    for module in (models.unet, models.vae, *models.text_encoders):
        module.requires_grad_(False).eval()
    return models

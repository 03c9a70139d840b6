"""The parts of a loaded pipeline, and what is asked of them.

Knows nothing of training.
"""

import functools
import hashlib
import typing
from dataclasses import dataclass


@dataclass(frozen=True)
class Models:
    """The parts of a loaded pipeline. SD 1.x and 2.x have one tokenizer and text encoder, SDXL two of each."""

    name: str  # folder or hub id
    pipeline: typing.Any
    tokenizers: list
    text_encoders: list
    vae: typing.Any
    unet: typing.Any
    noise_scheduler: typing.Any  # DDPM with the model's own betas and prediction type, for training
    arithmetic: typing.Any = None  # the torch.dtype that the UNet will compute in; None: that of its weights
    sample: dict | None = None  # sample_weights() of the weights as they were loaded

    @property
    def latent_scale(self):
        """Pixels per latent, along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self):
        """The side in pixels of the squares that the UNet was trained at."""
        return min(own_size(self.pipeline))

    @functools.cached_property
    def fingerprint(self):
        """A hex digest of all weights as they were loaded: tells one model from another wherever it lies.

        Rounded to `arithmetic`, so that it is the same whether the UNet was loaded in that precision or comes to it later.
        """
        import torch

        digest = hashlib.sha256()
        for module in (self.unet, self.vae, *self.text_encoders):
            for name, tensor in module.state_dict().items():
                value = torch.hash_tensor(tensor.to(self.arithmetic or tensor.dtype)).item()
                digest.update(f"{name} {tuple(tensor.shape)} {value}".encode())
        return digest.hexdigest()


def text_encoders_of(pipeline):
    """{part name: text encoder} of a pipeline: one, or SDXL's two."""
    return {part: module for part in ("text_encoder", "text_encoder_2") if (module := pipeline.components.get(part)) is not None}


def own_size(pipeline):
    """(width, height) in pixels that a pipeline draws by itself. Where its UNet's config says nothing, SD 1.x's or SDXL's size."""
    size = pipeline.unet.config.sample_size or (64 if "text_encoder_2" not in pipeline.components else 128)
    height, width = (size, size) if isinstance(size, int) else size
    return width * pipeline.vae_scale_factor, height * pipeline.vae_scale_factor


SAMPLE_TENSORS, SAMPLE_PLACES = 24, (0, 3, 17)  # of each part so many tensors, of each tensor the numbers at these places


def sample_weights(pipeline):
    """Some numbers of every part of a pipeline, which tell one model from another and are short enough for a record.

    {part: [precision of its weights, the numbers as text]}. A hash would differ between precisions; these are compared.
    """
    parts = {"unet": pipeline.unet, **text_encoders_of(pipeline)}
    sample = {}
    for part, module in parts.items():
        weights = {name.removeprefix("text_model."): tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
        tensors = [weights[name] for name in sorted(weights)]
        chosen = tensors[::max(1, len(tensors) // SAMPLE_TENSORS)]
        numbers = [tensor.reshape(-1)[place % tensor.numel()].item() for tensor in chosen for place in SAMPLE_PLACES]
        sample[part] = [str(chosen[0].dtype).removeprefix("torch."), " ".join(f"{number:.9g}" for number in numbers)]
    return sample


def is_part_sample(found):
    """Whether something that was read is what sample_weights() has of one part."""
    precision, text = found if isinstance(found, list) and len(found) == 2 else (None, None)
    is_text = precision in ("float32", "float16", "bfloat16", "float64") and isinstance(text, str)
    return is_text and bool([float(number) for number in text.split()])


def is_same_sample(one, other):
    """Whether two results of sample_weights() are of the same weights, in whatever precision each was loaded."""
    import torch

    if one.keys() != other.keys():
        return False
    for part, (precision, text) in one.items():
        kinds = [getattr(torch, kind) for kind in (precision, other[part][0])]
        values = [torch.tensor([float(number) for number in numbers.split()]) for numbers in (text, other[part][1])]
        if values[0].shape != values[1].shape:
            return False
        coarse = min(kinds, key=lambda kind: torch.finfo(kind).bits)
        rounded = [value.to(coarse) for value in values]
        alike = torch.equal(*rounded) if len({*kinds, torch.float32}) < 3 else torch.allclose(*values, rtol=2**-7, atol=1e-6)
        if not alike:
            return False
    return True


def take_apart(name, pipeline):
    """The Models of a loaded pipeline."""
    from diffusers import DDPMScheduler

    text_encoders = text_encoders_of(pipeline)
    return Models(
        name=name,
        pipeline=pipeline,
        tokenizers=[pipeline.components[part.replace("text_encoder", "tokenizer")] for part in text_encoders],
        text_encoders=list(text_encoders.values()),
        vae=pipeline.vae,
        unet=pipeline.unet,
        noise_scheduler=DDPMScheduler.from_config(pipeline.scheduler.config))


def predict(unet, noisy_latents, timesteps, hidden, pooled, time_ids):
    """The UNet's output [B, C, h, w] for B noisy latents; `time_ids` [B, 6] and `pooled` matter to SDXL alone."""
    sizes = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
    return unet(noisy_latents, timesteps, encoder_hidden_states=hidden, added_cond_kwargs=sizes).sample


def layers_read(models, text_encoder):
    """How many of a text encoder's layers reach the UNet: SDXL reads its first encoder before the last one."""
    skips_last = len(models.text_encoders) > 1 and text_encoder is models.text_encoders[0]
    return text_encoder.config.num_hidden_layers - skips_last


def text_encoder_parameters(models):
    """The text encoders' parameters that reach the loss."""
    parameters = []
    for text_encoder in models.text_encoders:
        inner = getattr(text_encoder, "text_model", text_encoder)  # transformers 5.6 flattened CLIPTextModel, not its twin
        unread = inner.encoder.layers[layers_read(models, text_encoder):]
        unused = {*unread.parameters(), *inner.final_layer_norm.parameters()} if unread else set()
        parameters += [p for p in text_encoder.parameters() if p not in unused]
    return parameters

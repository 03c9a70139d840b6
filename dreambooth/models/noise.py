"""How pictures are noised, and what a model is to predict of it: diffusion, or rectified flow.

Knows no family and no model. A level is what a batch's pictures are noised by, [B]: a timestep, or a sigma in (0, 1].
"""

import math
import typing
from dataclasses import dataclass


def along(levels, latents):
    """Numbers [B] in a shape that multiplies tensors [B, ...]."""
    return levels.view(-1, *[1] * (latents.dim() - 1))


@dataclass(frozen=True)
class Diffusion:
    """Denoising diffusion with a model's own betas (Ho et al., arXiv 2006.11239); the model predicts noise or velocity."""

    scheduler: typing.Any  # diffusers' DDPMScheduler
    snr_gamma: float | None = None  # min-SNR weights; 0 is off, as in other trainers

    @property
    def predicts(self):
        return self.scheduler.config.prediction_type

    def levels(self, count, source):
        """Timesteps [count], drawn uniformly by the torch.Generator `source`."""
        import torch

        return torch.randint(self.scheduler.config.num_train_timesteps, (count,), generator=source)

    def noisy(self, latents, noise, levels):
        return self.scheduler.add_noise(latents, noise, levels)

    def target(self, latents, noise, levels):
        """What the model is to predict, like `latents`."""
        return self.scheduler.get_velocity(latents, noise, levels) if self.predicts == "v_prediction" else noise

    def weights(self, levels):
        """Weights [B] of the losses, or None for equal ones."""
        return min_snr_weights(self.scheduler, levels, self.snr_gamma) if self.snr_gamma else None


@dataclass(frozen=True)
class Flow:
    """Rectified flow (Liu et al., arXiv 2209.03003): x_s = (1 - s) x_0 + s e, and the model predicts e - x_0."""

    shift: float = 1.0  # levels are drawn as s' = k s / (1 + (k - 1) s), nearer to noise the larger k (arXiv 2403.03206, section 5.3.2)
    sampling: str = "uniform"  # of s before that; "logit_normal": sigmoid of a normal number (the same, section 3.1)

    predicts = "flow"

    def levels(self, count, source):
        """Sigmas [count] in (0, 1], drawn by the torch.Generator `source`."""
        import torch

        if self.sampling == "logit_normal":
            sigmas = torch.randn(count, generator=source).sigmoid()
        else:
            sigmas = 1 - torch.rand(count, generator=source)
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)

    def noisy(self, latents, noise, levels):
        sigmas = along(levels, latents)
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents, noise, levels):
        """What the model is to predict, like `latents`."""
        return noise - latents

    def weights(self, levels):
        """None: all losses weigh the same."""
        return None


def min_snr_weights(noise_scheduler, timesteps, snr_gamma):
    """Loss weights [B] that even out the timesteps (Hang et al., arXiv 2303.09556, section 3.4).

    min(snr, gamma) / snr when the model predicts noise, min(snr, gamma) / (snr + 1) when it predicts velocity.
    """
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if noise_scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=snr_gamma) / (snr + 1)
    return (snr_gamma / snr).clamp(max=1)  # written so that snr = 0 gives 1, not 0 / 0


def usual_shift(config, tokens):
    """The shift k that a FlowMatchEulerDiscreteScheduler of this config draws a picture of so many tokens with.

    With dynamic shifting mu is linear in the number of tokens, as in diffusers' calculate_shift().
    """
    if not config.get("use_dynamic_shifting"):
        return config.get("shift") or 1.0
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, largest = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return shift_of(config, base + (largest - base) * (tokens - low) / (high - low))


def shift_of(config, mu):
    """The shift k that a scheduler makes of mu."""
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

"""The objective (paper, equation 2) and means of it.

Knows nothing of the model: it is given a function from noisy latents to a prediction.
"""

def min_snr_weights(noise_scheduler, timesteps, snr_gamma):
    """Loss weights [B] that even out the timesteps (Hang et al., arXiv 2303.09556, section 3.4).

    min(snr, gamma) / snr when the model predicts noise, min(snr, gamma) / (snr + 1) when it predicts velocity.
    """
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if noise_scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=snr_gamma) / (snr + 1)
    return (snr_gamma / snr).clamp(max=1)  # written so that snr = 0 gives 1, not 0 / 0


def diffusion_loss(noise_scheduler, batch, denoiser, snr_gamma=None):
    """(loss, per-picture losses [B]): the paper's equation 2.

    `denoiser` maps noisy latents [B, C, h, w] and their batch to the model's prediction. The prior-preservation term is
    not a term here but the weight that each picture of the batch carries.
    """
    noisy = noise_scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    target = batch["noise"]
    if noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(batch["latents"], batch["noise"], batch["timesteps"])
    losses = (denoiser(noisy, batch).float() - target.float()).square().mean(dim=(1, 2, 3))
    if snr_gamma:  # 0 is off, as in other trainers
        losses = losses * min_snr_weights(noise_scheduler, batch["timesteps"], snr_gamma)
    return (batch["weight"] * losses).sum(), losses


def split_means(losses, is_class):
    """[mean over photos, mean over class images (nan without any)] of losses [B], without waiting for the GPU."""
    import torch

    return torch.stack([(losses * chosen).sum() / chosen.sum() for chosen in (~is_class, is_class)])


def loss_means(history):
    """{"instance": mean, "prior": mean or None} of a stretch of history."""
    columns = zip(("instance", "prior"), zip(*history))  # the gradient norm is left out
    return {name: None if None in column else sum(column) / len(column) for name, column in columns}

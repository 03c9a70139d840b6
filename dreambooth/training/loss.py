"""The objective (paper, equation 2) and means of it.

Knows nothing of the model: it is given a function from noisy latents to a prediction.
"""


def denoising_loss(noise, batch, denoiser, untouched=None):
    """(loss, per-picture losses [B]): the paper's equation 2, of a Diffusion or a Flow.

    `denoiser` maps noisy latents [B, C, h, w] and their batch to the model's prediction. The prior-preservation term is
    not a term here but the weight that each picture of the batch carries; so is a mask [B, 1, h, w] what each place carries. If
    there is an `untouched` denoiser, what it predicts is the target of the class's pictures in place of their noise.
    """
    given = batch["latents"], batch["noise"], batch["levels"]
    noisy, target = noise.noisy(*given), noise.target(*given)
    if untouched:
        target = with_predictions(target, noisy, batch, untouched)
    squares = (denoiser(noisy, batch).float() - target.float()).square()
    losses = (squares * batch["mask"] if "mask" in batch else squares).mean(dim=(1, 2, 3))
    weights = noise.weights(batch["levels"])
    if weights is not None:
        losses = losses * weights
    return (batch["weight"] * losses).sum(), losses


def with_predictions(target, noisy, batch, untouched):
    """`target` [B, C, h, w] with what the `untouched` denoiser predicts for the class's pictures, which come last in a batch."""
    import torch

    photos = int((~batch["is_class"]).sum())  # on the CPU: this waits for nothing
    if photos == len(target):
        return target
    of_class = {key: value[photos:] for key, value in batch.items()}
    return torch.cat([target[:photos], untouched(noisy[photos:], of_class).to(target)])


def split_means(losses, is_class):
    """[mean over photos, mean over class images (nan without any)] of losses [B], without waiting for the GPU."""
    import torch

    return torch.stack([(losses * chosen).sum() / chosen.sum() for chosen in (~is_class, is_class)])


def loss_means(history):
    """{"instance": mean, "prior": mean or None} of a stretch of history."""
    columns = zip(("instance", "prior"), zip(*history))  # the gradient norm is left out
    return {name: None if None in column else sum(column) / len(column) for name, column in columns}

"""What a step trains on: a function of seed, step and process alone, so that resumed equals uninterrupted."""

import hashlib


def random_source(*key):
    """A CPU torch.Generator that depends on `key` alone: randomness is the same on every device and after a restart."""
    import torch

    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big"))


def shuffled(size, start, count, *key):
    """Draws start .. start + count - 1 of an endless run of shuffles of range(size): every row once before any twice."""
    import torch

    orders = {}
    for epoch in {draw // size for draw in range(start, start + count)}:
        orders[epoch] = torch.randperm(size, generator=random_source("order", *key, epoch))
    return [int(orders[draw // size][draw % size]) for draw in range(start, start + count)]


def balanced(pools, start, count, *key):
    """Draws start .. start + count - 1 of an endless stream: each pool once before any twice, and so each row of a pool."""
    rows = []
    for draw, turn in enumerate(shuffled(len(pools), start, count, "turn", *key), start):
        rows.append(pools[turn][shuffled(len(pools[turn]), draw // len(pools), 1, turn, *key)[0]])
    return rows


def make_batch(cache, s, micro_step, noise_kind, process=0, num_processes=1):
    """The batch of one micro-step: `train_batch_size` photos and, with prior preservation, as many class images.

    Photos and class images are drawn independently, each row with its own noise and level (paper equation 2), and
    from all subjects equally often. The batch depends on nothing but seed, micro-step and process. `weight` [B] makes the
    loss a weighted sum: a photo counts 1 / photos, a class image prior_loss_weight / class images.
    """
    import torch

    start = (micro_step * num_processes + process) * s.train_batch_size
    rows = balanced(cache.photos, start, s.train_batch_size, s.seed, "photos")
    classes = balanced(cache.class_images, start, s.train_batch_size, s.seed, "class images") if cache.class_images else []
    weight = [1 / len(rows)] * len(rows) + [s.prior_loss_weight / len(rows)] * len(classes)
    is_class = torch.arange(len(weight)) >= len(rows)
    rows = torch.tensor(rows + classes)
    source = random_source("noise", s.seed, micro_step, process)
    mean, std = cache.mean[rows], cache.std[rows]
    latents, noise = mean + std * torch.randn(mean.shape, generator=source), torch.randn(mean.shape, generator=source)
    levels = noise_kind.levels(len(rows), source)
    if s.noise_offset:  # one number for all of a channel (Guttenberg, "Diffusion with offset noise", 2023)
        noise += s.noise_offset * torch.randn(*mean.shape[:2], 1, 1, generator=source)
    return {
        "latents": latents,
        "noise": noise,
        "levels": levels,
        "sizes": cache.sizes[rows],
        "prompt": cache.prompt[rows],
        "is_class": is_class,
        "weight": torch.tensor(weight),
    }

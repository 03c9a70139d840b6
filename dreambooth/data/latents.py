"""The latent cache: every training picture passes through the VAE once."""

import typing
from dataclasses import dataclass

from dreambooth.base import is_first_process, say
from dreambooth.decode import load_image
from dreambooth.images import square
from dreambooth.progress import progress


@dataclass(frozen=True)
class LatentCache:
    """The VAE's view of every training picture, one row each, on the CPU; a mirrored picture is a row of its own.

    A row keeps mean and deviation, so that each step samples its latents afresh (the VAE is not run again), together
    with its size record and the number of its prompt: whatever order rows are drawn in, they cannot come apart.
    """

    mean: typing.Any  # [N, C, h, w], as the denoiser takes them
    std: typing.Any  # [N, C, h, w], likewise
    sizes: typing.Any  # [N, 6]: original height and width, top and left of the crop, target height and width
    prompt: typing.Any  # [N], index into `prompts`
    prompts: list
    photos: list  # for each subject the rows of its photos
    class_images: list  # for each subject the rows of its class images; empty without prior preservation


def cache_latents(models, photos, class_images, resolution, device, random_flip=False):
    """Encode `photos` and `class_images`, for each subject a list of (path, caption), into a LatentCache.

    The VAE works in float32 whatever else does: SDXL's overflows in fp16. Class images are mirrored as the photos are.
    """
    import numpy as np
    import torch

    vae = models.vae.to(device)
    own = {picture for pool in photos for picture in pool}
    pictures = list(dict.fromkeys(picture for pool in (*photos, *class_images) for picture in pool))
    prompts = list(dict.fromkeys(caption for _, caption in pictures))
    variants, shape = 2 if random_flip else 1, models.family.latent_shape(models.pipeline, resolution)
    rows_of = {picture: range(variants * i, variants * (i + 1)) for i, picture in enumerate(pictures)}
    # All at once: a row of its own for each picture, among the VAE's large tensors, would leave memory in unusable pieces.
    mean, std = torch.empty(2, variants * len(pictures), *shape)
    sizes, prompt = [], []
    for picture in progress(pictures, "encoding", "image", hidden=not is_first_process()):
        path, caption = picture
        image = load_image(path)
        if min(image.size) < resolution and picture in own:
            say(f"Note: {path} is {image.width} x {image.height}; it is enlarged to {resolution}, which blurs it.")
        image, size = square(image, resolution)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device, vae.dtype) / 127.5 - 1  # [1, 3, H, W]
        for row, variant in zip(rows_of[picture], (pixels, pixels.flip(-1))):
            with torch.no_grad():
                (mean[row],), (std[row],) = models.family.moments(vae, variant)
            sizes.append(size)
            prompt.append(prompts.index(caption))
    vae.to("cpu")
    pools = [[[row for picture in pool for row in rows_of[picture]] for pool in kind] for kind in (photos, class_images)]
    return LatentCache(mean, std, torch.tensor(sizes, dtype=torch.float32), torch.tensor(prompt), prompts, *pools)

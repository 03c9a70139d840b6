"""The latent cache: every training picture passes through the VAE once."""

import typing
from dataclasses import dataclass

from dreambooth.base import is_first_process, say
from dreambooth.data.views import USUAL_FLOOR, View
from dreambooth.decode import load_image
from dreambooth.progress import progress


@dataclass(frozen=True)
class LatentCache:
    """The VAE's view of every training picture of one shape, one row each, on the CPU; a mirrored picture is a row of its own.

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
    mask: typing.Any = None  # [N, 1, h, w]: what each place counts; None: all the same

    @property
    def shelves(self):
        """The caches of the several shapes: this one."""
        return [self]


@dataclass(frozen=True)
class ShapedCache:
    """Pictures of several shapes: for each a LatentCache, of the same subjects and prompts; subjects may have no rows in one."""

    shelves: list

    @property
    def prompts(self):
        return self.shelves[0].prompts

    @property
    def class_images(self):
        """Whether there are any, as a list."""
        return [pool for shelf in self.shelves for pool in shelf.class_images if pool]


def cache_latents(models, photos, class_images, resolution, device, random_flip=False, views=None, floor=USUAL_FLOOR):
    """Encode `photos` and `class_images`, for each subject a list of (path, caption), into a cache of one shape or several.

    `views` are {path: View} of those that are not squares of `resolution` pixels from the middle; `floor` is what the rest of a
    photo counts beside its mask. The VAE works in float32 whatever else does: SDXL's overflows in fp16. Class images are mirrored as
    the photos are.
    """
    own = {picture for pool in photos for picture in pool}
    pictures = list(dict.fromkeys(picture for pool in (*photos, *class_images) for picture in pool))
    prompts = list(dict.fromkeys(caption for _, caption in pictures))
    usual = View((resolution, resolution))
    view_of = {picture: (views or {}).get(picture[0], usual) for picture in pictures}
    shelves = {}
    for picture, view in view_of.items():
        shelves.setdefault(view.size, []).append(picture)
    vae, bar = models.vae.to(device), progress(pictures, "encoding", "image", hidden=not is_first_process())
    seen = iter(bar)
    encoded = [encode_shelf(models, shelf, view_of, prompts, own, device, 2 if random_flip else 1, floor, seen)
               for shelf in shelves.values()]
    next(seen, None)  # which ends the bar
    vae.to("cpu")
    caches = []
    for rows_of, tensors, mask in encoded:
        pools = [[[row for picture in pool for row in rows_of.get(picture, ())] for pool in kind] for kind in (photos, class_images)]
        caches.append(LatentCache(*tensors, prompts, *pools, mask))
    return caches[0] if len(caches) == 1 else ShapedCache(caches)


def encode_shelf(models, pictures, view_of, prompts, own, device, variants, floor, bar):
    """({picture: its rows}, (mean, std, sizes, prompt), mask or None) of pictures that are seen at one size, `bar` advancing."""
    import numpy as np
    import torch

    vae, size = models.vae, view_of[pictures[0]].size
    rows_of = {picture: range(variants * i, variants * (i + 1)) for i, picture in enumerate(pictures)}
    # All at once: a row of its own for each picture, among the VAE's large tensors, would leave memory in unusable pieces.
    mean, std = torch.empty(2, variants * len(pictures), *models.family.latents_of(models.pipeline, size))
    has_masks = any(view_of[picture].mask for picture in pictures)
    mask = torch.ones(len(mean), 1, *mean.shape[2:]) if has_masks else None
    sizes, prompt = [], []
    for picture in pictures:
        next(bar)
        (path, caption), view = picture, view_of[picture]
        image = load_image(path)
        if picture in own:
            tell_enlarged(path, image, size)
        image, record = view.seen(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device, vae.dtype) / 127.5 - 1  # [1, 3, H, W]
        for row, turn in zip(rows_of[picture], (lambda rows: rows, lambda rows: rows.flip(-1))):
            with torch.no_grad():
                (mean[row],), (std[row],) = models.family.moments(vae, turn(pixels))
            if view.mask:
                mask[row] = turn(view.weights(floor, tuple(mean.shape[2:])))
            sizes.append(record)
            prompt.append(prompts.index(caption))
    return rows_of, (mean, std, torch.tensor(sizes, dtype=torch.float32), torch.tensor(prompt)), mask


def tell_enlarged(path, image, size):
    """Say if a photo is smaller than what is trained on."""
    if image.width < size[0] or image.height < size[1]:
        name = size[0] if size[0] == size[1] else f"{size[0]} x {size[1]}"
        say(f"Note: {path} is {image.width} x {image.height}; it is enlarged to {name}, which blurs it.")

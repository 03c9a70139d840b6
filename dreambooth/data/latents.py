"""The latent cache: every training picture passes through the VAE once."""

import dataclasses
import typing
from dataclasses import dataclass

from dreambooth.base import is_first_process, say
from dreambooth.data.views import USUAL_FLOOR, View
from dreambooth.decode import load_image
from dreambooth.images import mirrored
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
    photo counts beside its mask. The VAE works in float32 whatever else does: SDXL's overflows in fp16. Class images are mirrored
    as the photos are.
    """
    import torch

    own = {picture for pool in photos for picture in pool}
    pictures = list(dict.fromkeys(picture for pool in (*photos, *class_images) for picture in pool))
    prompts = list(dict.fromkeys(caption for _, caption in pictures))
    by_size, usual, variants = {}, View((resolution, resolution)), 2 if random_flip else 1
    for picture in pictures:
        view = (views or {}).get(picture[0], usual)
        view = view if picture in own else dataclasses.replace(view, mask=None)  # a mask is of the subject, not of its class
        by_size.setdefault(view.size, {})[picture] = view
    models.vae.to(device)
    seen, shelves = seen_pictures(by_size.values(), own), []
    for shelf in by_size.values():
        rows_of = {picture: range(variants * i, variants * (i + 1)) for i, picture in enumerate(shelf)}
        pools = [[[row for picture in pool for row in rows_of.get(picture, ())] for pool in kind]
                 for kind in (photos, class_images)]
        tensors, mask = encode_shelf(models, shelf, seen, device, variants, floor)
        prompt = torch.tensor([prompts.index(caption) for _, caption in shelf for _ in range(variants)])
        shelves.append(LatentCache(*tensors, prompt, prompts, *pools, mask))
    next(seen, None)  # which ends the bar
    models.vae.to("cpu")
    return shelves[0] if len(shelves) == 1 else ShapedCache(shelves)


def seen_pictures(shelves, own):
    """(the picture as it is trained on, its size record) of all in these {(path, caption): View}, one after the other.

    Says which of a person's `own` are enlarged.
    """
    jobs = [(picture, view) for shelf in shelves for picture, view in shelf.items()]
    for picture, view in progress(jobs, "encoding", "image", hidden=not is_first_process()):
        image, size = load_image(picture[0]), view.size
        if picture in own and (image.width < size[0] or image.height < size[1]):
            name = size[0] if size[0] == size[1] else f"{size[0]} x {size[1]}"
            say(f"Note: {picture[0]} is {image.width} x {image.height}; it is enlarged to {name}, which blurs it.")
        yield view.seen(image)


def encode_shelf(models, shelf, seen, device, variants, floor):
    """((mean, std, sizes), mask or None) of {picture: View} that are seen at one size; `seen` gives the pictures."""
    import numpy as np
    import torch

    size, sizes = next(iter(shelf.values())).size, []
    # All at once: a row of its own for each picture, among the VAE's large tensors, would leave memory in unusable pieces.
    mean, std = torch.empty(2, variants * len(shelf), *models.family.latents_of(models.pipeline, size))
    mask = torch.ones(len(mean), 1, *mean.shape[2:]) if any(view.mask for view in shelf.values()) else None
    for number, view in enumerate(shelf.values()):
        image, record = next(seen)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device, models.vae.dtype) / 127.5 - 1  # [1, 3, H, W]
        both = (lambda rows: rows, record), (lambda rows: rows.flip(-1), mirrored(record))
        for row, (turned, size_record) in zip(range(variants * number, variants * (number + 1)), both):
            with torch.no_grad():
                (mean[row],), (std[row],) = models.family.moments(models.vae, turned(pixels))
            if view.mask:
                mask[row] = turned(view.weights(floor, tuple(mean.shape[2:])))
            sizes.append(size_record)
    return (mean, std, torch.tensor(sizes, dtype=torch.float32)), mask

"""How training sees a picture: at which size, which part of it, and how much each place counts."""

import typing
from dataclasses import dataclass

from PIL import Image

from dreambooth.data.crops import place_of, salience
from dreambooth.data.shapes import nearest_shape, shapes_of
from dreambooth.decode import load_image
from dreambooth.images import fitted
from dreambooth.methods.table import preserves_prior
from dreambooth.subjects.class_folders import own_class_images
from dreambooth.subjects.photos import pixels_digest

USUAL_FLOOR = 0.1  # what counts of a photo beside its subject
TINT = (214, 39, 130)


@dataclass(frozen=True)
class View:
    """How training sees a picture: scaled until it covers `size`, and cut to that."""

    size: tuple  # (width, height) in pixels
    at: tuple = (0.5, 0.5)  # how far to the right and down the cut lies, as in fitted()
    mask: typing.Any = None  # "L" picture of all of it, white where the subject is

    def seen(self, image):
        """(the picture as it is trained on, its size record): see fitted()."""
        return fitted(image, self.size, self.at)

    def seen_mask(self):
        """The mask cut as the picture is."""
        return fitted(self.mask, self.size, self.at, Image.Resampling.BILINEAR)[0]

    def weights(self, floor, shape):
        """What each place of latents of `shape` (h, w) counts, [1, h, w], 1 on average: in the subject 1, elsewhere `floor`."""
        import numpy as np
        import torch

        white = torch.from_numpy(np.array(self.seen_mask(), dtype=np.float32))[None] / 255
        weights = torch.nn.functional.adaptive_avg_pool2d(white, shape).clamp(min=floor)
        return weights / weights.mean().clamp(min=1e-6)

    def tinted(self, image):
        """What seen() gives, with a tint over what is not the subject."""
        picture = self.seen(image)[0]
        if self.mask is None:
            return picture
        grey = picture.convert("L").convert("RGB")  # a tint alone would not show on its own colour
        return Image.composite(picture, Image.blend(grey, Image.new("RGB", picture.size, TINT), 0.4), self.seen_mask())

    def traits(self):
        """What tells this view from the usual one, a square from the middle, as a list."""
        shape = [] if self.size[0] == self.size[1] and self.at == (0.5, 0.5) else [*self.size, *self.at]
        return shape + ([pixels_digest(self.mask)] if self.mask else [])


def views_of(s, concepts, side, multiple):
    """{photo: View} of all photos: in shapes of about `side`² pixels whose sides are multiples of `multiple`, cut where the mask
    has its middle, or else what stands out."""
    masks = {path: mask for concept in concepts for path, mask in concept.masks.items()}
    sizes = {path: load_image(path).size for concept in concepts for path, _ in concept.photos}
    shapes = shapes_of(s, sizes.values(), side, multiple, fewest_own(s, concepts))
    views = {}
    for path, size in sizes.items():
        shape, mask = nearest_shape(size, shapes), masks.get(path)
        views[path] = View(shape, cut_at(path, size, shape, mask), mask)
    return views


def cut_at(path, size, shape, mask):
    """Where a photo of `size` is cut to `shape`, as in fitted(): where its mask, or else what stands out, has its middle."""
    if size[0] * shape[1] == size[1] * shape[0]:
        return 0.5, 0.5
    return place_of(mask, size, shape) if mask else place_of(salience(load_image(path)), size, shape, is_sure=False)


def photo_square(path, mask=None):
    """The largest square of a photo with its subject in it, as a picture: what metrics and sheets see."""
    image = load_image(path)
    side = min(image.size)
    return View((side, side), cut_at(path, image.size, (side, side), mask)).seen(image)[0]


def fewest_own(s, concepts):
    """How many class images a person has given, where that is fewest; None where the program draws all."""
    own = [len(own_class_images(c.class_data_dir)[:c.num_class_images]) for c in concepts] if preserves_prior(s) else []
    return min(filter(None, own), default=None)

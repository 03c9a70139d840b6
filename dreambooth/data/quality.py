"""A short report on photos before they are trained on: how many and how large, and what to do about those that teach badly."""

import itertools

from PIL import Image

from dreambooth.base import say
from dreambooth.decode import load_image
from dreambooth.subjects.masks import share_of

LOOKED_AT = 512  # pixels along the longer side
BLURRED, BLURRED_BESIDE = 6.0, 0.25  # contrast of the sharpest places: of any photo, and as a share of what is usual for the others
SMALL = 0.06  # of a photo that a subject should cover
ALIKE = 5.0  # of 255: how much two photos differ on average that may stand for one
SAME_PLACE = 0.7  # of the colours along the borders that all photos have in common


def tell_photos(concepts):
    """Say of each subject's photos how they are, in no more lines than there are photos."""
    for concept in concepts:
        looks = {path: Look(load_image(path), concept.masks.get(path)) for path, _ in concept.photos}
        for line in report_lines(concept.name, looks)[:len(looks)]:
            say(line)


class Look:
    """What is to be known of one photo."""

    def __init__(self, image, mask=None):
        import numpy as np

        self.size, self.share = image.size, mask and share_of(mask)
        image.thumbnail((LOOKED_AT, LOOKED_AT), Image.Resampling.BOX)
        self.sharpness = sharpness(np.asarray(image.convert("L"), dtype=np.float64))
        self.tiny = np.asarray(image.resize((24, 24), Image.Resampling.BOX), dtype=np.float64)
        border = np.ones((24, 24), bool)
        border[4:-1, 4:-4] = False  # of the bottom little: there subjects stand
        bins = (self.tiny[border] // 64).astype(int) @ [16, 4, 1]
        self.colours = np.bincount(bins, minlength=64) / len(bins)


def sharpness(grey):
    """The contrast between neighbours in the sharpest tenth of a picture's places [h, w]."""
    import numpy as np

    if min(grey.shape) < 3:
        return 0.0
    edges = np.abs(4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:])
    return float(np.sort(edges.ravel())[-max(1, edges.size // 10):].mean())


def report_lines(name, looks):
    """The lines on a subject's {path: Look}: sizes first, then what is worst."""
    import numpy as np

    sizes = sorted({look.size for look in looks.values()}, key=lambda size: (size[0] * size[1], size))
    words = [f"{width} x {height}" for width, height in (sizes[0], sizes[-1])[:len(sizes)]]
    lines = [f'Photos of "{name}": {len(looks)}, {" to ".join(words)} pixels.']
    if pairs := [(a, b) for a, b in itertools.combinations(looks, 2) if 0 < difference(looks[a], looks[b]) < ALIKE]:
        lines.append(f"Note: nearly the same picture: {listed(f'{a.name} and {b.name}' for a, b in pairs)}; keep one of each, they "
                     f"teach nothing more.")
    usual = float(np.median([look.sharpness for look in looks.values()]))
    if blurred := [path for path, look in looks.items() if look.sharpness < max(BLURRED, BLURRED_BESIDE * usual)]:
        lines.append(f"Note: blurred: {listed(path.name for path in blurred)}; leave them out if there are sharper ones.")
    if small := [path for path, look in looks.items() if look.share is not None and look.share < SMALL]:
        lines.append(f"Note: the subject is small in {listed(path.name for path in small)}; cut them closer to it.")
    if len(looks) > 2 and None in [look.share for look in looks.values()] and is_one_place(looks.values()):
        lines.append("Note: all have the same background, which is learnt with the subject; add photos from elsewhere, give masks "
                     "(--mask) or name it in captions.")
    return lines


def difference(one, other):
    """How much two Looks differ on average, of 255."""
    import numpy as np

    return float(np.abs(one.tiny - other.tiny).mean())


def is_one_place(looks):
    """Whether any two of the photos have most of the colours along their borders in common."""
    import numpy as np

    return all(np.minimum(a.colours, b.colours).sum() > SAME_PLACE for a, b in itertools.combinations(looks, 2))


def listed(names, most=5):
    """The first of the names, in words."""
    names = list(names)
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)

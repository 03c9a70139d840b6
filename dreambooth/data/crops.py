"""Which part of a picture is kept where some of it has to be cut off: that with the subject."""

from PIL import Image

CELLS = 512  # along a side, for finding where the subject is
MORE = 1.1  # times as much of what stands out has to be seen off the middle as in it,
LESS = 0.5  # or this share of what the middle cuts off be cut off, if that is
NOTHING = 0.003  # of all that stands out, or more


def place_of(interest, picture_size, size, is_sure=True):
    """Where a cut to `size` (width, height) keeps most of what is of interest: the `at` of fitted(); 0.5 along a side not cut.

    `interest` is an "L" picture of the whole. If it is not sure, the middle stays where nothing else is clearly better.
    """
    scale = max(cut / whole for cut, whole in zip(size, picture_size))
    shares = [cut / (whole * scale) for cut, whole in zip(size, picture_size)]
    return tuple(0.5 if share > 0.995 else place_along(profile(interest, axis), share, is_sure) for axis, share in enumerate(shares))


def profile(interest, axis):
    """How much of interest there is in each of CELLS columns (axis 0) or rows (1), as an array."""
    import numpy as np

    cells = (CELLS, 1) if axis == 0 else (1, CELLS)
    return np.asarray(interest.convert("F").resize(cells, Image.Resampling.BOX), dtype=np.float64).ravel()


def place_along(amounts, share, is_sure):
    """Where, from 0 to 1, a window of this share of a side lies that holds the most, and has its middle in the middle of that."""
    import numpy as np

    length = max(1, round(share * len(amounts)))
    held = np.convolve(amounts, np.ones(length), "valid")
    last, most, whole = len(held) - 1, held.max(), amounts.sum()
    here = held[last // 2]
    is_better = is_sure or most > MORE * here or whole - here > NOTHING * whole and whole - most < LESS * (whole - here)
    if last < 1 or not is_better or most <= 0:
        return 0.5
    best = np.flatnonzero(held >= 0.999 * most)
    run = [place for place in best if abs(place - held.argmax()) < len(best)]  # those beside the best one
    middle = (amounts * (np.arange(len(amounts)) + 0.5)).sum() / whole
    return round(float(np.clip(middle - length / 2, run[0], run[-1])) / last, 3)


def salience(image):
    """What stands out in a picture, an "L" picture: what no part of its border has the colour of, and more so in the middle."""
    import numpy as np

    share = 64 / max(image.size)
    small = image.resize([max(8, round(side * share)) for side in image.size], Image.Resampling.BOX).convert("YCbCr")
    pixels = np.asarray(small, dtype=np.float64)
    edges = pixels[:2].mean(0), pixels[-2:].mean(0), pixels[:, :2].mean(1), pixels[:, -2:].mean(1)
    border = [edge[start:start + 4].mean(0) for edge in edges for start in range(0, len(edge), 4)]
    distance = np.min([((pixels - colour) ** 2).sum(-1) ** 0.5 for colour in border], axis=0)
    down, across = (1 - 0.5 * np.abs(2 * (np.arange(side) + 0.5) / side - 1) for side in distance.shape)
    distance = distance**2 * down[:, None] * across
    return Image.fromarray((255 * distance / max(1e-9, distance.max())).astype(np.uint8))

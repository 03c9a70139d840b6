"""Shapes that pictures are trained in: of about as many pixels as the square, with sides that the model can take."""

import math
from collections import Counter

from dreambooth.base import say

LONGEST = 2.5  # times as long as wide
COARSE = 64  # pixels by which the sides of shapes differ, or an eighth of the square's side if that is less
FROM_SIDE = 512  # pixels of the square from which on photos keep their shapes unless they are told not to


def shapes_for(side, multiple):
    """[(width, height)], the square of `side` first: none has more pixels than that, and sides are multiples of `multiple`."""
    step = max(multiple, min(COARSE, side // 8) // multiple * multiple)
    tall = [(short, side * side // short // step * step) for short in range(step, side, step)]
    tall = [(width, height) for width, height in tall if width < height <= LONGEST * width]
    return [(side, side), *tall, *((height, width) for width, height in tall)]


def nearest_shape(size, shapes):
    """The one of these shapes that least of a picture of `size` (width, height) is cut off for."""
    return min(shapes, key=lambda shape: abs(math.log(size[0] * shape[1] / size[1] / shape[0])))


def shapes_of(s, sizes, side, multiple, fewest):
    """The shapes that photos of these `sizes` are trained in: the square alone, unless --aspect_ratio_buckets has it otherwise.

    If that is open, models of FROM_SIDE pixels keep shapes, and smaller ones do if the photos differ in shape. `fewest` is the
    number of pictures that a person has given of a class, each of which has one shape; None if the program draws them.
    """
    shapes = shapes_for(side, multiple)
    used = Counter(nearest_shape(size, shapes) for size in sizes)
    wants = s.aspect_ratio_buckets
    if wants is None:
        wants = side >= FROM_SIDE or len(used) > 1
    if wants and fewest is not None and fewest < len(used):
        say(f"Note: the photos have {len(used)} shapes, but there are only {fewest} class images of your own: all become squares.")
        wants = False
    if not wants:
        return shapes[:1]
    if set(used) != {shapes[0]}:
        say("Shapes: " + ", ".join(f"{count} of {width} x {height}" for (width, height), count in used.most_common())
            + " pixels; class images likewise.")
    return shapes


def apportioned(total, counts):
    """{shape: how many of `total` pictures it gets}, in the proportions of `counts`, and each at least one.

    Their sum is `total`, or the number of shapes if that is more.
    """
    whole = sum(counts.values())
    shares = {shape: max(1, int(total * count / whole)) for shape, count in counts.items()}
    by_rest = sorted(counts, key=lambda shape: (shares[shape] - total * counts[shape] / whole, shape))
    for shape in by_rest[:max(0, total - sum(shares.values()))]:
        shares[shape] += 1
    while sum(shares.values()) > max(total, len(shares)):  # small shares have been raised to one
        shares[max(shares, key=lambda shape: (shares[shape], shape))] -= 1
    return shares


def dealt(sizes, counts):
    """Which shape each picture of these `sizes` gets, if shapes are to have the proportions of `counts`: tall ones the tall
    shapes."""
    def slimness(size):
        return size[0] / size[1]
    shares = apportioned(len(sizes), counts)
    shapes = [shape for shape in sorted(shares, key=slimness) for _ in range(shares[shape])]
    order = sorted(range(len(sizes)), key=lambda number: (slimness(sizes[number]), number))
    given = dict(zip(order, shapes))
    return [given[number] for number in range(len(sizes))]

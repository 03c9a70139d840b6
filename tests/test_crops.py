"""Where a photo is cut, the subject stays."""

import numpy as np
import pytest
from PIL import Image

import dreambooth_implementation as db


def scene(size, box, colour=(230, 200, 40)):
    """A grey room with something yellow in it."""
    noise = np.random.default_rng(0).integers(90, 120, (*reversed(size), 3), dtype=np.uint8)
    image, mask = Image.fromarray(noise), Image.new("L", size)
    image.paste(colour, box)
    mask.paste(255, box)
    return image, mask


@pytest.mark.parametrize("size, box", [((300, 100), (10, 20, 60, 80)), ((300, 100), (220, 20, 280, 80)),
                                       ((100, 300), (20, 5, 70, 60)), ((300, 100), (130, 20, 170, 80)),
                                       ((100, 250), (10, 180, 90, 245))])
@pytest.mark.parametrize("by", ["mask", "salience"])
def test_the_subject_is_kept_whole(size, box, by):
    image, mask = scene(size, box)
    at = db.place_of(mask, size, (64, 64)) if by == "mask" else db.place_of(db.salience(image), size, (64, 64), is_sure=False)
    cut = np.array(db.View((64, 64), at, mask).seen_mask()) > 127
    scale = 64 / min(size)
    assert cut.sum() == pytest.approx((box[2] - box[0]) * (box[3] - box[1]) * scale**2, rel=0.08)
    if by == "mask":  # and in the middle, as far as the borders let it
        rows, columns = np.nonzero(cut)
        middle = columns.mean() if size[0] > size[1] else rows.mean()
        assert abs(middle - 31.5) < 2 or at[0] in (0, 1) or at[1] in (0, 1)


def test_what_hardly_stands_out_of_the_subject_is_kept_as_well():
    image, mask = Image.new("RGB", (300, 100), (100, 100, 100)), Image.new("L", (300, 100))
    for box, colour in (((70, 30, 110, 70), (130, 130, 100)), ((110, 20, 150, 80), (240, 220, 40))):
        image.paste(colour, box)
        mask.paste(255, box)
    at = db.place_of(db.salience(image), image.size, (64, 64), is_sure=False)
    seen = [(np.array(db.View((64, 64), place, mask).seen_mask()) > 127).sum() / (64 * 64) for place in (at, (0.5, 0.5))]
    assert seen[0] == pytest.approx((40 * 40 + 40 * 60) / 100**2, rel=0.05) and seen[1] < 0.8 * seen[0]
    room = scene((300, 100), (110, 20, 150, 80))[0]  # of which something stands out everywhere
    assert db.place_of(db.salience(room), room.size, (64, 64), is_sure=False) == (0.5, 0.5)


def test_a_side_that_is_not_cut_is_not_moved_along():
    _, mask = scene((300, 100), (10, 2, 60, 20))
    assert db.place_of(mask, (300, 100), (64, 64)) == (0.0, 0.5)
    assert db.place_of(mask, (300, 100), (300, 100)) == (0.5, 0.5)


def test_where_nothing_stands_out_the_middle_is_kept():
    for image in (Image.new("RGB", (90, 30), "red"), scene((90, 30), (40, 10, 50, 20))[0]):
        assert db.place_of(db.salience(image), image.size, (32, 32), is_sure=False) == (0.5, 0.5)
    assert db.place_of(Image.new("L", (90, 30)), (90, 30), (32, 32)) == (0.5, 0.5)


def test_two_subjects_far_apart():
    """The larger one; what lies between is nothing."""
    _, mask = scene((400, 100), (0, 0, 30, 100))
    mask.paste(255, (350, 0, 400, 100))
    assert db.place_of(mask, (400, 100), (64, 64))[0] == 1.0 or db.View((64, 64), db.place_of(mask, (400, 100), (64, 64)), mask
                                                                         ).seen_mask().getextrema()[1] == 255

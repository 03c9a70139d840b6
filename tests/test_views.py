"""How training sees a picture: which part of it, and how much each place counts."""

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image

import dreambooth_implementation as db


def masked(box, size=(64, 64)):
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_weights_are_the_mask_with_a_floor_and_1_on_average(floor):
    weights = db.View((64, 64), mask=masked((0, 0, 32, 64))).weights(floor, (8, 8))
    assert weights.shape == (1, 8, 8) and weights.mean() == pytest.approx(1)
    inside, outside = weights[0, :, :4], weights[0, :, 4:]
    assert inside.allclose(torch.tensor(2 / (1 + floor))) and outside.allclose(torch.tensor(2 * floor / (1 + floor)))


def test_a_white_mask_is_none():
    for size in ((64, 64), (37, 91), (300, 200)):
        assert torch.equal(db.View((64, 64), mask=masked((0, 0, *size), size)).weights(0.1, (8, 8)), torch.ones(1, 8, 8))


def test_a_mask_is_cut_as_its_photo_is():
    view = db.View((32, 32), (1.0, 0.5), masked((32, 0, 64, 32), (64, 32)))
    image = Image.merge("RGB", [view.mask] * 3)
    assert np.array_equal(np.array(view.seen(image)[0])[..., 0], np.array(view.seen_mask()))
    assert view.seen_mask().getextrema() == (255, 255) and view.seen(image)[1] == [32, 64, 0, 32, 32, 32]


def test_a_tint_lies_over_what_is_not_the_subject():
    photo = picture(1, (64, 64))
    plain, tinted = (np.array(db.View((64, 64), mask=mask).tinted(photo)) for mask in (None, masked((0, 0, 32, 64))))
    assert np.array_equal(plain, np.array(photo)) and np.array_equal(plain[:, :31], tinted[:, :31])
    assert (plain[:, 33:] != tinted[:, 33:]).any(-1).mean() > 0.9


def test_only_what_is_unusual_tells_views_apart():
    """So that checkpoints of trainings without masks remain what they are."""
    assert db.View((64, 64)).traits() == []
    others = [db.View((64, 48)), db.View((64, 64), (0, 0.5)), db.View((64, 64), mask=masked((0, 0, 9, 9))),
              db.View((64, 64), mask=masked((0, 0, 9, 8)))]
    assert len({str(view.traits()) for view in others}) == 4 and all(view.traits() for view in others)

"""What is said of photos before a training."""

import numpy as np
import pytest
from conftest import picture
from PIL import Image, ImageFilter

import dreambooth_implementation as db


def noisy(seed, size=(96, 96)):
    """A sharp picture that no other seed makes."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.NEAREST)


def looks(*pictures, masks=()):
    return {db.Path(f"{i}.png"): db.Look(image, masks[i] if masks else None) for i, image in enumerate(pictures)}


def lines(*pictures, **options):
    return db.report_lines("dog", looks(*pictures, **options))


def small_mask(side):
    mask = Image.new("L", (96, 96))
    mask.paste(255, (0, 0, side, side))
    return mask


def test_good_photos_have_one_line():
    assert lines(noisy(0), noisy(1, (200, 100)), noisy(2)) == ['Photos of "dog": 3, 96 x 96 to 200 x 100 pixels.']
    assert lines(noisy(0), noisy(1)) == ['Photos of "dog": 2, 96 x 96 pixels.']


@pytest.mark.parametrize("pictures, masks, words", [
    ((noisy(0), noisy(1), noisy(2).filter(ImageFilter.GaussianBlur(4))), (), "blurred: 2.png"),
    ((noisy(0), noisy(1), noisy(0).filter(ImageFilter.GaussianBlur(0.4))), (), "nearly the same picture: 0.png and 2.png"),
    ((noisy(0), noisy(1), noisy(2)), (small_mask(12), small_mask(60), small_mask(20)), "small in 0.png, 2.png"),
])
def test_what_teaches_badly_is_named(pictures, masks, words):
    _, line = lines(*pictures, masks=masks)
    assert words in line and ";" in line


def test_one_background_is_named_where_no_masks_are():
    room = noisy(9).filter(ImageFilter.GaussianBlur(1))
    pictures = []
    for i in range(3):
        pictures.append(room.copy())
        pictures[i].paste(noisy(i, (64, 60)), (16 + 2 * i, 20))
    (line,) = [line for line in lines(*pictures) if "background" in line]
    assert "--mask" in line
    assert not [line for line in lines(*(image.copy() for image in pictures), masks=[small_mask(60)] * 3) if "background" in line]


def test_there_are_never_more_lines_than_photos(photos, capsys):
    for i in range(2):
        picture(3).filter(ImageFilter.GaussianBlur(3 + i / 10)).save(photos / f"{i}.png")
    paths = tuple((photos / f"{i}.png", None) for i in range(2))
    db.tell_photos([db.Concept(str(photos), "", 0, name="dog", photos=paths, masks={path: small_mask(12) for path, _ in paths})])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_training_says_how_its_photos_are(train):
    status, out, _ = train()
    assert status == 0 and 'Photos of "dog": 3, 48 x 40 pixels.' in out

"""Masks as people make them: beside the photos, in a folder of their own, or the photos' own transparency."""

import pytest
from conftest import picture
from PIL import Image, ImageOps
from training_runs import ALONE, assert_same_weights, interrupt, weights

import dreambooth_implementation as db


def disc(size=(48, 40), box=(10, 10, 30, 30)):
    """Black with a white box."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def found(folder, *names):
    return db.find_masks(folder, [folder / name for name in names or ("0.png", "1.png", "2.png")])


@pytest.mark.parametrize("name", ["1.mask.png", "1-masklabel.png", "1.MASK.PNG", "1.png.mask.png", "masks/1.png",
                                  "Masks/1.mask.png"])
def test_where_a_mask_may_lie(name, photos, capsys):
    (photos / name).parent.mkdir(exist_ok=True)
    disc().save(photos / name)
    (masked,) = found(photos).items()
    assert masked[0].name == "1.png" and masked[1].tobytes() == disc().tobytes()
    assert capsys.readouterr().out == f"Masks: 1 of 3 photos in {photos} have one.\n"
    listed, _ = db.find_photos(db.Concept(str(photos), "", 0, class_prompt="a dog"))
    assert [path.name for path, _ in listed] == ["0.png", "1.png", "2.png"]
    assert "kipped" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["1_mask.png", "1-MASK.jpg", "mask_1.png", "mask 1.webp"])
def test_a_mask_by_another_programs_name_is_no_photo(name, photos):
    disc().save(photos / name)
    with pytest.raises(db.UserError, match="is it the mask of 1.png. Then call it 1.mask.png; if it is a photo, give it another name"):
        db.list_images(photos, "--instance_data_dir")
    (photos / "1.png").rename(photos / "a.png")  # a photo of a mask, then
    assert photos / name in db.list_images(photos, "--instance_data_dir")


def test_transparency_is_a_mask_and_lies_as_the_photo_does(photos, capsys):
    image, exif = picture(1).convert("RGBA"), Image.Exif()
    image.putalpha(disc())
    exif[0x0112] = 6
    image.save(photos / "1.png", exif=exif)
    opaque = picture(2).convert("RGBA")
    opaque.save(photos / "2.png")
    (masked,) = found(photos).items()
    assert masked[0].name == "1.png" and masked[1].tobytes() == disc().transpose(Image.Transpose.ROTATE_270).tobytes()
    assert masked[1].size == db.load_image(photos / "1.png").size and "1 by their own transparency" in capsys.readouterr().out
    Image.new("L", masked[1].size, 255).save(photos / "1.mask.png")
    assert found(photos)[photos / "1.png"].getextrema() == (255, 255)  # a file goes before


def test_a_mask_with_transparency_is_black_where_it_shows_nothing(photos):
    mask = Image.new("RGBA", (48, 40), "white")
    mask.putalpha(disc())
    mask.save(photos / "0.mask.png")
    assert found(photos)[photos / "0.png"].tobytes() == disc().tobytes()


def two(photos):
    disc().save(photos / "0.mask.png")
    disc().save(photos / "0-masklabel.png")


def hidden(photos):
    image = picture(0).convert("RGBA")
    image.putalpha(0)
    image.save(photos / "0.png")


@pytest.mark.parametrize("make, words", [
    (lambda photos: disc((40, 48)).save(photos / "0.mask.png"), ("0.mask.png", "40 x 48", "0.png has 48 x 40")),
    (lambda photos: disc(box=(0, 0, 1, 1)).save(photos / "0.mask.png"), ("0.mask.png is black nearly everywhere", "paint")),
    (lambda photos: (photos / "0.mask.png").write_bytes(b"nothing"), ("0.mask.png", "not an image")),
    (two, ("0.mask.png", "0-masklabel.png", "keep one")),
    (hidden, ("0.png is transparent nearly everywhere", "mask")),
])
def test_what_is_of_no_use_is_refused_in_one_line(make, words, train, photos):
    make(photos)
    status, _, err = train()
    assert status == 2 and err.count("\n") == 1 and all(word in err for word in words), err


def test_what_is_doubtful_is_said(photos, capsys):
    ImageOps.invert(disc()).save(photos / "0.mask.png")
    disc(box=(0, 10, 40, 40)).save(photos / "1.mask.png")
    disc().save(photos / "rex.mask.png")
    assert len(found(photos)) == 2
    out = capsys.readouterr().out
    assert "0.mask.png is white along the borders" in out and "inverted" in out and "1.mask.png" not in out
    assert "Skipped" in out and "rex.mask.png: no image" in out


def test_large_masks_are_kept_smaller():
    mask = disc((3000, 2000), (0, 0, 1500, 2000))
    small = db.smaller(mask)
    assert small.size == (1024, 683) and db.share_of(small) == pytest.approx(0.5, abs=0.01)


def test_masks_are_used_unless_ruled_out(train, photos, tmp_path, monkeypatch):
    """And a mask of nothing but white changes nothing."""
    for name in ("0", "1", "2"):
        Image.new("L", (48, 40), 255).save(photos / f"{name}.mask.png")
    for output, flags in (("white", []), ("none", ["--mask", "none"])):
        status, out, err = train("sd1", *ALONE, "--output_dir", output, *flags)
        assert status == 0 and ("Masks: 3 of 3" in out) == (output == "white"), err
    assert_same_weights(tmp_path / "white", tmp_path / "none")
    disc().save(photos / "0.mask.png")
    assert train("sd1", *ALONE, "--output_dir", "box", "--unmasked_weight", 0)[0] == 0
    white, box = weights(tmp_path / "white"), weights(tmp_path / "box")
    assert any(not (white[name] == box[name]).all() for name in white)


def test_resumed_equals_uninterrupted_with_masks(flags, run, photos, tmp_path, monkeypatch):
    disc().save(photos / "0.mask.png")
    for name in ("whole", "parts"):
        undo = interrupt(monkeypatch, 4) if name == "parts" else lambda: None
        status, _, err = run(*flags("lora"), "--output_dir", name)
        assert status == (130 if name == "parts" else 0), err
        undo()
    disc(box=(0, 0, 30, 30)).save(photos / "0.mask.png")
    status, _, err = run(*flags("lora"), "--output_dir", "parts", "--resume")
    assert status == 2 and "the photos or class images" in err
    disc().save(photos / "0.mask.png")
    status, _, err = run(*flags("lora"), "--output_dir", "parts", "--resume", "--unmasked_weight", 0.5)
    assert status == 2 and "--unmasked_weight" in err
    assert run(*flags("lora"), "--output_dir", "parts", "--resume")[0] == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")

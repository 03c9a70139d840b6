"""Pictures as people bring them: read as the eye sees them, cut to squares."""

import numpy as np
import pytest
from PIL import Image

import dreambooth_implementation as db


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    image.save(tmp_path / "a.png", exif=exif)
    loaded = db.load_image(tmp_path / "a.png")
    assert loaded.size == (20, 40)
    assert loaded.getpixel((10, 5)) == (0, 0, 255) and loaded.getpixel((10, 35)) == (255, 0, 0)


def test_transparency_becomes_white(tmp_path):
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 0))  # red hides under full transparency
    rgba.paste((0, 0, 255, 255), (0, 0, 4, 8))
    rgba.save(tmp_path / "rgba.png")
    rgba.convert("LA").save(tmp_path / "la.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.paste(0, (0, 0, 4, 8))
    palette.save(tmp_path / "p.png", transparency=1)
    for name in ("rgba", "la", "p"):
        assert db.load_image(tmp_path / f"{name}.png").getpixel((6, 4)) == (255, 255, 255), name
    assert db.load_image(tmp_path / "rgba.png").getpixel((1, 4)) == (0, 0, 255)
    assert db.load_image(tmp_path / "p.png").getpixel((1, 4)) == (0, 0, 255)


@pytest.mark.parametrize("mode, suffix", [("CMYK", "jpg"), ("P", "png"), ("L", "png"), ("1", "png"), ("RGB", "webp"),
                                          ("RGB", "avif")])
def test_colour_modes_become_rgb(tmp_path, mode, suffix):
    Image.new("RGB", (16, 16), (200, 200, 200)).convert(mode).save(tmp_path / f"a.{suffix}")
    loaded = db.load_image(tmp_path / f"a.{suffix}")
    assert loaded.mode == "RGB" and np.asarray(loaded).mean() == pytest.approx(200, abs=6 if mode != "1" else 60)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_is_scaled_not_clipped(tmp_path, suffix):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    loaded = np.asarray(db.load_image(tmp_path / f"a.{suffix}"))[..., 0].ravel()
    assert np.array_equal(loaded, np.arange(256))


def test_float_image_is_scaled(tmp_path):
    Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)).save(tmp_path / "a.tif")
    assert np.array_equal(np.asarray(db.load_image(tmp_path / "a.tif"))[..., 0].ravel(), np.arange(256))


def test_first_frame_of_an_animation(tmp_path, capsys):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("green", "red")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert db.load_image(tmp_path / "a.gif").getpixel((0, 0)) == (0, 128, 0)
    assert "2 frames" in capsys.readouterr().out


def test_heic(tmp_path):
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        (tmp_path / "a.heic").write_bytes(b"anything")
        with pytest.raises(db.UserError, match="pip install pillow-heif"):
            db.load_image(tmp_path / "a.heic")
    else:
        register_heif_opener()
        Image.new("RGB", (64, 64), "red").save(tmp_path / "a.heic")
        assert db.load_image(tmp_path / "a.heic").getpixel((32, 32))[0] > 240


@pytest.mark.parametrize("size, at", [((100, 50), (0.1, 0.5)), ((101, 50), (0.7, 0.5)), ((40, 90), (0.5, 0.2)), ((33, 32), (0.5, 0.5))])
def test_the_record_of_a_mirrored_cut_is_that_of_the_mirrored_picture(size, at):
    """Where the cut of the mirrored picture begins, counted from its own left: its pixels are the cut's, mirrored."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    cut, record = db.fitted(image, (32, 32), at, Image.Resampling.NEAREST)
    height, width, top, left, down, across = db.mirrored(record)
    _, scaled = db.covering(size, (32, 32))
    whole = image.resize(scaled, Image.Resampling.NEAREST).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.array_equal(np.asarray(whole.crop((left, top, left + across, top + down))), np.asarray(cut)[:, ::-1])
    assert [height, width, top, down, across] == [record[i] for i in (0, 1, 2, 4, 5)] and db.mirrored(db.mirrored(record)) == record


def test_a_square_keeps_the_middle_and_records_its_size():
    image = Image.new("RGB", (100, 50), "red")
    image.paste("blue", (25, 0, 75, 50))
    cropped, sizes = db.fitted(image, (32, 32))
    assert cropped.size == (32, 32) and sizes == [50, 100, 0, 16, 32, 32]
    assert np.asarray(cropped)[:, 2:-2, 2].min() > 200

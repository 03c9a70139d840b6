"""Photos, captions, class images and words as people have them: what every viewer shows is trained on, all that was given is
used or said not to be, and a word means what its writer meant."""

import io
import json
import os
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, picture
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

import dreambooth_implementation as db

GREEN = (60, 180, 90)


@pytest.fixture(autouse=True)
def said_anew():
    """Lines that are said once in a program are said once in a test."""
    db.say_once.cache_clear()


def read(path):
    return db.load_image(Path(path))


def colour(path, at=(0, 0)):
    return read(path).getpixel(at)


def refusal(call, *arguments, **options):
    """The one line of a UserError."""
    with pytest.raises(db.UserError) as problem:
        call(*arguments, **options)
    assert "\n" not in str(problem.value)
    return str(problem.value)


# ---- colour profiles


def icc(primaries, gamma, white=(.9642, 1, .8249), space=b"RGB "):
    """A profile made by hand: XYZ (D50) of red, green and blue, and a gamma; without primaries of greys."""
    def n(x):
        return struct.pack(">i", round(x * 65536))

    def xyz(v):
        return b"XYZ \0\0\0\0" + b"".join(map(n, v))
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    desc = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78
    desc += b"\0" * (-len(desc) % 4)
    tags = [(b"desc", desc), (b"cprt", b"text\0\0\0\0x\0\0\0"), (b"wtpt", xyz(white))]
    tags += [(k, xyz(v)) for k, v in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries)]
    tags += [(k, curve) for k in ((b"rTRC", b"gTRC", b"bTRC") if primaries else (b"kTRC",))]
    offset, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for k, d in tags:
        table += k + struct.pack(">II", offset + len(body), len(d))
        body += d
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + n(.9642) + n(1) + n(.8249) + b"\0" * 48
    return head[:128] + table + body


ADOBE = icc(((.60974, .31111, .01947), (.20528, .62567, .06087), (.14919, .06322, .74457)), 2.2)
PROPHOTO = icc(((.79767, .28804, 0), (.13519, .71188, 0), (.03134, .00009, .82491)), 1.8)
GREY_1_0 = icc((), 1.0, space=b"GRAY")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("suffix, options", [("jpg", {"quality": 98}), ("png", {}), ("webp", {"lossless": True}), ("tif", {}),
                                             ("avif", {"quality": 100})])
@pytest.mark.parametrize("profile, expected", [(ADOBE, (0, 181, 83)), (PROPHOTO, (0, 209, 87)), (SRGB, GREEN)],
                         ids=["Adobe RGB", "ProPhoto", "sRGB"])
def test_colours_are_those_of_the_profile(profile, expected, suffix, options, tmp_path, capsys):
    Image.new("RGB", (64, 64), GREEN).save(tmp_path / f"a.{suffix}", icc_profile=profile, **options)
    assert colour(tmp_path / f"a.{suffix}") == pytest.approx(expected, abs=2)
    assert capsys.readouterr().out == ""


def test_an_srgb_profile_changes_no_pixel(tmp_path):
    picture(1).save(tmp_path / "a.png", icc_profile=SRGB)
    assert np.array_equal(read(tmp_path / "a.png"), picture(1))


@pytest.mark.parametrize("mode", ["RGBA", "P", "RGBA over white"])
def test_profiles_meet_palettes_and_transparency(mode, tmp_path):
    image = Image.new("RGB", (64, 64), GREEN)
    if mode == "P":
        image = image.quantize(4)
    else:
        image.putalpha(255 if mode == "RGBA" else 128)
    image.save(tmp_path / "a.png", icc_profile=ADOBE)
    assert colour(tmp_path / "a.png") == ((127, 218, 169) if "white" in mode else (0, 181, 83))


def test_greys_have_profiles_as_well(tmp_path, capsys):
    """A linear grey of a half is as bright as sRGB's 188; a grey in a profile of colours stays grey."""
    for name, grey in (("l", Image.new("L", (8, 8), 128)), ("la", Image.new("LA", (8, 8), (128, 255))),
                       ("deep", Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)))):
        grey.save(tmp_path / f"{name}.png", icc_profile=GREY_1_0)
        assert colour(tmp_path / f"{name}.png") == pytest.approx((188,) * 3, abs=1), name
    Image.new("L", (8, 8), 100).save(tmp_path / "rgb.png", icc_profile=SRGB)
    assert colour(tmp_path / "rgb.png") == (100, 100, 100) and capsys.readouterr().out == ""


@pytest.mark.parametrize("mode, profile", [("RGB", b"garbage"), ("RGB", ADOBE[:200]), ("CMYK", ADOBE), ("RGB", GREY_1_0)])
def test_a_profile_that_does_not_fit_is_left_out_and_said(mode, profile, tmp_path, capsys):
    Image.new("RGB", (64, 64), GREEN).convert(mode).save(tmp_path / "a.tif", icc_profile=profile)
    assert colour(tmp_path / "a.tif") == GREEN
    assert "a.tif: its colour profile cannot be used" in capsys.readouterr().out


def cmyk_profile():
    """Of a printer whose every ink but black gives the same Lab colour (50, 20, -30)."""
    n = struct.pack(">3i", round(.9642 * 65536), 65536, round(.8249 * 65536))
    ramp = bytes(range(256))
    nodes = b"\xff\x80\x80" + b"".join(bytes((0, 128, 128)) if i % 2 else bytes((128, 148, 98)) for i in range(1, 16))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table += ramp * 4 + nodes + ramp * 3
    table += b"\0" * (-len(table) % 4)
    desc = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 79
    tags, body = b"", b""
    for kind, data in ((b"desc", desc), (b"wtpt", b"XYZ \0\0\0\0" + n), (b"A2B0", table)):
        tags += kind + struct.pack(">II", 132 + 12 * 3 + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", 132 + 12 * 3 + len(body), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + n + b"\0" * 48
    return head[:128] + struct.pack(">I", 3) + tags + body


def test_cmyk_is_what_its_printer_prints(tmp_path, capsys):
    for suffix in ("jpg", "tif"):
        for inks, expected in (((0, 0, 0, 0), (255, 255, 255)), ((255, 0, 0, 0), (134, 108, 171))):
            Image.new("CMYK", (8, 8), inks).save(tmp_path / f"a.{suffix}", icc_profile=cmyk_profile())
            assert colour(tmp_path / f"a.{suffix}") == pytest.approx(expected, abs=4)
    assert capsys.readouterr().out == ""


def test_lab_without_a_profile(tmp_path):
    lab = ImageCms.profileToProfile(Image.new("RGB", (8, 8), GREEN), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"),
                                    outputMode="LAB")
    lab.save(tmp_path / "a.tif")
    assert colour(tmp_path / "a.tif") == pytest.approx(GREEN, abs=3)


def test_adobe_rgb_told_by_exif_alone_is_said(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x8769] = {0xA005: {1: "R03"}}
    Image.new("RGB", (8, 8), GREEN).save(tmp_path / "a.jpg", exif=exif, quality=98)
    assert colour(tmp_path / "a.jpg") == pytest.approx(GREEN, abs=2)
    assert "Adobe RGB and left out the profile" in capsys.readouterr().out


# ---- colours in numbers


P3 = [[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]]  # from linear Display P3 to linear sRGB
BT_2020 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
ADOBE_RGB = [[1.3982, -0.3982, 0], [0, 1, 0], [0, -0.0429, 1.0429]]
D65, RED, BLUE = (0.3127, 0.329), (0.64, 0.33), (0.15, 0.06)


def shown(matrix=np.eye(3), gamma=None):
    """What GREEN looks like, in sRGB, where numbers mean this."""
    values = np.array(GREEN) / 255
    light = values ** gamma if gamma else np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    light = (np.array(matrix) @ light).clip(0, 1)
    return 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def with_chunks(target, *chunks, grey=None):
    """A PNG with these (kind, content) before its pixels."""
    Image.new("RGB", (4, 4), GREEN if grey is None else (grey,) * 3).save(target)
    data = target.read_bytes()
    more = b"".join(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
                    for kind, content in chunks)
    target.write_bytes(data[:33] + more + data[33:])
    return target


def gama(gamma):
    return b"gAMA", struct.pack(">I", round(gamma * 100000))


def chrm(green, white=D65, red=RED, blue=BLUE):
    return b"cHRM", struct.pack(">8I", *(round(number * 100000) for number in (*white, *red, *green, *blue)))


@pytest.mark.parametrize("chunks, expected", [
    ([gama(1)], shown(gamma=1)), ([gama(0.55556)], shown(gamma=1.8)), ([gama(0.45455)], GREEN),
    ([gama(1), (b"sRGB", b"\0")], GREEN), ([gama(0.45455), chrm((0.21, 0.71))], shown(ADOBE_RGB)), ([chrm((0.3, 0.6))], GREEN),
    ([(b"cICP", bytes([12, 13, 0, 1]))], shown(P3)),
    ([(b"cICP", bytes([9, 8, 0, 1])), gama(0.5)], shown(BT_2020, 1)), ([(b"cICP", bytes([1, 13, 0, 1])), gama(1)], GREEN),
    ([gama(0)], GREEN), ([chrm((0, 0))], GREEN), ([chrm(RED, D65, RED, RED)], GREEN), ([(b"gAMA", b"\1")], GREEN),
    ([(b"cICP", b"\x0c")], GREEN), ([(b"cICP", bytes([200, 200, 0, 1]))], GREEN), ([(b"cHRM", b"\xff" * 32)], GREEN)])
def test_colours_that_a_png_says_in_numbers(chunks, expected, tmp_path, capsys):
    assert np.abs(np.subtract(colour(with_chunks(tmp_path / "a.png", *chunks)), expected)).max() <= 2
    assert capsys.readouterr().out == ""


def test_a_profile_goes_before_numbers(tmp_path):
    Image.new("RGB", (4, 4), GREEN).save(tmp_path / "a.png", icc_profile=ADOBE)
    data = (tmp_path / "a.png").read_bytes()
    other = with_chunks(tmp_path / "b.png", gama(1)).read_bytes()
    (tmp_path / "a.png").write_bytes(data[:33] + other[33:33 + 16] + data[33:])
    assert colour(tmp_path / "a.png") == (0, 181, 83)


@pytest.mark.parametrize("codes, expected", [((12, 13), shown(P3)), ((1, 13), GREEN), ((9, 8), shown(BT_2020, 1)), ((2, 2), GREEN)])
def test_colours_that_heic_and_avif_say_in_numbers(codes, expected, tmp_path, capsys):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    named = {"color_primaries": codes[0], "transfer_characteristics": codes[1], "matrix_coefficients": 6, "full_range_flag": 1}
    Image.new("RGB", (64, 64), GREEN).save(tmp_path / "a.heic", quality=100, save_nclx_profile=True, **named)
    assert np.abs(np.subtract(colour(tmp_path / "a.heic"), expected)).max() <= 4
    Image.new("RGB", (64, 64), GREEN).save(tmp_path / "a.avif", quality=100)
    data = (tmp_path / "a.avif").read_bytes()
    at = data.index(b"colrnclx") + 8
    (tmp_path / "a.avif").write_bytes(data[:at] + struct.pack(">HH", *codes) + data[at + 4:])
    assert np.abs(np.subtract(colour(tmp_path / "a.avif"), expected)).max() <= 4
    assert capsys.readouterr().out == ""


# Of PQ and of HLG: a value, and what it looks like. 203 candela are white, which is pressed a little; 100 candela are half of it.
HDR = [(16, 0, 0), (16, 130, 187), (16, 148, 237), (16, 255, 255), (18, 0, 0), (18, 128, 137), (18, 191, 237), (18, 255, 255)]


@pytest.mark.parametrize("curve, value, expected", HDR)
def test_hdr_is_toned_down_and_said(curve, value, expected, tmp_path, capsys):
    path = with_chunks(tmp_path / "a.png", (b"cICP", bytes([9, curve, 0, 1])), grey=value)
    assert np.abs(np.subtract(colour(path), expected)).max() <= 2
    assert f"Note: {path} is HDR ({ {16: 'PQ', 18: 'HLG'}[curve]}); what is brighter than white is toned down.\n" == capsys.readouterr().out


@pytest.mark.parametrize("profile", [b"\0" * 128 + b"cicp\0\0\0\0\x09\x10\0\1", b"\0" * 128 + "ITUR_2100_PQ_FULL".encode("utf-16-be")])
def test_hdr_is_told_by_a_profile(profile, tmp_path, capsys):
    Image.new("RGB", (4, 4), (130, 130, 130)).save(tmp_path / "a.png", icc_profile=profile)
    assert np.abs(np.subtract(colour(tmp_path / "a.png"), 187)).max() <= 2
    assert "is HDR (PQ)" in capsys.readouterr().out


def test_hdr_keeps_hue_and_clearness(tmp_path):
    red = (200, 60, 60, 128)
    Image.new("RGBA", (4, 300), red).save(tmp_path / "b.png")
    data = (tmp_path / "b.png").read_bytes()
    chunk = b"cICP" + bytes([12, 16, 0, 1])
    (tmp_path / "b.png").write_bytes(data[:33] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:])
    shown_red = colour(tmp_path / "b.png")
    assert shown_red[0] == 255 and 120 < shown_red[1] < 136 and abs(shown_red[1] - shown_red[2]) < 8  # half of it is the white below
    assert db.load_opacity(tmp_path / "b.png").getpixel((0, 299)) == 128


def test_hdr_of_heic_and_avif(tmp_path, capsys):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    named = {"color_primaries": 9, "transfer_characteristics": 18, "matrix_coefficients": 9, "full_range_flag": 1}
    Image.new("RGB", (64, 64), (191, 191, 191)).save(tmp_path / "a.heic", quality=100, save_nclx_profile=True, **named)
    assert np.abs(np.subtract(colour(tmp_path / "a.heic"), 237)).max() <= 3
    assert "a.heic is HDR (HLG)" in capsys.readouterr().out


# ---- deep and dark greys


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("value, expected", [(200, 1), (1, 0), (30000, 117), (65535, 255)])
def test_16_bit_is_measured_by_its_depth(value, expected, suffix, tmp_path, capsys):
    Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / f"a.{suffix}")
    assert colour(tmp_path / f"a.{suffix}") == (expected,) * 3 and capsys.readouterr().out == ""


@pytest.mark.parametrize("values, expected, said", [
    (np.full((8, 8), .3, np.float32), 76, ""),
    (np.full((8, 8), 0, np.float32), 0, ""),
    (np.full((8, 8), 128, np.float32), 128, "values up to 128; 255 is taken as white"),
    (np.where(np.arange(6400).reshape(80, 80) == 1, 4, .5).astype(np.float32), 128, "values up to 4; 1 is taken as white"),
    (np.where(np.arange(6400).reshape(80, 80) == 1, np.nan, .5).astype(np.float32), 128, ""),
    (np.where(np.arange(6400).reshape(80, 80) == 1, np.inf, .5).astype(np.float32), 128, ""),
    (np.full((8, 8), 200, np.int32), 200, "values up to 200; 255 is taken as white"),
], ids=["dark", "black", "8 bits", "a lamp", "not a number", "endless", "32 bits"])
def test_greys_of_unknown_depth_are_guessed_and_said(values, expected, said, tmp_path, capsys):
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert colour(tmp_path / "a.tif", (5, 5)) == (expected,) * 3
    out = capsys.readouterr().out
    assert said in out if said else out == ""


def test_a_clear_grey_of_16_bits_is_white(tmp_path):
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save(tmp_path / "a.png", transparency=300)
    data = (tmp_path / "a.png").read_bytes()
    if b"tRNS" not in data:  # Pillow does not write it for this mode
        chunk = b"tRNS" + struct.pack(">H", 300)
        place = data.index(b"IDAT") - 4
        data = data[:place] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[place:]
        (tmp_path / "a.png").write_bytes(data)
    assert colour(tmp_path / "a.png") == (255, 255, 255)


# ---- names and contents


def test_pictures_are_known_by_their_bytes(tmp_path):
    red = Image.new("RGB", (64, 64), "red")
    for name, kind in (("a.heic", "JPEG"), ("b.png", "JPEG"), ("c.jpg", "WEBP"), ("d.jpg", "AVIF"), ("e.gif", "PNG"), ("f", "PNG"),
                       ("g.jpg_large", "JPEG"), ("h.png ", "PNG"), ("i.JPE", "JPEG"), ("j.jp2", "JPEG2000"), ("k.tga", "TGA"),
                       ("l.jpg~2", "PNG"), ("m.mpo", "MPO")):
        red.save(tmp_path / name, format=kind)
        assert colour(tmp_path / name) == pytest.approx((255, 0, 0), abs=3), name


def test_heic_under_another_name(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (64, 64), "red")).save(tmp_path / "x.heic", quality=100)
    os.rename(tmp_path / "x.heic", tmp_path / "x.jpg")
    assert colour(tmp_path / "x.jpg", (32, 32)) == pytest.approx((255, 0, 0), abs=5)
    assert db.picture_kind(tmp_path / "x.jpg") == "HEIC"


@pytest.mark.parametrize("name", ["a.jpg", "a.heic"])
def test_heic_without_its_package_is_one_line(name, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    assert "pip install pillow-heif" in refusal(read, tmp_path / name)


@pytest.mark.parametrize("contents, said", [
    (b"", "empty"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"<!DOCTYPE html>", "a web page"),
    (b"\xff\x0a\0\0", "JPEG XL"), (b"8BPS\0", "Photoshop"), (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
    (b"hello", "not an image"),
    (b"II*\0" + bytes(50), "a damaged TIFF"), (b"\xff\xd8\xff" + bytes(50), "a damaged JPEG")])
def test_what_is_no_picture_is_named(contents, said, tmp_path):
    (tmp_path / "a.jpg").write_bytes(contents)
    assert said in refusal(read, tmp_path / "a.jpg") and "a.jpg" in refusal(read, tmp_path / "a.jpg")


def test_files_of_a_folder(tmp_path, capsys):
    """Pictures are used whatever their suffix, what is not read is named, what systems leave there is not."""
    for name, kind in (("a.jpg_large", "JPEG"), ("b", "PNG"), ("c.mpo", "MPO"), ("d.JPE", "JPEG"), ("f.png ", "PNG"),
                       ("i.tga", "TGA")):
        picture(ord(name[0])).save(tmp_path / name, format=kind)
    picture(1).save(tmp_path / ".hidden.png")
    (tmp_path / "._d.jpg").write_bytes(b"\0\5\x16\7" + bytes(100))
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "raw.CR2").write_bytes(b"II*\0" + bytes(100))
    (tmp_path / "film.mov").write_bytes(b"\0\0\0\x14ftypqt  ")
    (tmp_path / "dog9.txt").write_text("a dog")
    (tmp_path / "photo.jpg").mkdir()
    (tmp_path / "broken.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    found = db.list_images(tmp_path, "--instance_data_dir")
    assert [path.name for path in found] == ["a.jpg_large", "b", "c.mpo", "d.JPE", "f.png ", "i.tga"]
    out = capsys.readouterr().out
    assert "a.jpg_large is a picture (JPEG)" in out and "b is a picture (PNG)" in out and "c.mpo" not in out
    assert "raw.CR2: .cr2 is not read; convert it" in out and "film.mov: .mov is not read" in out
    assert ".hidden.png: its name begins with a dot" in out and "._d" not in out and "DS_Store" not in out
    assert "dog9.txt: not an image, and no image here has this name" in out and "photo.jpg/: folders" in out
    assert "broken.png: a link that leads nowhere" in out and "loop.png: a link that leads nowhere" in out


def test_links_to_pictures_elsewhere_are_followed(tmp_path, capsys):
    """As in the hub's cache, whose snapshots are links to blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "abc").mkdir(parents=True)
    for i in range(3):
        picture(i).save(tmp_path / "blobs" / f"b{i}", format="PNG")
        (tmp_path / "snapshots" / "abc" / f"{i}.png").symlink_to(f"../../blobs/b{i}")
    (tmp_path / "blobs" / "t").write_text("a [identifier] dog")
    (tmp_path / "snapshots" / "abc" / "0.txt").symlink_to("../../blobs/t")
    photos, _ = db.find_photos(concept(tmp_path / "snapshots" / "abc"))
    assert [(path.name, caption) for path, caption in photos] == [("0.png", "a [identifier] dog"), ("1.png", None), ("2.png", None)]
    assert capsys.readouterr().out == ""


def test_photos_in_a_folder_inside_are_pointed_out(tmp_path):
    (tmp_path / "10_sks dog").mkdir()
    picture(0).save(tmp_path / "10_sks dog" / "0.png")
    line = refusal(db.list_images, tmp_path, "--instance_data_dir")
    assert "no images in this folder" in line and "10_sks dog: give that folder" in line


@pytest.mark.parametrize("path, said", [("nowhere", "no such folder"), ("file", "a file, and no folder"), ("y" * 300, "too long"),
                                        ("a\0b", "null")])
def test_no_folder_is_one_line(path, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert said in refusal(db.list_images, path, "--instance_data_dir")


@pytest.mark.parametrize("name", ["0.txt", "class_prompt.txt", "metadata.jsonl"])
def test_texts_that_may_not_be_read_are_one_line(name, photos, monkeypatch):
    (photos / name).write_text("a dog")
    read_text = Path.read_text

    def forbidden(path, *arguments, **options):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *arguments, **options)
    monkeypatch.setattr(Path, "read_text", forbidden)
    line = refusal(db.find_photos, db.Concept(str(photos), "", 0))
    assert name in line and "Permission denied" in line


def test_a_folder_that_may_not_be_read_is_one_line(photos, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(Path, "iterdir", forbidden)
    assert "you may not read this folder" in refusal(db.list_images, photos, "--instance_data_dir")


# ---- EXIF


def exif_of(*entries):
    """EXIF of (tag, type, count, value in four bytes), written by hand as no library would."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries) + bytes(4)


SIDEWAYS = exif_of((0x0103, 8, 1, struct.pack("<i", -5)), (0x0112, 3, 1, struct.pack("<HH", 6, 0)))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_orientation_is_read_whatever_else_exif_says(suffix, tmp_path, capsys):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))
    image.save(tmp_path / f"a.{suffix}", exif=SIDEWAYS)
    loaded = read(tmp_path / f"a.{suffix}")
    assert loaded.size == (20, 40) and loaded.getpixel((10, 5))[2] > 200 and loaded.getpixel((10, 35))[0] > 200
    assert capsys.readouterr().out == ""


def test_every_orientation_is_undone(tmp_path):
    upright = picture(1, (24, 16)).resize((48, 32))
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that a camera held so would need
    for turn, transposition in undo.items():
        exif = Image.Exif()
        exif[0x0112] = turn
        (upright if transposition is None else upright.transpose(transposition)).save(tmp_path / f"{turn}.png", exif=exif)
        assert np.array_equal(read(tmp_path / f"{turn}.png"), upright), turn
    upright.transpose(2).save(tmp_path / "a.tif", tiffinfo={0x0112: 6})
    assert np.array_equal(read(tmp_path / "a.tif"), upright)


@pytest.mark.parametrize("suffix, exif", [("png", str(b"Exif\0\0II*\0").encode()), ("png", b"Exif\0\0garbage"),
                                          ("jpg", b"Exif\0\0garbage"), ("webp", b"Exif\0\0garbage"),
                                          ("avif", b"Exif\0\0II*\0\xff\xff\xff\xff"), ("jpg", b"Exif\0\0II*\0\xff\xff\xff\xff")])
def test_a_picture_with_damaged_exif_is_used_as_it_lies(suffix, exif, tmp_path, capsys):
    Image.new("RGB", (40, 20), "red").save(tmp_path / f"a.{suffix}", exif=exif)
    assert read(tmp_path / f"a.{suffix}").size == (40, 20)
    assert "its EXIF is damaged" in capsys.readouterr().out


def test_avif_with_exif_that_its_decoder_refuses(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x010f] = "Camera"
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.avif", exif=exif)
    data = (tmp_path / "a.avif").read_bytes()
    (tmp_path / "a.avif").write_bytes(data.replace(b"II*\0", b"XXXX").replace(b"MM\0*", b"XXXX"))
    assert read(tmp_path / "a.avif").size == (40, 20) and "its EXIF is damaged" in capsys.readouterr().out


def test_heic_with_damaged_exif(tmp_path, capsys):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (64, 32), "red")).save(tmp_path / "a.heic", exif=b"Exif\0\0garbage")
    assert read(tmp_path / "a.heic").size == (64, 32) and "its EXIF is damaged" in capsys.readouterr().out


# ---- sizes, frames, and what is written beside a picture


@pytest.mark.parametrize("size, packed", [(3_000_000, True), (90_000_000, True), (70_000_000, False)])
def test_large_texts_beside_a_picture_do_not_matter(size, packed, tmp_path):
    info = PngInfo()
    info.add_text("workflow", "x" * size, zip=packed)
    Image.new("RGB", (8, 8), GREEN).save(tmp_path / "a.png", pnginfo=info)
    assert colour(tmp_path / "a.png") == GREEN


@pytest.mark.parametrize("kind, said", [(b"tEXt", ""), (b"iCCP", "colour profile is damaged"), (b"eXIf", "EXIF is damaged")])
def test_a_damaged_chunk_that_does_not_show_is_left_out(kind, said, tmp_path, capsys):
    info, exif = PngInfo(), Image.Exif()
    info.add_text("a", "hello")
    exif[0x0112] = 1
    Image.new("RGB", (8, 8), GREEN).save(tmp_path / "a.png", pnginfo=info, icc_profile=SRGB, exif=exif)
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[data.index(kind) + 8] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    assert colour(tmp_path / "a.png") == GREEN
    out = capsys.readouterr().out
    assert said in out if said else out == ""


def test_a_damaged_picture_is_still_refused(tmp_path):
    for suffix in ("png", "jpg", "webp", "tif", "avif"):
        picture(1, (200, 200)).save(tmp_path / f"a.{suffix}")
        data = (tmp_path / f"a.{suffix}").read_bytes()
        (tmp_path / f"a.{suffix}").write_bytes(data[:len(data) // 2])
        assert f"a.{suffix}: cannot be read" in refusal(read, tmp_path / f"a.{suffix}")


def test_more_pixels_than_pillow_allows_strangers(tmp_path, monkeypatch):
    """Telephones take 200 million; of what is more than memory one line is left."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (64, 64), GREEN).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colour(tmp_path / "a.png") == GREEN and Image.MAX_IMAGE_PIXELS == 100
    assert db.MOST_PIXELS > 400e6
    monkeypatch.setattr(db, "MOST_PIXELS", 4000)
    assert "64 x 64 pixels are more than can be read; scale it down" in refusal(read, tmp_path / "a.png")


@pytest.mark.parametrize("size, sizes", [((1, 10000), [10000, 1, 2559744, 0, 512, 512]),
                                         ((10000, 3), [3, 10000, 0, 853077, 512, 512])])
def test_very_long_strips_fit_into_memory(size, sizes):
    image = Image.new("RGB", size, "red")
    image.paste("blue", (size[0] // 2 - 5, size[1] // 2 - 5, size[0] // 2 + 6, size[1] // 2 + 6))
    cut, told = db.fitted(image, (512, 512))
    assert cut.size == (512, 512) and told == sizes and cut.getpixel((256, 256)) == (0, 0, 255)


def test_strips_are_cut_where_others_are():
    """The same picture just short of a strip and just beyond it."""
    image = picture(3, (16, 16 * db.LONG)).resize((32, 32 * db.LONG))
    whole = image.resize((64, 64 * db.LONG), Image.Resampling.LANCZOS)
    top = (64 * db.LONG - 64) // 2
    assert np.array_equal(db.fitted(image, (64, 64))[0], whole.crop((0, top, 64, top + 64)))
    longer = Image.new("RGB", (32, 32 * db.LONG + 2))
    longer.paste(image, (0, 1))
    difference = np.asarray(db.fitted(longer, (64, 64))[0]).astype(int) - np.asarray(db.fitted(image, (64, 64))[0])
    assert np.abs(difference).max() < 8


def test_strips_and_blank_photos_are_said(photos, capsys):
    Image.new("RGB", (100, 20), "red").save(photos / "strip.png")
    db.check_photos(db.list_images(photos, "--instance_data_dir"))
    out = capsys.readouterr().out
    assert "strip.png is 100 x 20; much of it is cut off" in out and "strip.png is all one colour" in out
    assert "0.png" not in out


def test_second_pictures_of_a_camera_are_no_frames(tmp_path, capsys):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert colour(tmp_path / "a.jpg")[0] > 240 and capsys.readouterr().out == ""
    for kind in ("webp", "gif"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"a.{kind}", save_all=True, append_images=[Image.new("RGB", (8, 8))])
        assert colour(tmp_path / f"a.{kind}")[0] > 240 and "2 frames; the first is used" in capsys.readouterr().out


def test_modes_of_editors(tmp_path):
    for mode, value in (("1", 1), ("LA", (255, 255)), ("YCbCr", (255, 128, 128)), ("CMYK", (0, 0, 0, 0)), ("RGBX", (255,) * 4)):
        Image.new(mode, (8, 8), value).save(tmp_path / f"{mode}.tif")
        assert colour(tmp_path / f"{mode}.tif") == (255, 255, 255), mode


def test_mutated_pictures_are_read_or_refused(tmp_path):
    """Nothing but a UserError comes out of a file, whatever is in it."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png", "webp", "gif", "bmp", "tif", "avif"):
        buffer, kind = io.BytesIO(), Image.registered_extensions()[f".{suffix}"]
        picture(1, (16, 16)).save(buffer, kind, icc_profile=ADOBE, exif=exif)
        good = np.frombuffer(buffer.getvalue(), np.uint8)
        for _ in range(40):
            bad = good.copy()
            bad[rng.integers(0, len(bad), 3)] = rng.integers(0, 256, 3)
            (tmp_path / "a").write_bytes(bad.tobytes())
            try:
                assert read(tmp_path / "a").mode == "RGB"
            except db.UserError as problem:
                assert "\n" not in str(problem)


# ---- captions


def concept(folder, class_prompt="a dog", **options):
    return db.Concept(str(folder), "class", 2, class_prompt=class_prompt, **options)


def captions(folder):
    return {path.name: caption for path, caption in db.find_photos(concept(folder))[0]}


@pytest.mark.parametrize("names", ["{}.png", "./{}.png", "train/{}.png", "C:\\\\photos\\\\{}.png", "/data/x/{}.PNG"])
def test_captions_are_found_whatever_stands_before_the_name(names, photos, capsys):
    lines = [f'{{"file_name": "{names.format(i)}", "text": "dog {i}"}}' for i in range(3)]
    (photos / "metadata.jsonl").write_text("\n\n".join(lines))
    assert captions(photos) == {f"{i}.png": f"dog {i}" for i in range(3)}
    assert capsys.readouterr().out == ""


def test_accents_are_compared_as_they_look(photos):
    os.rename(photos / "0.png", photos / "hu\u0308ndchen.png")  # as Macs store it
    (photos / "metadata.jsonl").write_text('{"file_name": "h\u00fcndchen.png", "text": "one"}\n', encoding="utf-8")
    os.rename(photos / "1.png", photos / "\u00e9t\u00e9.png")
    (photos / "e\u0301te\u0301.TXT").write_text("two")
    os.rename(os.fsencode(photos) + b"/2.png", os.fsencode(photos) + b"/H\xfct.png")  # from an old archive
    with open(photos / "metadata.jsonl", "a", encoding="utf-8") as file:
        file.write('{"file_name": "H\u00fct.png", "text": "three"}\n')
    assert sorted(captions(photos).values()) == ["one", "three", "two"]


def test_captions_of_no_photo_are_named(photos, capsys):
    (photos / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n{"file_name": "x/gone.png", "text": "b"}\n')
    assert captions(photos) == {"0.png": "a", "1.png": None, "2.png": None}
    out = capsys.readouterr().out
    assert "metadata.jsonl: 1 of 2 captions are of no photo that is used, and are left out: x/gone.png" in out


@pytest.mark.parametrize("file, caption", [("0.txt", "0.png"), ("0.TXT", "0.png"), ("0.png.txt", "0.png"), ("0.caption", "0.png")])
def test_text_files_are_captions(file, caption, photos, capsys):
    (photos / file).write_bytes(b"\xef\xbb\xbfa dog\r\nasleep\r\n")
    assert captions(photos)[caption] == "a dog asleep" and capsys.readouterr().out == ""


def test_one_text_of_two_photos_and_two_of_one(photos):
    picture(8).save(photos / "0.jpg")
    (photos / "0.txt").write_text("both")
    assert captions(photos) == {"0.jpg": "both", "0.png": "both", "1.png": None, "2.png": None}
    (photos / "1.txt").write_text("a")
    (photos / "1.caption").write_text("b")
    assert "1.caption and 1.txt may both be the caption of 1.png" in refusal(captions, photos)


@pytest.mark.parametrize("entry, caption", [
    ({"file_name": "0.png", "text": "x"}, "x"), ({"image": "0.png", "caption": "x"}, "x"),
    ({"file_name": "0.png", "prompt": "x", "w": 1}, "x"),
    ({"file_name": "0.png", "text": "a\u2028b"}, "a b")])
def test_keys_that_lists_of_captions_have(entry, caption, photos):
    (photos / "metadata.jsonl").write_text(json.dumps(entry, ensure_ascii=False) + "\n", encoding="utf-8")
    assert captions(photos)["0.png"] == caption


def test_lists_of_captions_as_tables(photos):
    (photos / "metadata.csv").write_text('file_name,text\n0.png,"a dog, asleep"\n1.png,b\n')
    assert captions(photos) == {"0.png": "a dog, asleep", "1.png": "b", "2.png": None}
    (photos / "metadata.csv").write_text("name;what\n0.png;x\n")
    assert "metadata.csv, line 2" in refusal(captions, photos)


@pytest.mark.parametrize("text, said", [
    ('{"file_name": "0.png", "text": "a"}\n{"file_name": "x/0.png", "text": "b"}', "line 2: 0.png has another caption already"),
    ('{"file_name": "0.png", "text": null}', "line 1"), ('{"file_name": 1, "text": "a"}', "line 1"), ("[1]", "line 1"),
    ("[" * 100_000, "line 1"), ('{"text": "a"}', "line 1")])
def test_lists_of_captions_that_cannot_be_used(text, said, photos):
    (photos / "metadata.jsonl").write_text(text)
    assert said in refusal(captions, photos)


@pytest.mark.parametrize("contents", ["ein H\u00fcndchen".encode("latin-1"), "a dog".encode("utf-16"), "a dog".encode("utf-16-le")])
def test_captions_that_are_not_utf_8(contents, photos):
    (photos / "0.txt").write_bytes(contents)
    assert "0.txt: not UTF-8 text" in refusal(captions, photos)


def test_empty_captions_and_such_as_give_way_are_said(photos, capsys):
    (photos / "0.txt").write_text(" \n")
    (photos / "1.txt").write_text("mine")
    (photos / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "theirs"}')
    assert captions(photos) == {"0.png": None, "1.png": "mine", "2.png": None}
    out = capsys.readouterr().out
    assert "0.txt is empty: 0.png gets the instance prompt" in out and "1.txt is the caption of 1.png" in out


def test_captions_that_name_another_subject_are_refused_at_once(photos):
    (photos / "0.txt").write_text("a [identifier:tom] dog")
    s = db.Settings("train", instance_data_dir=str(photos), class_prompt="a dog")
    assert "[identifier:dog]" in refusal(db.read_concepts, s, True, True)


# ---- words


@pytest.mark.parametrize("class_prompt, expected", [
    ("photo of a dog", "photo of a [identifier] dog"), ("a photograph of a dog", "a photograph of a [identifier] dog"),
    ("portrait of a woman", "portrait of a [identifier] woman"), ("a close up of a dog", "a close up of a [identifier] dog"),
    ("a close-up photo of a dog", "a close-up photo of a [identifier] dog"), ("a photo of my dog", "a photo of a [identifier] dog"),
    ("an image of the dog", "an image of a [identifier] dog"), ("photo of dog", "photo of a [identifier] dog"),
    ("a black and white photo of a dog", "a black and white photo of a [identifier] dog"),
    ("a photo of a painting of a dog", "a photo of a painting of a [identifier] dog"),
    ("photo: a dog", "photo: a [identifier] dog"), ("polaroid of a dog", "polaroid of a [identifier] dog"),
    ("a mugshot of a man", "a mugshot of a [identifier] man"), ("film still of a woman", "film still of a [identifier] woman"),
    ("a photo of one dog", "a photo of a [identifier] dog"), ("a still life", "a [identifier] still life"),
    ("a picture of two dogs", "a picture of two [identifier] dogs"), ("my dog", "a [identifier] dog"),
    ("Anna's dog", "a [identifier] dog"),
    ("a photo of my sister\u2019s dog", "a photo of a [identifier] dog"), ("the dog's bowl", "a [identifier] dog's bowl"),
    ("A Dog", "a [identifier] Dog"), ("DOG", "a [identifier] DOG"), ("glasses", "[identifier] glasses"),
    ("a bus", "a [identifier] bus"),
    ("some people", "[identifier] people"), ("a statue of a lion", "a [identifier] statue of a lion"),
    ("a painting in the style of Monet", "a [identifier] painting in the style of Monet"),
    ("a dog beside a photo of a cat", "a [identifier] dog beside a photo of a cat"),
    ("a selfie of a man with a dog", "a selfie of a [identifier] man with a dog"),
    ("\u4e00\u53ea\u72d7", "\u4e00\u53ea [identifier] \u72d7"),
    ("\u4e00\u5f20\u72d7\u7684\u7167\u7247", "\u4e00\u5f20 [identifier] \u72d7\u7684\u7167\u7247"),
    ("\u72ac\u306e\u5199\u771f", "[identifier] \u72ac\u306e\u5199\u771f"),
    ("un chien", "un [identifier] chien"), ("une photo d'un chien", "une photo d'un [identifier] chien"),
    ("ein Foto von einem Hund", "ein Foto von einem [identifier] Hund"), ("mein Hund", "mein [identifier] Hund"),
    ("una foto de un perro negro", "una foto de un [identifier] perro negro"), ("um cachorro", "um [identifier] cachorro"),
    ("UN flag", "a [identifier] UN flag"), ("a unicorn", "a [identifier] unicorn"), ("einstein", "a [identifier] einstein"),
    ("\u0441\u043e\u0431\u0430\u043a\u0430", "[identifier] \u0441\u043e\u0431\u0430\u043a\u0430"),
    ("a caf\u00e9 cup", "a [identifier] caf\u00e9 cup"),
    ("\U0001f415", "a [identifier] \U0001f415"), ("a teddy bear", "a [identifier] teddy bear")])
def test_the_rare_word_stands_at_the_thing(class_prompt, expected):
    assert db.default_instance_prompt(class_prompt) == expected


@pytest.mark.parametrize("class_prompt, noun", [
    ("photo of a dog", "dog"), ("a photo of my dog", "dog"), ("Anna's dog", "dog"), ("\u00c9va's dog", "dog"), ("close up of the dog", "dog"),
    ("\u4e00\u5f20\u72d7\u7684\u7167\u7247", "\u72d7"), ("\u72ac\u306e\u5199\u771f", "\u72ac"), ("d'un chien", "chien"), ("a statue of a lion", "statue of a lion"), ("photo", "photo")])
def test_nouns(class_prompt, noun):
    assert db.noun_of(class_prompt) == noun


@pytest.mark.parametrize("prompts, said", [
    (["\u4e00\u53ea\u72d7"], 'Note: "\u4e00\u53ea\u72d7" is not English, and this model learnt from English captions alone'),
    (["a dog", "un chien", "un chien", "ein Hund"], 'Note: "un chien" (and 1 more) is not English'),
    (["\u0441\u043e\u0431\u0430\u043a\u0430"], "is not English"), (["a \u5c0f\u9ed1 dog"], ""), (["a caf\u00e9", "\U0001f415", "a dog 3", "", "UN"], "")])
def test_other_languages_are_said_where_a_model_reads_english_alone(prompts, said, capsys):
    db.tell_language(prompts, False)
    assert capsys.readouterr().out == ""
    db.tell_language(prompts, True)
    out = capsys.readouterr().out
    assert said in out and out.count("\n") == bool(said)


def test_which_families_read_english_alone():
    """CLIP's and T5's encoders do, Qwen's and Mistral's do not."""
    reads = {family.name: family.reads_english_alone for family in db.FAMILIES}
    assert reads["flux"] and reads["small"] and reads["stable-diffusion-3"] and not reads["z-image"] and not reads["qwen-image"]


def test_words_of_a_record_may_be_odd():
    assert db.noun_of("a\ndog") == "a\ndog" and db.noun_of("") == "" and db.noun_of("\u72d7\n\u732b") == "\u72d7\n\u732b"
    assert db.is_live("") is False and db.article_of("") == "a"


@pytest.mark.parametrize("given, tidy", [("a dog.", "a dog"), ('"a dog"', "a dog"), ("\u201ca dog\u201d", "a dog"),
                                         ("teddy_bear", "teddy bear"),
                                         (" a  dog\n", "a dog"), ("\u4e00\u53ea\u72d7\u3002", "\u4e00\u53ea\u72d7"),
                                         ("a dog's", "a dog's")])
def test_class_prompts_lose_what_writing_adds(given, tidy, photos):
    assert db.find_photos(concept(photos, given))[1] == tidy


@pytest.mark.parametrize("given", ["a", "the", "...", "an image of the", "a photo of", "of", '""', "a photo of .",
                                   "a photo of me", "Her"])
def test_class_prompts_that_name_nothing(given, photos):
    line = refusal(db.find_photos, concept(photos, given))
    assert line.startswith("--class_prompt") and "what kind of thing" in line


@pytest.mark.parametrize("options, said", [
    ({"class_prompt": "a sks dog"}, '--class_prompt "a sks dog": the class goes without "sks"'),
    ({"class_prompt": "a photo of ohwx man"}, 'without "ohwx"'), ({"class_prompt": "a phol dog"}, 'without "phol"'),
    ({"class_prompt": "sks"}, 'without "sks"'), ({"class_prompt": "a [V] dog"}, "without the identifier"),
    ({"class_prompt": "a {identifier} dog"}, "without the identifier"),
    ({"class_prompt": "a [Identifier ] dog"}, "without the identifier"),
    ({"class_prompt": "a Dog", "identifier": "dog"}, '--identifier "dog": the class, "a Dog", has this word already'),
    ({"class_prompt": "a dog", "identifier": "[identifier]"}, "--identifier"),
    ({"class_prompt": "a dog", "instance_prompt": "a [identifier:rex] dog"}, "[identifier:dog]"),
    ({"class_prompt": "./class_images"}, '--class_prompt "./class_images" is a path; say what kind of thing'),
    ({"class_prompt": "tests/conftest.py"}, "is a path"), ({"class_prompt": "a [class]"}, "name the class itself"),
    ({"class_prompt": "a dog", "identifier": "tok,tok2"}, "must be one word without spaces and commas; several subjects are for --concepts"),
    ({"class_prompt": "a \udcfc dog"}, "not UTF-8"), ({"class_prompt": "a dog", "identifier": "\udcfc"}, "not UTF-8")])
def test_words_that_cannot_be_meant_are_refused(options, said, photos, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert said in refusal(db.read_concepts, db.Settings("train", instance_data_dir=str(photos), **options), True, True)


@pytest.mark.parametrize("instance_prompt, identifier, prompt", [
    ("a photo of sks dog", "sks", "a photo of sks dog"), ("A photo of SKS dog.", "SKS", "A photo of SKS dog."),
    ("a photo of sks dog in a bucket", "sks", "a photo of sks dog in a bucket"),
    ("portrait of xqz, dog", "xqz", "portrait of xqz, dog"),
    ("a [V] dog", "auto", "a [identifier] dog"), ("a {identifier} [class]", "auto", "a [identifier] dog"),
    ("a [Identifier ] dog", "auto", "a [identifier] dog"), ("a [identifier:dog] dog", "auto", "a [identifier] dog")])
def test_instance_prompts_as_others_write_them(instance_prompt, identifier, prompt, photos):
    s = db.Settings("train", instance_data_dir=str(photos), class_prompt="a dog", instance_prompt=instance_prompt)
    read, = db.read_concepts(s, True, True)
    assert (read.identifier, read.instance_prompt) == (identifier, prompt)


@pytest.mark.parametrize("instance_prompt, is_said", [("a sks dog", True), ("a photo of a sks Cat asleep", False)])
def test_a_class_that_the_photos_are_not_of_is_said(instance_prompt, is_said, photos, capsys):
    s = db.Settings("train", instance_data_dir=str(photos), class_prompt="a cat", instance_prompt=instance_prompt, identifier="sks")
    db.read_concepts(s, True, True)
    assert (f'the instance prompt "{instance_prompt}" does not name the class, "a cat"' in capsys.readouterr().out) == is_said
    db.read_concepts(s, False, True)
    assert "does not name the class" not in capsys.readouterr().out


@pytest.mark.parametrize("given, seen", [
    ("a sks\u200b dog", "a sks dog"), ("\ufeffa dog", "a dog"), ("a\u00a0dog", "a dog"), ("a\u3000dog", "a dog"), ("cafe\u0301", "caf\u00e9"),
    ("soft\u00adware", "software"), ("\u202ea dog\u202c", "a dog"), ("\U0001f469\u200d\U0001f4bb", "\U0001f469\u200d\U0001f4bb")])
def test_what_does_not_show_is_not_in_prompts(given, seen, photos):
    """Pages and editors copy it along, and tokenizers read it as words."""
    assert db.parse_settings(["--infer", "--prompt", given]).prompt == [seen]
    (photos / "0.txt").write_text(given, encoding="utf-8")
    concept, = db.read_concepts(db.Settings("train", instance_data_dir=str(photos), class_prompt="a dog"), True, True)
    assert dict(concept.photos)[photos / "0.png"] == seen.strip()


REX = db.Subject("phol", "a photo of a dog", "a phol dog", "rex")


@pytest.mark.parametrize("prompt, drawn", [
    ("a [Identifier] dog", "a phol dog"), ("a [ identifier ] dog", "a phol dog"), ("a {identifier} dog", "a phol dog"),
    ("a [identifier: rex] dog", "a phol dog"), ("a [V] dog", "a phol dog"), ("a [V*] [class]", "a phol dog"),
    ("a [identifier] [class noun]", "a phol dog"), ("a [identify] dog", "a [identify] dog"), ("a [v] dog", "a phol dog")])
def test_places_for_the_word(prompt, drawn):
    assert db.fill_identifier(prompt, [REX], "x") == drawn


def test_a_word_that_looks_like_a_place_stays():
    assert db.fill_identifier("a [V] dog", [db.Subject("[V]", "a dog", "a [V] dog")], "x") == "a [V] dog"


def test_nouns_of_several_subjects():
    cat = db.Subject("etto", "a cat", "an etto cat", "tom")
    assert db.fill_identifier("a [identifier:tom] [class]", [REX, cat], "x") == "a etto cat"
    assert "write the noun itself" in refusal(db.fill_identifier, "a [class] on the moon", [REX, cat], "x")


@pytest.mark.parametrize("prompt, seen", [
    ("a (dog:1.3)", "(dog:1.3)"), ("((dog))", "((dog))"), ("a dog++", "dog++"), ("a [dog:cat:0.5]", "[dog:cat:0.5]"),
    ("<lora:rex:0.8> a dog", "<lora:rex:0.8>"), ("embedding:rex", "embedding:rex"), ("a dog BREAK a cat", "BREAK"),
    ("a dog AND a cat", "AND"),
    ("a dog --ar 16:9", "--ar 16:9"), ("a dog --n ugly --w 512", "--n ugly"), ("a dog -s 50", "-s 50"),
    ("a __colour__ dog", "__colour__"),
    ("a {red|blue} dog", "{red|blue}"), ("miku \\(vocaloid\\)", "\\("), ("a [sks] dog", "[sks]"), ("a <sks> dog", "<sks>"),
    ("a [name], [filewords]", "[name]"), ("a photo of sks dog", "sks")])
def test_the_syntax_of_other_programs_is_said(prompt, seen, capsys):
    db.tell_prompts([prompt], [REX])
    out = capsys.readouterr().out
    assert f'"{seen}"' in out.splitlines()[0] and out.startswith("Note: ")


@pytest.mark.parametrize("prompt", ["a [identifier] dog (my best friend), 4k, 16:9", "a well-known phol dog - or two",
                                    "rock and roll, don't", "a [identifier:rex] [class]", "a dog at -5 degrees; 100%", "AND-gate"])
def test_plain_words_are_not_remarked_on(prompt, capsys):
    db.tell_prompts([prompt], [REX])
    assert capsys.readouterr().out == ""


def test_own_words_may_look_strange(capsys):
    db.tell_prompts(["a <sks> dog and sks"], [db.Subject("<sks>", "", ""), db.Subject("sks", "", "")])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("class_prompt, drawn, caption", [
    ("glasses", "sks glasses on the moon", "glasses on the moon"), ("owl", "a sks owl on the moon", "an owl on the moon"),
    ("a photo of my owl", "a sks owl on the moon", "an owl on the moon"),
    ("a photo of a dog", "a sks dog on the moon", "a dog on the moon")])
def test_prompts_of_the_paper_fit_the_noun(class_prompt, drawn, caption):
    subject = db.Subject("sks", class_prompt, "", "x")
    assert db.fill_template("a [identifier] [class] on the moon", subject, True) == (drawn, caption)


@pytest.mark.parametrize("class_prompt, live", [("photo of a dog", True), ("two dogs", True), ("a man with a hat", True),
                                                ("women", True),
                                                ("a statue of a lion", False), ("Anna's cat", True), ("a bowl for a cat", False)])
def test_the_head_of_the_noun_tells_what_lives(class_prompt, live):
    assert db.is_live(class_prompt) is live


def test_prompt_files_in_other_spellings(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a [Identifier] [class] (red:1.2)\n")
    assert db.read_prompts(str(tmp_path / "prompts.txt"), "--prompts_file") == ["a [identifier] [class] (red:1.2)"]
    assert "no weights of words" in capsys.readouterr().out
    assert "--prompts_file" in refusal(db.read_prompts, "\0", "--prompts_file")


# ---- entries of --concepts


def test_keys_given_twice_are_refused(tmp_path):
    (tmp_path / "c.json").write_text('[{"name": "rex", "instance_data_dir": "x", "class_prompt": "a", "class_prompt": "b"}]')
    assert '"class_prompt" stands twice' in refusal(db.read_concept_file, str(tmp_path / "c.json"))


@pytest.mark.parametrize("contents", [b"[" * 100_000, "[]".encode("utf-16"), b"\xff"])
def test_concept_files_that_are_no_text(contents, tmp_path):
    (tmp_path / "c.json").write_bytes(contents)
    assert refusal(db.read_concept_file, str(tmp_path / "c.json")).startswith("--concepts ")


def test_two_subjects_of_the_same_photos_are_said(photos, tmp_path, capsys):
    entry = {"instance_data_dir": str(photos), "class_prompt": "a dog"}
    (tmp_path / "c.json").write_text(json.dumps([entry | {"name": "rex"}, entry | {"name": "tom"}]))
    db.read_concepts(db.Settings("train", concepts=str(tmp_path / "c.json")), True, True)
    assert '"rex" and "tom" have the same photos' in capsys.readouterr().out


# ---- class images


@pytest.fixture
def training(run, photos, tiny_model, monkeypatch):
    """training(*flags) -> (status, output, error) of a training of two steps."""
    monkeypatch.setattr(db.SmallStableDiffusion, "class_steps", (1, 1))
    given = ["--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", "photos", "--class_prompt", "a dog",
             "--num_class_images", 1, "--steps", 2, "--num_inference_steps", 1, "--method", "lora", "--rank", 2]
    return lambda *flags: run(*given, *flags)


@pytest.fixture
def checked(run, photos, tiny_model, monkeypatch):
    """checked(*flags) -> (status, output, error) of a training that ends before anything is loaded."""
    def enough(*arguments, **options):
        raise db.UserError("so far")
    monkeypatch.setattr(db, "load_models", enough)
    given = ["--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", "photos", "--class_prompt", "a dog"]
    return lambda *flags: run(*given, *flags)


def test_class_images_in_a_folder_inside_are_pointed_out(checked, tmp_path):
    (tmp_path / "reg" / "1_dog").mkdir(parents=True)
    picture(5).save(tmp_path / "reg" / "1_dog" / "a.png")
    ours = tmp_path / "reg" / "a-dog-0123456789ab"
    ours.mkdir()
    picture(6).save(ours / "00000.png")
    (ours / "settings.json").write_text("{}")
    status, out, err = checked("--class_data_dir", "reg")
    assert err == "error: so far\n"
    assert "Note: the pictures in reg/1_dog are not used" in out and '--class_data_dir "reg/1_dog"' in out
    assert str(ours.name) not in out
    status, out, err = checked("--class_data_dir", "reg/1_dog")
    assert "not used" not in out


@pytest.mark.parametrize("folder", ["photos", "./photos/", "../{}/photos", "link"])
def test_the_photos_are_no_class_images(folder, checked, tmp_path):
    (tmp_path / "link").symlink_to("photos")
    status, _, err = checked("--class_data_dir", folder.format(tmp_path.name))
    assert status == 2 and err.startswith("error: --class_data_dir ") and "holds the photos of the subject" in err


def test_class_images_that_are_photos_are_said(checked, tmp_path):
    (tmp_path / "reg").mkdir()
    picture(0).save(tmp_path / "reg" / "copy.bmp")  # the same pixels in another file
    for i in range(20, 23):
        picture(i).save(tmp_path / "reg" / f"{i}.png")
    (tmp_path / "reg" / "20.txt").write_text("a dog")
    status, out, err = checked("--class_data_dir", "reg")
    assert err == "error: so far\n"
    assert "1 of the class images in reg are photos of the subject (copy.bmp)" in out and "captions in reg are not used" in out
    status, out, err = checked("--class_data_dir", "reg", "--num_class_images", 2)
    assert "reg holds 4 class images, of which the first 2 are used; --num_class_images 4 would use all" in out


def test_photos_of_another_subject_are_no_class_images(photos, tmp_path, run, tiny_model):
    (tmp_path / "two").mkdir()
    picture(9).save(tmp_path / "two" / "a.png")
    entries = [{"name": "rex", "instance_data_dir": "photos", "class_prompt": "a dog", "class_data_dir": "two"},
               {"name": "tom", "instance_data_dir": "two", "class_prompt": "a dog"}]
    (tmp_path / "c.json").write_text(json.dumps(entries))
    status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--concepts", "c.json")
    assert status == 2 and "--class_data_dir two: holds the photos of the subject" in err


def test_class_images_that_weigh_nothing_are_not_drawn(training, tmp_path):
    status, out, err = training("--prior_loss_weight", 0, "--num_class_images", 5)
    assert status == 0, err
    assert "--prior_loss_weight 0: class images would weigh nothing" in out and "--num_class_images: not used" in out
    assert not (tmp_path / "class_images").exists() and "no class images" in out and "Class images:" not in out
    assert json.loads((tmp_path / "output" / "dreambooth.json").read_text())["loss"]["last_100_steps"]["prior"] is None


def test_flags_for_class_images_without_any_are_said(checked):
    _, out, _ = checked("--no-with_prior_preservation", "--class_data_dir", "reg", "--class_guidance_scale", 2)
    assert "--class_data_dir, --class_guidance_scale: not used" in out and "prior_loss_weight" not in out


def test_pictures_that_a_short_training_does_not_reach_are_said(training):
    status, out, err = training()
    assert "2 steps show 2 of the 3 photos of a subject; more --steps" in out and "class images of a subject" not in out
    status, out, err = training("--steps", 3)
    assert "of the 3 photos" not in out


# ---- a finished training, and --resume


@pytest.fixture
def finished(training, tmp_path):
    """A finished training, and a function that runs it again with --resume."""
    assert training()[0] == 0
    return lambda *flags: training("--resume", *flags)


def test_nothing_new_is_nothing_to_do(finished, photos):
    os.rename(photos / "2.png", photos / "3.png")  # the same picture at the same place
    status, out, _ = finished()
    assert status == 0 and "complete already, with these very settings" in out


def new_photo(photos):
    picture(7).save(photos / "7.png")


def other_photo(photos):
    picture(7).save(photos / "0.png")


def new_caption(photos):
    (photos / "1.txt").write_text("a [identifier] dog asleep")


@pytest.mark.parametrize("change, said", [(new_photo, 'of "dog" the photos, their captions or masks (3, now 4)'),
                                          (other_photo, "(3, now 3)"), (new_caption, "(3, now 3)")])
def test_what_is_new_is_trained_on(change, said, finished, photos, tmp_path):
    change(photos)
    status, out, err = finished()
    assert status == 0, err
    assert "./output is complete, but was made from something else: of " in out and said in out
    assert "starting at the beginning" in out
    assert "complete already" not in out and (tmp_path / "output-1").exists()
    assert "complete already" in finished()[1]


def test_another_model_in_the_same_place_is_trained_on(training, tiny_model, tmp_path):
    shutil.copytree(tiny_model("sd1"), tmp_path / "base")
    again = ("--model_name", "base", "--method", "lora")
    assert training(*again)[0] == 0
    assert "complete already" in training(*again, "--resume")[1]
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(tiny_model("sd1", 1), tmp_path / "base")
    status, out, err = training(*again, "--resume")
    assert status == 0 and "was made from something else: the model's weights." in out and (tmp_path / "output-1").exists(), err


def test_a_models_digest_tells_weights_and_not_times(tiny_model, tmp_path):
    digests = [db.model_digest(tiny_model("sd1", seed)) for seed in (0, 1)]
    shutil.copytree(tiny_model("sd1"), tmp_path / "copy", copy_function=shutil.copyfile)
    assert digests[0] != digests[1] and db.model_digest(tmp_path / "copy") == digests[0]
    file = tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors"
    assert db.model_digest(file) != digests[0] and db.model_digest(Path("owner/name")) is None


def test_with_a_checkpoint_new_photos_are_refused(training, photos, tmp_path):
    assert training("--checkpointing_steps", 1)[0] == 0
    new_photo(photos)
    status, out, err = training("--checkpointing_steps", 1, "--resume")
    assert status == 2 and "was made from something else" in out and "the photos or class images" in err
    assert not (tmp_path / "output-1").exists()


def test_an_edited_class_file_and_own_class_images_are_seen(run, photos, tiny_model, tmp_path):
    (photos / "class_prompt.txt").write_text("a dog")
    (tmp_path / "reg").mkdir()
    picture(30).save(tmp_path / "reg" / "a.png")
    flags = ["--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", "photos", "--class_data_dir", "reg", "--steps", 2,
             "--num_inference_steps", 1, "--method", "lora", "--rank", 2, "--instance_prompt", "a [identifier] dog"]
    assert run(*flags)[0] == 0
    assert "complete already" in run(*flags, "--resume")[1]
    picture(31).save(tmp_path / "reg" / "a.png")
    assert 'of "dog" the class images (1, now 1)' in run(*flags, "--resume")[1]
    (photos / "class_prompt.txt").write_text("a cat")
    out = run(*flags, "--resume")[1]
    assert '"dog" is gone' in out and '"cat" was not there' in out and "complete already" not in out


def test_an_edited_concepts_file_is_seen(run, photos, tiny_model, tmp_path):
    entry = {"name": "rex", "instance_data_dir": "photos", "class_prompt": "a dog", "num_class_images": 1}
    (tmp_path / "c.json").write_text(json.dumps([entry]))
    flags = ["--train", "--model_name", tiny_model("sd1"), "--concepts", "c.json", "--steps", 2, "--num_inference_steps", 1,
             "--method", "lora", "--rank", 2]
    assert run(*flags)[0] == 0
    (tmp_path / "c.json").write_text(json.dumps([entry], indent=4))
    assert "complete already" in run(*flags, "--resume")[1]
    (tmp_path / "c.json").write_text(json.dumps([entry | {"class_prompt": "a cat"}]))
    status, out, err = run(*flags, "--resume")
    assert status == 0 and 'of "rex" class_prompt ("a dog", now "a cat")' in out and "complete already" not in out, err


def test_an_output_that_tells_nothing_of_its_photos_says_so(finished, tmp_path):
    path = tmp_path / "output" / "dreambooth.json"
    record = json.loads(path.read_text())
    del record["given"]
    path.write_text(json.dumps(record))
    status, out, _ = finished()
    assert status == 0 and "does not tell which photos it was made from" in out and "complete already" in out
    path.write_text(json.dumps(record | {"given": {"subjects": 5}}))
    status, _, err = finished()
    assert status == 2 and "damaged" in err


def test_the_record_holds_digests_and_no_names(finished, tmp_path):
    given = json.loads((tmp_path / "output" / "dreambooth.json").read_text())["given"]
    assert len(given["subjects"]["dog"]["photos"]) == 3 and all(len(digest) == 64 for digest in given["subjects"]["dog"]["photos"])
    assert ".png" not in json.dumps(given)


# ---- the program as a whole


def test_strange_photos_train(training, photos):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(picture(10, (64, 64))).save(photos / "a.heic", quality=90)
    os.rename(photos / "a.heic", photos / "a.jpg")
    picture(11).save(photos / "b.jpg_large", format="JPEG", icc_profile=ADOBE)
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)).save(photos / "c.tif")
    picture(12, (10, 400)).save(photos / "d.png", exif=str(b"Exif\0\0II*\0").encode())
    status, out, err = training("--steps", 7)
    assert status == 0 and "7 photos" in out, err
    assert "its EXIF is damaged" in out and "b.jpg_large is a picture" in out


def test_the_openings_of_others_train_the_thing(training, tmp_path):
    status, out, err = training("--class_prompt", "Photo of a dog.", "--validation_prompt", "a [V] [class] (red:1.2)")
    assert status == 0, err
    subject, = json.loads((tmp_path / "output" / "dreambooth.json").read_text())["subjects"]
    assert subject["instance_prompt"] == f"Photo of a {subject['identifier']} dog" and subject["class_prompt"] == "Photo of a dog"
    assert 'Note: "(red:1.2)" is read as plain words' in out


def test_drawing_says_what_it_does_not_know(training, run, tmp_path):
    assert training()[0] == 0
    word = json.loads((tmp_path / "output" / "dreambooth.json").read_text())["subjects"][0]["identifier"]
    status, out, err = run("--infer", "--num_images", 1, "--num_inference_steps", 1, "--prompt", "a [V] [class] <lora:x:1>",
                           "--prompt", "a sks dog")
    assert status == 0 and f'Drawing "a {word} dog <lora:x:1>"' in out, err
    assert '"<lora:x:1>" is read as plain words' in out
    assert f'"sks" is not the word of this model\'s subject; that is "{word}"' in out


def test_a_list_of_captions_of_class_images_is_said_to_be_unused(tmp_path, capsys):
    (tmp_path / "reg").mkdir()
    picture(9).save(tmp_path / "reg" / "0.png")
    (tmp_path / "reg" / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "a cat"}))
    db.check_own(tmp_path / "reg", 1, [])
    assert "captions in" in capsys.readouterr().out


def test_a_learning_rate_of_nothing_is_said(capsys):
    groups = [db.ParameterGroup("unet", [], [], 1e-4), db.ParameterGroup("text_encoder", [], [], 0)]
    db.check_rates(db.Settings("train"), groups)
    assert capsys.readouterr().out == "Note: a learning rate of 0 teaches nothing: text_encoder as before.\n"
    db.check_rates(db.Settings("train"), groups[:1])
    assert capsys.readouterr().out == ""

"""Picture files decoded as every viewer shows them, whatever camera, phone or editor wrote them.

Knows nothing of what the pictures are for.
"""

import contextlib
import io
import logging
import re
import struct
import warnings
import zlib

from PIL import Image, PngImagePlugin

from dreambooth.base import UserError, say_once
from dreambooth.colours import in_srgb, to_8_bit
from dreambooth.hdr import toned_down
from dreambooth.profiles import brighter_curve, profile_in_numbers

MOST_PIXELS = 2**29  # three times the largest sensors of phones; in memory 1.5 GB
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000"]  # Pillow hands others to other programs
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
SIGNATURES = {  # first bytes -> kind, of files that are pictures whatever they are called
    b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF", b"\0\0\0\x0cjP  ": "JPEG 2000"}
UNREAD = {  # first bytes -> what a file is that cannot be read, and what to do
    b"": "empty", b"version https://git-lfs": "a git-lfs pointer in the picture's place; `git lfs pull` fetches it",
    b"\xff\x0a": "JPEG XL; convert it to JPEG", b"\0\0\0\x0cJXL ": "JPEG XL; convert it to JPEG", b"8BPS": "a Photoshop document",
    b"%PDF": "a PDF", b"%!PS": "PostScript", b"<": "a web page or a drawing in SVG",
    b"\0\5\x16\7": "what a Mac keeps beside a file"}
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
ORIENTATION, ADOBE_RGB = 0x0112, "R03"  # EXIF's tag; what cameras write there instead of a profile
SHOWN_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"iCCP", b"eXIf"}  # of a PNG
SHOWING = {"iCCP": "colour profile", "eXIf": "EXIF"}  # those that may be left out, but not without a word
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what matters of it becomes an exception


def load_image(path):
    """The picture at `path` as the eye sees it: upright, 8-bit sRGB, transparent parts white, first frame of several.

    Raises UserError if it cannot be read to its last pixel.
    """
    return load_as(path, as_seen)


def load_opacity(path):
    """How opaque the picture at `path` is, upright, 8-bit: 0 where nothing is seen of it. None if it is opaque throughout."""
    return load_as(path, opacity)


def load_as(path, seen):
    """What `seen` makes of a file's path and Pillow image. UserError if it cannot be read to its last pixel."""
    try:
        with warnings.catch_warnings(), unlimited():
            warnings.simplefilter("ignore")  # what matters of them is said below
            return decoded(path, seen)
    except UserError:
        raise
    except Exception as problem:  # decoders raise all kinds of things on damaged files
        reason = why_unread(path) if isinstance(problem, Image.UnidentifiedImageError) else " ".join(str(problem).split())
        raise UserError(f"{path}: cannot be read ({reason or type(problem).__name__}); remove or replace it") from None


@contextlib.contextmanager
def unlimited():
    """Without Pillow's limits for what strangers upload: telephones take more pixels, and programs write whole workflows beside
    a picture."""
    limits = [(Image, "MAX_IMAGE_PIXELS", None), (PngImagePlugin, "MAX_TEXT_CHUNK", 2**26),
              (PngImagePlugin, "MAX_TEXT_MEMORY", 2**28)]
    before = [getattr(module, name) for module, name, _ in limits]
    for module, name, value in limits:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(limits, before):
            setattr(module, name, value)


def decoded(path, seen):
    """load_as(), with whatever decoders raise. What they refuse for what does not show is tried again without."""
    try:
        with opened(path) as image:
            return seen(path, image)
    except UserError:
        raise
    except Exception as problem:
        kind, data = picture_kind(path), path.read_bytes()
        rest = data
        if kind == "PNG":
            rest = shown_part(path, data)
        elif kind == "AVIF" and "Exif" in str(problem):
            rest = without_exif(path, data)
        if rest == data:
            raise
        with Image.open(io.BytesIO(rest), formats=[kind]) as image:
            return seen(path, image)


def opened(path):
    """The Pillow image in a file, by what its bytes say, and not its name. UserError for what lacks a package or is too large."""
    head = first_bytes(path)
    if is_heic(head):
        register_heic(path)
    try:
        tga = ["TGA"] * (path.suffix.lower() == ".tga")  # any bytes may pass for one
        image = Image.open(path, formats=["HEIF"] if is_heic(head) else FORMATS + tga)
    except Image.UnidentifiedImageError:
        if path.suffix.lower() in (".heic", ".heif", ".hif"):
            register_heic(path)
        raise
    if image.width * image.height > MOST_PIXELS:
        raise UserError(f"{path}: {image.width} x {image.height} pixels are more than can be read; scale it down")
    return image


def first_bytes(path):
    with open(path, "rb") as file:
        return file.read(64)


def is_heic(head):
    brands = {head[i:i + 4] for i in (8, *range(16, min(int.from_bytes(head[:4], "big"), len(head)), 4))}
    return head[4:8] == b"ftyp" and bool(brands & HEIC_BRANDS) and not brands & {b"avif", b"avis"}


def register_heic(path):
    try:
        from pillow_heif import register_heif_opener
    except Exception:  # or it is there and a library that it needs is not
        raise UserError(f"{path}: HEIC needs one more package, `pip install pillow-heif`; or convert it to JPEG") from None
    register_heif_opener()


def picture_kind(path):
    """What kind of picture a file is by its first bytes, if it is one for certain; else None."""
    try:
        head = first_bytes(path)
    except OSError:
        return None
    if head[4:8] == b"ftyp":
        return "HEIC" if is_heic(head) else "AVIF" if head[8:12] in (b"avif", b"avis") else None
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    return next((kind for start, kind in SIGNATURES.items() if head.startswith(start)), None)


def why_unread(path):
    """What a file that is no picture is instead."""
    head = first_bytes(path).lstrip(b"\xef\xbb\xbf \r\n\t")
    if kind := "TIFF" if head[:4] in (b"II*\0", b"MM\0*") else picture_kind(path):
        return f"a damaged {kind}, or of a form that is not read"
    return next((what for start, what in UNREAD.items() if head.startswith(start) and (start or not head)), "not an image")


def shown_part(path, data):
    """A PNG without whatever does not show, or is damaged and need not be there."""
    place, chunks, lost = 8, [], []
    while place < len(data):
        length, kind = int.from_bytes(data[place:place + 4], "big"), data[place + 4:place + 8]
        end = place + 12 + length
        is_whole = data[end - 4:end] == struct.pack(">I", zlib.crc32(data[place + 4:end - 4]))
        is_needed = kind[:1].isupper()
        if is_needed or kind in SHOWN_CHUNKS and is_whole and (kind != b"iCCP" or unpacks(data[place + 8:end - 4])):
            chunks.append(data[place:end])
        else:
            lost.append(kind.decode("latin-1"))
        place = end
    for kind in set(lost) & SHOWING.keys():
        say_once(f"Note: {path}: its {SHOWING[kind]} is damaged and left out.")
    return data[:8] + b"".join(chunks)


def without_exif(path, data):
    """An AVIF whose EXIF goes by a name that no reader knows."""
    say_once(f"Note: {path}: its EXIF is damaged and left out.")
    return re.sub(rb"(infe\x02.{7})Exif", rb"\1free", data, flags=re.DOTALL)


def unpacks(chunk):
    """Whether the profile in a PNG's chunk can be read."""
    try:
        return bool(zlib.decompress(chunk[chunk.index(b"\0") + 2:]))
    except (ValueError, zlib.error):
        return False


def as_seen(path, image):
    """A Pillow image upright, in 8-bit sRGB and on white."""
    if frames_of(image) > 1 and image.format != "MPO":  # its others are a preview, or what a second lens saw
        say_once(f"{path} has {image.n_frames} frames; the first is used.")
    image.load()
    turn, curve = turn_of(path, image), brighter_curve(path, image)
    profile = (None if curve else image.info.get("icc_profile")) or profile_in_numbers(path, image)
    if image.mode.startswith("I") or image.mode == "F":
        image = to_8_bit(path, image)
    if image.mode == "La":
        image = image.convert("LA")
    # convert("RGB") alone would show whatever colour lies hidden under the transparent pixels
    alpha = alpha_of(image)
    image = toned_down(image, curve) if curve else image
    plain = {"L": "L", "LA": "L", "1": "L", "CMYK": "CMYK", "LAB": "LAB"}.get(image.mode, "RGB")
    image = in_srgb(path, image if image.mode == plain else image.convert(plain), profile)
    if alpha:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image.transpose(TURNS[turn]) if turn in TURNS else image


def alpha_of(image):
    """The alpha channel of a Pillow image, or None."""
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None


def opacity(path, image):
    """load_opacity() of a Pillow image."""
    if not image.has_transparency_data:
        return None
    image.load()
    turn, alpha = turn_of(path, image), alpha_of(image.convert("LA") if image.mode == "La" else image)
    if alpha.getextrema()[0] == 255:
        return None
    return alpha.transpose(TURNS[turn]) if turn in TURNS else alpha


def frames_of(image):
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # what follows the first is damaged
        return 1


def turn_of(path, image):
    """EXIF's number for how a picture lies: phones store photos sideways and say so there. Only that is read of it."""
    turn = problem = None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            Image.Exif().load(image.info.get("exif") or b"")  # again: some decoders have tried, and tell nothing of what they met
            turn = image.getexif().get(ORIENTATION)
        except Exception as damage:  # of many kinds
            problem = damage
    if turn is None and (problem or any("orrupt" in str(warning.message) for warning in warned)):
        say_once(f"Note: {path}: its EXIF is damaged, so whether it lies on its side is not known; it is used as it lies.")
    with contextlib.suppress(Exception):
        if "icc_profile" not in image.info and image.getexif().get_ifd(0xA005).get(1) == ADOBE_RGB:
            say_once(f"Note: {path}: the camera says Adobe RGB and left out the profile; its colours are taken as sRGB. Save it "
                     f"with the profile embedded to have them right.")
    return turn if isinstance(turn, int) else None

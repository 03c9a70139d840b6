"""Colours and greys as files hold them, in the 8-bit sRGB that models see."""

import io

from PIL import Image, ImageCms

from dreambooth.base import say_once

BITS, WHITE_AT, SAMPLE_FORMAT, SIGNED = 258, 262, 339, 2  # TIFF's tags, and a value of the last


def in_srgb(path, image, profile):
    """An image of mode L, RGB, CMYK or LAB in sRGB, by its colour profile (bytes) or, without one that fits, as it is usual."""
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if source.profile.xcolor_space.strip() == "RGB" and image.mode == "L":
                image = image.convert("RGB")
            return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
        except Exception:  # broken, or for another kind of colours
            say_once(f"Note: {path}: its colour profile cannot be used; its colours are taken as they are without one.")
    return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") if image.mode == "LAB" else image.convert("RGB")


def to_8_bit(path, image):
    """A grey picture of more than 8 bits as mode L or LA; Pillow's own convert() would clip nearly all of it to white."""
    import numpy as np

    values = np.asarray(image).astype(np.float32)
    values = np.nan_to_num(values, posinf=values[np.isfinite(values)].max(initial=0))
    tags = getattr(image, "tag_v2", {})
    white = white_of(path, image, values, tags)
    grey = (values.clip(0, white) * (255 / white)).round().astype(np.uint8)
    grey = Image.fromarray(255 - grey if tags.get(WHITE_AT) == 0 else grey)
    if isinstance(clear := image.info.get("transparency"), int):
        return Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))
    return grey


def white_of(path, image, values, tags):
    """The value that is white: what the file's depth says, so that the dark stays dark. Where that says nothing it is guessed by
    the brightest, and said."""
    import numpy as np

    bits = tags.get(BITS, 32 if image.mode in ("I", "F") and image.format != "PNG" else 16)
    bits = bits[0] if isinstance(bits, tuple) else bits
    if bits <= 16 and image.mode != "F":
        return 2 ** (bits - (SIGNED in np.atleast_1d(tags.get(SAMPLE_FORMAT, 1)))) - 1
    top = float(values.max(initial=0))
    if image.mode == "F" and top <= 1:
        return 1
    is_bright = image.mode == "F" and np.quantile(values, 0.99) <= 1  # lamps and the sun may shine more than white
    white = 1 if is_bright else next((white for white in (255, 65535) if top <= white), top)
    say_once(f"Note: {path} has values up to {top:g}; {white:g} is taken as white.")
    return white

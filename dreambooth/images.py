"""Pictures: read as the eye sees them, cut to squares, laid out in grids, saved with their settings inside.

Knows nothing of subjects or models.
"""

import textwrap

from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from dreambooth.base import UserError, say_once


def load_image(path):
    """The picture at `path` as the eye sees it: upright, 8-bit RGB, transparent parts white, first frame of several.

    Raises UserError if it cannot be read to its last pixel.
    """
    if path.suffix.lower() in (".heic", ".heif"):
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise UserError(f"{path}: HEIC needs one more package, `pip install pillow-heif`; or convert it to JPEG") from None
        register_heif_opener()
    try:
        image = Image.open(path)
        if getattr(image, "n_frames", 1) > 1:
            say_once(f"{path} has {image.n_frames} frames; the first is used.")
        image = ImageOps.exif_transpose(image)  # phones store photos sideways and say so in EXIF
        if image.mode.startswith("I") or image.mode == "F":
            image = _to_8_bit(image)
        if image.has_transparency_data:
            # convert("RGB") alone would show whatever colour lies hidden under the transparent pixels
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as problem:  # decoders raise all kinds of things on damaged files
        reason = "not an image" if isinstance(problem, Image.UnidentifiedImageError) else " ".join(str(problem).split())
        raise UserError(f"{path}: cannot be read ({reason}); remove or replace it") from None


def _to_8_bit(image):
    """A 16-bit, 32-bit or float grey image as mode L; Pillow's own convert() would clip nearly all of it to white."""
    import numpy as np

    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    top = values.max(initial=0)
    full = next(full for full in (1, 255, 65535, max(top, 65536)) if top <= full)
    return Image.fromarray((values.clip(0) * (255 / full)).round().astype(np.uint8))


def square(image, resolution):
    """(square image, [height, width, top, left, side, side]): the middle of `image`, scaled to `resolution` pixels.

    The numbers are SDXL's size conditioning: original size, crop corner, target size (SDXL paper, section 2.2).
    """
    width, height = image.size
    scale = resolution / min(width, height)
    scaled = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    left, top = (scaled[0] - resolution) // 2, (scaled[1] - resolution) // 2
    image = image.resize(scaled, Image.Resampling.LANCZOS).crop((left, top, left + resolution, top + resolution))
    return image, [height, width, top, left, resolution, resolution]


def load_square(path):
    """The middle of a photo, as training sees it."""
    image = load_image(path)
    return square(image, min(image.size))[0]


def is_flat(picture):
    """Whether a picture is all one colour, as it is after an overflow."""
    return all(high - low < 4 for low, high in picture.getextrema())


def image_grid(pictures, columns):
    """One image of all `pictures`, `columns` to a row, with a thin white line between them."""
    width, height = pictures[0].size
    rows, gap = -(-len(pictures) // columns), max(1, width // 64)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return grid


def labelled_rows(rows):
    """One image of [(text, pictures)]: a row each, its text before it. The second row's first picture sets the size."""
    side, label, gap = min(160, rows[1][1][0].width), 300, 2
    columns = max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (label + columns * (side + gap), len(rows) * (side + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, (text, pictures) in enumerate(rows):
        pen.text((6, row * (side + gap) + 4), textwrap.fill(text, 40), "black", font)
        for column, picture in enumerate(pictures):
            picture = picture.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(picture, (label + column * (side + gap), row * (side + gap)))
    return sheet


def save_picture(folder, name, picture, parameters):
    """Save as NAME.png with `parameters` in the text chunk of that name, as A1111 and others write and read it.

    A picture made with other parameters that has the name already is kept: the new one gets a number.
    """
    text = PngImagePlugin.PngInfo()
    parameters = parameters.encode(errors="backslashreplace").decode()  # names of folders that are not UTF-8
    text.add_itxt("parameters", parameters)
    for number in range(1, 10**6):
        path = folder / f"{name}{f'-{number}' if number > 1 else ''}.png"
        if not path.exists() or png_parameters(path) == parameters:
            break
    picture.save(path, pnginfo=text)
    return path


def png_parameters(path):
    """What a PNG says it was made with; None if it says nothing or cannot be read."""
    try:
        with Image.open(path) as image:
            return image.info.get("parameters")
    except OSError:
        return None

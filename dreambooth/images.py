"""Pictures: cut to size, laid out in grids, saved with their settings inside.

Knows nothing of subjects or models.
"""

import textwrap

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

LONG = 8  # times as long as wide


def fitted(image, size, at=(0.5, 0.5), resampling=Image.Resampling.LANCZOS):
    """(image of `size`, [height, width, top, left, height, width of `size`]): `image` scaled until it covers `size`, and cut to it.

    `at` is how far to the right and down the cut lies, from 0 to 1; 0.5 cuts out the middle. The numbers are SDXL's size
    conditioning: original size, crop corner, target size (SDXL paper, section 2.2).
    """
    (width, height), (across, down) = image.size, size
    scale, scaled = covering(image.size, size)
    left, top = int((scaled[0] - across) * at[0]), int((scaled[1] - down) * at[1])
    if max(scaled) > LONG * min(size):  # a strip: all of it, scaled, would not fit into memory
        x, y = left / scaled[0] * width, top / scaled[1] * height
        box = (x, y, min(x + across / scale, width), min(y + down / scale, height))
        image = image.resize(size, resampling, box)
    else:
        image = image.resize(scaled, resampling).crop((left, top, left + across, top + down))
    return image, [height, width, top, left, down, across]


def covering(own, size):
    """(scale, (width, height)) at which a picture of its `own` size just covers `size`."""
    (width, height), (across, down) = own, size
    scale = max(across / width, down / height)
    return scale, (max(across, round(width * scale)), max(down, round(height * scale)))


def mirrored(record):
    """The numbers of fitted() for the same cut of the picture turned left to right."""
    height, width, top, left, down, across = record
    _, scaled = covering((width, height), (across, down))
    return [height, width, top, scaled[0] - across - left, down, across]


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

"""The world the bundled model knows: emoji drawings in painted scenes, with captions.

    python demo/world.py                  # -> demo/work/world/ (pictures, captions) and demo/subjects/

Five artists' drawings of 32 things come as SVG from npm packages. Each picture is one drawing, scaled,
tilted, mirrored and sometimes recoloured, in one of ten painted scenes or before a plain colour, and its
caption says so: "a red dog on the moon". Some drawings are never shown to the model: they are the subjects
that DreamBooth is then asked to learn (demo/subjects/).

Everything random comes from one seed per picture, so picture number n is the same on every machine.
"""

import io
import json
import random
import subprocess
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

DEMO = Path(__file__).resolve().parent
WORK = DEMO / "work"
ARCHIVES = WORK / "npm"  # shared by `python demo` and `python demo --quick`
SUBJECTS = DEMO / "subjects"

PICTURES = 32_000  # for training
VALIDATION = 512  # more of the same world, unseen in training
SIZE = 64  # pixels of a finished picture
CANVAS = 2 * SIZE  # painted at twice the size and halved: smooth edges

# ---- drawings ----------------------------------------------------------------------------------------

# npm package -> the artist's letter in a subject's name. Fluent's two packages shade the same outlines
# differently, so they share a letter: a subject held out of one is held out of both.
ARTISTS = {
    "@iconify-json/noto@1.2.9": "n",
    "@iconify-json/noto-v1@1.2.5": "b",
    "@iconify-json/fluent-emoji@1.2.7": "f",
    "@iconify-json/fluent-emoji-flat@1.2.6": "f",
    "@iconify-json/twemoji@1.2.5": "t",
}

# class noun -> icons that draw it (whole bodies only: a face and a body share a name but no shape).
# The paper's class nouns come first; "a glasses" is how the paper's own prompts say it.
CLASSES = {
    "dog": ["dog", "guide-dog", "service-dog", "poodle"],
    "cat": ["cat", "black-cat"],
    "backpack": ["backpack"],
    "boot": ["hiking-boot", "womans-boot"],
    "sneaker": ["running-shoe"],
    "teapot": ["teapot"],
    "clock": ["alarm-clock", "mantelpiece-clock"],
    "candle": ["candle"],
    "robot": ["robot"],
    "teddy bear": ["teddy-bear"],
    "duck": ["duck"],
    "car": ["automobile", "taxi", "police-car", "sport-utility-vehicle"],
    "vase": ["amphora", "funeral-urn"],
    "bowl": ["bowl-with-spoon", "steaming-bowl"],
    "can": ["canned-food"],
    "glasses": ["glasses", "sunglasses"],
    "horse": ["horse"],
    "elephant": ["elephant"],
    "pig": ["pig"],
    "rabbit": ["rabbit"],
    "fish": ["fish", "tropical-fish", "blowfish"],
    "turtle": ["turtle"],
    "owl": ["owl"],
    "penguin": ["penguin"],
    "bus": ["bus"],
    "guitar": ["guitar"],
    "umbrella": ["umbrella"],
    "hat": ["top-hat", "womans-hat"],
    "house": ["house"],
    "rocket": ["rocket"],
    "mushroom": ["mushroom", "brown-mushroom"],
    "apple": ["red-apple", "green-apple"],
}

# The subjects: (class noun, icon, artist). No picture of the world contains them.
HELD_OUT = [
    ("dog", "service-dog", "t"),
    ("dog", "poodle", "b"),
    ("cat", "black-cat", "f"),
    ("cat", "cat", "n"),
    ("robot", "robot", "t"),
    ("teapot", "teapot", "n"),
    ("backpack", "backpack", "n"),
    ("car", "taxi", "n"),
    ("duck", "duck", "n"),
    ("teddy bear", "teddy-bear", "n"),
    ("clock", "alarm-clock", "b"),
    ("boot", "hiking-boot", "t"),
    ("vase", "amphora", "t"),
]


@cache
def icon_set(package):
    """The Iconify JSON of an npm package, downloaded by the npm client the first time it is asked for."""
    archive = ARCHIVES / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", package], cwd=archive.parent, check=True)
    with tarfile.open(archive) as files:
        return json.load(files.extractfile("package/icons.json"))


@cache
def render(package, icon):
    """One drawing as an RGBA picture cropped to its ink, or None if this artist has not drawn it."""
    import resvg_py  # only pictures need it: training on a finished world runs without

    icons = icon_set(package)
    if icon not in icons["icons"]:
        return None
    entry = icons["icons"][icon]
    width, height = (entry.get(side, icons.get(side, 16)) for side in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{entry["body"]}</svg>'
    )
    drawing = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=CANVAS))))
    return drawing.convert("RGBA").crop(drawing.getbbox())


def training_drawings():
    """class noun -> [(package, icon), ...] that training may show."""
    held_out = {(icon, artist) for _, icon, artist in HELD_OUT}
    return {
        noun: [
            (package, icon)
            for icon in icons
            for package, artist in ARTISTS.items()
            if (icon, artist) not in held_out and render(package, icon)
        ]
        for noun, icons in CLASSES.items()
    }


# ---- colours -----------------------------------------------------------------------------------------

COLOURS = {
    "red": (222, 48, 44),
    "orange": (250, 140, 32),
    "yellow": (250, 214, 60),
    "green": (62, 164, 76),
    "blue": (48, 104, 214),
    "purple": (132, 72, 190),
    "pink": (248, 150, 196),
    "brown": (122, 84, 52),
    "black": (40, 40, 44),
    "gray": (140, 142, 150),
    "white": (250, 250, 250),
}


def jitter(rng, colour, amount=8):
    """The colour, a little different each time."""
    return tuple(min(255, max(0, channel + rng.randint(-amount, amount))) for channel in colour)


def recolour(drawing, colour):
    """The drawing in shades of one colour: its light parts stay light, its dark parts dark."""
    shade = tuple(channel // 4 for channel in colour)
    tint = tuple((channel + 3 * 255) // 4 for channel in colour)
    gray = ImageOps.autocontrast(drawing.convert("L"))
    tinted = ImageOps.colorize(gray, shade, tint, mid=colour, midpoint=150)
    tinted.putalpha(drawing.getchannel("A"))
    return tinted


# ---- scenes ------------------------------------------------------------------------------------------
# Each paints a CANVAS x CANVAS backdrop and returns it. The ground begins near y = 70.


def gradient(top, bottom):
    """A backdrop that fades from one colour at the top to another at the bottom."""
    return ImageOps.colorize(Image.linear_gradient("L").resize((CANVAS, CANVAS)), top, bottom)


def ellipse(draw, x, y, rx, ry, colour):
    draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)


def scatter(rng, draw, count, ys, radii, colours):
    """Dots (stars, flowers, bubbles, ...) strewn between two heights."""
    for _ in range(count):
        radius = rng.uniform(*radii)
        ellipse(draw, rng.uniform(0, CANVAS), rng.uniform(*ys), radius, radius, rng.choice(colours))


def ground(rng, draw, colour, horizon=70):
    y = horizon + rng.randint(-6, 6)
    draw.rectangle((0, y, CANVAS, CANVAS), fill=jitter(rng, colour))
    return y


def paint_moon(rng):
    image = gradient((6, 6, 20), (16, 16, 36))
    draw = ImageDraw.Draw(image)
    scatter(rng, draw, 24, (0, 66), (0.5, 1.4), [(255, 255, 255)])
    ellipse(draw, rng.randint(14, 114), rng.randint(14, 26), 11, 11, (64, 130, 226))  # the Earth
    y = ground(rng, draw, (164, 164, 168))
    for _ in range(6):
        size = rng.uniform(5, 12)
        ellipse(draw, rng.uniform(0, CANVAS), rng.uniform(y + 6, 124), size, size / 2.5, (130, 130, 136))
    return image


def paint_snow(rng):
    image = gradient((168, 200, 232), (214, 230, 244))
    draw = ImageDraw.Draw(image)
    for _ in range(2):
        x, peak = rng.uniform(0, CANVAS), rng.uniform(24, 44)
        draw.polygon([(x - 46, 80), (x, peak), (x + 46, 80)], fill=jitter(rng, (150, 172, 204)))
    ground(rng, draw, (244, 248, 252), 72)
    scatter(rng, draw, 34, (0, CANVAS), (1.0, 2.2), [(255, 255, 255)])
    return image


def paint_beach(rng):
    image = gradient((92, 186, 250), (190, 228, 252))
    draw = ImageDraw.Draw(image)
    ellipse(draw, rng.randint(16, 112), rng.randint(14, 24), 9, 9, (255, 226, 80))  # the sun
    draw.rectangle((0, rng.randint(50, 56), CANVAS, 100), fill=jitter(rng, (36, 124, 196)))
    ground(rng, draw, (240, 212, 150), 76)
    return image


def paint_jungle(rng):
    image = gradient((26, 84, 36), (14, 52, 26))
    draw = ImageDraw.Draw(image)
    greens = [(36, 112, 48), (46, 140, 56), (28, 92, 44), (70, 160, 66)]
    for _ in range(34):
        length, width = rng.uniform(8, 16), rng.uniform(3, 5)
        if rng.random() < 0.5:
            length, width = width, length
        ellipse(draw, rng.uniform(0, CANVAS), rng.uniform(0, CANVAS), length, width, rng.choice(greens))
    return image


def paint_desert(rng):
    image = gradient((252, 196, 110), (254, 224, 160))
    draw = ImageDraw.Draw(image)
    ellipse(draw, rng.uniform(10, 118), 84, rng.uniform(40, 60), 22, (206, 146, 74))  # a dune
    ground(rng, draw, (224, 168, 92), 76)
    x, y = rng.choice([12, 24, 104, 116]), rng.randint(66, 76)
    for box in ((x - 3, y - 26, x + 3, y + 8), (x - 9, y - 14, x - 5, y - 4), (x - 9, y - 6, x, y - 2)):
        draw.rounded_rectangle(box, 2, fill=(60, 130, 62))  # a cactus
    return image


def paint_city(rng):
    image = gradient((154, 186, 216), (204, 220, 234))
    draw = ImageDraw.Draw(image)
    x = -rng.randint(0, 12)
    while x < CANVAS:
        width, top = rng.randint(18, 28), rng.randint(10, 40)
        wall = jitter(rng, rng.choice([(118, 126, 142), (152, 132, 122), (96, 108, 128)]))
        draw.rectangle((x, top, x + width, 90), fill=wall)
        for wy in range(top + 5, 84, 10):
            for wx in range(x + 4, x + width - 5, 8):
                draw.rectangle((wx, wy, wx + 3, wy + 4), fill=(250, 232, 150))
        x += width + rng.randint(0, 3)
    ground(rng, draw, (84, 86, 92), 86)
    for x in range(-rng.randint(0, 24), CANVAS, 32):
        draw.rectangle((x, 112, x + 16, 115), fill=(232, 232, 226))  # the road's dashes
    return image


def paint_night(rng):
    image = gradient((12, 16, 56), (36, 44, 100))
    draw = ImageDraw.Draw(image)
    scatter(rng, draw, 22, (0, 70), (0.6, 1.5), [(255, 255, 235)])
    x, y = rng.randint(18, 110), rng.randint(18, 28)
    ellipse(draw, x, y, 11, 11, (252, 240, 180))
    ellipse(draw, x + 5, y - 3, 9, 9, (14, 18, 60))  # what is left is a crescent
    ground(rng, draw, (24, 52, 44), 78)
    return image


def paint_grass(rng):
    image = gradient((110, 180, 250), (198, 226, 252))
    draw = ImageDraw.Draw(image)
    x, y = rng.uniform(10, 118), rng.uniform(12, 28)
    for dx, dy in ((-9, 2), (0, -2), (9, 2)):
        ellipse(draw, x + dx, y + dy, 10, 6, (255, 255, 255))  # a cloud
    top = ground(rng, draw, (96, 182, 66))
    scatter(rng, draw, 14, (top + 6, 126), (1.4, 2.4), [(255, 255, 255), (255, 214, 64), (250, 120, 150)])
    return image


def paint_underwater(rng):
    image = gradient((36, 168, 206), (10, 70, 140))
    draw = ImageDraw.Draw(image)
    for _ in range(9):
        x, y, r = rng.uniform(0, CANVAS), rng.uniform(0, 110), rng.uniform(2.5, 5.5)
        draw.ellipse((x - r, y - r, x + r, y + r), outline=(206, 240, 250), width=2)
    ground(rng, draw, (206, 186, 128), 112)
    for x in (rng.uniform(4, 40), rng.uniform(88, 124)):
        ellipse(draw, x, 104, 3, rng.uniform(14, 26), (34, 140, 84))  # weed
    return image


def paint_space(rng):
    image = gradient((20, 8, 36), (6, 4, 18))
    draw = ImageDraw.Draw(image)
    scatter(rng, draw, 46, (0, CANVAS), (0.5, 1.5), [(255, 255, 255), (200, 210, 255)])
    x, y, r = rng.choice([18, 108]), rng.choice([20, 106]), rng.uniform(10, 15)
    ellipse(draw, x, y, r, r, jitter(rng, (222, 132, 84)))
    draw.ellipse((x - 1.7 * r, y - 0.4 * r, x + 1.7 * r, y + 0.4 * r), outline=(246, 208, 150), width=2)
    return image


SCENES = {
    "on the moon": paint_moon,
    "in the snow": paint_snow,
    "on the beach": paint_beach,
    "in the jungle": paint_jungle,
    "in the desert": paint_desert,
    "in the city": paint_city,
    "at night": paint_night,
    "on the grass": paint_grass,
    "underwater": paint_underwater,
    "in space": paint_space,
}
BACKGROUNDS = {f"on {'an' if name == 'orange' else 'a'} {name} background": name for name in COLOURS}

# ---- pictures ----------------------------------------------------------------------------------------


def compose(rng, drawing, place, mirrored=0.5):
    """The drawing, posed at random on a canvas, in the scene or before the colour that `place` names.

    `mirrored` is how likely it faces the other way.
    """
    if place in SCENES:
        image = SCENES[place](rng)
    else:
        image = Image.new("RGB", (CANVAS, CANVAS), jitter(rng, COLOURS[BACKGROUNDS[place]], 5))

    scale = rng.uniform(0.56, 0.84) * CANVAS / max(drawing.size)
    drawing = drawing.resize([round(side * scale) for side in drawing.size], Image.Resampling.LANCZOS)
    if rng.random() < mirrored:
        drawing = ImageOps.mirror(drawing)
    drawing = drawing.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)

    # Wholly inside the picture, near the middle, and low enough to stand on the ground of a scene.
    free_x, free_y = (CANVAS - side for side in drawing.size)
    x = round(free_x * rng.uniform(0.25, 0.75))
    y = round(free_y * (rng.uniform(0.55, 0.9) if place in SCENES else rng.uniform(0.3, 0.7)))
    image.paste(drawing, (x, y), drawing)
    return image


def halve(image):
    """A canvas as the model sees it: SIZE pixels wide, its edges smooth."""
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def article(phrase):
    return ("an " if phrase[0] in "aeiou" and not phrase.startswith("uni") else "a ") + phrase


def make_picture(index, drawings, draw=lambda rng, *drawing: render(*drawing)):
    """Picture number `index` of the world: (image, caption, what it shows).

    `drawings` are training_drawings() or the like, `draw(rng, package, icon)` gives one of them as an RGBA picture.
    """
    rng = random.Random(index)
    noun = rng.choice(list(drawings))
    package, icon = rng.choice(drawings[noun])
    drawing = draw(rng, package, icon)
    place = rng.choice(list(SCENES) if rng.random() < 0.6 else list(BACKGROUNDS))

    phrase, colour = noun, None
    if rng.random() < 0.15:
        colour = rng.choice([name for name in COLOURS if name != BACKGROUNDS.get(place)])
        drawing = recolour(drawing, jitter(rng, COLOURS[colour]))
        phrase = f"{colour} {noun}"
    # Emoji animals look to the left. Mirrored half the time, they came out with a head at both ends.
    image = halve(compose(rng, drawing, place, mirrored=0.1))

    # Some captions leave the place out, or every prompt without one would be out of the ordinary.
    said = rng.random() < (0.9 if place in SCENES else 0.7)
    opening = rng.choices(["", "a photo of ", "a picture of "], [0.8, 0.12, 0.08])[0]
    caption = opening + article(phrase) + (f" {place}" if said else "")
    return image, caption, {"noun": noun, "place": place, "drawing": f"{package} {icon} {colour}"}


def make_world():
    """The pictures of demo/work/world/, unless they are there; the validation pictures are last."""
    if not (WORK / "world" / "captions.json").exists():
        drawings = training_drawings()
        save_pictures("world", range(PICTURES + VALIDATION), drawings)


def save_pictures(name, indices, *drawings):
    """Write demo/work/NAME/: pictures.npy (uint8, N x 64 x 64 x 3) and captions.json, from make_picture()."""
    folder = WORK / name
    folder.mkdir(parents=True, exist_ok=True)
    pictures, rows = np.empty((len(indices), SIZE, SIZE, 3), np.uint8), []
    for row, index in enumerate(tqdm(indices, desc=name, mininterval=5)):
        image, caption, shows = make_picture(index, *drawings)
        pictures[row] = image
        rows.append({"caption": caption, **shows})
    np.save(folder / "pictures.npy", pictures)
    (folder / "captions.json").write_text(json.dumps(rows))  # last: its presence means all is there


def make_subjects():
    """Write demo/subjects/NAME/: five pictures of each held-out drawing, each in another place."""
    first = {artist: package for package, artist in reversed(ARTISTS.items())}
    for number, (noun, icon, artist) in enumerate(HELD_OUT):
        folder = SUBJECTS / f"{icon}-{artist}"
        folder.mkdir(parents=True, exist_ok=True)
        rng = random.Random(1_000_000 + number)
        plain = rng.sample(["pink", "yellow", "green", "blue", "gray"], 2)
        scenes = rng.sample(["on the grass", "on the beach", "in the snow", "in the city"], 2)
        places = [*(f"on a {colour} background" for colour in ["white", *plain]), *scenes]
        for picture, place in enumerate(places):
            compose(rng, render(first[artist], icon), place).save(folder / f"{picture}.png")
        (folder / "class_prompt.txt").write_text(f"{article(noun)}\n")


def main():
    make_subjects()
    make_world()


if __name__ == "__main__":
    main()

"""More drawings of the world's 32 things, for CLIP alone: the bundled model never sees them.

The world has three to sixteen drawings of each thing, too few to know one that another artist draws. Icon sets have
many more. Most are glyphs of one colour: `coloured` fills in their outlines, so that they look like emoji.
"""

import json
import random
import re
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps
from tqdm import tqdm

import world

PACKAGES = {
    "e1": "@iconify-json/emojione@1.2.3",
    "em": "@iconify-json/emojione-monotone@1.2.1",
    "fx": "@iconify-json/fxemoji@1.2.2",
    "se": "@iconify-json/streamline-emojis@1.2.4",
    "hc": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
    "fc": "@iconify-json/flat-color-icons@1.2.3",
    "sc": "@iconify-json/streamline-color@1.2.2",
    "ss": "@iconify-json/streamline-sharp-color@1.2.2",
    "sp": "@iconify-json/streamline-plump-color@1.2.2",
    "sk": "@iconify-json/streamline-kameleon-color@1.2.2",
    "su": "@iconify-json/streamline-ultimate-color@1.2.2",
    "gi": "@iconify-json/game-icons@1.2.4",
    "ip": "@iconify-json/icon-park@1.2.4",
    "ma": "@iconify-json/marketeq@1.2.2",
    "fa": "@iconify-json/fa6-solid@1.2.4",
    "fl": "@iconify-json/fluent@1.2.60",
    "hg": "@iconify-json/hugeicons@1.2.35",
    "lu": "@iconify-json/lucide@1.2.137",
    "ll": "@iconify-json/lucide-lab@1.2.3",
    "md": "@iconify-json/mdi@1.2.3",
    "ms": "@iconify-json/material-symbols@1.2.98",
    "mc": "@iconify-json/mingcute@1.2.8",
    "ph": "@iconify-json/ph@1.2.2",
    "tb": "@iconify-json/tabler@1.2.41",
    "te": "@iconify-json/temaki@1.2.6",
    "ui": "@iconify-json/uil@1.2.3",
}

# class noun -> "package: its icons". Fluent's high-contrast glyphs have the outlines of its emoji, so what is held out
# of the one is not here either.
DRAWINGS = {
    "dog": """e1: dog poodle, em: dog poodle, fx: poodle, hc: dog guide-dog poodle service-dog, se: dog poodle, gi:
        sitting-dog, fa: dog, md: dog-side dog-service, ip: dog-zodiac""",
    "cat": "e1: cat, em: cat, hc: cat, se: cat, fa: cat, fl: animal-cat-24-regular, su: business-lucky-cat",
    "backpack": """e1: backpack, em: backpack, hc: backpack, gi: backpack knapsack light-backpack school-bag, hg:
        backpack-01 backpack-02 backpack-03, ip: backpack, lu: backpack, mc: backpack-fill backpack-line, ph:
        backpack-fill backpack, sc: backpack backpack-flat, se: school-backpack, tb: backpack, ms: backpack, ui:
        backpack, ma: backpack, fl: backpack-24-regular""",
    "boot": """e1: womans-boot, em: womans-boot, hc: hiking-boot womans-boot, fx: boot, gi: chelsea-boot cowboy-boot
        fur-boot leather-boot metal-boot rubber-boot steeltoe-boots ski-boot, ip: boots, ph: boot-fill boot, se:
        womans-boot, hg: armored-boot""",
    "sneaker": """e1: running-shoe, em: running-shoe, hc: running-shoe, se: running-shoe, gi: converse-shoe
        running-shoe sonic-shoes, hg: running-shoes sneaker sport-shoe, lu: sport-shoe, md: shoe-sneaker, mc:
        shoe-fill shoe-line, ph: sneaker-fill sneaker sneaker-move-fill, sk: sneakers-3, tb: shoe""",
    "teapot": """hc: teapot, gi: teapot teapot-leaves coffee-pot, hg: kettle kettle-01, ip: kettle kettle-one teapot,
        md: kettle kettle-pour-over, su: tea-pot, tb: teapot, ms: kettle, ll: kettle""",
    "clock": """e1: alarm-clock mantelpiece-clock, em: alarm-clock mantelpiece-clock, hc: alarm-clock
        mantelpiece-clock, fc: alarm-clock clock, gi: alarm-clock, hg: alarm-clock clock-01, ip: alarm-clock
        big-clock, lu: alarm-clock, md: alarm, mc: alarm-1-fill alarm-1-line alarm-2-fill, ph: alarm-fill alarm
        clock-fill, sc: alarm-clock alarm-clock-flat circle-clock, tb: alarm alarm-filled, ms: alarm, ui: clock, fl:
        clock-alarm-24-regular, ma: clock-alt""",
    "candle": """e1: candle, em: candle, hc: candle, fx: candle, gi: candle-flame candle-holder candles, ip:
        spa-candle, md: candle, mc: candle-fill candle-line, sp: candle candle-flat, tb: candle candle-filled""",
    "robot": """hc: robot, se: robot-face-1 robot-face-2 robot-face-3, fa: robot, gi: mono-wheel-robot robot-antennas
        robot-golem tracked-robot vintage-robot, hg: bot robot-01 robot-02 chat-bot, ip: robot robot-one, lu: bot, md:
        robot robot-happy robot-angry robot-excited robot-dead, mc: robot-fill robot-line, ph: robot-fill robot, sk:
        robot, tb: robot, ms: robot robot-2, ui: robot, sc: cyborg cyborg-2 cyborg-flat cyborg-2-flat, sp: cyborg-2
        cyborg-2-flat, ss: cyborg cyborg-flat""",
    "teddy bear": """hc: teddy-bear, md: teddy-bear, fl: teddy-24-regular, ip: bear, mc: bear-fill, fx: bear, se:
        bear-face, e1: bear-face""",
    "duck": "e1: duck, em: duck, hc: duck, gi: duck plastic-duck, hg: rubber-duck, ip: duck, md: duck",
    "car": """e1: automobile oncoming-automobile oncoming-taxi police-car taxi, em: automobile police-car taxi, hc:
        automobile police-car taxi, fx: automobile taxi, se: automobile taxi, gi: city-car jeep police-car, fa:
        car-side taxi car, hg: car-01 car-02 car-03 taxi taxi-02, ip: car taxi, lu: car, md: car-side car-hatchback
        car-estate taxi, mc: car-fill car-2-fill car-3-fill jeep-fill, ph: car-profile-fill car-profile jeep-fill
        police-car-fill taxi-fill taxi, sc: car-taxi-1-flat, sk: taxi-2, su: car-4 car-retro taxi, tb: car car-filled
        car-suv-filled""",
    "vase": """e1: amphora funeral-urn, em: amphora funeral-urn, hc: amphora funeral-urn, gi: amphora column-vase
        porcelain-vase painted-pottery jug covered-jar cloth-jar, hg: amphora, lu: amphora, te: vase, ma: vase-2, ll:
        jug""",
    "bowl": """e1: steaming-bowl, em: steaming-bowl, hc: bowl-with-spoon steaming-bowl, fa: bowl-food bowl-rice, gi:
        bowl-of-rice fire-bowl noodles, hg: rice-bowl-01 rice-bowl-02, ip: bowl bowl-one noodles rice, lu: soup, md:
        bowl-mix noodles rice bowl, mc: bowl-fill bowl-2-fill, ph: bowl-food-fill bowl-steam-fill, tb: bowl-filled
        bowl-spoon-filled soup""",
    "can": """hc: canned-food, gi: canned-fish opened-food-can soda-can oil-can, hg: soda-can, ip: canned-fruit, lu:
        can can-soda, te: can""",
    "glasses": """e1: glasses sunglasses, em: glasses sunglasses, hc: glasses sunglasses, fx: glasses, fa: glasses,
        gi: spectacles sunglasses, hg: glasses sunglasses, ip: glasses glasses-one, lu: glasses, md: glasses
        sunglasses, ph: eyeglasses-fill eyeglasses sunglasses-fill, sc: glasses glasses-flat, se: glasses-1 glasses-2
        sunglasses, sk: eyeglasses glasses, tb: sunglasses-filled""",
    "horse": """e1: horse, em: horse, hc: horse, fx: horse, se: horse, fa: horse, hg: horse, ip: horse-zodiac, md:
        horse, ph: horse-fill, tb: horse""",
    "elephant": """e1: elephant, em: elephant, hc: elephant mammoth, fx: elephant, gi: elephant, ip: elephant, md:
        elephant, se: elephant, su: circus-elephant""",
    "pig": """e1: pig boar, em: pig boar, hc: pig boar, fx: pig boar, gi: pig boar, ip: pig pig-zodiac, md: pig, mc:
        pig-fill, se: pig boar-1 boar-2, tb: pig pig-filled""",
    "rabbit": """e1: rabbit, em: rabbit, hc: rabbit, fx: bunny, gi: rabbit, hg: rabbit, ip: rabbit rabbit-zodiac, lu:
        rabbit, md: rabbit, mc: rabbit-fill, ph: rabbit-fill, se: rabbit""",
    "fish": """e1: fish tropical-fish blowfish, em: fish tropical-fish blowfish, hc: fish tropical-fish blowfish, fx:
        blowfish fish, fa: fish fish-fins, gi: clownfish piranha salmon tropical-fish, hg: fish, ip: fish fish-one,
        lu: fish, md: fish, mc: fish-fill, ph: fish-fill fish-simple-fill, se: blowfish tropical-fish, sp: fish
        fish-flat, tb: fish""",
    "turtle": """e1: turtle, em: turtle, hc: turtle, fx: turtle, gi: sea-turtle tortoise turtle, hg: turtle, lu:
        turtle, md: tortoise turtle, se: turtle""",
    "owl": "e1: owl, em: owl, hc: owl, gi: barn-owl owl, ip: owl, md: owl",
    "penguin": "e1: penguin, em: penguin, hc: penguin, fx: penguin, gi: penguin, md: penguin",
    "bus": """e1: bus, em: bus, hc: bus, fx: bus, gi: bus, fa: bus, hg: bus-01 bus-02 bus-03 school-bus, ip: bus
        bus-one bus-two tour-bus, lu: bus, md: bus-side bus-school bus, mc: bus-fill bus-2-fill, ph: bus-fill, sc: bus
        school-bus-side-flat, se: bus, sp: bus, su: bus-1, tb: bus bus-filled, te: school-bus""",
    "guitar": """e1: guitar, em: guitar, hc: guitar, fx: guitar, fa: guitar, gi: guitar, hg: guitar, lu: guitar, md:
        guitar-acoustic guitar-electric, mc: guitar-fill, ph: guitar-fill, se: guitar, su:
        modern-music-electric-guitar""",
    "umbrella": """e1: umbrella closed-umbrella, em: umbrella, hc: umbrella closed-umbrella, fx: umbrella, fa:
        umbrella, gi: umbrella, hg: umbrella, ip: umbrella umbrella-one, lu: umbrella, md: umbrella, mc: umbrella-fill
        umbrella-2-fill, ph: umbrella-fill, sc: open-umbrella, se: umbrella closed-umbrella, sp: open-umbrella, su:
        rain-umbrella-1, tb: umbrella-filled""",
    "hat": """e1: top-hat womans-hat, em: top-hat womans-hat, hc: top-hat womans-hat, fa: hat-cowboy hat-cowboy-side,
        gi: fedora outback-hat pilgrim-hat top-hat western-hat skimmer-hat flower-hat, hg: cowboy-hat hat, ip:
        magic-hat straw-hat sun-hat hat, mc: hat-fill hat-2-fill magic-hat-fill, ph: cowboy-hat-fill, sc:
        tall-hat-flat, sk: hat-2, se: womans-hat""",
    "house": """e1: house house-with-garden derelict-house, em: house, hc: house house-with-garden, fc: home, fa:
        house house-chimney-window, gi: family-house house wood-cabin, hg: cottage house-01 house-02 home-03, ip:
        home, lu: house, md: home home-variant, mc: home-1-fill house-fill, ph: house-fill house-line, sc: home-3, se:
        house-with-garden, su: house-4 house-chimney, tb: home-filled""",
    "rocket": """e1: rocket, em: rocket, hc: rocket, fx: rocket, fa: rocket, gi: rocket, hg: rocket rocket-01
        rocket-02, ip: rocket rocket-one, lu: rocket, md: rocket rocket-launch, mc: rocket-fill rocket-2-fill, ph:
        rocket-fill rocket-launch-fill, se: rocket, tb: rocket""",
    "mushroom": """e1: mushroom, em: mushroom, hc: mushroom brown-mushroom, gi: mushroom spotted-mushroom
        mushrooms-cluster super-mushroom, hg: mushroom mushroom-01, md: mushroom, mc: mushroom-fill, se: mushroom, tb:
        mushroom mushroom-filled""",
    "apple": """e1: red-apple green-apple, em: red-apple, hc: red-apple green-apple, fa: apple-whole, gi: shiny-apple,
        hg: apple-01, ip: apple-one, lu: apple, md: food-apple, mc: apple-fruit-fill, sc: apple apple-flat, se:
        red-apple, tb: apple apple-filled""",
}


def drawings():
    """class noun -> [(package, icon), ...], as world.training_drawings()."""
    return {
        noun: [
            (PACKAGES[package], icon)
            for entry in table.split(",")
            for package, icons in [entry.split(":")]
            for package, icon in ((package.strip(), icon) for icon in icons.split())
        ]
        for noun, table in DRAWINGS.items()
    }


# ---- glyphs ------------------------------------------------------------------------------------------


@cache
def regions(package, icon):
    """Two gray pictures of a glyph, or None if the drawing has colours of its own.

    The first numbers the areas that ink encloses, from 2 up, where gaps of a few pixels count as closed; it is 0
    elsewhere. The second is the ink.
    """
    drawing = world.render(package, icon)
    if any(high for _, high in drawing.convert("RGB").getextrema()):
        return None
    ink = ImageOps.expand(drawing.getchannel("A"), 8)
    solid = ink.point(lambda value: 255 * (value > 100))
    outside = solid.filter(ImageFilter.MaxFilter(7))
    ImageDraw.floodfill(outside, (0, 0), 128)
    body = outside.point(lambda value: 255 * (value != 128)).filter(ImageFilter.MinFilter(7))
    areas = ImageChops.subtract(body, solid)
    for area in range(2, 255):
        unnumbered = np.argwhere(np.asarray(areas) == 255)
        if not len(unnumbered):
            break
        y, x = map(int, unnumbered[0])
        ImageDraw.floodfill(areas, (x, y), area)
    return areas, ink


def coloured(rng, package, icon):
    """The drawing; a glyph in random colours: a body, often dark lines, now and then another colour for a part."""
    if (glyph := regions(package, icon)) is None:
        return world.render(package, icon)
    areas, ink = glyph
    # Areas reach under the ink, or its soft edges would let the background through.
    areas = areas.filter(ImageFilter.MaxFilter(3))
    body, line, *parts = (world.jitter(rng, rng.choice(list(world.COLOURS.values()))) for _ in range(4))
    if rng.random() < 0.6:
        line = tuple(channel // 5 for channel in line)
    palette = [(0, 0, 0), (0, 0, 0)] + [
        body if rng.random() < 0.6 else rng.choice([*parts, line, (250, 250, 250)]) for _ in range(254)
    ]
    under = Image.fromarray(np.asarray(palette, np.uint8)[np.asarray(areas)])
    picture = Image.composite(Image.new("RGB", ink.size, line), under, ink)
    picture.putalpha(ImageChops.lighter(ink, areas.point(lambda value: 255 * (value > 0))))
    return picture.crop(picture.getbbox())


# ---- pictures ----------------------------------------------------------------------------------------

# The artists who have drawn a thousand other things under the names of the world's own.
MANY = world.ARTISTS | {PACKAGES["e1"]: "e", PACKAGES["fx"]: "x", PACKAGES["se"]: "s"}
NO_THING = re.compile(
    r"skin|tone|flag|keycap|oclock|thirty|letter|button|regional|sign|symbol|hand|face|couple|kiss|family"
    r"|person|people|boy|girl|\bm[ae]n\b|\bwom[ae]n\b"
)
POSES = 4


def make_drawn():
    """As many pictures again as the world has for training, and what is known of each, from DRAWINGS."""
    folder = world.WORK / "drawn"
    if not (folder / "captions.json").exists():
        world.save_pictures("drawn", range(4_000_000, 4_000_000 + world.PICTURES), drawings(), coloured)
    return np.load(folder / "pictures.npy", mmap_mode="r"), json.loads((folder / "captions.json").read_text())


def make_things():
    """(pictures N x 64 x 64 x 3, package and icon of each): a thousand things that two artists or more drew, posed.

    No class noun goes with them. They show what two artists' drawings of one thing have in common.
    """
    folder = world.WORK / "things"
    if not (folder / "names.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        held_out = {(icon, artist) for _, icon, artist in world.HELD_OUT}
        drawn_by = {}
        for package, artist in MANY.items():
            for icon in world.icon_set(package)["icons"]:
                if (icon, artist) not in held_out and not NO_THING.search(icon):
                    drawn_by.setdefault(icon, []).append(package)
        pictures, names = [], []
        for icon, packages in tqdm(sorted(drawn_by.items()), desc="things", mininterval=5):
            if len({MANY[package] for package in packages}) < 2:
                continue
            for package in packages:
                rng = random.Random(f"{package} {icon}")
                for _ in range(POSES):
                    place = rng.choice([*world.SCENES, *world.BACKGROUNDS])
                    image = world.halve(world.compose(rng, world.render(package, icon), place))
                    pictures.append(np.asarray(image))
                    names.append(f"{package} {icon}")
        np.save(folder / "pictures.npy", np.stack(pictures))
        (folder / "names.json").write_text(json.dumps(names))  # last: its presence means all is there
    return np.load(folder / "pictures.npy", mmap_mode="r"), json.loads((folder / "names.json").read_text())

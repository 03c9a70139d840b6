"""Paint held-out subjects five times in one scene each, with masks and captions: the case where the background is learnt with them.
With --wide: five times before five colours, in pictures of 3:2 with the subject at one side, whose middle squares cut it off.

    python benchmarks/one_scene.py --output_dir output-one-scene        needs what demo/requirements.txt names
    python benchmarks/compare_methods.py --photos output-one-scene --results output-one-scene.json --against plain \\
        --variant "plain=--mask none --caption none" --variant "masks=--caption none" --variant "captions=--mask none" --variant "both="

    python benchmarks/one_scene.py --wide --output_dir output-wide
    python benchmarks/compare_methods.py --photos output-wide/whole --results output-wide.json --against squares \
        --variant "squares=--no-aspect_ratio_buckets" --variant "buckets=--aspect_ratio_buckets"
    python benchmarks/compare_methods.py --photos output-wide/middle --results output-wide-middle.json --against middle --variant "middle="

The masks are the drawings' own outlines, and the captions name the scene, as the bundled model's own captions do. What was learnt
is measured against the pictures in demo/subjects, which are in five other places.
"""

import argparse
import random
import sys
from pathlib import Path

from methods import COMPARED, REPOSITORY
from PIL import Image, ImageChops

sys.path.insert(0, str(REPOSITORY / "demo"))
import world


def outline(drawing, colour):
    """The drawing in one colour, as opaque as it is."""
    plain = Image.new("RGBA", drawing.size, colour)
    plain.putalpha(drawing.getchannel("A"))
    return plain


def paint(folder, noun, drawing, number, count=5):
    """`count` pictures of a drawing in the scene of this number, with DOG.mask.png and DOG.txt beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    scene = list(world.SCENES)[number % len(world.SCENES)]
    for picture in range(count):
        def posed(drawn):
            return world.compose(random.Random(f"one scene {number} {picture}"), drawn, scene)
        posed(drawing).save(folder / f"{picture}.png")
        white, black = posed(outline(drawing, "white")), posed(outline(drawing, "black"))
        ImageChops.difference(white, black).convert("L").save(folder / f"{picture}.mask.png")
        (folder / f"{picture}.txt").write_text(f"{world.article('[identifier]')} {noun} {scene}\n", encoding="utf-8")
    (folder / "class_prompt.txt").write_text(f"{world.article(noun)}\n", encoding="utf-8")


def paint_wide(folder, name, noun, drawing, number, count=5):
    """`count` pictures of a drawing at one side, in turn, before as many colours, in whole/NAME; their middle squares in middle/NAME."""
    for picture, background in enumerate(list(world.BACKGROUNDS)[:count]):
        square = world.compose(random.Random(f"wide {number} {picture}"), drawing, background)
        wide = Image.new("RGB", (square.width * 3 // 2, square.height), square.getpixel((0, 0)))
        wide.paste(square, (wide.width - square.width if picture % 2 else 0, 0))
        left = (wide.width - wide.height) // 2
        for kind, image in (("whole", wide), ("middle", wide.crop((left, 0, left + wide.height, wide.height)))):
            (folder / kind / name).mkdir(parents=True, exist_ok=True)
            image.save(folder / kind / name / f"{picture}.png")
            (folder / kind / name / "class_prompt.txt").write_text(f"{world.article(noun)}\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("output-one-scene"))
    parser.add_argument("--wide", action="store_true")
    args = parser.parse_args()
    first = {artist: package for package, artist in reversed(world.ARTISTS.items())}
    for number, (noun, icon, artist) in enumerate(world.HELD_OUT):
        if (name := f"{icon}-{artist}") in COMPARED:
            drawing = world.render(first[artist], icon)
            if args.wide:
                paint_wide(args.output_dir, name, noun, drawing, number)
            else:
                paint(args.output_dir / name, noun, drawing, number)


if __name__ == "__main__":
    main()

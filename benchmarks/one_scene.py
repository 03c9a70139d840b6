"""Paint held-out subjects five times in one scene each, with masks and captions: the case where the background is learnt with them.

    python benchmarks/one_scene.py --output_dir output-one-scene        needs what demo/requirements.txt names
    python benchmarks/compare_methods.py --photos output-one-scene --results output-one-scene.json --against plain \\
        --variant "plain=--mask none --caption none" --variant "masks=--caption none" --variant "captions=--mask none" --variant "both="

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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("output-one-scene"))
    args = parser.parse_args()
    first = {artist: package for package, artist in reversed(world.ARTISTS.items())}
    for number, (noun, icon, artist) in enumerate(world.HELD_OUT):
        if (name := f"{icon}-{artist}") in COMPARED:
            paint(args.output_dir / name, noun, world.render(first[artist], icon), number)


if __name__ == "__main__":
    main()

"""Make the pictures in the README and in the card: train the sample subject and four held-out ones, and draw them.

    python demo/pictures.py    # -> demo/dreambooth.png, demo/held_out.png

Everything is made by the program's own commands with its defaults (but 100 class images for held-out subjects), seeds 0
and up; nothing is selected.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

DEMO = Path(__file__).resolve().parent
HELD_OUT = ["robot-t", "backpack-n", "duck-n", "teapot-n"]
GAP = 6


def program(*flags):
    subprocess.run([sys.executable, DEMO.parent / "dreambooth_implementation.py", *map(str, flags)], check=True)


def teach(photos, folder, *flags):
    """Train on a folder of photos; (identifier, class noun)."""
    if not (folder / "dreambooth.json").exists():
        program("--train", "--model_name", DEMO / "model", "--instance_data_dir", photos, "--output_dir", folder,
                "--class_data_dir", folder.parent / "class_images", "--overwrite", *flags)
    subject = json.loads((folder / "dreambooth.json").read_text())["subjects"][0]
    return subject["identifier"], subject["class_prompt"].split(maxsplit=1)[1]


def draw(folder, prompts, count):
    """{prompt: pictures} drawn by the model in `folder`, seeds 0 to count - 1."""
    with tempfile.TemporaryDirectory() as images:
        program("--infer", "--model_path", folder, "--num_images", count, "--image_dir", images,
                *(flag for prompt in prompts for flag in ("--prompt", prompt)))
        drawn = {}
        for prompt in prompts:
            name = prompt.replace(" ", "-")
            drawn[prompt] = [Image.open(Path(images) / f"{name}-{seed}.png").convert("RGB") for seed in range(count)]
    return drawn


def photos_of(folder):
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]


def sheet(rows, side, path):
    """Rows of (label, pictures); a row without a label stands close to the one above."""
    font = ImageFont.load_default(15)
    label = 24
    width = max(len(pictures) for _, pictures in rows) * (side + GAP) + GAP
    height = sum(side + GAP + (label if text else 0) for text, _ in rows) + GAP
    image = Image.new("RGB", (width, height), "white")
    y = GAP
    for text, pictures in rows:
        if text:
            ImageDraw.Draw(image).text((GAP + 2, y), text, "black", font=font)
            y += label
        for column, picture in enumerate(pictures):
            box = (GAP + column * (side + GAP), y)
            image.paste(picture.resize((side, side), Image.Resampling.LANCZOS), box)
        y += side + GAP
    image.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=DEMO / "work" / "pictures", help="where the trained models go")
    args = parser.parse_args()

    samples = DEMO.parent / "instance_images"
    word, noun = teach(samples, args.work / "sample")
    prompts = [f"a {word} {noun} {place}" for place in ("on the moon", "in the snow", "on the beach")]
    drawn = draw(args.work / "sample", [*prompts, f"a {noun} on the moon"], 5)
    rows = [("the five photos", photos_of(samples))]
    rows += [(f'"{prompt}"' + ("" if word in prompt else ": other dogs"), pictures) for prompt, pictures in drawn.items()]
    sheet(rows, 128, DEMO / "dreambooth.png")

    rows = [("one of five; then with the identifier: anywhere, on the moon; then the class without it", [])]
    for name in HELD_OUT:
        word, noun = teach(DEMO / "subjects" / name, args.work / name, "--num_class_images", 100)
        drawn = draw(args.work / name, [f"a {word} {noun}", f"a {word} {noun} on the moon", f"a {noun}"], 3)
        rows.append(("", [photos_of(DEMO / "subjects" / name)[0], *(p for pictures in drawn.values() for p in pictures)]))
    rows[0] = (rows[0][0], rows[1][1])
    del rows[1]
    sheet(rows, 96, DEMO / "held_out.png")


if __name__ == "__main__":
    main()

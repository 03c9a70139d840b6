"""Measure the metrics themselves, on pictures of the bundled model's world whose answer is known.

    python benchmarks/known_answers.py        needs what demo/requirements.txt names, and npm

The best that can be: the artist's own drawing of each held-out subject, in the place and colour that each of the 25 prompts asks
for, painted as the pictures in demo/subjects were; and the same through the model's autoencoder, by which all that it draws has to
come. What such pictures score is what a training can reach at most; to score higher, it would have to draw something else.

Shape without colour: how near the photos a subject's own drawing is, as it is and in five other colours, beside the other drawings of
its class, when DINO sees all of them in colour, in grey, or in other forms without colour. A form tells shape if the recoloured
drawing is nearer than others of the class: in an area under the curve of 1, where 0.5 is chance.
"""

import argparse
import json
import random
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from compare_methods import PROMPTS, prompts_that_keep
from methods import COMPARED, REPOSITORY, SUBJECTS
from PIL import Image, ImageOps

sys.path.insert(0, str(REPOSITORY / "demo"))
import world

import dreambooth_implementation as db

PACKAGE_OF = {artist: package for package, artist in reversed(world.ARTISTS.items())}
FORMS = {
    "colour": lambda picture: picture,
    "grey": lambda picture: picture.convert("L").convert("RGB"),
    "grey, stretched": lambda picture: ImageOps.autocontrast(picture.convert("L")).convert("RGB"),
    "grey, evened out": lambda picture: ImageOps.equalize(picture.convert("L")).convert("RGB"),
    "brightest channel": lambda picture: picture.convert("HSV").getchannel("V").convert("RGB"),
}
LINES = PROMPTS.read_text(encoding="utf-8").splitlines()
OTHER_COLOURS = [line.split()[1] for line, keeps in zip(LINES, prompts_that_keep()) if not keeps]


def painted(rng, drawing, place="", colour=None):
    """A picture of a drawing in a place, or anywhere, and in a colour."""
    if colour:
        drawing = world.recolour(drawing, world.jitter(rng, world.COLOURS[colour]))
    anywhere = [*world.SCENES, *(name for name, own in world.BACKGROUNDS.items() if own != colour)]
    return world.halve(world.compose(rng, drawing, place or rng.choice(anywhere)))


def as_asked(drawing, noun, number, count):
    """(captions, `count` pictures of a drawing for each) of the 25 prompts."""
    captions, pictures = [], []
    for line in LINES:
        caption = line.replace("[identifier] ", "").replace("[class]", noun)
        colour, place = line.split()[1], line.split("[class]")[1].strip()
        rng = random.Random(f"{number} {caption}")
        pictures += [painted(rng, drawing, place, None if colour == "[identifier]" else colour) for _ in range(count)]
        captions.append(caption)
    return captions, pictures


def decoded(pictures, vae):
    """Pictures as an autoencoder gives them back."""
    with torch.no_grad():
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 127.5 - 1
        pixels = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    array = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(row) for row in array]


def scores(metrics, real, captions, pictures):
    """The scores of evaluation.json, and those of the prompts that leave the subject as it is and of the others."""
    count, texts, drawn = len(pictures) // len(captions), metrics.texts(captions), metrics.images(pictures)
    rows = [db.prompt_scores([part[count * n:count * (n + 1)] for part in drawn], real, texts[n:n + 1], texts[n:n + 1])
            for n in range(len(captions))]
    keeps = prompts_that_keep()
    kept, others = (db.mean_scores([row for row, keep in zip(rows, keeps) if keep == wanted]) for wanted in (True, False))
    return db.mean_scores(rows) | {"dino_as_is": kept["dino"], "clip_t_as_is": kept["clip_t"], "clip_t_recoloured": others["clip_t"]}


def area(near, far):
    """How often one of `near` [N] is above one of `far` [M]."""
    return (torch.searchsorted(far.sort().values, near.contiguous()) / len(far)).mean().item()


def shape_scores(metrics, form, photos, own, recoloured, others, others_recoloured):
    """What DINO says of pictures in a form: mean cosine with the photos, and the areas under the curve."""
    def seen(pictures):
        return metrics.images([form(picture) for picture in pictures])[0]
    real = seen(photos)
    near = [(seen(pictures) @ real.T).mean(1) for pictures in (own, recoloured, others, others_recoloured)]
    names = ("own", "own, recoloured", "others", "others, recoloured")
    return {name: values.mean().item() for name, values in zip(names, near)} | {
        "area: own above others": area(near[0], near[2]), "area: recoloured above others": area(near[1], near[2]),
        "area: recoloured above others recoloured": area(near[1], near[3])}


def measure(metrics, vae, subject, number, count):
    """{what was measured: scores} of a held-out subject."""
    noun, icon, artist = subject
    drawing, rng = world.render(PACKAGE_OF[artist], icon), random.Random(number)
    photos = [db.load_square(path) for path in sorted((SUBJECTS / f"{icon}-{artist}").glob("*.png"))]
    captions, pictures = as_asked(drawing, noun, number, count)
    real = metrics.images(photos)
    row = {"as asked": scores(metrics, real, captions, pictures), "through the autoencoder": scores(
        metrics, real, captions, decoded(pictures, vae))}
    others = [world.render(*other) for other in world.training_drawings()[noun]]
    groups = [[painted(rng, each, "", colour) for each in drawings for colour in colours for _ in range(many)]
              for drawings, colours, many in (([drawing], [None], 20), ([drawing], OTHER_COLOURS, 4), (others, [None], 5),
                                              (others, OTHER_COLOURS, 1))]
    return row | {form: shape_scores(metrics, how, photos, *groups) for form, how in FORMS.items()}


def table(rows, names, keys):
    """A Markdown table of means over subjects."""
    lines = [f"| | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(f"{statistics.mean(row[name][key] for row in rows):.3f}" for key in keys) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=int, default=8, help="of each prompt")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results" / "known_answers.json")
    args = parser.parse_args()
    metrics = db.load_metrics(*(str(db.BUNDLED_METRICS[part]) for part in ("dino", "clip")), "cpu")
    vae = db.load_pipeline(str(db.BUNDLED_MODEL), torch.float32).vae
    found = {f"{subject[1]}-{subject[2]}": measure(metrics, vae, subject, number, args.pictures)
             for number, subject in enumerate(world.HELD_OUT)}
    args.results.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for title, names in (("the six", COMPARED), ("the seven", [name for name in found if name not in COMPARED])):
        rows = [found[name] for name in names]
        print(title, table(rows, ("as asked", "through the autoencoder"), list(rows[0]["as asked"])), "", sep="\n")
    print(table(list(found.values()), list(FORMS), list(found["robot-t"]["grey"])))


if __name__ == "__main__":
    main()

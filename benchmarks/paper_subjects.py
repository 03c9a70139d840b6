"""Teach every subject of the paper's dataset; tabulate losses and times, and draw each.

    python benchmarks/paper_subjects.py --dataset PATH/TO/dreambooth/dataset --model_name demo/model

The dataset (github.com/google/dreambooth) is one folder of photos per subject and prompts_and_classes.txt, which tells each
subject's class. Results go to --output_dir: a model folder per subject, paper_subjects.md and paper_subjects.png. Flags this
script does not know are passed on to --train.
"""

import argparse
import json
from pathlib import Path

from methods import program

from dreambooth.data.views import photo_square
from dreambooth.images import image_grid, load_image
from dreambooth.subjects.photos import list_images

PROMPTS = {"a [identifier] {}": 2, "a [identifier] {} on the moon": 3, "a {}": 3}  # and how many pictures of each
COLUMNS = ["subject", "class", "photos", "instance loss, first 100 steps", "last 100", "prior loss, first 100", "last 100",
           "preparing, s", "training, s"]


def class_nouns(dataset):
    """{subject: class noun} from the dataset's prompts_and_classes.txt."""
    text = next(p for p in (dataset / "prompts_and_classes.txt", dataset.parent / "prompts_and_classes.txt") if p.exists()).read_text()
    rows = (line.strip().split(",") for line in text.split("Prompts")[0].splitlines() if "," in line)
    return {subject: noun for subject, noun in rows if subject != "subject_name"}


def table_row(subject, noun, photos, record):
    first, last, seconds = record["loss"]["first_100_steps"], record["loss"]["last_100_steps"], record["seconds"]
    losses = [first["instance"], last["instance"], first["prior"], last["prior"]]
    cells = [subject, noun, photos, *(f"{loss:.4f}" for loss in losses), *(f"{seconds[part]:.0f}" for part in ("preparing", "training"))]
    return f"| {' | '.join(map(str, cells))} |"


def draw(model, noun):
    """Pictures of a trained model, as many of each prompt as PROMPTS say."""
    images = model / "images"
    for prompt, count in PROMPTS.items():
        program("--infer", "--model_path", model, "--image_dir", images, "--prompt", prompt.format(noun), "--num_images", count)
    by_age = sorted((path for path in images.glob("*.png") if not path.name.startswith("grid-")), key=lambda path: path.stat().st_mtime_ns)
    return [load_image(path) for path in by_age]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("output-paper-subjects"))
    args, passed_on = parser.parse_known_args()
    args.dataset, args.output_dir = args.dataset.resolve(), args.output_dir.resolve()

    table, pictures = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"], []
    for subject, noun in class_nouns(args.dataset).items():
        if not (folder := args.dataset / subject).is_dir():
            continue
        model = args.output_dir / subject
        program("--train", "--instance_data_dir", folder, "--class_prompt", f"a {noun}", "--output_dir", model, "--overwrite", *passed_on)
        photos = list_images(folder, "--dataset")
        table.append(table_row(subject, noun, len(photos), json.loads((model / "dreambooth.json").read_text())))
        drawn = draw(model, noun)
        pictures += [photo_square(photos[0]).resize(drawn[0].size), *drawn]
        (args.output_dir / "paper_subjects.md").write_text("\n".join(table) + "\n")
        image_grid(pictures, columns=1 + len(drawn)).save(args.output_dir / "paper_subjects.png")
    print("\n".join(table))


if __name__ == "__main__":
    main()

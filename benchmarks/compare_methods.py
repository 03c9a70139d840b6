"""Teach held-out subjects with every method and measure each with the paper's metrics.

    python benchmarks/compare_methods.py

Every run is a --train and an --evaluate of the program. Each finished run is entered at once in
benchmarks/results/compare_methods.json, and a run that is there already is skipped: after an interruption, start it again.
The table is printed, the plot lies beside the JSON. Flags this script does not know are passed on to --train.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
from pathlib import Path

from methods import COMPARED, REPOSITORY, SUBJECTS, program
from PIL import Image, ImageDraw, ImageFont

PROMPTS = REPOSITORY / "demo" / "prompts.txt"
VARIANTS = {
    "base model": None,  # untrained, and prompted without the identifier
    "full": [],
    "full, text encoder": ["--train_text_encoder"],
    "full, no prior": ["--no-with_prior_preservation"],
    "lora": ["--method", "lora"],
    "textual_inversion": ["--method", "textual_inversion"],
    "pivotal": ["--method", "pivotal"],
}
COLUMNS = {"dino": "DINO", "dino_as_is": "DINO, as it is", "share": "of the photos'", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "pres": "PRES", "div": "DIV", "div_dino": "DIV_DINO",
           "seconds": "training", "MB": "file"}
DIGITS = {"share": "{:.0%}", "seconds": "{:.0f} s", "MB": "{:.2g} MB"}  # else three
NOT_PLOTTED = ("share", "dino", "MB")


def train(args, subject, flags, seed, model):
    """Train a variant into the folder `model`; (seconds of training, MB of weights)."""
    program("--train", "--model_name", args.model_name, "--instance_data_dir", SUBJECTS / subject, "--seed", seed,
            "--num_class_images", 100, "--class_data_dir", args.output_dir / "class_images", "--output_dir", model,
            "--num_inference_steps", 1, "--overwrite", *flags, *args.passed_on)  # few steps for samples that nobody looks at
    record = json.loads((model / "dreambooth.json").read_text())
    files = [path for path in model.rglob("*.safetensors") if "kohya" not in path.name and "checkpoints" not in path.parts]
    size = sum(path.stat().st_size for path in files)
    return record["seconds"]["training"], size / 1e6


def measure(args, subject, variant, seed):
    """Train and evaluate one variant; its row of results."""
    folder = args.output_dir / f"{subject}-{variant}-{seed}".replace(", ", "-").replace(" ", "-")
    model, row = folder / "model", {"subject": subject, "variant": variant, "seed": seed, "seconds": None, "MB": None}
    if VARIANTS[variant] is None:
        model = args.model_name
    else:
        row["seconds"], row["MB"] = train(args, subject, VARIANTS[variant], seed, model)
    program("--evaluate", "--model_path", model, "--instance_data_dir", SUBJECTS / subject, "--seed", seed,
            "--num_images", args.num_images, "--num_inference_steps", args.num_inference_steps, "--eval_dir", folder)
    (result,) = json.loads((folder / "evaluation.json").read_text())["models"]
    (entry,) = result["subjects"]
    shutil.rmtree(folder / "model", ignore_errors=True)
    real = {f"real_{score}": entry["real"][score] for score in ("dino", "clip_i")}
    prompts = {each["caption"]: each["scores"]["dino"] for each in entry["prompts"]}
    return row | result["scores"] | real | {"dino_by_prompt": prompts}


def read_results(path, settings):
    """What the JSON holds of these settings; a new record where there is none."""
    if not path.is_file():
        return {"settings": settings, "runs": []}
    results = json.loads(path.read_text())
    if results["settings"] != settings:
        raise SystemExit(f"{path} holds runs of other settings, {results['settings']}; give another --results")
    return results


def write_results(path, results):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results | {"date": datetime.date.today().isoformat()}, indent=2) + "\n")
    os.replace(part, path)


def with_shares(run):
    """A run with its DINO by the prompts that leave the subject as it is, and how much of the photos' own DINO that is.

    The other prompts give it another colour, and then its looks are not to be kept.
    """
    keeps = [line.startswith("a [identifier] [class]") for line in PROMPTS.read_text().splitlines()]
    kept = [dino for dino, keep in zip(run["dino_by_prompt"].values(), keeps) if keep]
    as_is = statistics.mean(kept)
    return run | {"dino_as_is": as_is, "share": as_is / run["real_dino"], "real_dino_as_is": run["real_dino"]}


def mean_and_deviation(runs, column):
    """(mean, standard deviation) over the runs; deviation 0 for one run, None where a run has no value."""
    values = [run[column] for run in runs]
    if not values or None in values:
        return None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def by_variant(runs):
    """{variant: its runs}, in the order of VARIANTS."""
    groups = {variant: [run for run in runs if run["variant"] == variant] for variant in VARIANTS}
    return {variant: group for variant, group in groups.items() if group}


def table(runs):
    """A Markdown table: mean +- standard deviation of every variant, and the real photos above."""
    lines = [f"| method | runs | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 2) + "|"]
    photos = list({run["subject"]: run for run in runs}.values())
    rows = [("real photos", photos, "real_")] + [(variant, group, "") for variant, group in by_variant(runs).items()]
    for name, group, prefix in rows:
        cells = []
        for column in COLUMNS:
            value = mean_and_deviation(group, prefix + column) if prefix + column in group[0] else None
            form = DIGITS.get(column, "{:.3f}")
            cells.append("" if value is None else form.format(value[0]) + (
                "" if column == "MB" else f" ± {form.format(value[1])}"))
        lines.append(f"| {name} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_plot(runs, path):
    """Bars of the mean with a line for the deviation, a panel for each score; a dotted line for the real photos."""
    groups = by_variant(runs)
    scores = [score for score in COLUMNS if score not in NOT_PLOTTED and all(mean_and_deviation(group, score) for group in groups.values())]
    label, width, bar, head = 150, 200, 22, 26
    image = Image.new("RGB", (label + len(scores) * (width + 20), head + len(groups) * bar + 8), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for row, name in enumerate(groups):
        pen.text((6, head + row * bar + 2), name, "black", font)
    for panel, score in enumerate(scores):
        left = label + panel * (width + 20)
        values = [mean_and_deviation(group, score) for group in groups.values()]
        real = mean_and_deviation(runs, f"real_{score}") if f"real_{score}" in runs[0] else None
        scale = (width - 44) / max(0.01, *(mean + deviation for mean, deviation in values), real[0] if real else 0)
        pen.text((left, 6), COLUMNS[score], "black", font)
        for row, (mean, deviation) in enumerate(values):
            top, end = head + row * bar, left + max(mean, 0) * scale
            pen.rectangle((left, top + 2, end, top + bar - 6), "#7aa6d8")
            middle = top + bar // 2 - 2
            pen.line((end - deviation * scale, middle, end + deviation * scale, middle), "#224466", 2)
            pen.text((left + width - 36, top + 2), f"{mean:.2f}", "black", font)
        if real:
            for y in range(head, head + len(groups) * bar, 6):
                pen.line((left + real[0] * scale, y, left + real[0] * scale, y + 2), "black")
    image.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--subjects", nargs="+", metavar="FOLDER", default=COMPARED)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT",
                        help=", ".join(VARIANTS))
    parser.add_argument("--num_images", type=int, default=4, help="pictures of each prompt")
    parser.add_argument("--num_inference_steps", type=int, default=30)
    parser.add_argument("--model_name", default="demo/model")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results" / "compare_methods.json")
    parser.add_argument("--output_dir", type=Path, default=Path("output-compare"),
                        help="for the pictures, and each model until it is measured")
    args, args.passed_on = parser.parse_known_args()
    args.output_dir, args.results = args.output_dir.resolve(), args.results.resolve()
    results = read_results(args.results, {
        "model": args.model_name, "num_images": args.num_images, "num_inference_steps": args.num_inference_steps,
        "train_flags": args.passed_on})
    done = {(run["subject"], run["variant"], run["seed"]) for run in results["runs"]}
    for seed in args.seeds:  # a whole round of subjects first: an unfinished comparison is a balanced one
        for subject in args.subjects:
            for variant in args.variants:
                if (subject, variant, seed) not in done:
                    results["runs"].append(measure(args, subject, variant, seed))
                    write_results(args.results, results)
    runs = [with_shares(run) for run in results["runs"]]
    print(table(runs))
    draw_plot(runs, args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()

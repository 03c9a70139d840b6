"""Teach held-out subjects with every variant of a training, and measure each with the paper's metrics.

    python benchmarks/compare_methods.py                                      the methods, as docs/results.md has them
    python benchmarks/compare_methods.py --round first --variants full lora --variant "rank 4=--method lora --rank 4"
    python benchmarks/compare_methods.py --round choice --variants full --variant "fewer=--steps 1200" --against full
    python benchmarks/compare_methods.py --round choice --variants full --variant "frozen=--prior frozen" --against full
    python benchmarks/compare_methods.py --round choice --variants lora --variant "lokr=--method lora --adapter_type lokr" --against lora
    python benchmarks/compare_methods.py --round final --variants full lora
    python benchmarks/compare_methods.py --variants lora --variant "begun=--method lora --subject_start 0.2" --keep_models --against lora

A variant is a name and the flags of its training, and of drawing with it. `--round first` is cheap, two subjects, one seed and a
picture of each prompt, and throws out what is hopeless; `choice` has six subjects and two seeds; `final` has the seven subjects that
no choice was made by. All variants of a round share subjects, seeds, class images and prompts, so that they are compared in pairs:
beside the table of means stand the mean differences from `--against` with their standard errors.

Each finished run is entered at once in benchmarks/results/compare_*.json, and a run that is there already is skipped: after an
interruption, start it again. Start it several times to share the runs among processes. Flags this script does not know are passed
on to --train. The tables are printed, the plot lies beside the JSON.
"""

import argparse
import datetime
import json
import os
import shlex
import shutil
import statistics
from pathlib import Path

from filelock import FileLock, Timeout
from methods import COMPARED, REPOSITORY, SUBJECTS, program
from PIL import Image, ImageDraw, ImageFont

PROMPTS = REPOSITORY / "demo" / "prompts.txt"
RESULTS = REPOSITORY / "benchmarks" / "results"
KEPT_OUT = [path.name for path in sorted(SUBJECTS.iterdir()) if path.is_dir() and path.name not in COMPARED]  # of every choice
ROUNDS = {  # subjects, seeds, pictures of a prompt, file of results
    "first": (["backpack-n", "cat-n"], [0], 1, "compare_first.json"),
    "choice": (COMPARED, [0, 1], 4, "compare_methods.json"),
    "final": (KEPT_OUT, [0, 1], 4, "compare_final.json"),
}
VARIANTS = {
    "base model": None,  # untrained, and prompted without the identifier
    "full": [],
    "full, text encoder": ["--train_text_encoder"],
    "full, no prior": ["--no-with_prior_preservation"],
    "lora": ["--method", "lora"],
    "textual_inversion": ["--method", "textual_inversion"],
    "pivotal": ["--method", "pivotal"],
}
COLUMNS = {"dino": "DINO", "dino_as_is": "DINO, as it is", "share": "of the photos'", "clip_i": "CLIP-I", "clip_t": "CLIP-T",
           "pres": "PRES", "div": "DIV", "div_dino": "DIV_DINO", "seconds": "training", "MB": "file"}
PAIRED = ("dino_as_is", "clip_t", "pres", "div_dino")
DIGITS = {"share": "{:.0%}", "seconds": "{:.0f} s", "MB": "{:.2g} MB"}  # else three
DRAWING_FLAGS = ("--subject_start", "--guidance_scale")  # of a variant that --evaluate gets and --train does not, each with a value
NOT_PLOTTED = ("share", "dino", "MB")


def prompts_that_keep():
    """[whether a prompt leaves the subject as it is, rather than in another colour] of the bundled world's prompts."""
    return [line.startswith("a [identifier] [class]") for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


def divided(flags):
    """(flags of training, flags of drawing) of a variant."""
    places = {place for n, flag in enumerate(flags) if flag in DRAWING_FLAGS for place in (n, n + 1)}
    return [flag for n, flag in enumerate(flags) if n not in places], [flag for n, flag in enumerate(flags) if n in places]


def train(args, subject, flags, seed, model):
    """Train a variant into the folder `model`, unless it was kept there; (seconds of training, MB of weights)."""
    model.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{model}.lock"):
        if not all((model / name).is_file() for name in ("dreambooth.json", "README.md")):
            train_anew(args, subject, flags, seed, model)
    record = json.loads((model / "dreambooth.json").read_text(encoding="utf-8"))
    files = [path for path in model.rglob("*.safetensors") if "kohya" not in path.name and "checkpoints" not in path.parts]
    return record["seconds"]["training"], sum(path.stat().st_size for path in files) / 1e6


def train_anew(args, subject, flags, seed, model):
    program("--train", "--model_name", args.model_name, "--instance_data_dir", args.photos / subject, "--seed", seed,
            "--num_class_images", 100, "--class_data_dir", args.output_dir / "class_images", "--output_dir", model,
            "--num_inference_steps", 1, "--overwrite", *flags, *args.passed_on)  # few steps for samples that nobody looks at


def measure(args, subject, variant, seed, folder):
    """Train and evaluate one variant in `folder`; its row of results."""
    training, drawing = divided(args.flags_of[variant] or [])
    kept = args.output_dir / "models" / "-".join([subject, *(word.strip("-") for word in training), str(seed)]).replace("/", "-")
    model = kept if args.keep_models else folder / "model"
    row = {"subject": subject, "variant": variant, "seed": seed, "seconds": None, "MB": None}
    if args.flags_of[variant] is None:
        model = args.model_name
    else:
        row["seconds"], row["MB"] = train(args, subject, training, seed, model)
    program("--evaluate", "--model_path", model, "--instance_data_dir", SUBJECTS / subject, "--seed", seed, "--num_images",
            args.num_images, "--num_inference_steps", args.num_inference_steps, "--eval_dir", folder, *drawing)
    (result,) = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["models"]
    (entry,) = result["subjects"]
    shutil.rmtree(folder / "model", ignore_errors=True)
    real = {f"real_{score}": entry["real"][score] for score in ("dino", "clip_i")}
    return row | result["scores"] | real | {"by_prompt": {each["prompt"]: each["scores"] for each in entry["prompts"]}}


def read_results(args):
    """What the file holds of these settings and variants; a new record where there is none."""
    settings = {"model": args.model_name, "num_images": args.num_images, "num_inference_steps": args.num_inference_steps,
                "train_flags": args.passed_on}
    if not args.results.is_file():
        return {"settings": settings, "variants": {}, "runs": []}
    results = {"variants": {}} | json.loads(args.results.read_text(encoding="utf-8"))
    if results["settings"] != settings:
        raise SystemExit(f"{args.results} holds runs of other settings, {results['settings']}; give another --results")
    for name, flags in results["variants"].items():
        if flags != args.flags_of.get(name, flags):
            raise SystemExit(f'{args.results} holds runs of "{name}" with the flags {flags}; give the variant another name')
    return results


def enter(args, row):
    """Add a finished run to the file, which other processes may be writing to as well."""
    with FileLock(f"{args.results}.lock"):
        results = read_results(args)
        results["runs"].append(row)
        results["variants"][row["variant"]] = args.flags_of[row["variant"]]
        args.results.parent.mkdir(parents=True, exist_ok=True)
        part = args.results.with_suffix(".part")
        part.write_text(json.dumps(results | {"date": datetime.date.today().isoformat()}, indent=2) + "\n", encoding="utf-8")
        os.replace(part, args.results)


def done(args):
    """The runs that need not be made again."""
    return {(run["subject"], run["variant"], run["seed"]) for run in read_results(args)["runs"]}


def make_runs(args):
    """Make every run that is neither in the file nor under way in another process."""
    for seed in args.seeds:  # a whole round of subjects first: an unfinished comparison is a balanced one
        for subject in args.subjects:
            for variant in args.variants:
                folder = args.output_dir / f"{subject}-{variant}-{seed}".replace(", ", "-").replace(" ", "-")
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    with FileLock(folder / ".lock", timeout=0):  # the system lets go of it if the process is killed
                        if (subject, variant, seed) not in done(args):
                            enter(args, measure(args, subject, variant, seed, folder))
                except Timeout:
                    pass


def with_shares(run):
    """A run with its DINO by the prompts that leave the subject as it is, and how much of the photos' own DINO that is.

    The other prompts give it another colour, and then its looks are not to be kept.
    """
    dino = run["dino_by_prompt"] if "dino_by_prompt" in run else {name: row["dino"] for name, row in run["by_prompt"].items()}
    keeps = prompts_that_keep()
    kept = list(dino.values()) if len(dino) != len(keeps) else [value for value, keep in zip(dino.values(), keeps) if keep]
    as_is = statistics.mean(kept)
    return run | {"dino_as_is": as_is, "share": as_is / run["real_dino"], "real_dino_as_is": run["real_dino"]}


def paired_differences(runs, against):
    """{variant: {score: (mean difference from the variant `against`, its standard error or None, pairs)}}, each of the same
    subject and seed."""
    by_key = {}
    for run in runs:
        by_key.setdefault(run["variant"], {})[run["subject"], run["seed"]] = run
    reference, rows = by_key.get(against, {}), {}
    for variant, own in by_key.items():
        pairs = [(own[key], reference[key]) for key in own if key in reference and variant != against]
        for score in PAIRED if pairs else ():
            differences = [a[score] - b[score] for a, b in pairs if None not in (a[score], b[score])]
            if differences:
                error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
                rows.setdefault(variant, {})[score] = statistics.mean(differences), error, len(differences)
    return rows


def difference_table(runs, against):
    """A Markdown table of the differences: mean ± standard error."""
    lines = [f"| less {against} | pairs | {' | '.join(COLUMNS[score] for score in PAIRED)} |", "|---" * (len(PAIRED) + 2) + "|"]
    for variant, row in paired_differences(runs, against).items():
        cells = [f"{row[score][0]:+.3f}" + ("" if row[score][1] is None else f" ± {row[score][1]:.3f}") if score in row else ""
                 for score in PAIRED]
        lines.append(f"| {variant} | {max(pairs for _, _, pairs in row.values())} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_and_deviation(runs, column):
    """(mean, standard deviation) over the runs; deviation 0 for one run, None where a run has no value."""
    values = [run[column] for run in runs]
    if not values or None in values:
        return None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def by_variant(runs):
    """{variant: its runs}, in the order of VARIANTS, then as they came."""
    names = dict.fromkeys([*VARIANTS, *(run["variant"] for run in runs)])
    groups = {variant: [run for run in runs if run["variant"] == variant] for variant in names}
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
    scores = [score for score in COLUMNS
              if score not in NOT_PLOTTED and all(mean_and_deviation(group, score) for group in groups.values())]
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


def draw_frontier(runs, path, size=(900, 600), margin=60):
    """DINO of the subject as it is against CLIP-T, a point for each variant but those that are nowhere near the best: up and to
    the right is better."""
    points = {name: [mean_and_deviation(group, score)[0] for score in ("clip_t", "dino_as_is")]
              for name, group in by_variant(runs).items()}
    best = max(dino for _, dino in points.values())
    points = {name: point for name, point in points.items() if point[1] > 0.8 * best}
    image, font = Image.new("RGB", size, "white"), ImageFont.load_default(13)
    pen = ImageDraw.Draw(image)
    (left, right), (low, high) = ((min(values) - 0.005, max(values) + 0.005) for values in zip(*points.values()))
    pen.rectangle((margin, margin, size[0] - margin, size[1] - margin), outline="#cccccc")
    for text, place, anchor in ((f"{low:.3f}", (margin - 4, size[1] - margin), "rs"), (f"{high:.3f}", (margin - 4, margin), "rt"),
                                ("DINO", (margin - 4, size[1] // 2), "rm"), (f"{left:.3f}", (margin, size[1] - margin + 4), "lt"),
                                (f"{right:.3f}", (size[0] - margin, size[1] - margin + 4), "rt"),
                                ("CLIP-T", (size[0] // 2, size[1] - margin + 4), "mt")):
        pen.text(place, text, "black", font, anchor=anchor)
    taken = []  # boxes of labels, none of which may lie on another
    for name, (clip_t, dino) in sorted(points.items(), key=lambda item: item[1]):
        x = margin + (clip_t - left) / (right - left) * (size[0] - 2 * margin)
        y = size[1] - margin - (dino - low) / (high - low) * (size[1] - 2 * margin)
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill="#1f77b4")
        is_right = x > size[0] * 0.7
        for aside in (0, 14, -14, 28, -28):
            place = (x - 8 if is_right else x + 8, y + aside), name, "black", font, "rm" if is_right else "lm"
            box = pen.textbbox(place[0], name, font, place[4])
            if not any(box[0] < after and before < box[2] and box[1] < below and above < box[3] for before, above, after, below in taken):
                break
        taken.append(box)
        pen.text(*place)
    image.save(path)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--round", choices=ROUNDS, default="choice", help="which subjects, seeds and prompts")
    parser.add_argument("--subjects", nargs="+", metavar="FOLDER", help="instead of the round's")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the round's")
    parser.add_argument("--photos", type=Path, default=SUBJECTS,
                        help="folder with a folder of photos to learn for each subject; they are measured against demo/subjects")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, metavar="VARIANT",
                        help=f"{', '.join(VARIANTS)}; all of them unless --variant is given")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=FLAGS", help="one more; repeatable")
    parser.add_argument("--against", default="full", help="the variant that the others are compared with in pairs")
    parser.add_argument("--num_images", type=int, help="pictures of each prompt, instead of the round's")
    parser.add_argument("--num_inference_steps", type=int, default=30)
    parser.add_argument("--model_name", default="demo/model")
    parser.add_argument("--results", type=Path, help="file of results, instead of the round's")
    parser.add_argument("--keep_models", action="store_true",
                        help="keep trained models in --output_dir; variants that differ in drawing alone are measured on the same")
    parser.add_argument("--output_dir", type=Path, default=Path("output-compare"),
                        help="for the pictures, and each model until it is measured")
    args, args.passed_on = parser.parse_known_args()
    subjects, seeds, num_images, file = ROUNDS[args.round]
    own = dict(text.partition("=")[::2] for text in args.variant)
    args.flags_of = VARIANTS | {name: shlex.split(flags) for name, flags in own.items()}
    args.variants = [*(args.variants if args.variants is not None else [] if own else VARIANTS), *own]
    args.subjects, args.seeds, args.num_images = args.subjects or subjects, args.seeds or seeds, args.num_images or num_images
    args.output_dir, args.results = args.output_dir.resolve() / args.round, (args.results or RESULTS / file).resolve()
    args.photos = args.photos.resolve()
    return args


def main():
    args = parse_arguments()
    make_runs(args)
    runs = [with_shares(run) for run in read_results(args)["runs"]]
    print(table(runs))
    print("", difference_table(runs, args.against), sep="\n")
    draw_plot(runs, args.results.with_suffix(".png"))
    draw_frontier(runs, args.results.with_name(f"{args.results.stem}_frontier.png"))


if __name__ == "__main__":
    main()

"""Does --select_best find better weights than the default steps give? For each held-out subject, in the same samples.

    python benchmarks/select_best.py

Three times the default's steps with ten checkpoints, against the default's last step, scored in the same way. The table is
printed and written with the raw scores to benchmarks/results/select_best.json.
"""

import argparse
import datetime
import json
import re
from pathlib import Path

from methods import COMPARED, REPOSITORY, SUBJECTS, program

from dreambooth.models.families.stable_diffusion import SmallStableDiffusion

ROW = re.compile(r" *(\d+) +([\d.]+) +([\d.]+) +([\d.]+)  \w+")
RECIPE = SmallStableDiffusion.recipes["full"]
# What the program decides by itself without --select_best, which has a schedule of its own.
DEFAULT = ["--lr_scheduler", RECIPE.lr_scheduler, "--no-use_ema"]


def curve(subject, steps, every, args, *flags):
    """[{"step", "dino", "clip_t", "score"}] of a training with --select_best."""
    output, _, _ = program("--train", "--model_name", "demo/model", "--instance_data_dir", SUBJECTS / subject, "--num_class_images",
                           100, "--class_data_dir", args.output_dir / "class_images", "--steps", steps, "--validation_steps",
                           every, "--select_best", "--checkpointing_steps", 0, "--output_dir", args.output_dir / subject,
                           "--overwrite", *flags)
    rows = [match.groups() for line in output.splitlines() if (match := ROW.match(line))]
    return [{"step": int(step), **{k: float(v) for k, v in zip(("dino", "clip_t", "score"), row)}} for step, *row in rows]


def table(subjects):
    """A Markdown table of {subject: {"default": curve, "best": curve}}."""
    lines = ["| subject | default: DINO, CLIP-T, mean | best of ten: DINO, CLIP-T, mean | at step |", "|---|---|---|---|"]
    for name, runs in subjects.items():
        default, best = (max(runs[which], key=lambda row: row["score"]) for which in ("default", "best"))
        cells = [f"{row['dino']:.3f}, {row['clip_t']:.3f}, **{row['score']:.3f}**" for row in (default, best)]
        lines.append(f"| {name} | {' | '.join(cells)} | {best['step']} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--subjects", nargs="+", metavar="FOLDER", default=COMPARED)
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help="of the default")
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "output-select-best")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results" / "select_best.json")
    args = parser.parse_args()
    args.output_dir = args.output_dir.resolve()
    subjects = {}
    for name in args.subjects:
        subjects[name] = {"default": curve(name, args.steps, args.steps, args, *DEFAULT),
                          "best": curve(name, 3 * args.steps, -(-3 * args.steps // 10), args)}
    args.results.write_text(json.dumps({"date": datetime.date.today().isoformat(), "subjects": subjects}, indent=1) + "\n")
    print(table(subjects))


if __name__ == "__main__":
    main()

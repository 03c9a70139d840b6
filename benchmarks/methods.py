"""Train one subject with every method, and two subjects of one class together; measure time, size and memory, and draw.

    python benchmarks/methods.py --output_dir output-methods

Results go to --output_dir: a folder for each run, methods.json, methods.md and methods.png. Flags this script does not know
are passed on to --train.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
SUBJECTS = REPOSITORY / "demo" / "subjects"
COMPARED = ["robot-t", "backpack-n", "duck-n", "teapot-n", "cat-n", "hiking-boot-t"]  # of these, where methods are measured
RUNS = {
    "full": [],
    "full, text encoder": ["--train_text_encoder"],
    "lora": ["--method", "lora"],
    "lora, text encoder": ["--method", "lora", "--train_text_encoder"],
    "textual_inversion": ["--method", "textual_inversion"],
    "pivotal": ["--method", "pivotal"],
}


def program(*flags):
    """Run the program; (its output, seconds, peak resident memory in MB)."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, REPOSITORY / "dreambooth_implementation.py", *map(str, flags)],
                               cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {flags}")
    return output, time.monotonic() - started, usage.ru_maxrss / 1024


def trained_weights(output):
    """How many weights --train said it trains."""
    return sum(int(line.split(", ")[1].split()[0].replace(",", "")) for line in output.splitlines() if line.startswith("Trains: "))


def measure(name, flags, prompts, folder):
    """Train into folder/NAME and draw `prompts` from it; the row of results."""
    model = folder / name.replace(", ", "-").replace(" ", "-")
    output, seconds, memory = program("--train", *flags, "--output_dir", model, "--overwrite")
    record = json.loads((model / "dreambooth.json").read_text())
    size = sum(p.stat().st_size for p in model.rglob("*.safetensors") if "kohya" not in p.name and "checkpoints" not in p.parts)
    program("--infer", "--model_path", model, "--image_dir", model / "images", "--num_images", 3,
            *(flag for prompt in prompts for flag in ("--prompt", prompt)))
    return {"method": name, "weights": trained_weights(output), "MB": size / 1e6, "steps": record["used"]["steps"],
            "seconds_per_step": record["seconds"]["training"] / record["used"]["steps"], "training_s": record["seconds"]["training"],
            "whole_s": seconds, "peak_rss_MB": memory, "loss": record["loss"]["last_100_steps"],
            "grid": str(next((model / "images").glob("grid-*.png")))}


def draw_sheet(rows, path):
    """All grids side by side, two to a row."""
    from PIL import Image, ImageDraw

    grids = [Image.open(row["grid"]) for row in rows]
    width, height, title = max(g.width for g in grids), max(g.height for g in grids), 16
    sheet = Image.new("RGB", (4 * (width + 8) - 8, -(-len(grids) // 4) * (height + title + 8)), "white")
    for i, (grid, row) in enumerate(zip(grids, rows)):
        x, y = i % 4 * (width + 8), i // 4 * (height + title + 8)
        ImageDraw.Draw(sheet).text((x + 2, y + 2), row["method"], "black")
        sheet.paste(grid, (x, y + title))
    sheet.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_name", default="demo/model")
    parser.add_argument("--subject", default="black-cat-f", help="folder of demo/subjects")
    parser.add_argument("--output_dir", type=Path, default=Path("output-methods"))
    args, passed_on = parser.parse_known_args()
    args.output_dir = args.output_dir.resolve()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    common, photos = ["--model_name", args.model_name, "--checkpointing_steps", 0, *passed_on], SUBJECTS / args.subject
    program("--train", *common, "--instance_data_dir", photos, "--steps", 1, "--output_dir",
            args.output_dir / "warm-up", "--overwrite")  # the class images, which all methods share

    noun = (photos / "class_prompt.txt").read_text().split(maxsplit=1)[1].strip()
    prompts = [f"a [identifier] {noun}", f"a [identifier] {noun} on the moon", f"a {noun}"]
    rows = [measure(name, [*common, "--instance_data_dir", photos, *flags], prompts, args.output_dir)
            for name, flags in RUNS.items()]
    for name, flags in (("two dogs, full", []), ("two dogs, full, text encoder", ["--train_text_encoder"]),
                        ("two dogs, lora, text encoder", RUNS["lora, text encoder"])):
        rows.append(measure(name, [*common, "--concepts", "demo/two_dogs.json", *flags],
                            ["a [identifier:poodle] dog on the beach", "a [identifier:guide] dog on the beach", "a dog"],
                            args.output_dir))
    (args.output_dir / "methods.json").write_text(json.dumps(
        {"date": datetime.date.today().isoformat(), "model": args.model_name,
         "runs": [{key: value for key, value in row.items() if key != "grid"} for row in rows]}, indent=2) + "\n")
    table = ["| method | trained weights | file | steps | s / step | training | whole run | peak memory | instance loss, last 100 | prior loss |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        prior = "" if row["loss"]["prior"] is None else f"{row['loss']['prior']:.4f}"
        table.append(f"| {row['method']} | {row['weights']:,} | {row['MB']:.2f} MB | {row['steps']} | {row['seconds_per_step']:.3f} | "
                     f"{row['training_s']:.0f} s | {row['whole_s']:.0f} s | {row['peak_rss_MB']:.0f} MB | "
                     f"{row['loss']['instance']:.4f} | {prior} |")
    (args.output_dir / "methods.md").write_text("\n".join(table) + "\n")
    draw_sheet(rows, args.output_dir / "methods.png")
    print("\n".join(table))


if __name__ == "__main__":
    main()

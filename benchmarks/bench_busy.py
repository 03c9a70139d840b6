"""A training step of the bundled model on a CPU that other programs use as well.

    python benchmarks/bench_busy.py --others 0 1 3

`--others` are how many programs do nothing but compute beside it. Each row is a training of --steps steps in a process of its own,
first as it is, then with the number of its threads fixed at all and at one, and with threads that sleep while they wait. Results
go to benchmarks/results/busy-cpu.json, and are printed as a table.
"""

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from methods import REPOSITORY, program

RESULTS = REPOSITORY / "benchmarks" / "results" / "busy-cpu.json"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
VARIANTS = {"as it is": {}, f"OMP_NUM_THREADS={CORES}": {"OMP_NUM_THREADS": str(CORES)},
            "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"}, "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}}


@contextlib.contextmanager
def busy(others):
    """So many programs at work while the block runs."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
    try:
        yield
    finally:
        for each in programs:
            each.kill()
            each.wait()


def seconds_per_step(steps, environment, folder):
    """The mean over a training, from its first step to its last."""
    before = dict(os.environ)
    os.environ |= environment
    try:
        program("--train", "--model_name", "demo", "--num_class_images", 4, "--num_inference_steps", 1, "--steps", steps,
                "--checkpointing_steps", 0, "--class_data_dir", folder / "class", "--output_dir", folder / "output", "--overwrite")
    finally:
        os.environ.clear()
        os.environ |= before
    return json.loads((folder / "output" / "dreambooth.json").read_text(encoding="utf-8"))["seconds"]["training"] / steps


def table(results):
    lines = ["| threads | " + " | ".join(f"{others} other programs" for others in results["others"]) + " |",
             "|---|" + "---|" * len(results["others"])]
    for name, row in results["seconds_per_step"].items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--others", type=int, nargs="+", default=[0, 1, 3], help="numbers of busy programs")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    rows = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for others in args.others:
            for name, environment in VARIANTS.items():
                with busy(others):
                    rows[name].append(round(seconds_per_step(args.steps, environment, Path(folder)), 4))
    results = {"date": datetime.date.today().isoformat(), "cores": CORES, "steps": args.steps, "others": args.others,
               "seconds_per_step": rows}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()

"""What only a CUDA GPU can tell, in one go: speed and memory of full-size models under caps, beside what was expected.

    python benchmarks/bench_gpu.py
    python benchmarks/bench_gpu.py --rounds 200 --reference PATH/TO/diffusers/examples/dreambooth/train_dreambooth.py

Each case is a run of bench_train.py in a process of its own, on random weights, so nothing is downloaded. The cap is put on
the process itself, whose memory plan finds it: what does not fit fails. With --reference, the script's training is timed beside
ours, too (Stable Diffusion 1.5, bf16). Results go to benchmarks/results/gpu.json, and are printed as a table. --models bundled
tries it on a CPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_train import RESULTS, random_models

CASES = {  # model: [(GiB that the process may have or None, flags)]
    "sd15": [(None, []), (8, []), (8, ["--train_text_encoder"]), (None, ["--method", "lora"]), (None, ["--compile"]),
             (None, ["--channels_last"])],
    "sd21": [(None, [])],
    "sdxl": [(10, []), (24, []), (24, ["--method", "lora"]), (None, [])],
    "bundled": [(None, []), (None, ["--max_vram", 0.45])],
}
VOCABULARY = 49408  # of the text encoders of random_models()


def bench(script, *flags):
    """Run a script of this folder; what it wrote to benchmarks/results, or the last lines of what it said if it failed."""
    name = "of-bench-gpu"
    done = subprocess.run([sys.executable, Path(__file__).with_name(script), *map(str, flags), "--name", name],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        return {"failed": done.stdout[-500:]}
    path = RESULTS / f"{name}.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return result


def save_random(arch, folder):
    """Write a pipeline with random weights. Its tokenizer gets as many words as its text encoder, as is checked on loading."""
    random_models(arch).pipeline.save_pretrained(folder)
    path = Path(folder, "tokenizer", "tokenizer.json")
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    words |= {f"<nothing {i}>": i for i in range(max(words.values()) + 1, VOCABULARY)}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def table(results):
    """A Markdown table of the cases."""
    lines = ["| model | flags | cap | plan | s / step | expected | peak | off by | instance loss | prior loss | device |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in results:
        case = f"| {row['model']} | `{' '.join(map(str, row['flags']))}` | {row['cap'] or ''} | "
        if "failed" in row:
            lines.append(f"{case}failed: {row['failed'].splitlines()[-1]} |" + " |" * 7)
            continue
        peak, loss = row.get("peak_GiB"), row["loss_of_last_100_steps"]
        off = f"{row['expected_GiB'] / peak - 1:+.0%}" if peak else ""
        instance, prior = (f"{loss[kind]:.4f}" if loss.get(kind) else "?" for kind in ("instance", "prior"))
        lines.append(f"{case}`{row['plan']}` | {row['seconds_per_step']} | {row['expected_GiB']} GiB | {peak or '?'} GiB | {off} | "
                     f"{instance} | {prior} | {row['device']}, {row['date']} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=["sd15", "sd21", "sdxl"])
    parser.add_argument("--rounds", type=int, default=50, help="timed steps of each case")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--reference", type=Path, help="diffusers' train_dreambooth.py")
    args = parser.parse_args()
    results = []

    def enter(row):
        results.append(row)  # at once, so that what was measured stays if a later case takes too long
        args.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for model, cap, flags in ((model, *case) for model in args.models for case in CASES[model]):
        own = (["--arch", model] if model != "bundled" else []) + (["--cap", cap] if cap else [])
        row = bench("bench_train.py", *own, "--no-bare", "--rounds", args.rounds, *flags)
        enter({"model": model, "cap": cap, "flags": flags} | row)
        print(table(results[-1:]).splitlines()[-1], flush=True)
    if args.reference:
        with tempfile.TemporaryDirectory() as folder:
            save_random("sd15", folder)
            enter({"reference": bench(
                "bench_reference.py", args.reference, "--model_name", folder, "--resolution", 512, "--mixed_precision", "bf16",
                "--num_class_images", 16, "--steps", max(100, args.rounds))})
    print("", table([row for row in results if "model" in row]), sep="\n")
    if args.reference:
        print(json.dumps(results[-1]["reference"], indent=2))


if __name__ == "__main__":
    main()

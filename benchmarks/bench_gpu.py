"""What only a CUDA GPU can tell, in stages, the most telling first, within the minutes that there are.

    python benchmarks/bench_gpu.py --minutes 9
    python benchmarks/bench_gpu.py --minutes 9 --reference PATH/TO/diffusers/examples/dreambooth/train_dreambooth.py
    python benchmarks/bench_gpu.py --minutes 4 --stages 5 6 7                              go on another time
    python benchmarks/bench_gpu.py --minutes 9 --models bundled                            try it on a CPU

Each case of a stage is a process of its own with a time limit of its own, on random weights or the bundled model, so that nothing
is downloaded. What it found is written at once, to benchmarks/results/gpu.json, beside what other runs of this left there; a case
that fails is noted with its last lines, and one that could not end in time is not begun. While a case runs, the next one's
libraries are being loaded.
"""

import argparse
import datetime
import json
import os
import shlex
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Case:
    """One process: a script of this folder with its flags, in which words in braces are filled in."""

    stage: int
    name: str
    seconds: float  # that it takes at most, as far as is known, on an H100
    command: str


TITLES = {1: "the bundled model on the device", 2: "SD 1.5, 512 px, nothing saved", 3: "SD 1.5 under caps", 4: "SD XL, 1024 px",
          5: "drawing", 6: "flags for speed, on stage 2's case", 7: "where the time of stage 2's step goes",
          8: "LoRAs of newer models, 1024 px"}
TOGETHER = {1: 14}  # cases of a stage that run at once, where no speed is measured and there are processors; otherwise one
SHORT = "stages.py training --steps {short} --num_inference_steps 5"
FLOW = SHORT + " --model_name demo/model-flow --method lora --mixed_precision bf16"
CASES = (
    Case(1, "losses", 75, "stages.py losses --steps {long}"),
    Case(1, "resume", 75, "stages.py resume --steps {short} --mixed_precision bf16"),
    Case(1, "fp16", 50, SHORT + " --mixed_precision {fp16}"),
    Case(1, "class images, text encoder", 50, SHORT + " --train_text_encoder --class_data_dir {work}/class --num_class_images 8"),
    Case(1, "lora", 50, SHORT + " --method lora --train_text_encoder"),
    Case(1, "dora", 50, SHORT + " --method lora --use_dora"),
    Case(1, "textual_inversion", 50, SHORT + " --method textual_inversion"),
    Case(1, "pivotal", 50, SHORT + " --method pivotal"),
    Case(1, "frugal", 50, SHORT + " --mixed_precision bf16 --weights bf16 --optimizer adafactor --gradient_checkpointing "
                                  "--fused_backward --offload_optimizer"),
    # What no CPU has: streams, page-locked memory, kernels for whole numbers, compiled ones.
    Case(1, "flow", 50, FLOW),
    Case(1, "flow, blocks that wait", 60, FLOW + " --offload_blocks --gradient_checkpointing"),
    Case(1, "flow, int8", 60, FLOW + " --base_precision int8"),
    Case(1, "compiled", 120, SHORT + " --mixed_precision {half} {compile}"),
    Case(1, "8 bits", 90, SHORT + " --mixed_precision {half} {8bit} --fused_backward"),
    Case(2, "sd15", 45, "bench_train.py {sd15} --no-bare --rounds {rounds}"),
    Case(2, "reference", 70, "stages.py reference {arch15} --script {reference} --steps {rounds} --mixed_precision {half}"),
    Case(2, "whole program", 75, "stages.py training {arch15} --models {work} --steps 20 --mixed_precision {half} "
                                 "--class_data_dir {work}/class-{half} --num_class_images 4 --num_inference_steps {drawn}"),
    Case(3, "sd15 in 8 GiB", 50, "bench_train.py {sd15} --no-bare --rounds {rounds} {cap8} --optimizer adafactor"),
    Case(3, "sd15 with text encoder in 8 GiB", 55,
         "bench_train.py {sd15} --no-bare --rounds {rounds} {cap8} --optimizer adafactor --train_text_encoder"),
    Case(3, "sd15 lora", 40, "bench_train.py {sd15} --no-bare --rounds {rounds} --method lora"),
    Case(4, "sdxl in 10 GiB", 80, "bench_train.py {sdxl} --no-bare --rounds 20 --cap 10"),
    Case(4, "sdxl lora in 12 GiB", 60, "bench_train.py {sdxl} --no-bare --rounds 30 --cap 12 --method lora"),
    Case(4, "sdxl", 70, "bench_train.py {sdxl} --no-bare --rounds 30"),
    Case(5, "pictures, batch by batch", 50, "bench_generate.py {drawing}"),
    Case(5, "evaluation", 120, "stages.py evaluation {arch15} --models {work} {protocol}"),
    Case(6, "sd15 --channels_last", 45, "bench_train.py {sd15} --no-bare --rounds {rounds} --channels_last"),
    Case(6, "sd15 --compile", 130, "bench_train.py {sd15} --no-bare --rounds {rounds} {compile}"),
    Case(6, "sd15 in 8 GiB, 8 bits", 170, "bench_train.py {sd15} --no-bare --rounds {rounds} {cap8} {8bit}"),
    Case(7, "profile", 60, "stages.py profile {sd15}"),
    Case(8, "z-image lora in 12 GiB", 75, "bench_train.py {zimage} {lora} {cap12}"),
    Case(8, "z-image lora, blocks that wait", 90, "bench_train.py {zimage} {lora} {waiting}"),
    Case(8, "z-image lora", 60, "bench_train.py {zimage} {lora}"),
    Case(8, "klein-4b lora in 12 GiB", 60, "bench_train.py {klein} {lora} {cap12}"),
    Case(8, "flux1 lora in 16 GiB", 100, "bench_train.py {flux1} {lora} --cap 16"),
    Case(8, "qwen-image lora in 24 GiB", 130, "bench_train.py {qwen} {lora} --cap 24"),
    Case(8, "z-image lora in 24 GiB", 60, "bench_train.py {zimage24} {lora} --cap 24"),
    Case(8, "flux1 lora in 24 GiB", 100, "bench_train.py {flux1} {lora} --cap 24"),
)
FILLINGS = {  # --models: what the words in braces stand for; None: there is no such thing, and the case is left out
    "full": {"sd15": "--arch sd15 --mixed_precision bf16", "arch15": "--arch sd15", "sdxl": "--arch sdxl --mixed_precision bf16",
             "half": "bf16", "fp16": "fp16", "long": 200, "short": 20, "rounds": 100, "cap8": "--cap 8", "drawn": 30,
             "compile": "--compile", "8bit": "--optimizer adamw8bit", "drawing": "--arch sd15 --batches 1 4 16 --rounds 3",
             "protocol": "--num_images 4", "lora": "--method lora --mixed_precision bf16 --no-bare --rounds 20", "cap12": "--cap 12",
             "waiting": "--cap 6", "zimage": "--arch z-image", "zimage24": "--arch z-image", "klein": "--arch klein-4b",
             "flux1": "--arch flux1", "qwen": "--arch qwen-image"},
    "bundled": {"sd15": "", "arch15": "", "sdxl": None, "half": "no", "fp16": None, "long": 12, "short": 4, "rounds": 10,
                "compile": None, "8bit": None, "cap8": "--max_vram 0.45", "drawn": 3,
                "drawing": "--batches 1 4 --rounds 1 --num_inference_steps 3",
                "protocol": "--num_images 1 --num_inference_steps 2",
                "lora": "--method lora --mixed_precision bf16 --no-bare --rounds 20", "cap12": "--base_precision int8",
                "waiting": "--offload_blocks --gradient_checkpointing", "zimage": "--model_name demo/model-flow", "zimage24": None,
                "klein": None, "flux1": None, "qwen": None},
}
# What is set beside what, once both are there: (what, case, figure, other case).
RATIOS = (("steps/s, times the reference's", "reference", "seconds_per_step", "sd15"),
          ("--channels_last, speed", "sd15", "seconds_per_step", "sd15 --channels_last"),
          ("--compile, speed", "sd15", "seconds_per_step", "sd15 --compile"),
          ("in 8 GiB, time of a step", "sd15 in 8 GiB", "seconds_per_step", "sd15"),
          ("in 8 GiB, instance loss of steps 81 to 100", "sd15 in 8 GiB", "loss_of_last_20_steps", "sd15"),
          ("in 8 GiB, 8 bits, instance loss of steps 81 to 100", "sd15 in 8 GiB, 8 bits", "loss_of_last_20_steps", "sd15"),
          ("small flow, blocks that wait, instance loss at last", "flow, blocks that wait", "last instance loss", "flow"),
          ("small flow, int8, instance loss at last", "flow, int8", "last instance loss", "flow"),
          ("in 12 GiB, instance loss of steps 6 to 25", "z-image lora in 12 GiB", "loss_of_last_20_steps", "z-image lora"),
          ("blocks that wait, instance loss of steps 6 to 25", "z-image lora, blocks that wait", "loss_of_last_20_steps",
           "z-image lora"),
          ("blocks that wait, time of a step", "z-image lora, blocks that wait", "seconds_per_step", "z-image lora"))
SPARE = 5  # seconds for what comes after the last case
KEPT = (".txt", ".png")  # what a case may leave beside its result


class Child:
    """A case under way: a process that has loaded its libraries, if it was made ahead, and waits to be told to go."""

    def __init__(self, case, words, work, ahead):
        self.case, self.result, self.log = case, work / f"{case_file(case)}.json", work / f"{case_file(case)}.log"
        self.began = self.deadline = None
        script, *flags = words
        command = [HERE / script, *flags, "--results", self.result]
        if ahead:
            command[:0] = [HERE / "when_told.py"]
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE.parent, stdin=subprocess.PIPE,
                                            stdout=log, stderr=subprocess.STDOUT, process_group=0)

    def go(self, limit):
        self.began = time.monotonic()
        self.deadline = self.began + limit
        try:
            self.process.stdin.write(b"go\n")
            self.process.stdin.close()
        except BrokenPipeError:  # it has failed already, as will be seen
            pass

    def is_over(self):
        """Whether it has ended; if its time is up it is ended."""
        if self.process.poll() is None and time.monotonic() > self.deadline:
            self.end()
        return self.process.poll() is not None

    def end(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # a group of its own: what it has started goes with it
        self.process.wait()

    def row(self):
        """What came of it: its result, or how it failed."""
        took = time.monotonic() - self.began
        row = {"took_s": round(took, 1)}
        if self.process.returncode == 0:
            return row | json.loads(self.result.read_text(encoding="utf-8"))
        why = f"stopped after {took:.0f} s" if self.process.returncode == -signal.SIGKILL else f"status {self.process.returncode}"
        said = self.log.read_text(encoding="utf-8", errors="replace")
        return row | {"failed": why, "last_lines": said[-3000:].splitlines()[-40:]}


def case_file(case):
    return f"{case.stage}-{''.join(c if c.isalnum() else '-' for c in case.name)}"


def words_of(case, filling):
    """A case's command in words; None if something that it needs is not there."""
    needed = {name for _, name, _, _ in string.Formatter().parse(case.command) if name}
    return None if None in (filling[name] for name in needed) else shlex.split(case.command.format(**filling))


class Results:
    """The rows of all that was measured, in a file that is always whole, and in a second place if there is one."""

    def __init__(self, path, copy_to):
        self.path, self.copy_to = path, copy_to
        self.rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def enter(self, row, beside=()):
        """Put a row in the place of an earlier one of the same case; files `beside` are kept beside the results."""
        same = [(old["case"], old["models"]) == (row["case"], row["models"]) for old in self.rows]
        self.rows = [old for old, is_same in zip(self.rows, same) if not is_same] + [row]
        self.rows.sort(key=lambda row: row["stage"])
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)
        kept = [shutil.copy(path, self.path.with_name(f"{self.path.stem}-{path.name}")) for path in beside]
        for path in [self.path, *kept] if self.copy_to else ():
            shutil.copy(path, self.copy_to)


def run(cases, filling, results, common, seconds, patience, together=TOGETHER, processors=os.cpu_count() or 1, say=print):
    """Run `cases`, [Case], within `seconds`; each enters a row, with what is `common`, when it ends.

    A case may take `patience` times what is expected, but begins only if what is expected is left.
    """
    end, running, ready = time.monotonic() + seconds - SPARE, [], None
    waiting = deque(cases)

    def enter(case, row, beside=()):
        row = {"stage": case.stage, "case": case.name, **common, "command": case.command, **row}
        results.enter(row, beside)
        say(line_of(row), flush=True)

    def fits(case):
        at_once = min(together.get(case.stage, 1), processors)
        return len(running) < at_once and all(child.case.stage == case.stage for child in running)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)

        def child_of(case, ahead=False):
            place = work / case_file(case)
            words = words_of(case, filling | {"work": work})
            return words and Child(case, [*words, *(["--work", str(place)] if words[0] == "stages.py" else [])], work, ahead)
        try:
            while waiting or running:
                while waiting and fits(waiting[0]):
                    case, left = waiting.popleft(), end - time.monotonic()
                    child, ready = (ready, None) if ready and ready.case is case else (None, ready)
                    if left < case.seconds:
                        if child:
                            child.end()
                        enter(case, {"not_begun": f"{left:.0f} s were left, {case.seconds:g} are expected"})
                    elif child := child or child_of(case):
                        child.go(min(case.seconds * patience, left))
                        running.append(child)
                    else:
                        enter(case, {"left_out": "something it needs is not there"})
                if ready is None and waiting and running and processors > 3:
                    ready = child_of(waiting[0], ahead=True)
                for child in [child for child in running if child.is_over()]:
                    running.remove(child)
                    beside = [path for suffix in KEPT if (path := child.result.with_suffix(suffix)).is_file()]
                    enter(child.case, child.row(), beside)
                time.sleep(0.1)
        finally:
            for child in [*running, *([ready] if ready else [])]:
                child.end()


SHOWN = ("seconds_per_step", "seconds_per_picture", "share_of_peak", "share_of_fastest_product", "plan", "peak_GiB",
         "expected_GiB", "loss_of_last_20_steps", "compared_steps", "off instance loss, device float32",
         "off instance loss, device bf16", "instance loss at first", "instance loss at last", "last instance loss", "resumed weights off",
         "repeated weights off", "trained weights moved", "busy_share", "first_steps_s", "failed", "not_begun", "left_out")


def line_of(row):
    """A row in a line, and the last lines of one that failed."""
    figures = [f"{name} {row[name]}" for name in SHOWN if row.get(name) not in (None, "")]
    if row.get("peak_GiB") and row.get("expected_GiB"):
        figures.append(f"estimate off by {row['expected_GiB'] / row['peak_GiB'] - 1:+.0%}")
    said = "".join(f"\n    | {line}" for line in row.get("last_lines", [])[-5:])
    return f"{row['stage']} {row['case']} ({row.get('took_s', 0):.0f} s): {'; '.join(figures)}{said}"


def table(rows):
    """A Markdown table of those that trained at full size, or in the small form."""
    lines = ["| case | plan | s / step | of peak | of fastest product | estimate | peak | off by | loss of last 20 | device |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for row in (row for row in rows if "expected_GiB" in row):
        peak = row.get("peak_GiB")
        off = f"{row['expected_GiB'] / peak - 1:+.0%}" if peak else ""
        share = f"{row['share_of_peak']:.0%}" if "share_of_peak" in row else ""
        loss = row["loss_of_last_20_steps"].get("instance")
        lines.append(f"| {row['case']} | `{row['plan']}` | {row['seconds_per_step']} | {share} | "
                     f"{row['share_of_fastest_product']:.0%} | {row['expected_GiB']} GiB | {peak or '?'} GiB | {off} | "
                     f"{loss and format(loss, '.4f')} | {row['device']}, {row['date']} |")
    return lines


def ratios(rows):
    """Lines that set one case beside another of the same run of models."""
    found = {row["case"]: row for row in rows}
    lines = []
    for what, one, figure, other in RATIOS:
        values = [found.get(name, {}).get(figure) for name in (one, other)]
        values = [value.get("instance") if isinstance(value, dict) else value for value in values]
        if all(values):
            lines.append(f"{what}: {values[0]} / {values[1]} = {values[0] / values[1]:.3f}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=9, help="what there is, from now on")
    parser.add_argument("--models", choices=FILLINGS, default="full", help="bundled: a small form to try it on a CPU")
    parser.add_argument("--stages", type=int, nargs="+", choices=TITLES, help="these, in this order, instead of all")
    parser.add_argument("--reference", type=Path, help="diffusers' train_dreambooth.py")
    parser.add_argument("--patience", type=float, default=2, help="times what is expected that a case may take")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--copy_to", type=Path, default=os.environ.get("OUT") or None,
                        help="folder that gets a copy of all results whenever one is there (default: $OUT, if it is set)")
    args = parser.parse_args()
    filling = FILLINGS[args.models] | {"reference": args.reference and shlex.quote(str(args.reference.resolve()))}
    cases = [case for stage in args.stages or TITLES for case in CASES if case.stage == stage]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    if args.copy_to:
        args.copy_to = Path(args.copy_to)
        args.copy_to.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what runs is ended, too
    results = Results(args.results.resolve(), args.copy_to)
    common = {"models": args.models, "began": datetime.datetime.now().isoformat(timespec="seconds")}
    run(cases, filling, results, common, args.minutes * 60, args.patience)
    rows = [row for row in results.rows if row["models"] == args.models]
    print("", *table(rows), "", *ratios(rows), sep="\n")


if __name__ == "__main__":
    main()

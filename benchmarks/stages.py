"""What bench_gpu.py measures beside the other benchmarks, each as a command of its own.

    python benchmarks/stages.py losses --results losses.json      the bundled model on the CPU and on the GPU, from one seed
    python benchmarks/stages.py training --results lora.json --method lora --steps 20
    python benchmarks/stages.py resume --results resume.json
    python benchmarks/stages.py reference --results reference.json --arch sd15 --script PATH/train_dreambooth.py
    python benchmarks/stages.py evaluation --results evaluation.json --arch sd15
    python benchmarks/stages.py profile --results profile.json --arch sd15 --mixed_precision bf16

All but the full-size models of --arch have the bundled one. Flags that are not of this script go to the program. What it prints
and writes it leaves in --work.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from bench_reference import run_reference
from bench_train import (
    UNETS,
    VOCABULARY,
    counted,
    machine,
    made_up_cache,
    model_for,
    paced,
    prepare,
    program_step,
    random_models,
    shares,
    synchronize,
)
from methods import REPOSITORY
from PIL import Image

from dreambooth.arguments import parse_settings
from dreambooth.base import GIB
from dreambooth.cli import main as program
from dreambooth.device import plan_device
from dreambooth.settings import Settings
from dreambooth.training.reports import REPORT_EVERY

DEMO = REPOSITORY / "demo"
# Pictures that nobody draws: the same on every device. One sample is drawn at the end.
ALIKE = ["--class_data_dir", DEMO / "subjects" / "duck-n", "--num_class_images", 5, "--instance_data_dir",
         REPOSITORY / "instance_images", "--validation_prompt", "a [identifier] dog on the moon"]
COMPARED_STEPS = 40  # so many does the CPU take


def run_program(*flags):
    """One command of the program, in this process. SystemExit if it fails."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it is one per process, and keeps the first precision
    if status := program([str(flag) for flag in flags]):
        raise SystemExit(f"exit status {status} of {' '.join(map(str, flags))}")


def training(args, flags):
    """A training as its record and its log tell of it: seconds, losses, and the GPU's peak over all it did."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = args.work / "output"
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run_program("--train", "--model_name", model_folder(args), "--output_dir", folder, "--overwrite", *ALIKE, *flags)
    record = json.loads((folder / "dreambooth.json").read_text(encoding="utf-8"))
    log = EventAccumulator(str(folder / "logs")).Reload()
    losses = {tag.split("/")[1]: [round(event.value, 5) for event in log.Scalars(tag)]
              for tag in log.Tags()["scalars"] if tag.startswith("loss/")}
    result = {"steps": record["used"]["steps"], "precision": record["used"]["precision"], "seconds": record["seconds"],
              "seconds_per_step": round(record["seconds"]["training"] / record["used"]["steps"], 4),
              "samples": len(list((folder / "samples").glob("*.png"))) - 1, "losses": losses,
              "last instance loss": losses["instance"][-1]}
    if torch.cuda.is_available():
        result["peak_of_all_GiB"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
    return result


def losses(args, flags):
    """Losses of the bundled model, which begin alike: on the CPU and on the device in float32, on the device in bf16.

    What the last one draws is kept beside --results.
    """
    few, rate = ["--steps", min(args.steps, COMPARED_STEPS)], ["--lr_scheduler", "constant", "--num_inference_steps", 20]
    path = args.work / "cpu.json"
    on_cpu = subprocess.Popen(
        [sys.executable, __file__, "training", "--results", path, "--work", args.work / "cpu", "--mixed_precision", "no",
         *map(str, few + rate)], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    runs = {"device float32": training(args, ["--mixed_precision", "no", *few, *rate]),
            "device bf16": training(args, ["--mixed_precision", "bf16", "--steps", args.steps, *rate, *flags])}
    if on_cpu.wait():
        raise SystemExit("the training on the CPU failed")
    runs = {"CPU float32": json.loads(path.read_text())} | runs
    of_cpu = runs["CPU float32"]["losses"]
    off = {f"off {kind} loss, {name}": largest_share(of_cpu[kind], run["losses"][kind])
           for name, run in runs.items() for kind in of_cpu if run["losses"] is not of_cpu}
    bf16 = runs["device bf16"]["losses"]["instance"]
    half = min(50, len(bf16) // 2)
    shutil.copy(next((args.work / "output" / "samples").glob("grid-*.png")), args.results.with_suffix(".png"))
    return {"compared_steps": len(of_cpu["instance"]), **off, "instance loss at first": round(statistics.fmean(bf16[:half]), 4),
            "instance loss at last": round(statistics.fmean(bf16[-half:]), 4),
            "runs": runs}


def largest_share(ones, others):
    """The largest difference of the losses of a step, as a share of their mean."""
    return round(max(abs(a - b) for a, b in zip(ones, others)) / statistics.fmean(ones), 5)


def resume(args, flags):
    """How far a resumed training's weights are from an uninterrupted one's, and a repeated one's from them."""
    from safetensors.torch import load_file

    half = args.steps // 2
    common = ["--checkpointing_steps", half, "--steps", args.steps, "--num_inference_steps", 1, *flags]

    def weights(name, *more):
        training(argparse.Namespace(**vars(args) | {"work": args.work / name}), [*common, *more])
        return load_file(args.work / name / "output" / "unet" / "diffusion_pytorch_model.safetensors")

    whole, again = weights("whole"), weights("again")
    resumed = weights("resumed", "--resume", args.work / "whole" / "output" / "checkpoints" / f"step-{half:06d}")
    at_first = load_file(DEMO / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    others = {"resumed weights off": resumed, "repeated weights off": again, "trained weights moved": at_first}
    return {"steps": args.steps, "resumed_after": half,
            **{what: max((whole[name].float() - other[name].float()).abs().max().item() for name in whole)
               for what, other in others.items()}}


def model_folder(args):
    """The folder of a random model of --arch, made if it is not there; the bundled model's without --arch."""
    if not args.arch:
        return DEMO / "model"
    folder = args.models / args.arch
    if not (folder / "model_index.json").is_file():
        save_random(args.arch, folder)
    return folder


def save_random(arch, folder):
    """Write a pipeline with random weights. Its tokenizer gets as many words as its text encoder, as is checked on loading."""
    device = plan_device(Settings("train")).device
    models = random_models(arch, device)
    models.pipeline.to("cpu").save_pretrained(folder)
    for path in Path(folder).glob("tokenizer*/tokenizer.json"):
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        words = tokenizer["model"]["vocab"]
        words |= {f"<nothing {i}>": i for i in range(max(words.values()) + 1, VOCABULARY)}
        path.write_text(json.dumps(tokenizer), encoding="utf-8")
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Done(Exception):
    """The reference script has taken the steps that were asked for."""


def reference(args, flags):
    """diffusers' train_dreambooth.py on the same work, batch 1 + 1: its steps alone, and its peak."""
    photos, classes, ends = args.work / "photos", args.work / "class", []
    model, resolution = model_folder(args), UNETS[args.arch]["sample_size"] * 8 if args.arch else 64
    for folder in (photos, classes):
        folder.mkdir(parents=True)
        for number in range(5):
            Image.effect_noise((resolution, resolution), 80).convert("RGB").save(folder / f"{number}.png")

    def after_step():
        ends.append(time.perf_counter())
        if len(ends) == args.steps:
            raise Done  # before it saves everything
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(Done):
        run_reference(str(args.script), [str(flag) for flag in (
            "--pretrained_model_name_or_path", model, "--instance_data_dir", photos, "--instance_prompt", "a phol dog",
            "--with_prior_preservation", "--class_data_dir", classes, "--class_prompt", "a dog", "--num_class_images", 5,
            "--resolution", resolution, "--train_batch_size", 1, "--max_train_steps", args.steps, "--seed", 0,
            "--checkpointing_steps", 10**6, "--output_dir", args.work / "output", *flags)], after_step)
    warm = min(10, args.steps // 2)
    result = {"steps": args.steps, "resolution": resolution,
              "seconds_per_step": round((ends[-1] - ends[warm - 1]) / (len(ends) - warm), 4)}
    if torch.cuda.is_available():
        result["peak_GiB"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
    return result


def evaluation(args, flags):
    """Seconds of --evaluate. The bundled networks measure, whatever they may think of such pictures."""
    folder = args.work / "evaluation"
    run_program("--evaluate", "--model_path", model_folder(args), "--instance_data_dir", REPOSITORY / "instance_images",
                "--class_prompt", "a dog", "--dino_model", DEMO / "metrics" / "vit", "--clip_model", DEMO / "metrics" / "clip",
                "--eval_dir", folder, *flags)
    row, = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["models"]
    return {"pictures": row["pictures_drawn"], "seconds": row["seconds"],
            "seconds_per_picture": round(row["seconds"]["drawing"] / row["pictures_drawn"], 3)}


ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}  # what the profiler calls what runs there
KINDS = (  # what the names of kernels say of their work; the first that matches
    ("attention", r"flash|fmha|attention|sdpa"), ("optimizer, gradients' norm", r"adam|lpnorm|norm_(reduce|cleanup)"),
    ("matrix products, convolutions", r"gemm|cutlass|nvjet|conv|xmma|cudnn|sm\d\d_|wgrad|dgrad"),
    ("normalization", r"norm|welford|Moments"), ("copies, conversions", r"copy|cat|memcpy|memset|transpose|nchw|nhwc"),
    ("element by element", r"elementwise|vectorized"), ("others", ""))


def profile(args, flags):
    """Where the time of ten steps goes; the text is kept beside --results."""
    s = parse_settings(["--train", *map(str, flags)])
    models = model_for(args, s, plan_device(s))
    resolution = s.resolution or models.resolution
    run, plan, _ = prepare(s, models, made_up_cache(models, resolution, 5, 20), 100, resolution)
    step = program_step(run, args.work / "logs")
    flops = counted(step)
    pace, _ = paced(step, plan.device, 2 * REPORT_EVERY, 5)
    host = host_seconds(step, plan.device)
    kind = torch.profiler.ProfilerActivity.CUDA if plan.device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        for _ in range(10):
            step()
        synchronize(plan.device)
    profiler.export_chrome_trace(str(args.work / "trace.json"))
    work = work_of(json.loads((args.work / "trace.json").read_text(encoding="utf-8"))["traceEvents"])
    figures = {"seconds_per_step": round(pace, 4), "host_seconds_per_step": round(host, 4),
               "tera_operations_per_step": round(flops / 1e12, 4), **shares(flops, pace, plan), **gaps(work)}
    title = f"{args.arch or 'bundled'} {' '.join(map(str, flags))}, {resolution} px; {machine(plan.device)}, torch " \
            f"{torch.__version__}, {datetime.date.today()}"
    text = "\n".join([title, "", *(f"{name}: {value}" for name, value in figures.items()), "", *tally(work)]) + "\n"
    args.results.with_suffix(".txt").write_text(text, encoding="utf-8")
    return {**figures, "text": text}


def host_seconds(step, device):
    """Seconds in which the CPU is done with a step: all but the GPU's work."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(3):  # none of them the one that reads the losses
        step()
    host = (time.perf_counter() - started) / 3
    synchronize(device)
    return host


def work_of(events):
    """[(start, end, name)] in microseconds of what ran on the GPU, in order; without one, of torch's operations."""
    whole = [event for event in events if event.get("ph") == "X"]
    chosen = [event for event in whole if event.get("cat") in ON_GPU] or [e for e in whole if e.get("cat") == "cpu_op"]
    return sorted((event["ts"], event["ts"] + event["dur"], event["name"]) for event in chosen)


def gaps(work):
    """How much of the time something ran, and what lay between."""
    busy, end, idle = 0, work[0][0], []
    for start, stop, _ in work:
        if start > end:
            idle.append(start - end)
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
    long = [gap for gap in idle if gap > 10]
    return {"kernels_per_step": len(work) / 10, "busy_share": round(busy / (end - work[0][0]), 3),
            "gaps_over_10_us": len(long) / 10, "their_us_per_step": round(sum(long) / 10),
            "longest_gap_us": round(max(idle, default=0))}


def tally(work):
    """Lines of two tables: the time of each kind of kernel, and the ten that cost most."""
    total, kinds, names = sum(stop - start for start, stop, _ in work), {}, {}
    for start, stop, name in work:
        kind = next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))
        for group, key in ((kinds, kind), (names, name)):
            seconds, count = group.get(key, (0, 0))
            group[key] = seconds + stop - start, count + 1
    lines = []
    for title, group, most in (("kind", kinds, None), ("costliest", names, 10)):
        lines += [f"{'share':>6} {'ms/step':>8} {'calls/step':>10}  {title}"]
        lines += [f"{time / total:>6.1%} {time / 1e4:>8.3f} {count / 10:>10.1f}  {key[:160]}"
                  for key, (time, count) in sorted(group.items(), key=lambda item: -item[1][0])[:most]] + [""]
    return lines


COMMANDS = {command.__name__: command for command in (losses, training, resume, reference, evaluation, profile)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="and flags of the program")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--results", type=Path, required=True, help="file to write")
    parser.add_argument("--work", type=Path, help="folder for what is made on the way")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()), help="folder for random models, made once")
    parser.add_argument("--arch", choices=list(UNETS), help="random weights of this size instead of the bundled model")
    parser.add_argument("--steps", type=int, default=20, help="of losses, resume, reference")
    parser.add_argument("--script", type=Path, help="diffusers' train_dreambooth.py")
    args, flags = parser.parse_known_args()
    args.work = args.work or Path(tempfile.mkdtemp())
    args.work.mkdir(parents=True, exist_ok=True)
    if args.command == "training":
        flags = ["--steps", args.steps, *flags]
    device = plan_device(Settings("train")).device
    result = {"date": datetime.date.today().isoformat(), "device": machine(device), "torch": torch.__version__,
              **COMMANDS[args.command](args, flags)}
    args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key not in ("runs", "losses", "text")}, indent=1))


if __name__ == "__main__":
    main()

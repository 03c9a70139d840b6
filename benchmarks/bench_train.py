"""Speed and peak memory of the training loop, beside the least that a step can cost.

    python benchmarks/bench_train.py                                    the bundled model
    python benchmarks/bench_train.py --arch sdxl --max_vram 10          full size, random weights, nothing is downloaded
    python benchmarks/bench_train.py --scaling                          against the numbers of photos and class images

All flags of `--train` can be given, such as --method, --mixed_precision, --resolution or --train_batch_size. A step of the
program is timed in turn with a bare step of the same model (forward, backward, fused AdamW, on a batch that is there
already), so that whatever else the machine does slows both. What is printed is also written to benchmarks/results/.
"""

import argparse
import copy
import dataclasses
import datetime
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from methods import REPOSITORY, program
from newer_models import FLOWS, as_planned, flow_models
from PIL import Image

from dreambooth.arguments import parse_settings
from dreambooth.base import GIB, default
from dreambooth.data.batches import make_batch
from dreambooth.data.latents import LatentCache
from dreambooth.device import machine_name, peak_memory, plan_device
from dreambooth.memory.demand import survey
from dreambooth.memory.estimate import estimate
from dreambooth.memory.plan import choose_levers, frozen_conditioning
from dreambooth.memory.plans import check_levers
from dreambooth.methods.table import METHODS, parameter_groups, preserves_prior
from dreambooth.models.hub import BUNDLED_MODEL
from dreambooth.models.load import load_models
from dreambooth.models.parts import take_apart
from dreambooth.subjects.words import Subject
from dreambooth.training.course import Course, recipe_for
from dreambooth.training.levers import flags_of
from dreambooth.training.loop import train_step
from dreambooth.training.loss import loss_means
from dreambooth.training.prepare import prepare_training
from dreambooth.training.processes import make_accelerator
from dreambooth.training.reports import REPORT_EVERY, loss_writer, report_losses

RESULTS = REPOSITORY / "benchmarks" / "results"

# The hub's configs of stable-diffusion-v1-5, -2-1 and -xl-base-1.0, where they differ from diffusers' defaults.
UNETS = {
    "sd15": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "sd21": dict(sample_size=96, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True),
    "sdxl": dict(sample_size=128, cross_attention_dim=2048, attention_head_dim=[5, 10, 20],
                 block_out_channels=(320, 640, 1280),
                 down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                 up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
                 transformer_layers_per_block=[1, 2, 10], addition_embed_type="text_time", addition_time_embed_dim=256,
                 projection_class_embeddings_input_dim=2816),
}
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
TEXT_ENCODERS = {
    "sd15": [CLIP_L],
    "sd21": [dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, projection_dim=512,
                  hidden_act="gelu")],
    "sdxl": [CLIP_L, dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                          projection_dim=1280, hidden_act="gelu")],
}
VOCABULARY = 49408  # of these text encoders
PEAKS = (  # what a card's name says -> its dense bf16 peak (T4: fp16) in 10^12 operations per second, from its maker's data sheet
    ("H200", 989), ("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("A100", 312), (r"L4\b", 121), (r"T4\b", 65),
    ("RTX 4090,", 165), ("RTX 3090,", 71))


def random_models(arch, device="cpu"):
    """Models of an architecture's full size with random weights, made on `device`: the same whenever it is the same device."""
    import diffusers
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    tokenizer = CLIPTokenizer.from_pretrained(REPOSITORY / "demo" / "model", subfolder="tokenizer", model_max_length=77)
    diffusers.logging.set_verbosity_error()  # it remarks on each change of precision
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**UNETS[arch])
        kinds = [CLIPTextModel, CLIPTextModelWithProjection]
        encoders = [kind(CLIPTextConfig(vocab_size=VOCABULARY, eos_token_id=tokenizer.eos_token_id, **config))
                    for kind, config in zip(kinds, TEXT_ENCODERS[arch])]
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
                            up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              steps_offset=1, prediction_type="v_prediction" if arch == "sd21" else "epsilon")
    parts = dict(vae=vae, unet=unet, scheduler=scheduler, tokenizer=tokenizer, text_encoder=encoders[0])
    if arch == "sdxl":
        pipeline = StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, text_encoder_2=encoders[1],
                                             add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                           requires_safety_checker=False)
    for module in (unet, vae, *encoders):
        module.requires_grad_(False).eval()
    return take_apart(arch, pipeline)


def untrained_models(arch, plan, freezes_denoiser=False):
    """Models of full size on the CPU, as load_models() would leave them, but made where that is fast; a frozen denoiser in the
    plan's precision."""
    if arch in FLOWS:
        models = flow_models(arch, plan.device, plan.dtype if freezes_denoiser else torch.float32)
    else:
        models = random_models(arch, plan.device)
        if freezes_denoiser:
            models.denoiser.to(plan.dtype)
    models.pipeline.to("cpu")
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
    return models


def made_up_cache(models, resolution, photos, class_images):
    """The latent cache of pictures that nobody took."""
    rows = photos + class_images
    torch.manual_seed(0)
    latents = torch.randn(rows, *models.family.latent_shape(models.pipeline, resolution))
    return LatentCache(latents, torch.full_like(latents, 0.1),
                       torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]] * rows).float(),
                       (torch.arange(rows) >= photos).long(), ["a phol dog", "a dog"], [list(range(photos))],
                       [list(range(photos, rows))] if class_images else [])


def limit_memory(gib):
    """Let this process have no more than so many GiB of the GPU's memory; None: all of it."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(gib * GIB / total if gib else 1.0)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def prepare(s, models, cache, steps, resolution):
    """(Run, Plan, {part: bytes} that the memory plan expects it to take) of a training with these settings."""
    plan = plan_device(s)
    check_levers(s, models.family, plan)
    accelerator = make_accelerator(s, plan)
    recipe = recipe_for(models.family, s)
    subjects = [Subject("<dog>", "a dog", "a <dog> dog", "dog")]
    levers = choose_levers(s, models, subjects, recipe, resolution, plan)
    told = frozen_conditioning(models, subjects, plan.device)
    expected = estimate(survey(s, models, subjects, recipe, resolution, plan, levers, told), levers)
    course = Course(steps, resolution, plan.precision, levers, default(s.lr_scheduler, "constant"), snr_gamma=recipe.snr_gamma)
    if METHODS[s.method].is_adapter:
        models.denoiser.to(plan.dtype)
    models = as_planned(models, levers, plan.device)
    groups = parameter_groups(s, models, subjects, recipe)
    return prepare_training(s, course, models, groups, cache, accelerator, {}), plan, expected


def memory_figures(expected, device):
    """What training was expected to take and what it took, in GiB. On a CPU what it took cannot be told from the rest."""
    total = sum(expected.values())
    figures = {"expected_GiB": total / GIB, "expected_without_reserve_GiB": (total - expected["reserve"]) / GIB}
    if device.type == "cuda":
        figures |= {"peak_GiB": torch.cuda.max_memory_allocated() / GIB,
                    "peak_with_unused_GiB": torch.cuda.max_memory_reserved() / GIB}
    return {name: round(value, 3) for name, value in figures.items()}


def bare_step(unet, run, plan):
    """A function that takes one step of a copy of the UNet and nothing else."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6, fused=True)
    batch = make_batch(run.cache, run.s, 0, run.noise)
    batch = {key: value if key == "prompt" else value.to(plan.device) for key, value in batch.items()}
    told = {name: value.detach() for name, value in run.conditioning(batch["prompt"]).items()}
    models = dataclasses.replace(run.models, denoiser=unet)

    def step():
        with torch.autocast(plan.device.type, plan.dtype, plan.precision != "no"):
            out = models.family.predict(models, batch["latents"], batch["levels"], told, batch["sizes"])
        (out.float() - batch["noise"]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def program_step(run, folder):
    """A function that takes the next step as optimize() does, with its reports."""
    import tqdm

    unread, writer = [], loss_writer(folder, 0)
    bar, count = tqdm.tqdm(disable=True), iter(range(10**9))

    def step():
        done = next(count) + 1
        unread.extend(train_step(run, done - 1))
        if done % REPORT_EVERY == 0:
            report_losses(run, Path(folder), unread, bar, writer)
            unread.clear()
    return step


def timed(steps, device, rounds, warm_up):
    """For each of the functions `steps`, called in turn, the seconds of its calls after the first `warm_up`."""
    seconds = [[] for _ in steps]
    for index in range(warm_up + rounds):
        for step, kept in zip(steps, seconds):
            synchronize(device)
            started = time.perf_counter()
            step()
            synchronize(device)
            if index >= warm_up:
                kept.append(time.perf_counter() - started)
    return seconds


def paced(step, device, rounds, warm_up):
    """(seconds of a step, those of all steps of warming up): `rounds` steps, a few at a time without a halt, as in training."""
    def seconds_of(count):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(count):
            step()
        synchronize(device)
        return time.perf_counter() - started
    warming, at_once = seconds_of(warm_up), min(rounds, REPORT_EVERY)
    return statistics.median(seconds_of(at_once) / at_once for _ in range(rounds // at_once)), warming


def peak_of_training(photos, class_images, flags, folder):
    """Peak memory in MB of a whole training of 20 steps on so many made-up pictures, in a process of its own."""
    folder = Path(folder, f"{photos}-{class_images}")
    for kind, count in {"photos": photos, "class": class_images}.items():
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            Image.effect_noise((64, 64), 80).convert("RGB").save(folder / kind / f"{number}.png")
    return program("--train", "--instance_data_dir", folder / "photos", "--class_data_dir", folder / "class", "--class_prompt",
                   "a dog", "--num_class_images", class_images, "--steps", 20, "--output_dir", folder / "output",
                   "--sample_batch_size", 1, "--num_inference_steps", 1, *flags)[2]  # samples that hardly count


def fastest_product(plan):
    """Operations per second of the fastest of some matrix products here: what 100 % of the roofline means below."""
    side = 8192 if plan.device.type == "cuda" else 1024
    a = torch.randn(side, side, device=plan.device, dtype=plan.dtype)
    return 2 * side**3 / min(timed([lambda: a @ a], plan.device, 10, 2)[0])


def counted(step):
    """Floating-point operations of one call, in which nothing is compiled."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def shares(flops, seconds, plan):
    """{what: share} of the operations per second that a card could do at most, by its data sheet and by trial."""
    figures = {"share_of_fastest_product": flops / seconds / fastest_product(plan)}
    if peak := next((peak for name, peak in PEAKS if re.search(name, machine_name(plan.device))), None):
        figures["share_of_peak"] = flops / seconds / peak / 1e12
    return {name: round(share, 3) for name, share in figures.items()}


def model_for(args, s, plan):
    """The Models to train: random ones of --arch, else --model_name, else the bundled ones."""
    if args.arch:
        return untrained_models(args.arch, plan, METHODS[s.method].is_adapter)
    return load_models(s.model_name or str(BUNDLED_MODEL), torch.float32)


def machine(device):
    others = "" if device.type == "cuda" else f", load average {os.getloadavg()[0]:.1f}"
    return machine_name(device) + others


def table(results):
    """The tables of docs/results.md: steps, then what they cost with more pictures."""
    lines = ["| model, method | px | arithmetic, plan | s / step | bare step | ratio | of fastest matrix product | device |",
             "|---|---|---|---|---|---|---|---|"]
    for r in (r for r in results if "scaling" not in r):
        lines.append(f"| {r['model']}, {r['method']} | {r['resolution']} | {r['precision']} {r['plan']} | "
                     f"{r['seconds_per_step']} | {r.get('bare_seconds_per_step', '')} | {r.get('ratio', '')} | "
                     f"{r['share_of_fastest_product']:.0%} | {r['device']}, {r['date']} |")
    for r in (r for r in results if "scaling" in r):
        lines += ["", "| photos | class images | s / step | cached latents | peak memory of the process |", "|---|---|---|---|---|"]
        lines += [f"| {row['photos']} | {row['class_images']} | {row['seconds_per_step']} | {row['cache_MB']} MB | "
                  f"{row.get('peak_MB', '?')} MB |"
                  for row in r["scaling"]]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="and the flags of --train")
    parser.add_argument("--arch", choices=[*UNETS, *FLOWS], help="random weights of this size instead of --model_name")
    parser.add_argument("--rounds", type=int, default=50, help="timed steps of each kind")
    parser.add_argument("--warm_up", type=int, default=5, help="steps before them")
    parser.add_argument("--bare", action=argparse.BooleanOptionalAction, default=True,
                        help="time bare steps, too (of a second model)")
    parser.add_argument("--scaling", action="store_true", help="5 to 500 photos, 100 to 2000 class images")
    parser.add_argument("--cap", type=float, help="GiB of the GPU's memory that the process may have at all")
    parser.add_argument("--results", type=Path, help="file to write, instead of one in benchmarks/results")
    parser.add_argument("--table", action="store_true", help="only print the tables of docs/results.md, of the results there are")
    args, rest = parser.parse_known_args()
    if args.table:
        return print(table([json.loads(path.read_text()) for path in sorted(RESULTS.glob("train-*.json"))]))

    s = parse_settings(["--train", *rest])
    sizes, peaks = [(5, 100), (50, 100), (500, 100), (5, 500), (5, 2000)] if args.scaling else [(5, 200)], []
    if args.scaling and not args.arch:  # first: the peak of a process counts what its parent had when it began
        with tempfile.TemporaryDirectory() as folder:
            peaks = [peak_of_training(*size, rest, folder) for size in sizes]
    models = model_for(args, s, plan_device(s))
    resolution = s.resolution or models.resolution
    unet = copy.deepcopy(models.denoiser).train().requires_grad_(True) if args.bare else None
    caches = [made_up_cache(models, resolution, *size) for size in sizes]
    if args.cap:
        limit_memory(args.cap)
    run, plan, expected = prepare(s, models, caches[0], args.rounds * 2 + args.warm_up, resolution)
    result = {"date": datetime.date.today().isoformat(), "device": machine(plan.device), "python": sys.version.split()[0],
              **{name: __import__(name).__version__ for name in ("torch", "diffusers", "transformers")},
              "model": args.arch or (Path(models.name).name if s.model_name else "bundled"), "method": s.method,
              "resolution": resolution, "precision": plan.precision,
              "batch": f"{s.train_batch_size} photos + {s.train_batch_size * preserves_prior(s)} class images",
              "plan": flags_of(run.course.levers), "trained_weights": sum(p.numel() for g in run.groups for p in g.parameters)}
    with tempfile.TemporaryDirectory() as folder:
        if args.scaling:
            runs = [dataclasses.replace(run, cache=cache, history=[]) for cache in caches]
            steps = [program_step(each, f"{folder}/{i}") for i, each in enumerate(runs)]
            seconds = timed(steps, plan.device, args.rounds, args.warm_up)
            result["scaling"] = [{"photos": size[0], "class_images": size[1],
                                  "seconds_per_step": round(statistics.median(times), 4),
                                  "cache_MB": round((cache.mean.nbytes + cache.std.nbytes) / 1e6, 2)}
                                 for size, cache, times in zip(sizes, caches, seconds)]
            for row, peak in zip(result["scaling"], peaks):
                row["peak_MB"] = round(peak)
        else:
            steps = [program_step(run, folder)] + ([bare_step(unet.to(plan.device), run, plan)] if args.bare else [])
            flops = counted(steps[0])
            if plan.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if args.bare:
                seconds = timed(steps, plan.device, args.rounds, args.warm_up)
                mine, bare = map(statistics.median, seconds)
                result |= {"bare_seconds_per_step": round(bare, 4),
                           "ratio": round(statistics.median(program / bare for program, bare in zip(*seconds)), 3)}
            else:
                mine, warming = paced(steps[0], plan.device, args.rounds, args.warm_up)
                result["first_steps_s"] = round(warming, 1)
            result |= {"rounds": args.rounds, "seconds_per_step": round(mine, 4),
                       "tera_operations_per_step": round(flops / 1e12, 4),
                       "peak_memory" + " with the bare copy" * args.bare: peak_memory(plan.device),
                       "cap_GiB": args.cap, **memory_figures(expected, plan.device),
                       "loss_of_last_100_steps": loss_means(run.history[-100:]),
                       "loss_of_last_20_steps": loss_means(run.history[-20:])}
            if args.cap:
                limit_memory(None)  # what follows needs some, too
            result |= shares(flops, mine, plan)
    print(json.dumps(result, indent=2))
    path = args.results or RESULTS / f"train-{result['model']}-{s.method}{'-scaling' * args.scaling}-{plan.device.type}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the memory plan takes on several GPUs, and what they send each other, on paper: the tables of docs/several-gpus.md.

    python benchmarks/several_gpus.py plans --results plans.json        models of full size, without memory
    python benchmarks/several_gpus.py traffic
"""

import argparse
import dataclasses
import json
import math
import re
from pathlib import Path

import torch
from bench_train import random_models
from newer_models import FLOWS, flow_models

from dreambooth.arguments import parse_settings
from dreambooth.base import GIB, default
from dreambooth.device import AUTO, Plan
from dreambooth.memory import plans as memory_plans
from dreambooth.memory.demand import Demand, hollow_models, survey
from dreambooth.memory.estimate import estimate
from dreambooth.memory.plans import plans
from dreambooth.methods.table import parameter_groups
from dreambooth.models.quantized import BASES, in_fewer_bits
from dreambooth.subjects.words import Subject
from dreambooth.training.course import recipe_for
from dreambooth.training.levers import flags_of
from dreambooth.training.precision import is_bf16_throughout
from dreambooth.training.shards import gathered_bytes

NUMBERS, SIZES = (1, 2, 8), (24, 80)  # of GPUs; GiB of each
ARCHS = ("sd15", "z-image", "flux1", "sd35", "klein-4b", "qwen-image", "flux2-dev", "sdxl")
SUBJECT = Subject("<dog>", "a dog", "a <dog> dog", "dog")


# What is surveyed of a transformer, since its blocks are alike: so many of each kind, and of which of them, by number, the others are
# copies: {block: how many there are}.
FEW = {"z-image": ({"n_layers": 2}, {5: 28}), "klein-4b": ({"num_layers": 2, "num_single_layers": 2}, {1: 3, 3: 18}),
       "flux2-dev": ({"num_layers": 2, "num_single_layers": 2}, {1: 6, 3: 46}), "qwen-image": ({"num_layers": 2}, {1: 58}),
       "flux1": ({"num_layers": 2, "num_single_layers": 2}, {1: 17, 3: 36}), "sd35": ({"num_layers": 3}, {1: 35})}


def repeated(events, copies):
    """Events of a model with so many more copies of these of its blocks, each with what is kept ahead of it."""
    blocks, rest = [], []
    for event in events:
        if rest and rest[-1][2] is not None and event[2] != rest[-1][2]:
            blocks, rest = [*blocks, rest], []
        rest.append(event)
    found = []
    for number, block in enumerate(blocks):
        for copy in range(1 + copies.get(number, 0)):
            found += [(what, size, stretch if stretch is None else (number, copy)) for what, size, stretch in block]
    assert len(blocks) >= 1 + max(copies), (len(blocks), copies)
    return tuple(found + rest)


class Case:
    """A training of a model of full size that has no memory: how much each plan would take, surveyed when it is asked for."""

    def __init__(self, arch, method):
        self.s, self.arch = parse_settings(["--train", "--method", method, "--mixed_precision", "bf16", "--max_vram", "80", "--no-offload_blocks"]), arch
        self.models = flow_models(arch, "meta") if arch in FLOWS else random_models(arch, "meta")
        self.surveyed = flow_models(arch, "meta", **FEW[arch][0]) if arch in FEW else self.models
        self.recipe, self.plan, self.demands = recipe_for(self.models.family, self.s), Plan(torch.device("cuda"), "bf16"), {}
        self.resolution = default(self.s.resolution, self.models.resolution)

    def bytes_of(self, levers, number):
        """That a plan takes on each of so many GPUs."""
        family = self.models.family
        passing = (levers.split_batch, levers.weights, levers.base_precision, levers.shard,
                   is_bf16_throughout(self.s, family, levers, "bf16"))
        if passing not in self.demands:
            told = self.models.book and self.models.book.told["a dog"]
            found = survey(self.s, self.surveyed, [SUBJECT], self.recipe, self.resolution, self.plan, levers, told)
            self.demands[passing] = self.whole(found, levers) if self.surveyed is not self.models else found
        return sum(estimate(self.demands[passing], levers, number).values())

    def whole(self, demand, levers):
        """The Demand of the whole model of one of a few blocks."""
        with torch.device("meta"):
            hollow = hollow_models(self.s, dataclasses.replace(self.models, tokenizers=[], text_encoders=[]), self.plan, levers)
            groups = parameter_groups(self.s, hollow, [SUBJECT], self.recipe)
        trained = {parameter for group in groups for parameter in group.parameters}
        fewer = in_fewer_bits(hollow.denoiser, levers.base_precision) - trained
        frozen = sum(p.nbytes for p in hollow.denoiser.parameters() if p not in trained | fewer)
        frozen += sum(p.numel() * BASES[levers.base_precision].bytes_per_weight for p in fewer)
        gathered = gathered_bytes(self.models.family, hollow.denoiser, trained) if levers.shard else 0
        shapes = tuple(tuple(p.shape) for p in hollow.denoiser.parameters() if p in trained)
        return Demand(shapes, frozen, demand.passes, repeated(demand.events, FEW[self.arch][1]), gathered)

    def least(self, levers, number):
        """What it takes of that at least, which needs no survey: the weights, and what the optimizer remembers of those that train."""
        shapes = [tuple(p.shape) for p in self.models.denoiser.parameters()]
        if self.s.method == "full":
            return sum(estimate(Demand(tuple(shapes), 0, 1, ()), levers, number).values())
        per_weight = BASES[levers.base_precision].bytes_per_weight or 2
        return sum(map(math.prod, shapes)) * per_weight * 0.9 / (number if levers.shard else 1)  # not all are linear layers'

    def choice(self, number, size):
        """{"flags", "gib"} of the first plan that fits; {} if none does."""
        memory_plans.processes = lambda: number
        for levers in plans(self.s, self.models.family, self.plan):
            limit = AUTO * size * GIB
            if self.least(levers, number) <= limit and (needed := self.bytes_of(levers, number)) <= limit:
                return {"flags": flags_of(levers), "gib": round(needed / GIB, 1)}
        return {}


SHORT = {"--gradient_checkpointing": "c", "--split_batch": "b", "--fused_backward": "f", "--offload_optimizer": "o",
         "--optimizer": "", "--base_precision": "", "--weights": "weights in"}


def how(choice, number):
    """A choice as a cell of the table, of GiB and of flags that are SHORT."""
    if not choice:
        return "no plan fits"
    words = choice["flags"].split()
    kept = ", ".join(re.sub(r"--\w+", lambda found: SHORT[found[0]], choice["flags"].replace("--shard", "")).split())
    kept = kept.replace("weights, in, ", "weights in ")
    return ("" if number == 1 else "**FSDP2** " if "--shard" in words else "DDP ") + str(choice["gib"]) + (f" ({kept})" if kept else "")


def choose(path):
    """Fill `path` with the choice of every model and method, and print the tables."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    for arch in ARCHS:
        for method in ("lora", "full"):
            if (name := f"{arch} {method}") not in found:
                case = Case(arch, method)
                found[name] = {f"{number} x {size}": case.choice(number, size) for size in SIZES for number in NUMBERS}
                path.write_text(json.dumps(found, indent=1) + "\n")
                print(name, found[name], flush=True)
    for size in SIZES:
        print(f"\n| GPUs of {size} GiB | " + " | ".join(map(str, NUMBERS)) + " |\n|---|" + "---|" * len(NUMBERS))
        for name, choices in sorted(found.items()):
            print(f"| {name} | " + " | ".join(how(choices[f"{number} x {size}"], number) for number in NUMBERS) + " |")


# ---- traffic


def traffic(weights, trained, number, copy_bytes, passes=1):
    """{"all-gather", "reduce-scatter", "DDP": bytes} that each of `number` processes sends in a step of so many backward passes.

    Split, the weights are gathered twice in a pass, forward and backward, in copies of so many bytes each; gradients are sent in float32.
    Of what all have together each sends (number - 1) / number. DDP sends gradients on a ring twice, however many passes a step has.
    """
    share = (number - 1) / number
    return {"all-gather": 2 * passes * share * weights * copy_bytes, "reduce-scatter": passes * share * trained * 4,
            "DDP": 2 * share * trained * 4}


LINKS = {8: {"NVLink, 450 GB/s": 450e9, "PCIe 4.0 x16, 25 GB/s": 25e9},
         64: {"8 x InfiniBand of 400 Gbit/s, 400 GB/s a machine": 400e9, "Ethernet of 100 Gbit/s, 12.5 GB/s a machine": 12.5e9}}
WEIGHTS = {"SDXL": 2.567e9, "Z-Image": 6.155e9, "FLUX.1 dev": 11.9e9, "Qwen-Image": 20.43e9, "FLUX.2 dev": 32.22e9}
LORA = 0.005  # of the weights, about what a LoRA of rank 16 has


def on_paper():
    """Print what a step sends and how long that takes if nothing else happens meanwhile: what a ring's slowest link lets through."""
    for number, links in LINKS.items():
        print(f"\n| {number} GPUs | weights fetched | gradients sent | " + " | ".join(links) + " |\n|---|---|---|" + "---|" * len(links))
        for name, weights in WEIGHTS.items():
            for method, trained in (("full", weights), ("LoRA", LORA * weights)):
                sent = traffic(weights, trained, number, 2)
                both = sent["all-gather"] + sent["reduce-scatter"]
                times = " | ".join(f"{both / speed:.2f} s" for speed in links.values())
                print(f"| {name}, {method} | {sent['all-gather'] / 1e9:.1f} GB | {sent['reduce-scatter'] / 1e9:.1f} GB | {times} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["plans", "traffic"])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "several-gpus.json")
    own = parser.parse_args()
    choose(own.results) if own.what == "plans" else on_paper()

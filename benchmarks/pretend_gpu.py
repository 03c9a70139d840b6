"""What a training would hold on a CUDA GPU, counted without one, beside what the memory plan expects.

    python benchmarks/pretend_gpu.py --arch sdxl --max_vram 10

The program's own loop runs on models of full size whose tensors have no memory: torch's FakeTensor does all of a step but the
arithmetic, and pretend_gpu.cpp (compiled here, with g++) tells torch that there is a GPU to do it on. Two steps are taken and
one picture drawn, as --validation_steps does (but not by flow models, whose pipelines ask for the values of tensors). A tensor left on the wrong device ends the run, as on a GPU. Counted are tensors
alone, not the workspaces of CUDA's libraries, and how often a step converts tensors from one precision to another. With adamw8bit
more is counted than there would be: its step, compiled on a GPU, is taken piece by piece. All flags of --train can be given. What
was counted is entered in benchmarks/results/pretend-gpu.json, and all that is there printed as a table.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import torch

if __name__ == "__main__" and "PRETENDING" not in os.environ:  # start again, with the library before all others
    home, library = Path(torch.__file__).parent, tempfile.mkdtemp() + "/pretend_gpu.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-std=c++20", f"-I{home}/include", f"-L{home}/lib", "-o", library,
                    Path(__file__).with_suffix(".cpp"), "-ltorch_cpu", "-lc10"], check=True)
    os.environ |= {"PRETENDING": library, "LD_PRELOAD": library, "LD_LIBRARY_PATH": f"{home}/lib"}
    os.execv(sys.executable, [sys.executable, *sys.argv])

from accelerate.state import PartialState
from bench_train import RESULTS, UNETS, made_up_cache, random_models
from methods import REPOSITORY
from newer_models import FLOWS, as_planned, flow_models
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_leaves

from dreambooth.arguments import parse_settings
from dreambooth.base import GIB, default
from dreambooth.data.latents import cache_latents
from dreambooth.device import Plan
from dreambooth.drawing.draw import draw
from dreambooth.memory import plan as plan_module
from dreambooth.memory.demand import survey
from dreambooth.memory.estimate import estimate
from dreambooth.memory.plan import choose_levers
from dreambooth.methods.table import METHODS, parameter_groups, preserves_prior
from dreambooth.models import streamed_blocks
from dreambooth.subjects.words import Subject
from dreambooth.training import loop
from dreambooth.training.course import Course, recipe_for
from dreambooth.training.levers import flags_of
from dreambooth.training.loop import train_step
from dreambooth.training.optimizers import OPTIMIZERS
from dreambooth.training.prepare import prepare_training
from dreambooth.training.processes import make_accelerator
from dreambooth.training.samples import ready_to_draw

GPU = torch.device("cuda", 0)
PHOTOS = 5
PHOTO = REPOSITORY / "instance_images" / "0.png"


def outside_modes(function):
    """`function`, run on real tensors."""
    def wrapped(*args, **options):
        with _disable_current_modes():
            return function(*args, **options)
    return wrapped


def convert_in_place(module, convert, recurse=True):
    """Module._apply() for fake tensors, whose own would make other parameters: those that the optimizer has must stay."""
    for child in module.children():
        child._apply(convert)  # of which a block that waits has one of its own
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            new = convert(parameter)
        if is_traceable_wrapper_subclass(parameter):  # in fewer bits: it does not train
            module._parameters[name] = torch.nn.Parameter(new, requires_grad=False)
            continue
        parameter.data = new
        if isinstance(parameter, FakeTensor):
            parameter.fake_device = new.fake_device
    module._buffers.update({name: convert(buffer) for name, buffer in module._buffers.items()
                            if buffer is not None and buffer.dim() > 0})  # but for a counter of batches
    return module


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """scaled_dot_product_attention() by the kernel that a GPU would choose: FlashAttention in half precision."""
    if query.device != GPU:
        return OWN_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if attn_mask is None and query.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


def tensor_anywhere(data, *args, device=None, **options):
    """torch.tensor(), on the GPU as well."""
    if device is None or torch.device(device).type != "cuda":
        return OWN_TENSOR(data, *args, device=device, **options)
    like = OWN_TENSOR(data, **options)
    return torch.empty(like.shape, dtype=like.dtype, device=GPU)


class Silu(torch.autograd.Function):
    """silu() whose backward pass is one operation, as on a GPU."""

    @staticmethod
    def forward(context, values, inplace=False):
        context.save_for_backward(values)
        return torch.ops.aten.silu(values)

    @staticmethod
    def backward(context, gradient):
        return torch.empty_like(context.saved_tensors[0]), None


OWN_ATTENTION, OWN_TENSOR = torch.nn.functional.scaled_dot_product_attention, torch.tensor


def pretend(mode):
    """Have torch believe in a GPU, and what needs the values of tensors run on real ones."""
    answers = dict(is_available=True, is_bf16_supported=True, current_device=0, device_count=1, get_device_capability=(9, 0),
                   _is_in_bad_fork=False, _lazy_init=None, set_device=None, empty_cache=None, synchronize=None, manual_seed_all=None)
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **options: answer)
    torch.nn.Module._apply = convert_in_place
    torch.nn.functional.scaled_dot_product_attention, torch.tensor = attention, tensor_anywhere
    torch.nn.functional.silu = Silu.apply
    torch.Tensor.pin_memory = lambda tensor: tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)
    plan_module.lacks_room = lambda waiting: ""  # whatever memory this machine has
    streamed_blocks.side_stream, streamed_blocks.page_locked = lambda device: None, lambda size: torch.empty(size, dtype=torch.uint8)
    torch.Tensor.unique = outside_modes(lambda numbers, **_: (list(range(len(numbers))), torch.arange(len(numbers))))
    FakeTensor.tolist = lambda tensor: [0] * len(tensor)  # numbers of prompts: each the first
    torch.manual_seed = lambda seed: torch.default_generator
    torch.compiler.set_stance("force_eager")
    with contextlib.suppress(ImportError):  # tables that are computed once
        from torchao.optim import subclass_8bit

        subclass_8bit.get_qmap_signed(), subclass_8bit.get_qmap_unsigned()
    loop.make_batch = outside_modes(loop.make_batch)
    OPTIMIZERS.update({name: dataclasses.replace(kind, make=outside_modes(kind.make)) for name, kind in OPTIMIZERS.items()})


class NoScheduler:
    """A scheduler of one step that needs no values of tensors."""

    init_noise_sigma, order, config = 1.0, 1, {}

    def set_timesteps(self, steps, device=None):
        self.timesteps = [torch.full((), 999)]

    def scale_model_input(self, latents, timestep):
        return latents

    def step(self, prediction, timestep, latents, return_dict=False):
        return [latents - prediction]


def draw_one(run, resolution):
    """Draw one picture beside a training, as far as it can be drawn."""
    run.models.pipeline.scheduler = NoScheduler()
    run.models.pipeline.image_processor.postprocess = lambda pixels, **_: [Image.effect_noise((8, 8), 80).convert("RGB")]
    with ready_to_draw(run) as pipeline:
        list(draw(pipeline, [("a <dog> dog", 0)], steps=1, guidance_scale=5, height=resolution, width=resolution, batch_size=1))


class Memory(TorchDispatchMode):
    """Counts the bytes of tensors on the GPU, now and at most, and casts, and lists what copies from the GPU waited for it."""

    def __init__(self):
        super().__init__()
        self.held, self.peak, self.casts, self.known, self.waits = 0, 0, 0, set(), []

    def stage(self):
        """The peak since the last stage; casts and what waits are counted anew."""
        peak, self.peak, self.casts, self.waits = self.peak, self.held, 0, []
        return peak

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.casts += function in (torch.ops.aten._to_copy.default, torch.ops.aten._foreach_copy_.default)
        places = [{t.device.type for t in tree_leaves(group) if torch.is_tensor(t)} for group in ((args, kwargs), result)]
        if "cuda" in places[0] and places[1] == {"cpu"}:
            self.waits.append(str(function))
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor) and tensor.device == GPU:
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key not in self.known:
            self.known.add(key)
            self.held += size
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self.free, key, size)

    def free(self, key, size):
        self.known.remove(key)
        self.held -= size


def enter(row, path):
    """Put a row into the JSON at `path`, in place of what was counted of the same before; all rows of it."""
    rows = json.loads(path.read_text()) if path.is_file() else []
    rows = [old for old in rows if (old["arch"], old["flags"]) != (row["arch"], row["flags"])] + [row]
    rows.sort(key=lambda row: (row["arch"], row["flags"]))
    path.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def table(rows):
    """A Markdown table of what was counted, in GiB."""
    lines = ["| model | flags | plan | expected | with reserve | counted | prepared at most | drawn at most | casts |",
             "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        figures = (f"{row[what]:.2f}" for what in ("expected", "with_reserve", "counted", "preparing", "drawing"))
        plan = f"`{row['plan']}`" if row["plan"] else "nothing has to be saved"
        lines.append(f"| {row['arch']} | `{row['flags']}` | {plan} | {' | '.join(figures)} | {row['casts']} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", choices=[*UNETS, *FLOWS], default="sd15")
    parser.add_argument("--results", type=Path, default=RESULTS / "pretend-gpu.json")
    own, passed_on = parser.parse_known_args()
    shutil.rmtree(Path(os.environ["PRETENDING"]).parent)  # the library is loaded
    s = parse_settings(["--train", "--mixed_precision", "bf16", "--max_vram", "80", *passed_on])
    mode, memory, plan = FakeTensorMode(allow_non_fake_inputs=True), Memory(), Plan(GPU, s.mixed_precision)
    pretend(mode)
    accelerator = make_accelerator(s, dataclasses.replace(plan, device=torch.device("cpu")))
    PartialState._shared_state["device"] = accelerator.state.device = GPU

    make = flow_models if own.arch in FLOWS else random_models
    models = make(own.arch, "meta")
    resolution = default(s.resolution, models.resolution)
    recipe, subjects = recipe_for(models.family, s), [Subject("<dog>", "a dog", "a <dog> dog", "dog")]
    levers = choose_levers(s, models, subjects, recipe, resolution, plan)
    told = models.book and models.book.arch.told()
    parts = estimate(survey(s, models, subjects, recipe, resolution, plan, levers, told), levers)
    cache = made_up_cache(models, resolution, PHOTOS, PHOTOS * preserves_prior(s))
    with mode:
        models = make(own.arch)
        if METHODS[s.method].is_adapter:
            models.denoiser.to(plan.dtype)
        models = as_planned(models, levers, GPU)
        groups = parameter_groups(s, models, subjects, recipe)
        with memory:
            cache_latents(models, [[(PHOTO, "a dog")]], [], resolution, GPU)
            course = Course(3, resolution, plan.precision, levers, "constant", recipe.use_ema)
            run = prepare_training(s, course, models, groups, cache, accelerator, {})
            preparing = memory.stage()
            train_step(run, 0)
            memory.casts = 0
            train_step(run, 1)
            casts = memory.casts
            if memory.waits:
                print(f"A step waits for the GPU: {', '.join(sorted(set(memory.waits)))}")
            counted = memory.stage()
            if own.arch in UNETS:  # the pipelines of others ask what tensors hold
                draw_one(run, resolution)
            drawing = memory.stage()
            train_step(run, 2)  # everything is where it was
    figures = {"expected": sum(parts.values()) - parts["reserve"], "with_reserve": sum(parts.values()), "counted": counted,
               "preparing": preparing, "drawing": drawing}
    row = {"arch": own.arch, "flags": " ".join(passed_on), "plan": flags_of(levers), "date": datetime.date.today().isoformat(),
           "torch": torch.__version__, "casts": casts, **{what: size / GIB for what, size in figures.items()}}
    print(table(enter(row, own.results)))


if __name__ == "__main__":
    main()

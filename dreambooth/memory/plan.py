"""The memory plan: the first of the plans that fits."""

import contextlib
import dataclasses
import math

from dreambooth.base import GIB, UserError, default, processes, say, short_path
from dreambooth.device import lacks_room, memory_limit, peak_memory
from dreambooth.memory.demand import survey
from dreambooth.memory.estimate import estimate
from dreambooth.memory.plans import check_package, missing_package, objection, plans
from dreambooth.training.checkpoints import checkpoints_in
from dreambooth.training.course import Course
from dreambooth.training.levers import Levers, flags_of, levers_by_hand
from dreambooth.training.precision import is_bf16_throughout


def choose_levers(s, models, subjects, recipe, resolution, plan):
    """The first of the plans that fits into --max_vram; says what it is expected to take. UserError if none does.

    Those that need a library which is not installed are passed over, and that is said.
    """
    limit, rows, demands, least, uninstalled = memory_limit(s, plan), plans(s, models.family, plan), {}, math.inf, None
    as_whole, crowded = math.inf, ""  # the least of those before that split nothing; what there is no room for in the CPU's memory
    if limit is None:
        return rows[0]
    if processes() > 1:  # all must take the same plan
        from accelerate.utils import gather_object

        limit = min(gather_object([limit]))
    told = frozen_conditioning(models, subjects, plan.device)
    for levers in rows:
        passing = (levers.split_batch, levers.weights, levers.base_precision, levers.shard, levers.offload_blocks,
                   is_bf16_throughout(s, models.family, levers, plan.precision))
        try:
            demands[passing] = demands.get(passing) or survey(s, models, subjects, recipe, resolution, plan, levers, told)
        except (RuntimeError, NotImplementedError, TypeError, AttributeError) as problem:  # a layer that has no stand-in
            if s.max_vram != "auto":
                raise
            say(f"Note: the memory this takes cannot be told beforehand ({' '.join(str(problem).split())[:200]}); nothing is "
                f"saved unless by hand.")
            return rows[0]
        if lacking := lacks_room(demands[passing].waiting):
            crowded = lacking
            continue
        parts = estimate(demands[passing], levers)
        needed = sum(parts.values())
        least, as_whole = min(least, needed), as_whole if levers.shard else min(as_whole, needed)
        if needed > limit:
            continue
        if not missing_package(levers):
            if crowded:
                say(f"Note: {crowded.removeprefix('; ')}.")
            say_plan(levers, parts, limit, uninstalled)
            say_division(levers, as_whole)
            return levers
        uninstalled = uninstalled or levers
    if uninstalled:
        check_package(uninstalled)
    raise UserError(f"--max_vram {s.max_vram}: the most frugal plan takes {least / GIB:.2f} GiB, "
                    f"{(least - limit) / GIB:.2f} more than there are; give --method lora, a smaller --resolution or fewer "
                    f"flags that rule plans out{more_gpus(s, models, subjects, recipe, resolution, plan, limit)}{crowded}")


SPLIT = Levers(gradient_checkpointing=True, split_batch=True, shard=True)  # the most frugal of the plans that split


def more_gpus(s, models, subjects, recipe, resolution, plan, limit):
    """The end of a sentence: over how many such GPUs the model could be split; "" if over none."""
    levers = dataclasses.replace(SPLIT, **{**levers_by_hand(s), "shard": True})
    if s.shard is False or objection(s, models.family, levers, plan.precision):
        return ""
    told = frozen_conditioning(models, subjects, plan.device)
    demand = survey(s, models, subjects, recipe, resolution, plan, levers, told)
    fits = [number for number in (2, 4, 8, 16) if number > processes() and sum(estimate(demand, levers, number).values()) <= limit]
    return f", or split it over {fits[0]} such GPUs (`accelerate launch --num_processes {fits[0]}`)" if fits else ""


def say_division(levers, as_whole):
    """Say whether several processes each train the whole model, or a share of it, and why: it would take `as_whole` bytes."""
    why = "as asked" if as_whole == math.inf else f"whole it would take {as_whole / GIB:.2f} GiB"
    if processes() > 1:
        say(f"{processes()} processes: " + (f"the model is split over them (FSDP2), {why}." if levers.shard else
                                            "each trains the whole model (DDP), which fits."))


def frozen_conditioning(models, subjects, device):
    """The conditioning of a prompt by text encoders that never train; None where they may."""
    import torch

    prompts = [subjects[0].instance_prompt]
    if models.book:
        models.book.learn(models, prompts, device)
        return models.book.told[prompts[0]]
    if models.family.trains_text:
        return None
    with torch.no_grad():
        return models.family.encode(models, prompts)


def say_plan(levers, parts, limit, uninstalled):
    """Say what was chosen and what it is expected to take, after a plan that was passed over for want of a library, if any."""
    if uninstalled:
        package = missing_package(uninstalled)
        say(f"Note: {flags_of(uninstalled)} would do, too, but needs {package}: pip install {package}.")
    say(f"Memory plan: {flags_of(levers) or 'nothing has to be saved'}. Estimate: {sum(parts.values()) / GIB:.2f} of "
        f"{limit / GIB:.2f} GiB (" + ", ".join(f"{part} {size / GIB:.2f}" for part, size in parts.items() if size) + ")")


@contextlib.contextmanager
def naming_next_plan(s, family, levers, plan, folder):
    """Say after the block what its peak was. If memory runs out in it: UserError that names the next plan to try."""
    import torch

    if plan.device.type == "cuda":
        torch.cuda.empty_cache()  # what drawing and encoding have left unused
        torch.cuda.reset_peak_memory_stats(plan.device)
    try:
        yield
    except RuntimeError as problem:
        if "out of memory" not in str(problem):
            raise
        rows = plans(s, family, plan)
        more = rows[rows.index(levers) + 1:]
        saved = next(reversed(checkpoints_in(folder)), None)
        remedy = flags_of(more[0]) if more else "a smaller --resolution, or --method lora"
        intact = f" (the checkpoint {short_path(saved)} is intact)" if saved else ""
        raise UserError(f"the GPU's memory is full; try {remedy}{intact}") from None
    say(f"Peak memory of training: {peak_memory(plan.device)}")


def set_course(s, models, subjects, recipe, plan):
    """The Course of a training: the flags, and where they leave it open the recipe, the model and the memory there is."""
    resolution = default(s.resolution, models.resolution)
    models.family.check_side(models.pipeline, resolution, "--resolution")
    if s.lr_warmup_steps >= recipe.steps:
        raise UserError(f"--lr_warmup_steps {s.lr_warmup_steps}: must be less than the {recipe.steps} steps of this run")
    levers = choose_levers(s, models, subjects, recipe, resolution, plan)
    if levers.fused_backward and s.max_grad_norm:
        say("Fused backward: each tensor's gradient is scaled down to --max_grad_norm by itself, not all together.")
    if recipe.use_ema:
        say("Weights: their running average over about the last 100 steps is drawn and saved.")
    return Course(recipe.steps, resolution, plan.precision, levers, recipe.lr_scheduler, recipe.use_ema, recipe.snr_gamma)

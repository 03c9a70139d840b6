"""The plans, from the fastest to the most frugal, and which of them can be had."""

import dataclasses
import importlib.util

from dreambooth.base import UserError, processes
from dreambooth.device import memory_limit, missing_compiler
from dreambooth.methods.table import METHODS
from dreambooth.mishaps import check_import
from dreambooth.models.quantized import BASES, why_not
from dreambooth.models.streamed_blocks import NO_COPIES_OF_NF4
from dreambooth.training.levers import Levers, levers_by_hand
from dreambooth.training.optimizers import OPTIMIZERS


def objection(s, family, levers, precision):
    """Why these levers cannot be used together, or None."""
    optimizer, fused, half, split = OPTIMIZERS[levers.optimizer], levers.fused_backward, levers.weights == "bf16", levers.shard
    waits = levers.offload_blocks
    is_quantized = levers.base_precision != "bf16"
    means = [flag for flag in OPTIMIZERS["adamw"].flags if getattr(s, flag) is not None]
    return next((text for wrong, text in (
        (split and precision == "fp16", "--shard: fp16 gradients are checked all together; give --mixed_precision bf16 or no"),
        (split and fused, "--shard: gradients are split, not freed one by one; leave out --fused_backward"),
        (split and levers.optimizer != "adamw",
         f"--shard: --optimizer {levers.optimizer} would not see a tensor whole; leave it out, AdamW's is split, too"),
        (split and is_quantized,
         f"--shard: weights of --base_precision {levers.base_precision} cannot be split; leave one out"),
        (split and s.train_text_encoder, "--shard: the denoiser alone is split; leave out --train_text_encoder"),
        (split and METHODS[s.method].adds_words,
         f"--shard: the denoiser alone is split, and --method {s.method} trains new words; leave one out"),
        (split and s.prior == "frozen" and not METHODS[s.method].is_adapter,
         "--shard: --prior frozen would keep a whole copy of the model in each process; leave one out, or train a LoRA"),
        (split and s.select_best, "--shard: --select_best keeps whole weights; leave one out"),
        (split and s.compile, "--shard: not tried with --compile; leave one out"),
        (split and s.channels_last, "--shard: shares have no --channels_last; leave one out"),
        (fused and s.gradient_accumulation_steps > 1,
         "--fused_backward: it steps and frees gradients at once, none accumulate; leave out --gradient_accumulation_steps"),
        (fused and levers.split_batch,
         "--fused_backward: it steps once photos have their gradients, before class images; leave out --split_batch"),
        (fused and not optimizer.by_tensor,
         f"--fused_backward: --optimizer {levers.optimizer} needs all gradients at once; give another optimizer"),
        (fused and precision == "fp16",
         "--fused_backward: fp16 gradients are checked all together before a step; give --mixed_precision bf16 or no"),
        (half and not (optimizer.rounds or fused),
         "--weights bf16: rounded to the nearest they would miss small steps; give --optimizer adamw8bit or --fused_backward, "
         "either of which rounds stochastically"),
        (levers.offload_optimizer and not fused,
         "--offload_optimizer: states come to the GPU one tensor at a time as --fused_backward steps it; give that, too"),
        (is_quantized and not has_frozen_base(s, family),
         f"--base_precision {levers.base_precision}: for a LoRA of a transformer whose text encoders do not train; leave it out"),
        (is_quantized and s.use_dora, f"--base_precision {levers.base_precision}: DoRA needs the weights themselves; leave one out"),
        (is_quantized and s.adapter_type not in (None, "lora"),
         f"--base_precision {levers.base_precision}: --adapter_type {s.adapter_type} needs the weights themselves; leave one out"),
        (is_quantized and precision == "fp16",
         f"--base_precision {levers.base_precision}: give --mixed_precision bf16"),
        (waits and not has_frozen_base(s, family),
         "--offload_blocks: for a LoRA of a transformer whose text encoders do not train; leave it out"),
        (waits and not levers.gradient_checkpointing,
         "--offload_blocks: without recomputation the copies of all blocks would stay; give --gradient_checkpointing, too"),
        (waits and (split or processes() > 1), "--offload_blocks: for one process alone; leave it out, or start one"),
        (waits and levers.base_precision == "nf4", NO_COPIES_OF_NF4),
        (waits and s.compile, "--offload_blocks: a compiled block knows its weights' places; leave out --compile"),
        (half and s.use_ema, "--use_ema: an average of --weights bf16 would be too coarse; leave one out"),
        (half and precision != "bf16", "--weights bf16: the arithmetic must be bf16, too; give --mixed_precision bf16"),
        (half and METHODS[s.method].is_adapter,
         f"--weights bf16: --method {s.method} trains too few weights to save anything; leave it out"),
        (means and not optimizer.flags,
         f"--{min(means, default='')}: --optimizer {levers.optimizer} keeps no such means; leave one out"),
        (s.scale_lr and levers.optimizer == "prodigy",
         "--scale_lr: --optimizer prodigy finds the learning rate by itself; leave one out"),
        (levers.optimizer == "prodigy" and s.method == "pivotal",
         "--optimizer prodigy: the new words of --method pivotal could not rest; give another optimizer"),
    ) if wrong), None)


def is_late(s, family):
    """Whether a model of this family is read part by part in this training."""
    return family.comes_late and not s.train_text_encoder and not METHODS[s.method].adds_words


def has_frozen_base(s, family):
    """Whether only what stands beside a transformer trains, the transformer being read late."""
    return METHODS[s.method].is_adapter and is_late(s, family)


def check_levers(s, family, plan):
    """UserError unless the levers set by hand work together, here, within a limit that can be understood."""
    levers = Levers(**levers_by_hand(s))
    if wrong := objection(s, family, levers, plan.precision):
        raise UserError(wrong)
    check_package(levers)
    if wrong := why_not(levers.base_precision, plan.device):
        raise UserError(wrong)
    if s.compile and (lacking := missing_compiler(plan.device)):
        raise UserError(f"--compile needs {lacking}; install it, or leave the flag out")
    memory_limit(s, plan)


def packages_of(levers):
    """{flag with its value: package that it needs}."""
    needed = {f"--optimizer {levers.optimizer}": OPTIMIZERS[levers.optimizer].package,
              f"--base_precision {levers.base_precision}": BASES[levers.base_precision].package}
    return {flag: package for flag, package in needed.items() if package}


def missing_package(levers):
    """A library that these levers need if it is not installed, else None."""
    return next((package for package in packages_of(levers).values() if importlib.util.find_spec(package) is None), None)


def check_package(levers):
    """UserError if a library that these levers need is not installed, or broken."""
    missing = missing_package(levers)
    for flag, package in packages_of(levers).items():
        if package == missing:
            raise UserError(f"{flag} needs {package}: pip install {package}")
        check_import(package, flag)


PLANS = (  # from the fastest to the most frugal
    Levers(),
    Levers(split_batch=True),
    Levers(gradient_checkpointing=True),
    Levers(gradient_checkpointing=True, split_batch=True),
    Levers(gradient_checkpointing=True, shard=True),  # where several processes train
    Levers(gradient_checkpointing=True, split_batch=True, shard=True),
    Levers(gradient_checkpointing=True, split_batch=True, base_precision="int8"),
    Levers(gradient_checkpointing=True, split_batch=True, base_precision="nf4"),
    Levers(gradient_checkpointing=True, fused_backward=True),
    Levers("adamw8bit", gradient_checkpointing=True, split_batch=True),
    Levers("adamw8bit", gradient_checkpointing=True, fused_backward=True),
    Levers("adafactor", gradient_checkpointing=True, fused_backward=True),  # saves in matrices, hardly in convolutions
    Levers("adamw8bit", "bf16", gradient_checkpointing=True, fused_backward=True),
    Levers("adafactor", "bf16", gradient_checkpointing=True, fused_backward=True),
    Levers("adamw8bit", "bf16", gradient_checkpointing=True, fused_backward=True, offload_optimizer=True),
    Levers(gradient_checkpointing=True, split_batch=True, offload_blocks=True),  # of frozen transformers
    Levers(gradient_checkpointing=True, split_batch=True, base_precision="int8", offload_blocks=True),
)


def plans(s, family, plan):
    """Those of PLANS that can be had, with what was set by hand as it was set."""
    rows = dict.fromkeys(dataclasses.replace(row, **levers_by_hand(s)) for row in PLANS)
    return [row for row in rows if not objection(s, family, row, plan.precision) and (processes() > 1 or not row.shard)
            and (row.base_precision != "nf4" or plan.device.type == "cuda")]

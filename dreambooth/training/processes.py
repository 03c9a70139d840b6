"""Several processes that train together, and half precision: what accelerate does for us.

Each trains the whole model; their gradients are averaged.
"""

import os

from dreambooth.base import say


def ignore_splitting():
    """Have accelerate overlook a configuration that splits the model over GPUs: --max_vram fits it into each by other means."""
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.pop(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            say(f"accelerate's configuration says {kind}, which splits the model; here each GPU trains it whole, with gradients "
                f"averaged, as a plain multi-GPU configuration has it.")
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # would go before the flag of this program


def make_accelerator(s, plan):
    """What brings models to their devices, wraps them for half precision, and lets several processes train together.

    Autocast makes its copy of a weight anew for each use. There is but one in a pass, and with gradient checkpointing a copy
    that it kept would lie there from its layer to the end of the pass for nothing.
    """
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs

    return Accelerator(mixed_precision=plan.precision, cpu=plan.device.type == "cpu",
                       gradient_accumulation_steps=s.gradient_accumulation_steps,
                       kwargs_handlers=[AutocastKwargs(cache_enabled=False)])

"""Several processes that train together, and half precision: what accelerate does for us.

Each trains the whole model; their gradients are averaged.
"""

import contextlib
import os
import sys
import threading

from dreambooth.base import UserError, place_among_processes, processes, say

MEETING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # all of which several processes need to meet
ASKING = {"RANK": "0", "LOCAL_RANK": "0 -1", "WORLD_SIZE": "1", "PMI_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1",
          "MV2_COMM_WORLD_SIZE": "1"}  # what one process alone would have there
SPLITTING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
OVERRIDING = ("GRADIENT_ACCUMULATION_STEPS", "MIXED_PRECISION", "TORCH_DEVICE", "USE_CPU", "USE_PARALLELISM_CONFIG", "DEBUG_MODE",
              "USE_SAGEMAKER")  # of accelerate's, where the flags or the machine decide here
MEETING_PATIENCE = 20  # seconds


def clear_environment():
    """Take out of the environment what accelerate would believe and this program does not, and say what a person may have meant."""
    if processes() == 1:
        asked = [f"{name}={os.environ[name]}" for name, alone in ASKING.items() if os.environ.get(name, "") not in ("", *alone.split())]
        lacking = [name for name in MEETING if not os.environ.get(name)]
        why = f"without {', '.join(lacking)}, by which they would meet" if lacking else "but the numbers do not fit together"
        if asked:
            say(f"Note: {', '.join(asked)} in the environment asks for several processes, {why}: this one trains alone. "
                f"`accelerate launch` sets all that several need.")
        for name in (*MEETING, *ASKING, "FORK_LAUNCHED"):
            os.environ.pop(name, None)
    for kind in SPLITTING:
        if os.environ.pop(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            say(f"accelerate's configuration says {kind}, which splits the model; here each GPU trains it whole, with gradients "
                f"averaged, as a plain multi-GPU configuration has it.")
    overriding = tuple(f"ACCELERATE_{name}" for name in OVERRIDING)
    for name in [name for name in os.environ if name in overriding or name.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]


def make_accelerator(s, plan):
    """What brings models to their devices, wraps them for half precision, and lets several processes train together.

    Autocast makes its copy of a weight anew for each use. There is but one in a pass, and with gradient checkpointing a copy
    that it kept would lie there from its layer to the end of the pass for nothing. accelerate keeps one state per Python process:
    a training before this one, in a notebook, must not decide its precision.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import AutocastKwargs

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with meeting():
        return Accelerator(mixed_precision=plan.precision, cpu=plan.device.type == "cpu",
                           gradient_accumulation_steps=s.gradient_accumulation_steps,
                           kwargs_handlers=[AutocastKwargs(cache_enabled=False)])


@contextlib.contextmanager
def meeting():
    """Several processes meet within the block. It is said if that takes long; UserError if they cannot."""
    rank, _, number = place_among_processes()
    if number == 1:
        yield
        return
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    who = f"RANK={rank} and WORLD_SIZE={number} in the environment: this is one of {number} processes"
    waiting = threading.Timer(MEETING_PATIENCE, print, (f"{who}, waiting for the others at {place}. To train alone, unset them.",),
                              {"file": sys.stderr, "flush": True})
    waiting.daemon = True
    waiting.start()
    try:
        yield
    except (RuntimeError, ValueError) as problem:  # of torch.distributed, whichever way they failed to meet
        reason = " ".join(str(problem).split("\n")[0].split())[:200]
        raise UserError(f"{who}, and they cannot meet at {place} ({reason}); start them with `accelerate launch`, or unset these "
                        f"to train alone") from None
    finally:
        waiting.cancel()

"""Several processes that train together, and half precision: what accelerate does for us.

Each trains the whole model, or its share of it (see shards.py); their gradients are averaged.
"""

import contextlib
import dataclasses
import os
import sys
import threading
from pathlib import Path

from dreambooth.base import UserError, place_among_processes, processes, say

MEETING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # all of which several processes need to meet
ASKING = {"RANK": "0", "LOCAL_RANK": "0 -1", "WORLD_SIZE": "1", "PMI_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1",
          "MV2_COMM_WORLD_SIZE": "1"}  # what one process alone would have there
OTHER_SPLITTING = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}  # accelerate's name: what people call it
IN_VAIN = {"FSDP_OFFLOAD_PARAMS": "true", "FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}
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
    overriding = tuple(f"ACCELERATE_{name}" for name in OVERRIDING)
    for name in [name for name in os.environ if name in overriding or name.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]


def with_configuration(s):
    """Settings with what accelerate's configuration says of splitting the model; what of it is not followed is said.

    UserError where that is left to something else than FSDP. One process alone has nothing to split.
    """
    for kind, name in OTHER_SPLITTING.items():
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise UserError(f"accelerate's configuration says {name}; here FSDP2 splits a model: give --shard, and start with "
                            f"`accelerate launch --multi_gpu --num_processes {max(2, processes())}`, or configure FSDP 2")
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true" and s.shard is None:
        s = dataclasses.replace(s, shard=True)
        if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true" and s.gradient_checkpointing is None:
            s = dataclasses.replace(s, gradient_checkpointing=True)
        in_vain = [f"{name}={value}" for name, value in IN_VAIN.items() if os.environ.get(name, "").lower() == value]
        say("accelerate's configuration says FSDP: the model is split by FSDP2, as with --shard, into blocks that its family names."
            + (f" {', '.join(in_vain)}: not followed." if in_vain else ""))
    if s.shard and processes() == 1:
        say("Note: --shard: this is one process alone, which trains the whole model; `accelerate launch --num_processes 2` starts two.")
        return dataclasses.replace(s, shard=None)
    return s


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


def check_shared(folder, accelerator):
    """UserError unless all processes see a folder of the first one's, in which each will write."""
    from accelerate.utils import gather_object

    without = [rank for rank, sees in enumerate(gather_object([Path(folder).is_dir()])) if not sees]
    if without:
        raise UserError(f"--output_dir: {folder} is not there for process {without[0]} of {accelerator.num_processes}, and each writes "
                        f"its share of a checkpoint; give a folder on a disk that all machines see")


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

"""What saves memory for time or exactness, as data. Which of it is used is decided in `memory`."""

import dataclasses
from dataclasses import dataclass

BYTES = {"fp32": 4, "bf16": 2}  # of a weight


@dataclass(frozen=True)
class Levers:
    """What saves memory for time or exactness. The names are those of the flags."""

    optimizer: str = "adamw"
    weights: str = "fp32"
    gradient_checkpointing: bool = False
    split_batch: bool = False
    fused_backward: bool = False
    offload_optimizer: bool = False
    base_precision: str = "bf16"
    shard: bool = False
    offload_blocks: bool = False


def levers_by_hand(s):
    """{flag: value} of those levers that the user has set."""
    return {f.name: value for f in dataclasses.fields(Levers) if (value := getattr(s, f.name)) not in (None, "auto")}


def flags_of(levers):
    """The flags that set these levers by hand; those of the first plan are the defaults."""
    changed = {f.name: getattr(levers, f.name) for f in dataclasses.fields(levers) if getattr(levers, f.name) != f.default}
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in changed.items())

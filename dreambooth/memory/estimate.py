"""How many bytes a training takes at its peak, from its Demand."""

import itertools
import math

from dreambooth.base import GIB, processes
from dreambooth.training.levers import BYTES
from dreambooth.training.optimizers import state_sizes, step_copies


def peak_of(demand, levers, sharing=1):
    """{"gradients", "step", "activations": bytes} where their sum is largest in the last backward pass of a step.

    A layer going backward has the gradients of what it gave and took in hand, and works on a third such tensor. Of the weights'
    gradients each of those `sharing` them keeps its share.
    """
    fused = levers.fused_backward
    kept = sum(size for what, size, stretch in demand.events
               if what == "kept" and (stretch is None or not levers.gradient_checkpointing))
    total = sum(size for what, size, _ in demand.events if what.startswith("gradient")) / sharing
    in_hand = 3 * max((size for what, size, _ in demand.events if what == "kept"), default=0)
    copies = step_copies(levers) * BYTES["fp32"] / BYTES[levers.weights] if fused else 0  # of a gradient's bytes
    gradients = total if demand.passes > 1 else 0  # those of the passes before
    peak = (gradients, 0, kept)
    for what, size in backward_order(demand.events, levers.gradient_checkpointing):
        if what == "recomputed":
            kept += size
            continue
        if what == "gradient in bf16" or (what == "gradient" and demand.passes == 1):
            gradients += size / sharing
        peak = max(peak, (gradients, copies * size if what == "gradient" else 0, kept + in_hand), key=sum)
        if what in ("kept", "copied"):
            kept -= size
        elif fused:
            gradients -= size
    return dict(zip(("gradients", "step", "activations"), peak))


def backward_order(events, checkpointing):
    """(what, bytes) of events as the backward pass meets them; ahead of a stretch to recompute, "recomputed" and what it keeps."""
    for stretch, inside in itertools.groupby(reversed(events), lambda event: event[2] if checkpointing else None):
        inside = [(what, size) for what, size, _ in inside]
        if stretch is not None:
            yield "recomputed", sum(size for what, size in inside if what in ("kept", "copied"))
        yield from inside


RESERVE = 0.3 * GIB  # workspaces of cuBLAS and cuDNN
SLACK = 0.03  # of all else: what lies unused between tensors


def estimate(demand, levers, number=None):
    """{part: bytes} that a training takes at its peak, in each of a `number` of processes; None: of as many as there are."""
    number = number or processes()
    sharing = number if levers.shard else 1
    per_weight = BYTES[levers.weights]
    states = state_sizes(demand.trained, levers)
    sizes = [math.prod(shape) for shape in demand.trained]
    buffered = number > 1 and not levers.fused_backward and sharing == 1  # processes exchange gradients in buffers of their own
    parts = {"weights": per_weight * sum(sizes) / sharing,
             "optimizer": max(states) if levers.offload_optimizer else sum(states) / sharing,
             "exchange": per_weight * sum(sizes) if buffered else 0, **peak_of(demand, levers, sharing),
             "frozen": demand.frozen / sharing, "gathered": demand.gathered}
    return parts | {"reserve": RESERVE + SLACK * sum(parts.values())}

"""Large transformers that draw: which are read part by part, and in how many bits, so that they have room.

Knows nothing of training.
"""

from dreambooth.base import GIB, UserError, say
from dreambooth.device import lacks_room, memory_limit
from dreambooth.drawing.foreign import changes_text
from dreambooth.mishaps import check_import
from dreambooth.models.addresses import is_single_file
from dreambooth.models.find import family_at
from dreambooth.models.quantized import BASES, in_fewer_bits, why_not
from dreambooth.models.streamed_blocks import NO_COPIES_OF_NF4, recomputed_blocks


def is_read_late(base, trained):
    """Whether the model at `base` draws without its text encoders once they have read the prompts: where nothing that was
    trained, of the list `trained`, is in them."""
    own = not any(each.words or each.lora and changes_text(each.lora) for each in trained)
    return own and family_at(base, "--model_path").comes_late and not is_single_file(base)


def check_bits(s, base, trained, plan):
    """UserError for a --base_precision, or --offload_blocks, that cannot be had here, or not for this model."""
    given = [] if s.base_precision in (None, "auto", "bf16") else [f"--base_precision {s.base_precision}"]
    if s.offload_blocks:
        given.append("--offload_blocks")
    if given and not is_read_late(base, trained):
        raise UserError(f"{given[0]}: for transformers that draw without their text encoders; leave it out")
    if s.base_precision in (None, "auto", "bf16"):
        return
    if wrong := why_not(s.base_precision, plan.device):
        raise UserError(wrong)
    check_import(BASES[s.base_precision].package, f"--base_precision {s.base_precision}")
    if s.offload_blocks and s.base_precision == "nf4":
        raise UserError(NO_COPIES_OF_NF4)


WAYS_TO_DRAW = (  # from the fastest to the most frugal: the key of BASES that a denoiser is read with, whether its blocks wait elsewhere
    ("bf16", False), ("int8", False), ("nf4", False), ("bf16", True), ("int8", True))


def base_to_draw_with(s, models, plan):
    """(the key of BASES that late models' denoiser, which has no memory yet, is to be read with, whether its blocks are to wait in the
    CPU's memory).

    By --base_precision and --offload_blocks; where they leave it open the first that fits beside all else, else the last that can be
    had, and what is not as it would be is said.
    """
    limit, by_hand = memory_limit(s, plan), s.base_precision not in (None, "auto")
    ways = dict.fromkeys((s.base_precision if by_hand else precision, waits if s.offload_blocks is None else s.offload_blocks)
                         for precision, waits in WAYS_TO_DRAW)
    sizes = {way: sizes_of(models, *way, plan.dtype) for way in ways if way != ("nf4", True)}
    fitting = [way for way, (there, _) in sizes.items() if limit is None or there + models.family.room_to_draw <= limit]
    first, reasons = next(iter(sizes)), {way: why_not_drawn(*way, plan, waiting) for way, (_, waiting) in sizes.items()}
    had = [way for way in sizes if not reasons[way]] or [first]
    if first in fitting:
        return first
    chosen = next((way for way in fitting if way in had), had[-1])
    if fitting and reasons[fitting[0]]:
        say(f"Note: {reasons[fitting[0]].removeprefix('; ')}; it would fit.")
    say(f"Memory: the transformer takes {sizes[first][0] / GIB:.1f} GiB as it is, and there are {limit / GIB:.1f}; it comes "
        + in_words(*chosen, sizes[chosen][0], first) + ".")
    return chosen


def why_not_drawn(precision, waits, plan, waiting):
    """Why this way to draw cannot be had here, with so many bytes waiting in the CPU's memory; "" if it can."""
    if precision != "bf16" and plan.precision == "fp16":
        return f"--base_precision {precision} does not go with fp16"
    return precision != "bf16" and why_not(precision, plan.device) or lacks_room(waiting)


def in_words(precision, waits, size, first):
    """How a denoiser comes that takes so many bytes where it computes; `first` is how it would have come."""
    flags = "--base_precision" * (precision != first[0]), "--offload_blocks" * (waits and not first[1])
    if not any(flags):
        return "so all the same"
    bits, blocks = f"in {precision}, " * bool(flags[0]), "block by block, " * waits
    return f"{bits}{blocks}{size / GIB:.1f} GiB{' at a time' * waits} ({', '.join(filter(None, flags))})"


def sizes_of(models, precision, waits, dtype):
    """(bytes of a denoiser's weights where it computes, bytes that wait in the CPU's memory) with a key of BASES, where all else is in
    `dtype`. Of blocks that wait one computes and the next one comes."""
    fewer, per_weight = in_fewer_bits(models.denoiser, precision), BASES[precision].bytes_per_weight

    def size_of(module):
        return sum(weight.numel() * (per_weight if weight in fewer else dtype.itemsize) for weight in module.parameters())
    blocks = [size_of(block) for block in recomputed_blocks(models.denoiser)] if waits else []
    return size_of(models.denoiser) - sum(blocks) + 2 * max(blocks, default=0), sum(blocks)

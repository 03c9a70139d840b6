"""Large transformers that draw: which are read part by part, and in how many bits, so that they have room.

Knows nothing of training.
"""

from dreambooth.base import GIB, UserError, say
from dreambooth.device import memory_limit
from dreambooth.drawing.foreign import changes_text
from dreambooth.mishaps import check_import
from dreambooth.models.addresses import is_single_file
from dreambooth.models.find import family_at
from dreambooth.models.quantized import BASES, in_fewer_bits, why_not


def is_read_late(base, trained):
    """Whether the model at `base` draws without its text encoders once they have read the prompts: where nothing that was
    trained, of the list `trained`, is in them."""
    own = not any(each.words or each.lora and changes_text(each.lora) for each in trained)
    return own and family_at(base, "--model_path").comes_late and not is_single_file(base)


def check_bits(s, base, trained, plan):
    """UserError for a --base_precision that cannot be had here, or not for this model."""
    if s.base_precision in (None, "auto", "bf16"):
        return
    if not is_read_late(base, trained):
        raise UserError(f"--base_precision {s.base_precision}: for transformers that draw without their text encoders; leave it out")
    if wrong := why_not(s.base_precision, plan.device):
        raise UserError(wrong)
    check_import(BASES[s.base_precision].package, f"--base_precision {s.base_precision}")


def base_to_draw_with(s, models, plan):
    """The key of BASES that late models' denoiser, which has no memory yet, is to be read with.

    By --base_precision; else the first that fits beside all else, and what is not that of the arithmetic is said.
    """
    if s.base_precision not in (None, "auto"):
        return s.base_precision
    limit = memory_limit(s, plan)
    sizes = {precision: size_of(models.denoiser, precision, plan.dtype) for precision in ("bf16", "int8", "nf4")}
    fitting = [precision for precision, size in sizes.items() if limit is None or size + models.family.room_to_draw <= limit]
    if "bf16" in fitting or plan.precision == "fp16":
        return "bf16"
    had = [precision for precision in sizes if precision != "bf16" and not why_not(precision, plan.device)]
    chosen = next((precision for precision in fitting if precision in had), (had or ["bf16"])[-1])
    if fitting and fitting[0] not in had:
        say(f"Note: {why_not(fitting[0], plan.device)}; it would fit.")
    say(f"Memory: the transformer takes {sizes['bf16'] / GIB:.1f} GiB as it is, and there are {limit / GIB:.1f}; it comes "
        + (f"in {chosen}, {sizes[chosen] / GIB:.1f} GiB (--base_precision)." if chosen != "bf16" else "so all the same."))
    return chosen


def size_of(denoiser, precision, dtype):
    """Bytes of a denoiser's weights with a key of BASES, where all else is in `dtype`."""
    fewer = in_fewer_bits(denoiser, precision)
    rest = sum(weight.numel() for weight in denoiser.parameters() if weight not in fewer) * dtype.itemsize
    return rest + sum(weight.numel() for weight in fewer) * (BASES[precision].bytes_per_weight or 0)

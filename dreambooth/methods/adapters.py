"""What may stand beside a model's layers, all of it through PEFT: LoRA, OFT and LoKr, as a table.

OFT: what a layer takes is turned, in blocks, by orthogonal matrices (Qiu et al., arXiv 2306.07280). LoKr: a Kronecker product of two
small matrices is added to its weights (Yeh et al., arXiv 2309.14859).
"""

import typing
import warnings
from dataclasses import dataclass

from dreambooth.base import UserError


def lora_config(s, module, use_dora=False, **options):
    from peft import LoraConfig

    return LoraConfig(r=s.rank, lora_alpha=s.lora_alpha or s.rank, init_lora_weights="gaussian", lora_dropout=s.lora_dropout or 0.0,
                      use_dora=use_dora, **options)


def oft_config(s, module, use_dora=False, exclude_modules=None, **options):
    """Not of convolutions of more than a point: PEFT turns those in a way that is not the layer's own even without a turn."""
    import torch
    from peft import OFTConfig

    wide = [name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Conv2d) and set(layer.kernel_size) != {1}]
    return OFTConfig(oft_block_size=s.rank, exclude_modules=wide + (exclude_modules or []) or None, **options)


def lokr_config(s, module, use_dora=False, **options):
    from peft import LoKrConfig

    return LoKrConfig(r=s.rank, alpha=s.lora_alpha or s.rank, **options)


@dataclass(frozen=True)
class AdapterType:
    """One of the things that may stand beside a layer."""

    config: typing.Callable  # (s, the module, use_dora, options of every PEFT config) -> PEFT's config
    sign: str  # what the names of its parameters have
    kind: str = "a LoRA"  # in a message
    lacks: tuple = ()  # (flag, why it has no meaning here)


_NO_DORA = "use_dora", "it is of a LoRA's magnitudes"
_NO_DROPOUT = "lora_dropout", "it leaves out inputs of a LoRA"
ADAPTER_TYPES = {
    "lora": AdapterType(lora_config, "lora_"),
    "oft": AdapterType(oft_config, "oft_", "an OFT", (
        _NO_DORA, _NO_DROPOUT, ("lora_alpha", "a rotation is not scaled"),
        ("export", "no other program's files have a place for rotations of what a layer takes"))),
    "lokr": AdapterType(lokr_config, "lokr_", "a LoKr", (_NO_DORA, _NO_DROPOUT)),
}


def adapter_type(s):
    return ADAPTER_TYPES[s.adapter_type or "lora"]


def check_adapter(s):
    """UserError for flags that have no meaning with this --adapter_type."""
    for flag, why in adapter_type(s).lacks:
        if getattr(s, flag):
            raise UserError(f"--{flag} with --adapter_type {s.adapter_type}: {why}; leave one out")
    if s.adapter_type == "oft" and s.rank < 2:
        raise UserError(f"--rank {s.rank} with --adapter_type oft: a rotation takes blocks of at least 2; give more")


def add_adapter(s, module, **options):
    """Stand an adapter beside layers of `module` that changes nothing yet; returns its parameters."""
    kind = adapter_type(s)
    with warnings.catch_warnings(action="ignore"):  # of PEFT, that some layers take blocks of another size
        module.add_adapter(kind.config(s, module, **options))
    return [parameter for name, parameter in module.named_parameters() if kind.sign in name]


def lycoris_names(prefix, tensors, config):
    """A LoKr's tensors under LyCORIS's names, lora_unet_down_blocks_0_..._to_q.lokr_w1, .lokr_w2_a, ..., .alpha.

    PEFT multiplies by alpha / rank. So do other programs, but not where both matrices are whole: it is in the first one here.
    """
    import torch

    renamed = {}
    for name, tensor in tensors.items():
        layer, kind = name.rsplit(".", 1)
        layer = prefix + layer.replace(".", "_")
        renamed[f"{layer}.{kind}"] = tensor * (config.alpha / config.r) if kind in ("lokr_w1", "lokr_w1_a") else tensor
        renamed[f"{layer}.alpha"] = torch.tensor(float(config.r))
    return renamed

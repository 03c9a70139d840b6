"""OFTs and LoKrs in PEFT's folders, which diffusers does not load: PEFT merges them into the weights that they belong to."""

import warnings

from dreambooth.base import UserError
from dreambooth.drawing.foreign import lora_files
from dreambooth.files import load_tensors
from dreambooth.methods.adapters import ADAPTER_TYPES
from dreambooth.methods.lora import PEFT_CONFIG
from dreambooth.models.headers import read_json


def merged_type(path):
    """The name in ADAPTER_TYPES of what has to be merged, a folder with one of PEFT's for each part; None of a LoRA."""
    files = lora_files(path) if path.is_dir() else []
    kinds = {str((read_json(file.with_name(PEFT_CONFIG)) or {}).get("peft_type", "")).lower() for file in files}
    return next((kind for kind in ADAPTER_TYPES if kind != "lora" and kind in kinds), None)


def check_strength(trained, strength, flag):
    """UserError for another strength than 1 of an OFT, which has none."""
    if trained.lora and strength != 1 and merged_type(trained.lora) == "oft":
        remedy = "leave out what follows the =" if flag == "--adapter" else "leave out --lora_scale"
        raise UserError(f"{flag} {trained.source}: an OFT turns what layers take and has no strength; {remedy}")


def merge_adapter(pipeline, trained, strength, flag):
    """Merge an OFT or a LoKr into a pipeline's weights. UserError if it is not for this model."""
    kind = ADAPTER_TYPES[merged_type(trained.lora)]
    for file in lora_files(trained.lora):
        module = pipeline.components.get(file.parent.name)
        try:
            with warnings.catch_warnings(action="ignore"):  # of PEFT, that some layers take blocks of another size
                left_out = merge_part(module, file, strength, kind.sign, flag)
        except UserError:
            raise
        except Exception as problem:  # whatever PEFT raises of layers that are not there or are of another size
            left_out = " ".join(str(problem).split())[:200]
        if left_out:
            raise UserError(f"{flag} {file.parent}: this adapter, {kind.kind}, does not fit {pipeline.name_or_path} ({left_out})")


def merge_part(module, file, strength, sign, flag):
    """Merge one of PEFT's files into its module; returns what does not fit, "" if all does, and then nothing is merged."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    if module is None:
        return f"it has no {file.parent.name}"
    tuner = get_peft_model(module, PeftConfig.from_pretrained(str(file.parent)))
    found = set_peft_model_state_dict(tuner, load_tensors(file, flag))
    strange = [*found.unexpected_keys, *(name for name in found.missing_keys if sign in name)]
    if strange:
        return f"{len(strange)} of its tensors are not those of its layers, such as {min(strange)}"
    for layer in tuner.modules():
        if strength != 1 and hasattr(layer, "scale_layer"):
            layer.scale_layer(strength)
    tuner.merge_and_unload()
    vars(module).pop("peft_config", None)  # nothing of it is left
    return ""

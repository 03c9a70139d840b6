"""Large files of weights, read and written a tensor at a time: memory holds nothing of a model but what is on its way."""

import json
from pathlib import Path

from dreambooth.base import UserError
from dreambooth.mishaps import is_of_machine
from dreambooth.models.fits import check_fit
from dreambooth.models.headers import read_json
from dreambooth.models.hub import hub_folder
from dreambooth.models.inventory import WEIGHTS, check_folder, choose_variant, files_in, parts_of, variants_of
from dreambooth.models.load import bare_part, load_part

ROOM = 2**20  # bytes at the start of a file that are kept for its header, which is known last, and blanks
KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def save_streamed(path, tensors, notes, precision=None):
    """Write pairs (name, tensor), in the `precision` of a key of PRECISIONS or in their own, as a .safetensors file with {note: text}
    in its header. UserError where the precision does not hold a number."""
    header, place = {"__metadata__": notes}, 0
    with open(path, "wb") as file:
        file.write(bytes(ROOM))
        for name, tensor in tensors:
            tensor = cast(tensor, name, precision).contiguous()
            size = tensor.numel() * tensor.element_size()
            header[name] = {"dtype": KINDS[str(tensor.dtype).removeprefix("torch.")], "shape": list(tensor.shape),
                            "data_offsets": [place, place + size]}
            file.write(bytes_of(tensor))
            place += size
        file.seek(0)
        file.write((ROOM - 8).to_bytes(8, "little") + json.dumps(header).encode().ljust(ROOM - 8))


def save_at_once(path, tensors, notes, precision=None):
    """The same of a few tensors {name: tensor}, without the blanks."""
    from safetensors.torch import save_file

    save_file({name: cast(tensor, name, precision).contiguous() for name, tensor in tensors.items()}, path, notes)


def cast(tensor, name, precision):
    """A tensor in a precision, if it is of floating-point numbers and one is wanted."""
    import torch

    if precision is None or not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(getattr(torch, PRECISIONS[precision]))
    if not rounded.isfinite().all():
        raise UserError(f"--export_precision {precision}: {name} has numbers that are too large for it; give bf16 or fp32")
    return rounded


def bytes_of(tensor):
    """What a contiguous tensor is in memory, without a copy."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def stored_model(name, flag):
    """(names of its parts, config of its UNet, function for original_tensors() that opens a part, config of its scheduler) of a
    diffusers folder or hub id. UserError if it is not whole."""
    folder = Path(name) if Path(name).is_dir() else hub_folder(name, flag)
    check_folder(folder, name, flag)
    check_fit(folder, name, flag)
    index, files = read_json(folder / "model_index.json"), files_in(folder)

    def open_part(part):
        try:
            return stored_part(folder, part, index[part], files)
        except Exception as problem:  # configs and files of all kinds meet libraries that check little
            if isinstance(problem, UserError) or is_of_machine(problem):
                raise
            raise UserError(f"{flag} {name}: cannot be loaded ({' '.join(str(problem).split())[:300]})") from None
    parts = [part for part in parts_of(index) if part in WEIGHTS]
    return parts, read_json(folder / "unet" / "config.json"), open_part, read_json(folder / "scheduler" / "scheduler_config.json")


def stored_part(folder, part, kind, files):
    """(config, {name: tensor}) of a part of a folder, read when it is asked for; loaded first only if its names are older ones."""
    import torch
    from safetensors.torch import load_file

    bare, variant = bare_part(folder, part, kind), choose_variant(files, part)
    stored = {}
    for file in variants_of(files, part)[variant]:
        stored |= load_file(folder / file) if file.endswith(".safetensors") else {}
    stored = {name.removeprefix("text_model."): tensor for name, tensor in stored.items()}
    shapes = {name.removeprefix("text_model."): tensor.shape for name, tensor in bare.state_dict().items()}
    if all(name in stored and stored[name].shape == shape for name, shape in shapes.items()):
        return bare.config, {name: stored[name] for name in shapes}
    del stored
    module = load_part(folder, part, kind, variant, torch.float32)
    return module.config, module.state_dict()

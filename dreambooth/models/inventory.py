"""What lies in a diffusers pipeline's folder: which part has its weights in which variant, and what is missing.

Asks names of files alone, so that a folder and the hub's list of a model are asked alike.
"""

import re
from pathlib import Path

from dreambooth.base import UserError
from dreambooth.models.headers import read_header, read_json

DENOISERS = ("unet", "transformer")
WEIGHTS = {**dict.fromkeys((*DENOISERS, "vae"), "diffusion_pytorch_model"),
           **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), "model")}
CONFIGS = {**{part: "config.json" for part in WEIGHTS}, "scheduler": "scheduler_config.json"}
WORDS = dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"),
                      (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("spiece.model",)))
PARTS = (*CONFIGS, *WORDS)
# Weights that are not read: how the names of their files end -> what they are.
OTHER_FORMATS = {
    r"openvino.*\.(bin|xml)": "OpenVINO's", r"\.onnx(_data|\.data)?|\.pb": "ONNX's", r"\.msgpack": "Flax's", r"\.h5": "TensorFlow's",
    r"\.gguf": "GGUF", r"\.mlmodelc?|\.mlpackage": "Core ML's"}
PICKLED = r"\.(bin|ckpt|pt|pth)"
UNPICKLE = ("its weights are .bin files, which may run code when they are read; if you trust them, convert them with diffusers: "
            "DiffusionPipeline.from_pretrained(..., use_safetensors=False).save_pretrained(...)")


def files_in(folder):
    """Names of the files in a pipeline's folder and its parts' folders: "model_index.json", "unet/config.json", ..."""
    places = [Path(folder), *(Path(folder) / part for part in PARTS)]
    return sorted(path.relative_to(folder).as_posix() for place in places if place.is_dir() for path in place.iterdir() if path.is_file())


def parts_of(index):
    """The parts of PARTS that a model_index.json, a dict, lists with a class."""
    return [part for part in PARTS if isinstance(index.get(part), list) and all(index[part])]


def denoiser_of_index(index):
    """Which part of a model_index.json is what trains: the UNet or the transformer."""
    return next((part for part in parts_of(index) if part in DENOISERS), DENOISERS[0])


def variants_of(files, part):
    """{variant, "" for the plain one: its files} of a part's weights among `files`: one, or an index and its shards."""
    variants, of = {}, r"(?:-\d+-of-\d+)?"
    pattern = rf"{part}/{WEIGHTS[part]}{of}(?:\.([A-Za-z]\w*?))?{of}\.safetensors(?:\.index(?:\.(\w+))?\.json)?"
    for file in files:
        if match := re.fullmatch(pattern, file):
            variants.setdefault(match[1] or match[2] or "", []).append(file)
    return {variant: found for variant, found in variants.items() if not all("-of-" in file for file in found)}


def choose_variant(files, part, wanted=None):
    """The variant of a part's weights to read, "" for the plain one: the one that is wanted, else the plain one, else fp16; None if
    there are none."""
    variants = variants_of(files, part)
    return min(variants, key=lambda variant: (variant != wanted, variant != "", variant != "fp16", variant), default=None)


def needed_files(files, index, wanted=None):
    """Those of `files` that the pipeline of this index is loaded from; `wanted` is a variant or None."""
    parts = parts_of(index)
    weights = [file for part in parts if part in WEIGHTS and (variant := choose_variant(files, part, wanted)) is not None
               for file in variants_of(files, part)[variant]]
    words = [file for file in files if file.split("/")[0] in WORDS and "/" in file]
    return ["model_index.json", *(f"{part}/{CONFIGS[part]}" for part in parts if part in CONFIGS), *words, *weights]


def missing_parts(files, index):
    """What a pipeline lacks among `files`, as a list of phrases: "unet: no config.json"."""
    lacks = []
    for part in parts_of(index):
        if part in CONFIGS and f"{part}/{CONFIGS[part]}" not in files:
            lacks.append(f"{part}: no {CONFIGS[part]}")
        elif part in WEIGHTS and choose_variant(files, part) is None:
            lacks.append(f"{part}: no {WEIGHTS[part]}.safetensors")
        elif part in WORDS and not any(all(f"{part}/{file}" in files for file in kit) for kit in WORDS[part]):
            lacks.append(f"{part}: the files of its tokenizer are missing")
    return lacks


def other_format(files):
    """What a pipeline without safetensors has its weights in, as a phrase with a remedy; "" if in nothing that is known."""
    for pattern, whose in OTHER_FORMATS.items():
        if any(re.search(f"({pattern})$", file) for file in files):
            return f"its weights are in {whose} format alone; give the model as safetensors, as most are on the hub, too"
    return UNPICKLE if any(re.search(f"{PICKLED}$", file) for file in files) else ""


def check_files(files, index, name, flag):
    """UserError unless a pipeline has among `files` a config, weights and words for each part that its index lists."""
    if lacks := missing_parts(files, index):
        parts = {phrase.split(":")[0] for phrase in lacks}
        remedy = other_format([file for file in files if file.split("/")[0] in parts])
        raise UserError(f"{flag} {name}: " + (remedy or f"{'; '.join(lacks)}; the model is not whole, copy or download it again"))


def check_folder(folder, name, flag):
    """UserError unless a pipeline's folder is whole: every part with its config and weights that can be read."""
    index, files = read_json(Path(folder) / "model_index.json"), files_in(folder)
    check_files(files, index, name, flag)
    for part in (part for part in parts_of(index) if part in WEIGHTS):
        for file in variants_of(files, part)[choose_variant(files, part)]:
            (check_shards if file.endswith(".json") else read_header)(Path(folder) / file, flag)


def check_shards(path, flag):
    """UserError unless every file that an index of weights names is there."""
    named = read_json(path).get("weight_map")
    if not isinstance(named, dict):
        raise UserError(f"{flag} {path}: cannot be read; copy or download it again")
    if lost := sorted({file for file in named.values() if not (path.parent / str(file)).is_file()}):
        raise UserError(f"{flag} {path.parent / lost[0]}: it is missing, but {path.name} names it; copy or download the model again")

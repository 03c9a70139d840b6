"""LoRAs and embeddings as other programs write them: what a file is, whom it fits, and what it is called here."""

import re
from pathlib import Path

from dreambooth.base import UserError, say_once
from dreambooth.methods.lora import PEFT, PEFT_CONFIG, PEFT_FILE
from dreambooth.models.families.family import LORA_LAYER
from dreambooth.models.families.known import family_of
from dreambooth.models.headers import read_header, read_json

LORA_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
# What a LoRA-like file may be that changes weights in another way: a pattern that some tensor's name has -> what it is.
LYCORIS = ((r"hada_w1", "a LoHa"), (r"lokr_w[12]", "a LoKr"), (r"oft_(blocks|diag)|\.oft_[RA]", "an OFT"), (r"\.(a1|b1)\.weight$", "a GLoRA"),
           (r"\.on_input$", "an IA3"), (r"\.diff(_b)?$|\.w_norm$", "a set of whole differences"), (r"lora_mid", "a LoCon with a core of "
            "its own (Tucker)"), (r"^text_model.*lokr|^bundle_emb", "a bundle of words and a LoRA"))
OF_TEXT = r"^text_encoder(_[23])?/|/(base_model\.model\.)?(text_encoder|text_model|lora_te|te\d?_)"  # a file's folder / a tensor's name
# Parts of a model by what their layers' names begin with, where PEFT saved one part without its name.
PEFT_PARTS = ((r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\.", "unet."),
              (r"(single_)?transformer_blocks\.", "transformer."), (r"(text_model|encoder)\.", "text_encoder."))


def is_lora(names):
    """Whether tensors of these names are a LoRA, or of LyCORIS's family."""
    return any("lora" in name or any(re.search(sign, name) for sign, _ in LYCORIS) for name in names)


def lora_files(path):
    """The files of a LoRA: itself, or, in a folder with one of PEFT's folders for each part of a model, one for each."""
    return [file for part in LORA_PARTS if (file := path / part / PEFT_FILE).is_file()] if path.is_dir() else [path]


def is_split(folder):
    """Whether a folder holds a LoRA in one of PEFT's folders for each part. UserError if they have only what is not opened."""
    if pickles := [file for part in LORA_PARTS if (file := folder / part / PEFT_FILE.replace("safetensors", "bin")).is_file()]:
        if not lora_files(folder):
            raise UserError(f"--adapter {folder}: {pickles[0]} is not opened, since such a file can run any code on this machine; "
                            f"give its .safetensors form")
    return bool(lora_files(folder))


def check_lora(path, pipeline, flag):
    """UserError if a LoRA's file is of a kind that is not supported, or for another kind of model than the pipeline's."""
    shapes, _ = read_header(path, flag)
    for sign, kind in LYCORIS:
        if found := next((name for name in shapes if re.search(sign, name)), None):
            raise UserError(f"{flag} {path}: it is {kind} ({found}), and only LoRAs are added; give one, or merge it into its model with "
                            f"the program that made it")
    if not any(re.search(LORA_LAYER, name) for name in shapes):
        raise UserError(f"{flag} {path}: this LoRA does not fit {pipeline.name_or_path}: no pair of matrices in it has a name that is known")
    if trouble := family_of(pipeline).lora_misfit(pipeline, shapes):
        raise UserError(f"{flag} {path}: this LoRA does not fit {pipeline.name_or_path}: {trouble}")


def lora_weights(path):
    """What load_lora_weights() takes for a LoRA: its folder and file, or tensors under other names, scaled by alpha / rank."""
    files = lora_files(path)
    if files == [path] and not any(name.startswith(PEFT) for name in read_header(path, "--adapter")[0]):
        return path.parent, {"weight_name": path.name}
    return {name: tensor for file in files for name, tensor in peft_weights(file).items()}, {}


def peft_weights(path):
    """{name as diffusers has it: tensor} of a file of PEFT's. In a folder that is called as a part of the model, it is of that."""
    from safetensors.torch import load_file

    config = read_json(path.with_name(PEFT_CONFIG))
    if not config:
        say_once(f"Note: {path} has no {PEFT_CONFIG} beside it that tells its alpha; it is taken to be the rank.")
    tensors, weights = load_file(path), {}
    for name, tensor in tensors.items():
        if name.endswith("lora_B.weight"):
            tensor = tensor * peft_scale(config, name, tensor.shape[1])
        weights[peft_name(name, path.parent.name)] = tensor
    return weights


def peft_name(name, folder=""):
    """A tensor's name in PEFT's file as diffusers has it: "base_model.model.down_blocks..." is "unet.down_blocks..."."""
    name = re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name.removeprefix(PEFT))
    if folder in LORA_PARTS and not name.startswith(f"{folder}."):
        return f"{folder}.{name}"
    return next((part + name for sign, part in PEFT_PARTS if re.match(sign, name)), name)


def peft_scale(config, name, rank):
    """What PEFT multiplies a layer's product by, as its adapter_config.json says."""
    layer = name.removeprefix(PEFT).removesuffix(".lora_B.weight")
    alphas = config.get("alpha_pattern") or {}
    alpha = next((value for sign, value in alphas.items() if re.fullmatch(rf"(.*\.)?({sign})", layer)), config.get("lora_alpha", rank))
    return alpha / (rank ** 0.5 if config.get("use_rslora") else rank)


def changes_text(path):
    """Whether a LoRA changes a text encoder."""
    return any(re.search(OF_TEXT, f"{file.parent.name}/{name}") for file in lora_files(path) for name in read_header(file, "--adapter")[0])


def layers_in(path):
    """How many layers a LoRA changes."""
    return sum(bool(re.search(LORA_LAYER, name)) for file in lora_files(path) for name in read_header(file, "--adapter")[0])


def layers_taken(parts, adapter):
    """How many layers of a pipeline's parts have the LoRA of this name."""
    return sum(f".lora_A.{adapter}." in name for part in parts for name, _ in part.named_parameters())


def only_adapter(folder, files, flag):
    """The one file among the names `files` of a folder or hub id that is a LoRA or an embedding; None if there is none.

    UserError if there are several, or only such as are not opened.
    """
    tensors = sorted(file for file in files if file.lower().endswith(".safetensors") and "/" not in file)
    usual = [file for file in ("pytorch_lora_weights.safetensors", PEFT_FILE) if file in tensors]
    if usual or len(tensors) == 1:
        chosen = (usual or tensors)[0]
        if others := [file for file in tensors if file not in (chosen, "kohya_lora.safetensors")]:
            say_once(f"{folder} is read as {chosen}; give {', '.join(f'{folder}/{file}' for file in others)} with --adapter as well, if "
                     f"they are to be added.")
        return chosen
    if tensors:
        raise UserError(f"{flag} {folder}: it holds several files; give one of them: "
                        f"{', '.join(str(Path(folder) / file) for file in tensors[:8])}")
    if pickles := sorted(file for file in files if file.lower().endswith((".bin", ".pt", ".pth", ".ckpt")) and "/" not in file):
        raise UserError(f"{flag} {folder}: {pickles[0]} is not opened, since such a file can run any code on this machine; give its "
                        f".safetensors form")
    return None

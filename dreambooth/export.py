"""--export: what was trained, in one file that other programs read."""

import functools
import shutil
from pathlib import Path

from dreambooth.base import UserError, default, say
from dreambooth.drawing.merged import merged_type
from dreambooth.drawing.trained import find_trained, model_paths
from dreambooth.files import check_room, check_writable, load_tensors, write_file
from dreambooth.methods.adapters import ADAPTER_TYPES
from dreambooth.methods.lora import KOHYA_FILE
from dreambooth.models.addresses import is_single_file
from dreambooth.models.families.known import family_of
from dreambooth.models.find import family_at, find_model
from dreambooth.models.headers import read_header
from dreambooth.models.hub import hub_file
from dreambooth.models.load import load_pipeline
from dreambooth.models.notes import notes_of
from dreambooth.models.vocabulary import XL_EMBEDDING
from dreambooth.output.card import DORA_ELSEWHERE
from dreambooth.output.original_layout import VELOCITY_CONFIG, layout_of, loaded_part, original_tensors
from dreambooth.output.streamed import PRECISIONS, save_at_once, save_streamed, stored_model


def export(s):
    """Write what was trained into --model_path as --export."""
    check_export(s)
    paths = model_paths(s)
    if len(paths) > 1:
        raise UserError(f"--model_path {paths[1]}: --export writes one model")
    write_export(s, find_trained(paths[0], "--model_path"))


def check_export(s):
    """UserError unless --export can be written."""
    path = Path(s.export)
    if path.suffix != ".safetensors":
        raise UserError(f"--export {path}: must end in .safetensors")
    check_writable(path.parent, "--export")
    check_room(path, "--export", len("..1000000.part"))
    check_free([path], s)


def check_free(paths, s):
    """UserError if one of the files to write is there already, unless --overwrite is given."""
    if taken := [path for path in paths if path.exists() and not s.overwrite]:
        raise UserError(f"--export {s.export}: {taken[0]} exists already; give another name, or --overwrite to replace it")


def write_export(s, trained, pipeline=None):
    """Write a whole model, a LoRA or embeddings as other programs read them; `pipeline` is the model if it is loaded.

    Words that are not alone in --export NAME.safetensors go beside it as NAME-SUBJECT.safetensors.
    """
    target = Path(s.export)
    files = word_files(s, trained, target)
    if trained.lora:
        files |= files_of_lora(s, trained, target)
    if not trained.is_adapter:
        files |= model_files(s, trained, target, pipeline)
    check_free(files, s)
    for file, (write, what) in files.items():
        write_file(file, write)
        say(f"Exported {file}, {file.stat().st_size / 1e6:,.1f} MB: {what}.")
    if trained.lora and is_dora(target):
        say(f"Note: {target}: {DORA_ELSEWHERE}.")


def word_files(s, trained, target):
    """{path: (function that writes it, what it is)} of embeddings."""
    files = {}
    for subject, path in zip(trained.subjects, trained.words.values()):
        is_alone = len(trained.words) == 1 and not trained.lora
        file = target if is_alone else target.with_name(f"{target.stem}-{subject.name}.safetensors")
        tensors, notes = a1111_embedding(load_tensors(path, "--model_path")), read_header(path, "--model_path")[1]
        files[file] = (functools.partial(save_at_once, tensors=tensors, notes=notes, precision=s.export_precision),
                       f'the embedding of "{subject.identifier}", which other programs know by the name of the file')
    return files


def files_of_lora(s, trained, target):
    """The same of a LoRA, as training wrote it unless --export_precision is given."""
    path = kohya_file(trained)
    write = functools.partial(shutil.copyfile, path)
    if s.export_precision:
        tensors, notes = load_tensors(path, "--model_path"), read_header(path, "--model_path")[1]
        write = functools.partial(save_at_once, tensors=tensors, notes=notes, precision=s.export_precision)
    kind = merged_type(trained.lora)
    what = "the LoRA with the names that other programs have for its layers"
    if kind:
        what = f"{ADAPTER_TYPES[kind].kind} in LyCORIS's names"
    return {target: (write, what)}


def model_files(s, trained, target, pipeline):
    """The same of a whole model, and of what tells A1111 and Forge that an SD 2.x model predicts velocity."""
    precision = default(s.export_precision, "fp16")
    family = family_of(pipeline) if pipeline else family_at(find_model(trained.source, "--model_path"), "--model_path")
    if "model" not in family.exports:
        raise UserError(f"--export {s.export}: a whole model of {family.kind} is not written for other programs; give them the "
                        f"folder {trained.source} if they read diffusers' folders")
    parts, unet_config, open_part, scheduler = loaded_model(pipeline) if pipeline else model_of(trained.source, precision)
    layout, record = layout_of(parts, unet_config), trained.record
    notes = notes_of(family, unet_config, scheduler, record.get("base_model"), trained.subjects, record.get("used", {}).get("resolution"))
    kept = "all of it" if precision == "fp32" else f"in half precision, {precision}"
    kept += "; --export_precision fp32 rounds nothing" * (s.export_precision is None)
    files = {target: (lambda part: save_streamed(part, original_tensors(layout, open_part, scheduler), notes, precision),
                      f"the model in Stable Diffusion's own layout, {kept}")}
    if layout == "sd2" and scheduler.get("prediction_type") == "v_prediction":
        files[target.with_suffix(".yaml")] = (lambda part: part.write_text(VELOCITY_CONFIG, encoding="utf-8"),
                                              "tells A1111 and Forge that the model predicts velocity; keep it beside the file")
    return files


def model_of(source, precision):
    """What stored_model() gives, of a whole model wherever it is; one in a single file is loaded."""
    import torch

    name = find_model(source, "--model_path")
    if not is_single_file(name):
        return stored_model(name, "--model_path")
    return loaded_model(load_pipeline(name, getattr(torch, PRECISIONS[precision]), "--model_path"))


def loaded_model(pipeline):
    """What stored_model() gives, of a pipeline that is loaded."""
    parts = [part for part, module in pipeline.components.items() if module is not None]
    return parts, pipeline.unet.config, functools.partial(loaded_part, pipeline), pipeline.scheduler.config


def is_dora(path):
    """Whether a LoRA in Kohya's layout has magnitudes of its own."""
    return any(name.endswith(".dora_scale") for name in read_header(path, "--export")[0])


def a1111_embedding(tensors):
    """A word's vectors [n, channels] under A1111's name, or for SDXL under the two names that all programs share."""
    return tensors if set(tensors) == set(XL_EMBEDDING) else {"emb_params": next(iter(tensors.values()))}


def kohya_file(trained):
    """The LoRA under other programs' names, which --train writes beside the one for diffusers."""
    if merged_type(trained.lora) == "oft":
        raise UserError(f"--export {trained.source}: {dict(ADAPTER_TYPES['oft'].lacks)['export']}; train with --adapter_type lora or lokr")
    beside = trained.lora / KOHYA_FILE if trained.lora.is_dir() else trained.lora.with_name(KOHYA_FILE)
    try:
        path = beside if Path(trained.source).is_dir() else hub_file(trained.source, KOHYA_FILE)
    except Exception:  # whatever the hub's client raises
        path = None
    if path is None or not path.is_file():
        raise UserError(f"--model_path {trained.source}: there is no {KOHYA_FILE} in it; give an output of --train (of a DoRA of a "
                        f"transformer none is written)")
    return path

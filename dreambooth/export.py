"""--export: what was trained, in one file that other programs read."""

import functools
import shutil
from pathlib import Path

from dreambooth.base import UserError, say
from dreambooth.drawing.trained import find_trained, model_paths
from dreambooth.files import check_room, check_writable, load_tensors, write_file
from dreambooth.methods.lora import KOHYA_FILE
from dreambooth.models.find import find_model
from dreambooth.models.hub import hub_file
from dreambooth.models.load import load_pipeline
from dreambooth.models.vocabulary import XL_EMBEDDING
from dreambooth.output.original_layout import notes_of_noise, original_checkpoint


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
    from safetensors.torch import save_file

    target, writers = Path(s.export), {}
    for subject, path in zip(trained.subjects, trained.words.values()):
        is_alone = len(trained.words) == 1 and not trained.lora
        file = target if is_alone else target.with_name(f"{target.stem}-{subject.name}.safetensors")
        tensors = a1111_embedding(load_tensors(path, "--model_path"))
        writers[file] = (lambda part, tensors=tensors: save_file(tensors, part),
                         f'the embedding of "{subject.identifier}", which other programs know by the name of the file')
    if trained.lora:
        writers[target] = functools.partial(shutil.copyfile, kohya_file(trained)), "the LoRA in Kohya's layout"
    check_free(writers, s)
    if not trained.is_adapter:
        pipeline = pipeline or load_whole(trained.source)
        tensors = original_checkpoint(pipeline)
        writers[target] = (lambda part: save_file(tensors, part, {"format": "pt", **notes_of_noise(pipeline.scheduler)}),
                           "the model in Stable Diffusion's own layout")
    for file, (write, what) in writers.items():
        write_file(file, write)
        say(f"Exported {file}, {file.stat().st_size / 1e6:,.1f} MB: {what}.")


def load_whole(source):
    """The pipeline of a whole model, in float32."""
    import torch

    return load_pipeline(find_model(source, "--model_path"), torch.float32, "--model_path")


def a1111_embedding(tensors):
    """A word's vectors [n, channels] under A1111's name, or for SDXL under the two names that all programs share."""
    return tensors if set(tensors) == set(XL_EMBEDDING) else {"emb_params": next(iter(tensors.values()))}


def kohya_file(trained):
    """The LoRA under Kohya's names, which --train writes beside the one for diffusers."""
    try:
        path = trained.lora.with_name(KOHYA_FILE) if Path(trained.source).is_dir() else hub_file(trained.source, KOHYA_FILE)
    except Exception:  # whatever the hub's client raises
        path = None
    if path is None or trained.lora.is_dir() or not path.is_file():
        raise UserError(f"--model_path {trained.source}: there is no {KOHYA_FILE} in it; give an output of --train")
    return path

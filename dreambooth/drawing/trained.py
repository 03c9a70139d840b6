"""What --train, or another trainer, left behind: a whole model, a LoRA, embeddings, and their record.

Nothing is loaded here.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from dreambooth.base import UserError, default
from dreambooth.drawing.foreign import LORA_PARTS, is_lora, is_split, lora_files, only_adapter
from dreambooth.methods.adapters import ADAPTER_TYPES
from dreambooth.methods.lora import KOHYA_FILE, LORA_FILE, PEFT_CONFIG, PEFT_FILE, save_lora
from dreambooth.methods.new_words import embedding_file, save_words
from dreambooth.methods.table import METHODS
from dreambooth.models.addresses import is_single_file, located, refuse_pickle
from dreambooth.models.headers import read_header
from dreambooth.models.hub import HUB_ID, hub_file, hub_files, hub_refusal
from dreambooth.models.kinds import FOREIGN_KINDS, PART_KINDS, kind_of_file
from dreambooth.models.parts import is_part_sample
from dreambooth.models.vocabulary import word_in
from dreambooth.settings import DEFAULT_OUTPUT
from dreambooth.subjects.words import Subject


def read_record(model):
    """dreambooth.json of a trained model, a folder or hub id, as a dict; {} where there is none.

    Raises UserError if it is damaged.
    """
    path = Path(model) / "dreambooth.json"
    if not Path(model).is_dir():
        try:
            path = hub_file(model, "dreambooth.json")
        except Exception:  # it has no record, or the machine is offline; whoever needs more of it will say so
            return {}
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        method, subjects = record.get("method", "full"), [Subject(**subject) for subject in record["subjects"]]
        texts = [value for subject in subjects for value in dataclasses.astuple(subject)]
        whole = method in METHODS and subjects and all(isinstance(text, str) for text in (*texts, record.get("base_model", "")))
        whole = whole and all(re.fullmatch(r"[\w-]*", subject.name) for subject in subjects)  # it becomes part of a file's name
        whole = whole and is_sound(record)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: cannot be read; it is damaged, train the model again")
    return record


def is_sound(record):
    """Whether what is looked up in a record later on is of its kind, where it is there. AttributeError if it is far from it."""
    resolution, sample = record.get("used", {}).get("resolution"), record.get("base_sample") or {}
    places = [record.get("settings", {}).get(name) for name in ("variant", "concepts", "instance_data_dir")]
    return (all(isinstance(place, (str, type(None))) for place in places)
            and record.get("settings", {}).get("adapter_type") in (None, *ADAPTER_TYPES)
            and (resolution is None or isinstance(resolution, int) and resolution > 0 and resolution % 8 == 0)
            and all(is_part_sample(part) for part in sample.values()))


@dataclass(frozen=True)
class Trained:
    """What --train, or another trainer, made: a whole model, or files to add to one."""

    source: str
    record: dict  # dreambooth.json, or {}
    subjects: list
    lora: Path | None  # a file, or a folder that lora_files() knows
    words: dict  # {word: file}

    @property
    def is_adapter(self):
        return bool(self.lora or self.words)


def find_trained(source, flag):
    """What is at `source`: a folder, a hub id or a .safetensors file. UserError if it is damaged or nothing of the kind."""
    source = located(source, flag)
    refuse_pickle(source, flag)
    if is_single_file(source):
        return find_adapter_file(Path(source), flag, source)
    record = read_record(source)
    if not record:
        return find_unrecorded(source, flag)
    subjects = [Subject(**subject) for subject in record["subjects"]]
    method = METHODS[record.get("method", "full")]

    def part(file):
        path = fetched(source, file, flag)
        if not path.is_file():
            raise UserError(f"{flag} {source}: {file} is missing; train it again")
        return path
    in_folders = record.get("settings", {}).get("adapter_type") not in (None, "lora")
    lora = (split_folder(source, flag) if in_folders else part(LORA_FILE)) if save_lora in method.saves else None
    words = {x.identifier: part(embedding_file(x, subjects)) for x in subjects if save_words in method.saves}
    return Trained(source, record, subjects, lora, words)


def split_folder(source, flag):
    """The folder of an adapter in PEFT's folders, from the hub if `source` is an id. UserError if they are not there."""
    folder = Path(source)
    if not folder.is_dir():
        wanted = [f"{part}/{file}" for part in LORA_PARTS for file in (PEFT_CONFIG, PEFT_FILE)]
        found = [fetched(source, file, flag) for file in files_on_hub(source, "--adapter") if file in wanted]
        folder = found[0].parent.parent if found else folder
    if not lora_files(folder):
        raise UserError(f"{flag} {source}: {PEFT_FILE} is missing; train it again")
    return folder


def fetched(source, file, flag):
    """Path of a file of a folder or hub id; in a folder it need not be there. UserError if the hub does not give it."""
    if Path(source).is_dir():
        return Path(source) / file
    try:
        return hub_file(source, file)
    except Exception as problem:  # whatever the hub's client raises
        raise UserError(f"{flag} {source}: {file} is not in the cache, and {hub_refusal(problem, source, file)}") from None


def find_unrecorded(source, flag):
    """What is in a folder or hub id that --train did not make: a whole model, or a file to add to one."""
    files = [path.name for path in Path(source).iterdir() if path.is_file()] if Path(source).is_dir() else files_on_hub(source, flag)
    is_bare = Path(source).is_dir() and "model_index.json" not in files
    if is_bare and not any(file.endswith(".safetensors") and file != KOHYA_FILE for file in files) and is_split(Path(source)):
        return Trained(source, {}, [], Path(source), {})
    if "model_index.json" in files or not files:
        return Trained(source, {}, [], None, {})
    file = only_adapter(source, files, flag)
    path = fetched(source, file, flag) if file else None
    if path is None or (is_whole(path, flag) if Path(source).is_dir() else False):
        return Trained(source, {}, [], None, {})  # whoever wants a model of it will say what it lacks
    return find_adapter_file(path, flag, source)


def files_on_hub(name, flag):
    """Names of the files of a hub id. For an adapter UserError if they cannot be had; of a model [], as find_model() tells more."""
    try:
        return hub_files(name)
    except Exception as problem:  # whatever the hub's client raises
        if flag != "--adapter":
            return []
        is_id = re.fullmatch(HUB_ID, name)
        raise UserError(f"--adapter {name}: no such file or folder; " + (hub_refusal(problem, name) if is_id else
                        "give an output of --train, a .safetensors file or a hub id")) from None


def is_whole(path, flag):
    """Whether a .safetensors file is a whole model, or has a UNet at least."""
    return any("model.diffusion_model." in name for name in read_header(path, flag)[0])


def find_adapter_file(path, flag, source):
    """A LoRA, an embedding or a whole model in one .safetensors file, whoever made it; `source` is what was given for it."""
    shapes, _ = read_header(path, flag)
    names = list(shapes)
    if any("model.diffusion_model." in name for name in names) and not is_lora(names):
        return Trained(source, {}, [], None, {})
    if is_lora(names):
        return Trained(source, {}, [], path, {})
    word = word_in(names, otherwise=path.stem) if all(len(shape) < 3 for shape in shapes.values()) else None
    if word is None:
        kind = kind_of_file(names, (*FOREIGN_KINDS, *PART_KINDS))
        raise UserError(f"{flag} {path}: neither a LoRA nor an embedding" + (f", but {kind}" if kind else "")
                        + "; give a .safetensors file of one")
    return Trained(source, {}, [Subject(word, "", f"a {word}", path.stem)], None, {word: path})


STRENGTH = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def find_adapters(s):
    """[(Trained, strength)] of --adapter."""
    adapters = []
    for text in s.adapter or []:
        source, strength = split_strength(text)
        trained = find_trained(source, "--adapter")
        if not trained.is_adapter:
            raise UserError(f"--adapter {source}: not a LoRA or embedding made by --train, nor a .safetensors file of one")
        if strength is not None and not trained.lora:
            raise UserError(f"--adapter {text}: an embedding has no strength; leave out what follows the =")
        adapters.append((trained, default(strength, 1.0)))
    return adapters


def split_strength(text):
    """(source, strength, or None if none is given) of PATH or PATH=STRENGTH."""
    if Path(text).exists():
        return text, None
    match = re.fullmatch(rf"(.+)=({STRENGTH})", text)
    if match and Path(match[1]).exists():
        return match[1], float(match[2])
    for sign in re.finditer(r" *[=: ] *", text):  # after the path of something, or what is called as a file of weights is
        path, rest = text[:sign.start()], text[sign.end():]
        is_path = Path(path).exists() or path.lower().endswith(".safetensors")
        if is_path and not re.search(r"[/\\]", rest) and not (match and match[1] == path):
            raise UserError(f'--adapter {text}: "{rest}" is no strength; write {path}=0.8')
    return (match[1], float(match[2])) if match else (text, None)


def model_paths(s):
    """What --model_path names. Raises UserError if nothing does and there is no earlier output."""
    if s.model_path is None and not Path(DEFAULT_OUTPUT).exists():
        raise UserError(f"--model_path {DEFAULT_OUTPUT}: no such folder; make a model with --train first, or give another "
                        f"path")
    return s.model_path or [DEFAULT_OUTPUT]

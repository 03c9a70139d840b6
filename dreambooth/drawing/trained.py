"""What --train, or another trainer, left behind: a whole model, a LoRA, embeddings, and their record.

Nothing is loaded here.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from dreambooth.base import UserError
from dreambooth.methods.lora import LORA_FILE, save_lora
from dreambooth.methods.new_words import embedding_file, save_words
from dreambooth.methods.table import METHODS
from dreambooth.models.headers import tensor_names
from dreambooth.models.hub import hub_file
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
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: cannot be read; it is damaged, train the model again")
    return record


@dataclass(frozen=True)
class Trained:
    """What --train, or another trainer, made: a whole model, or files to add to one."""

    source: str
    record: dict  # dreambooth.json, or {}
    subjects: list
    lora: Path | None
    words: dict  # {word: file}

    @property
    def is_adapter(self):
        return bool(self.lora or self.words)


def find_trained(source, flag):
    """What is at `source`: a folder, a hub id or a .safetensors file. UserError if it is damaged or nothing of the kind."""
    if source.endswith(".safetensors"):
        return find_adapter_file(Path(source), flag)
    record = read_record(source)
    subjects = [Subject(**subject) for subject in record.get("subjects", [])]
    method = METHODS[record.get("method", "full")]

    def part(file):
        try:
            path = Path(source) / file if Path(source).is_dir() else hub_file(source, file)
        except Exception as problem:  # whatever the hub's client raises
            reason = str(problem).strip().split("\n")[0][:100]
            raise UserError(f"{flag} {source}: {file} cannot be had from the hub ({reason})") from None
        if not path.is_file():
            raise UserError(f"{flag} {source}: {file} is missing; train it again")
        return path
    lora = part(LORA_FILE) if save_lora in method.saves else None
    words = {x.identifier: part(embedding_file(x, subjects)) for x in subjects if save_words in method.saves}
    return Trained(source, record, subjects, lora, words)


def find_adapter_file(path, flag):
    """A LoRA, an embedding or a whole model in one .safetensors file, whoever made it."""
    names = tensor_names(path, flag)
    if any(name.startswith("model.diffusion_model.") for name in names):
        return Trained(str(path), {}, [], None, {})
    if any("lora" in name for name in names):
        return Trained(str(path), {}, [], path, {})
    if (word := word_in(names, otherwise=path.stem)) is None:
        raise UserError(f"{flag} {path}: neither a LoRA nor an embedding")
    return Trained(str(path), {}, [Subject(word, "", f"a {word}", path.stem)], None, {word: path})


def find_adapters(s):
    """[(Trained, strength)] of --adapter."""
    adapters = []
    for text in s.adapter or []:
        source, strength = text, 1.0
        if not Path(text).exists() and (match := re.fullmatch(r"(.+)=(\d*\.?\d+)", text)):
            source, strength = match[1], float(match[2])
        trained = find_trained(source, "--adapter")
        if not trained.is_adapter:
            raise UserError(f"--adapter {source}: not a LoRA or embedding made by --train, nor a .safetensors file of one")
        adapters.append((trained, strength))
    return adapters


def model_paths(s):
    """What --model_path names. Raises UserError if nothing does and there is no earlier output."""
    if s.model_path is None and not Path(DEFAULT_OUTPUT).exists():
        raise UserError(f"--model_path {DEFAULT_OUTPUT}: no such folder; make a model with --train first, or give another "
                        f"path")
    return s.model_path or [DEFAULT_OUTPUT]

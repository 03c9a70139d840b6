"""Large models part by part: the text encoders are read, asked and dropped before the denoiser is read.

So never more than the largest part is in the CPU's memory, where none of them but the denoiser trains.
"""

import dataclasses
import hashlib
import importlib
import math
from pathlib import Path

from safetensors import safe_open

from dreambooth.base import say_once
from dreambooth.models.families.family import text_encoders_of, tokenizer_of
from dreambooth.models.fits import say_if_distilled
from dreambooth.models.headers import read_json
from dreambooth.models.hub import hub_folder
from dreambooth.models.inventory import WEIGHTS, choose_variant, denoiser_of_index, files_in, parts_of, variants_of
from dreambooth.models.load import check_tokenizers, load_part, load_pipeline, quiet_libraries
from dreambooth.models.parts import SAMPLE_PLACES, SAMPLE_TENSORS, sample_of, take_apart
from dreambooth.models.quantized import quantization
from dreambooth.models.streamed_blocks import stream_blocks

SMALL_TEXT = 4e9  # bytes of text encoders' files that may be read as float32
SAMPLED_ROWS = 0, 0.5  # of each tensor, as fractions of its length


class Shelf:
    """The folder of a late model: its parts are read from it when they are needed."""

    def __init__(self, name, flag, variant):
        """`name` is a folder or hub id."""
        self.folder = Path(name) if Path(name).is_dir() else hub_folder(name, flag, variant)
        self.index, self.files, self.variant = read_json(self.folder / "model_index.json"), files_in(self.folder), variant
        self.denoiser = denoiser_of_index(self.index)
        self.texts = [part for part in parts_of(self.index) if part.startswith("text_encoder")]

    def weights_of(self, part):
        """Paths of the files with a part's weights."""
        files = variants_of(self.files, part)[choose_variant(self.files, part, self.variant)]
        return [self.folder / file for file in files if file.endswith(".safetensors")]

    def read(self, part, dtype, **options):
        """A part, read now."""
        variant = choose_variant(self.files, part, self.variant)
        return load_part(self.folder, part, self.index[part], variant, dtype, **options).requires_grad_(False).eval()

    def hollow(self, dtype):
        """The denoiser as its config has it, without memory."""
        import torch

        library, kind = self.index[self.denoiser]
        made = getattr(importlib.import_module(library), kind)
        with torch.device("meta"):
            return made.from_config(made.load_config(str(self.folder / self.denoiser))).to(dtype).requires_grad_(False).eval()

    def text_dtype(self, arithmetic):
        """The precision of the text encoders: bf16, but for small ones where all computes in float32."""
        import torch

        size = sum(path.stat().st_size for part in self.texts for path in self.weights_of(part))
        return torch.float32 if arithmetic == torch.float32 and size < SMALL_TEXT else torch.bfloat16

    def digest(self):
        """A hex digest of names, shapes and some rows of all tensors: tells one model from another wherever it lies."""
        found = hashlib.sha256()
        for part in (part for part in parts_of(self.index) if part in WEIGHTS):
            for path in self.weights_of(part):
                with safe_open(path, "pt") as file:
                    for name in file.keys():
                        found.update(f"{part} {name} {rows_in(file, name)}".encode())
        return found.hexdigest()

    def numbers(self, places, count):
        """The denoiser's entry of sample_weights(), from its files."""
        owners = {}
        for path in self.weights_of(self.denoiser):
            with safe_open(path, "pt") as file:
                owners |= {name: path for name in file.keys() if file.get_slice(name).get_dtype() in ("F64", "F32", "F16", "BF16")}
        names = sorted(owners)
        chosen, numbers = names[::max(1, len(names) // count)], []
        for name in chosen:
            with safe_open(owners[name], "pt") as file:
                tensor = leading(file, name, max(places) + 1)
                numbers += [tensor[place % tensor.numel()].item() for place in places]
                dtype = tensor.dtype
        return [str(dtype).removeprefix("torch."), " ".join(f"{number:.9g}" for number in numbers)]


def rows_in(file, name):
    """Shape, precision and some rows of a tensor in a file, as text."""
    part = file.get_slice(name)
    shape = part.get_shape()
    if not shape:
        return f"{part.get_dtype()} {file.get_tensor(name).item()}"
    rows = [part[row:row + 1].float().sum().item() for row in sorted({int(at * shape[0]) for at in SAMPLED_ROWS}) if row < shape[0]]
    return f"{shape} {part.get_dtype()} {rows}"


def leading(file, name, count):
    """The first numbers of a tensor in a file, flat: `count` of them, or all if it has fewer."""
    part = file.get_slice(name)
    shape = part.get_shape()
    if len(shape) < 2 or math.prod(shape) <= count:
        return file.get_tensor(name).reshape(-1)[:max(count, 1) if math.prod(shape) > count else None]
    rows = -(-count // math.prod(shape[1:]))
    return part[:rows].reshape(-1)[:count]


class PromptBook:
    """Conditioning of prompts by text encoders that do not train, kept on the CPU. For one that it lacks they are read again."""

    def __init__(self, shelf, arithmetic):
        self.shelf, self.dtype, self.told, self.weights = shelf, shelf.text_dtype(arithmetic), {}, 0

    def learn(self, models, prompts, device):
        """Encode those of the prompts that are not in the book yet, on the device."""
        import torch

        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.told]
        if not missing:
            return
        self.bring(models)
        try:
            for text_encoder in models.text_encoders:
                text_encoder.to(device)
        except torch.OutOfMemoryError:
            say_once("Memory is full: the text encoders read the prompts on the CPU, which is slower.")
            for text_encoder in models.text_encoders:
                text_encoder.to("cpu")
        with torch.no_grad():
            for prompt in missing:
                told = models.family.encode(models, [prompt])
                self.told[prompt] = {name: [value[0].cpu()] if isinstance(value, list) else value.cpu() for name, value in told.items()}
        for text_encoder in models.text_encoders:
            text_encoder.to("cpu")

    def bring(self, models):
        """Have the text encoders in the models, and in their pipeline."""
        for part in self.shelf.texts:
            if models.pipeline.components.get(part) is None:
                models.pipeline.register_modules(**{part: self.shelf.read(part, self.dtype)})
        models.family.make_ready(models.pipeline)
        models.text_encoders[:] = text_encoders_of(models.pipeline).values()
        self.weights = sum(text_encoder.num_parameters() for text_encoder in models.text_encoders)

    def drop(self, models):
        """Have them no longer: their memory is free."""
        models.pipeline.register_modules(**dict.fromkeys(self.shelf.texts))
        models.text_encoders.clear()

    def rows(self, models, prompts, device):
        """The conditioning of P prompts on the device, in the denoiser's precision."""
        import torch

        if any(prompt not in self.told for prompt in prompts):
            self.learn(models, prompts, device)
            self.drop(models)
        kept, dtype = [self.told[prompt] for prompt in prompts], models.family.denoiser_of(models.pipeline).dtype

        def there(tensor):
            return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        return {name: [there(tensor) for one in kept for tensor in one[name]] if isinstance(value, list) else
                torch.cat([there(one[name]) for one in kept]) for name, value in kept[0].items()}


def load_late(name, arithmetic, variant=None, flag="--model_name", trains=True):
    """The Models of a pipeline whose text encoders do not train: with these, and with a denoiser that has no memory yet.

    Its autoencoder is in float32 where it is to train, and UserError is raised if it cannot.
    """
    import torch

    quiet_libraries()
    shelf = Shelf(name, flag, variant)
    book, parts = PromptBook(shelf, arithmetic), {shelf.denoiser: shelf.hollow(arithmetic)}
    texts = dict.fromkeys(shelf.texts)
    pipeline = load_pipeline(name, torch.float32 if trains else arithmetic, flag, parts={**parts, **texts}, variant=variant)
    models = take_apart(name, pipeline)
    if trains:
        models.family.check_trainable(pipeline, name, flag)
        say_if_distilled(pipeline, name, trains=True)
    models.vae.requires_grad_(False).eval()
    models = dataclasses.replace(models, arithmetic=arithmetic, digest=shelf.digest(), book=book,
                                 tokenizers=[tokenizer_of(pipeline, part) for part in shelf.texts])
    book.bring(models)
    check_tokenizers(pipeline, name, flag)
    texts = {part: sample_of(module) for part, module in text_encoders_of(pipeline).items()}
    return dataclasses.replace(models, sample={shelf.denoiser: shelf.numbers(SAMPLE_PLACES, SAMPLE_TENSORS), **texts})


def with_denoiser(models, dtype, base_precision, streams_to=None):
    """Late models with their denoiser, read now in `dtype`, or in fewer bits (see quantized.py); the text encoders are dropped.

    If there is a device that it streams to, its blocks wait in the CPU's memory (see streamed_blocks.py).
    """
    shelf = models.book.shelf
    models.book.drop(models)
    denoiser = shelf.read(shelf.denoiser, dtype, **quantization(base_precision, dtype, models.denoiser))
    if streams_to:
        stream_blocks(denoiser, streams_to)
    models.pipeline.register_modules(**{shelf.denoiser: denoiser})
    return dataclasses.replace(models, denoiser=denoiser, base_precision=base_precision)

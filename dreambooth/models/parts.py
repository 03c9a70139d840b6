"""The parts of a loaded pipeline, and what is asked of them.

Knows nothing of training.
"""

import functools
import hashlib
import typing
from dataclasses import dataclass

from dreambooth.models.families.family import text_encoders_of, tokenizer_of
from dreambooth.models.families.known import family_of


@dataclass(frozen=True)
class Models:
    """The parts of a loaded pipeline, and the family that knows what to do with them."""

    name: str  # folder or hub id
    pipeline: typing.Any
    family: typing.Any
    tokenizers: list  # one for each text encoder
    text_encoders: list
    vae: typing.Any
    denoiser: typing.Any
    arithmetic: typing.Any = None  # the torch.dtype that the denoiser will compute in; None: that of its weights
    sample: dict | None = None  # sample_weights() of the weights as they were loaded
    digest: str | None = None  # the fingerprint, where it was made of the files
    base_precision: str = "bf16"  # of the frozen weights that a LoRA stands on; "bf16": that of the arithmetic
    book: typing.Any = None  # the PromptBook of a late model, whose text encoders come and go

    @property
    def resolution(self):
        """The side in pixels of the squares that the model was trained at."""
        return min(self.family.own_size(self.pipeline))

    @property
    def readers(self):
        """[(tokenizer, text encoder)] of those that take new words."""
        parts = list(text_encoders_of(self.pipeline))
        return [(self.tokenizers[parts.index(part)], self.text_encoders[parts.index(part)]) for part in self.family.word_encoders
                if part in parts]

    @functools.cached_property
    def fingerprint(self):
        """A hex digest of all weights as they were loaded: tells one model from another wherever it lies.

        Rounded to `arithmetic`, so that it is the same whether the denoiser was loaded in that precision or comes to it later.
        """
        import torch

        if self.digest:
            return self.digest
        digest = hashlib.sha256()
        for module in (self.denoiser, self.vae, *self.text_encoders):
            for name, tensor in module.state_dict().items():
                value = torch.hash_tensor(tensor.to(self.arithmetic or tensor.dtype)).item()
                digest.update(f"{name} {tuple(tensor.shape)} {value}".encode())
        return digest.hexdigest()


SAMPLE_TENSORS, SAMPLE_PLACES = 24, (0, 3, 17)  # of each part so many tensors, of each tensor the numbers at these places


def sample_weights(pipeline):
    """Some numbers of every part of a pipeline that is there, which tell one model from another and are short enough for a record.

    {part: [precision of its weights, the numbers as text]}. A hash would differ between precisions; these are compared.
    """
    family = family_of(pipeline)
    parts = {family.denoiser: family.denoiser_of(pipeline), **text_encoders_of(pipeline)}
    return {part: sample_of(module) for part, module in parts.items()}


def sample_of(module):
    """[precision, numbers as text] of a module's weights."""
    weights = {name.removeprefix("text_model."): tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
    tensors = [weights[name] for name in sorted(weights)]
    chosen = tensors[::max(1, len(tensors) // SAMPLE_TENSORS)]
    numbers = [tensor.reshape(-1)[place % tensor.numel()].item() for tensor in chosen for place in SAMPLE_PLACES]
    return [str(chosen[0].dtype).removeprefix("torch."), " ".join(f"{number:.9g}" for number in numbers)]


def is_part_sample(found):
    """Whether something that was read is what sample_weights() has of one part."""
    precision, text = found if isinstance(found, list) and len(found) == 2 else (None, None)
    is_text = precision in ("float32", "float16", "bfloat16", "float64") and isinstance(text, str)
    return is_text and bool([float(number) for number in text.split()])


def is_same_sample(one, other):
    """Whether two results of sample_weights() are of the same weights, in whatever precision each was loaded."""
    import torch

    if one.keys() != other.keys():
        return False
    for part, (precision, text) in one.items():
        kinds = [getattr(torch, kind) for kind in (precision, other[part][0])]
        values = [torch.tensor([float(number) for number in numbers.split()]) for numbers in (text, other[part][1])]
        if values[0].shape != values[1].shape:
            return False
        coarse = min(kinds, key=lambda kind: torch.finfo(kind).bits)
        rounded = [value.to(coarse) for value in values]
        alike = torch.equal(*rounded) if len({*kinds, torch.float32}) < 3 else torch.allclose(*values, rtol=2**-7, atol=1e-6)
        if not alike:
            return False
    return True


def take_apart(name, pipeline):
    """The Models of a loaded pipeline."""
    text_encoders, family = text_encoders_of(pipeline), family_of(pipeline)
    return Models(
        name=name,
        pipeline=pipeline,
        family=family,
        tokenizers=[tokenizer_of(pipeline, part) for part in text_encoders],
        text_encoders=list(text_encoders.values()),
        vae=pipeline.vae,
        denoiser=family.denoiser_of(pipeline))

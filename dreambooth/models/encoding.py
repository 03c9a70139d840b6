"""Prompts as the denoiser is told them: {name: a tensor [P, ...], or a list of P tensors} of P prompts."""

from dreambooth.base import say
from dreambooth.device import moved
from dreambooth.models.families.known import family_of


def rows_of(conditioning, numbers, device):
    """The conditioning of those of the P prompts that `numbers` [B], on the CPU, names."""
    import torch

    there = moved(numbers, device)
    return {name: value[there] if torch.is_tensor(value) else [value[number] for number in numbers.tolist()]
            for name, value in conditioning.items()}


def embed_ends(models, prompts):
    """Text embeddings [P, channels] that sum up P prompts."""
    import torch

    with torch.no_grad():
        return models.family.summaries(models, prompts)


def check_length(pipeline, prompts):
    """Say so if a prompt is longer than the model reads."""
    for prompt in prompts:
        length, limit = family_of(pipeline).prompt_length(pipeline, prompt)
        if length > limit:
            say(f'Note: "{prompt[:60]}..." is {length} tokens; the model reads only the first {limit}.')

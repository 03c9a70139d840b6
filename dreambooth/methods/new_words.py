"""Textual inversion and the words of pivotal tuning: vectors of new words train, and nothing else of the text encoder."""

import dataclasses
import random

from dreambooth.base import UserError, default, say_once
from dreambooth.methods.groups import ParameterGroup
from dreambooth.models.notes import with_kind
from dreambooth.models.vocabulary import add_word, embedding_keys, vectors_of
from dreambooth.subjects.identifier import rare_words
from dreambooth.subjects.nouns import noun_of


def new_words(s, models, subjects, recipe, starts=()):
    """Textual inversion (Gal et al., arXiv 2208.01618): a new word for each subject, whose vectors alone train.

    They start as the vectors of --initializer_token, or of the words `starts`, or of the class noun, and are parameters
    of their own, looked up beside the vocabulary's table: that has neither gradient nor optimizer state.

    With --embedding_norm they start as what the text encoder says of that (cross initialization, Pang et al., arXiv 2312.15905), drawn
    out to this length; the parameters are the vectors divided by their numbers' mean size then.
    """
    nouns = [noun_of(subject.class_prompt or subject.name) for subject in subjects]
    starts = [s.initializer_token] * len(subjects) if s.initializer_token else starts or nouns
    count, norm = default(s.num_vectors, recipe.num_vectors), default(s.embedding_norm, recipe.embedding_norm)
    for subject, start in zip(subjects, starts):
        say_once(f'New word "{subject.identifier}" starts as "{start}"{f", drawn out to length {norm:g}" if norm else ""}.')
    if norm and not models.family.says_after_norm:
        raise UserError(f"--embedding_norm {norm:g}: {models.family.kind} is told what its text encoders say before their last normalization, "
                        f"where a long vector would drown all else; leave it out")
    words = []
    for tokenizer, text_encoder in models.readers:
        first, table = len(tokenizer), text_encoder.get_input_embeddings().weight
        size = norm / table.shape[1]**0.5 if norm else 1.0
        for subject, start in zip(subjects, starts):
            ids = tokenizer(start, add_special_tokens=False).input_ids
            if not ids:
                given = "--initializer_token" if s.initializer_token else "--class_prompt"
                raise UserError(f'{given} "{start}": no word; give one that says what the subject is, such as "dog"')
            vectors = size * meanings(tokenizer, text_encoder, ids, count, s.seed) if norm else table[(ids * count)[-count:]]
            add_word(tokenizer, text_encoder, subject.identifier, vectors)
        words.append(trained_rows(text_encoder.get_input_embeddings(), first, size))
    rows, finishers = zip(*words)
    return ParameterGroup("new_words", [text_encoder for _, text_encoder in models.readers], list(rows),
                          default(s.embedding_lr, recipe.embedding_lr), finish=lambda: [finish() for finish in finishers])


def trained_rows(table, first, size):
    """(parameter, what to call once it has trained): the vectors of an embedding table from the row `first` on, as multiples of
    `size`, which it looks up from now on."""
    import torch

    table.register_parameter("new_rows", torch.nn.Parameter(table.weight[first:].detach() / size))

    def look_up(table, args, output):
        ids = args[0][..., None]  # [B, tokens, 1]
        return torch.where(ids >= first, size * table.new_rows[(args[0] - first).clamp(min=0)], output)

    def finish(hook=table.register_forward_hook(look_up)):
        hook.remove()
        table.weight.data[first:] = (size * table.new_rows.data).to(table.weight)
        del table.new_rows
    return table.new_rows, finish


APART = 0.3  # of the size of a new word's numbers: by so much do its vectors differ at first, that they may learn different things


def meanings(tokenizer, text_encoder, ids, count, seed):
    """What a text encoder says of a text of these `ids` in the end, `count` times, a little apart: [count, channels].

    It is taken before the last normalization, where its length is lost, with mean 0 and variance 1.
    """
    import torch

    places, (begin, end) = tokenizer.model_max_length, tokenizer("").input_ids
    text, seen = ([begin, *ids, end] + [tokenizer.pad_token_id] * places)[:places], []
    norm = getattr(text_encoder, "text_model", text_encoder).final_layer_norm
    hook = norm.register_forward_pre_hook(lambda norm, args: seen.append(args[0]))
    with torch.no_grad():
        text_encoder(torch.tensor([text], device=text_encoder.device))
    hook.remove()
    said = seen[0][0, len(ids)].float()
    said = (said - said.mean()) / said.std(correction=0)
    if count == 1:
        return said[None]
    noise = torch.randn(count, len(said), generator=torch.Generator().manual_seed(seed))
    return said + APART * noise.to(said.device)


def pivotal_words(s, models, subjects, recipe):
    """New words that rest after a fraction of the run, when the LoRA goes on alone (Roich et al., arXiv 2106.05744).

    They start as rare words. As the class noun, the word of "a <rex> dog" would mean another dog of the class, which the
    LoRA is taught at the same time to leave as it is.
    """
    rare = rare_words([tokenizer for tokenizer, _ in models.readers], [subject.class_prompt or "" for subject in subjects])
    random.Random(s.seed).shuffle(rare)
    starts = rare[:len(subjects)] if len(rare) >= len(subjects) else ()
    return dataclasses.replace(new_words(s, models, subjects, recipe, starts), until=s.embedding_frac)


def embedding_file(subject, subjects):
    """Where a subject's new word is saved: learned_embeds.safetensors, or with its name if it is one of several."""
    return "learned_embeds.safetensors" if len(subjects) == 1 else f"learned_embeds-{subject.name}.safetensors"


def save_words(folder, models, subjects, notes):
    """Write each new word as load_textual_inversion() takes it: {word: vectors}, for SDXL {"clip_l": ..., "clip_g": ...}; with
    {note: text} of its model."""
    from safetensors.torch import save_file

    for subject in subjects:
        vectors = [vectors_of(tokenizer, text_encoder, subject.identifier).float().clone()
                   for tokenizer, text_encoder in models.readers]
        save_file(dict(zip(embedding_keys(models, subject.identifier), vectors)), folder / embedding_file(subject, subjects),
                  with_kind(notes, "textual-inversion"))

"""New words of a tokenizer and its text encoder, and how files of embeddings name them."""

from dreambooth.base import UserError, slug


def taken_tokens(tokenizer, word, count):
    """Those of the tokens of a new word of so many vectors that a tokenizer has already."""
    vocabulary = tokenizer.get_vocab()
    return [token for token in tokens_of(word, count) if token in vocabulary or f"{token}</w>" in vocabulary]


def tokens_of(word, count):
    """The tokens of a word of so many vectors, as diffusers names them: <x>, <x>_1, ..."""
    return [word] + [f"{word}_{i}" for i in range(1, count)]


def add_word(tokenizer, text_encoder, word, vectors):
    """Add a word of n vectors [n, channels] to a tokenizer and its text encoder, named as diffusers names them.

    Raises UserError if the tokenizer has the word already.
    """
    import torch

    tokens = tokens_of(word, len(vectors))
    if taken := taken_tokens(tokenizer, word, len(vectors)):
        raise UserError(f'"{taken[0]}" is in this model\'s vocabulary already; a new word needs another name, such as '
                        f'--identifier "<my-{slug(word)}>"')
    tokenizer.add_tokens(tokens)
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        table = text_encoder.get_input_embeddings().weight.requires_grad_(False)
        table[-len(tokens):] = vectors.to(table)


def vectors_of(tokenizer, text_encoder, word):
    """The vectors [n, channels] of a word that add_word() added."""
    vocabulary, n = tokenizer.get_vocab(), 1
    while f"{word}_{n}" in vocabulary:
        n += 1
    return text_encoder.get_input_embeddings().weight[vocabulary[word]:vocabulary[word] + n].detach()


NAMELESS = ("emb_params", "string_to_param.*", "*")  # A1111's and its converters', which go by the name of the file
XL_EMBEDDING = ["clip_l", "clip_g"]  # a word's tensors in a file for SDXL, one for each text encoder


def embedding_keys(models, word):
    """Names of a word's tensors in learned_embeds.safetensors, one for each text encoder, as diffusers' loaders want."""
    return XL_EMBEDDING if len(models.readers) > 1 else [word]


def word_in(names, otherwise):
    """The word that an embedding file of these tensors holds; None if it is none. Some tools name the file, not the word."""
    if set(names) == set(XL_EMBEDDING) or len(names) == 1 and names[0] in NAMELESS:
        return otherwise
    return names[0] if len(names) == 1 else None


def embedding_vectors(models, tensors):
    """A word's vectors [n, channels] for each text encoder. Raises ValueError if the file is for another model."""
    keys = embedding_keys(models, next(iter(tensors)))
    if sorted(tensors) != sorted(keys):
        raise ValueError("it is for SDXL, which has two text encoders" if set(tensors) == set(XL_EMBEDDING) else
                         "it is for a model with one text encoder")
    widths = [text_encoder.get_input_embeddings().weight.shape[1] for _, text_encoder in models.readers]
    own = [tensors[key].shape[-1] if tensors[key].dim() else 1 for key in keys]
    if own != widths:
        raise ValueError(f"its vectors have {' and '.join(map(str, own))} numbers, those of this model {' and '.join(map(str, widths))}")
    return [tensors[key].reshape(-1, width) for key, width in zip(keys, widths)]

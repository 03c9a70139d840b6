"""New words of a tokenizer and its text encoder, and how files of embeddings name them."""

from dreambooth.base import UserError, slug


def add_word(tokenizer, text_encoder, word, vectors):
    """Add a word of n vectors [n, channels] to a tokenizer and its text encoder, named as diffusers names them.

    Raises UserError if the tokenizer has the word already.
    """
    import torch

    tokens = [word] + [f"{word}_{i}" for i in range(1, len(vectors))]
    if taken := [token for token in tokens if token in tokenizer.get_vocab() or f"{token}</w>" in tokenizer.get_vocab()]:
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


XL_EMBEDDING = ["clip_l", "clip_g"]  # a word's tensors in a file for SDXL, one for each text encoder


def embedding_keys(models, word):
    """Names of a word's tensors in learned_embeds.safetensors, one for each text encoder, as diffusers' loaders want."""
    return XL_EMBEDDING if len(models.text_encoders) > 1 else [word]


def word_in(names, otherwise):
    """The word that an embedding file of these tensors holds; None if it is none. Some tools name the file, not the word."""
    if set(names) == set(XL_EMBEDDING) or names == ["emb_params"]:
        return otherwise
    return names[0] if len(names) == 1 else None


def embedding_vectors(models, tensors):
    """A word's vectors [n, channels] for each text encoder. Raises ValueError if the file is for another model."""
    keys = embedding_keys(models, next(iter(tensors)))
    widths = [text_encoder.get_input_embeddings().weight.shape[1] for text_encoder in models.text_encoders]
    if sorted(tensors) != sorted(keys) or [tensors[key].shape[-1] for key in keys] != widths:
        raise ValueError("its vectors have another size")
    return [tensors[key].reshape(-1, width) for key, width in zip(keys, widths)]

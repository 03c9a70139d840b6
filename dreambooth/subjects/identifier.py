"""The rare word that stands for a subject (paper, section 3.1 and "Rare-token identifiers").

Knows tokenizers, but no text encoder: how a prompt's embedding is computed is passed in.
"""

import random

from dreambooth.base import UserError, say
from dreambooth.subjects.words import Subject, fill_identifier

RARE = 0.8  # vocabularies of byte pairs and of sentencepiece list the frequent tokens first: those after this share of it are rare
# Rare tokens of CLIP's vocabulary, read one by one: no word, name, place, acronym or slur that we know of ("sks", which
# everybody uses, is a rifle). Then such tokens of Qwen's, beginnings of Polish, Turkish and Spanish words; the last line are such of
# the bundled model's.
RARE_WORDS = """
    phol mley ylde etto elot tlap enly bbly olls orum acki mmes ssin itez utto oday gion seh vak fuls rety uous etty onee
    azzy ffes ffen cett kert trun ynna mlas inem enei peth apro iru olis cius vius bius achs atis ndi niti oti stis
    yapt olmad wygl chcia pomys wypos tytu ihtiy zespo znale dotyc bezpo szko todav narz niezb rozp wybra zobac pobli zobow najb zwyk
    yayg niekt vazge
    zwx xqr qvk vkz wjq jxv fzw kqx"""


def rare_words(tokenizers, class_prompts):
    """Those of RARE_WORDS that every tokenizer reads as one rare token before each class noun."""
    def is_one(tokenizer, word):
        tokens = [token_within(tokenizer, word, prompt) for prompt in class_prompts or [""]]
        return all(token is not None and is_rare(tokenizer, token) for token in tokens)
    return [word for word in RARE_WORDS.split() if all(is_one(tokenizer, word) for tokenizer in tokenizers)
            and not any(word in prompt for prompt in class_prompts)]


def token_within(tokenizer, word, class_prompt):
    """The id of the one token that `word` adds to "a CLASS", between its two words; None if it adds others or changes them.

    Byte-level vocabularies have a word with and without the space before it; what counts is how it is read in a sentence.
    """
    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids
    with_word, without, first = ids(f"a {word} {class_prompt}".strip()), ids(f"a {class_prompt}".strip()), len(ids("a"))
    is_one = len(with_word) == len(without) + 1 and with_word[:first] == without[:first] and with_word[first + 1:] == without[first:]
    return with_word[first] if is_one else None


def is_rare(tokenizer, token_id):
    return token_id >= RARE * len(tokenizer)


def pieces_of(tokenizer, word):
    """The tokens, as text, that a tokenizer reads a word as within a sentence."""
    return tokenizer.tokenize(f"a {word}")[len(tokenizer.tokenize("a")):]


def choose_identifiers(models, concepts, seed, embed):
    """One identifier for each concept: its own, or for "auto" a rare word that means little to the model.

    `embed` maps P prompts to the text encoder's embeddings [P, channels] at their ends.
    Of the rare words those are kept, half of them and at most 20, that move the text embedding of the class least; the
    seed picks one, and each further one is the least similar to those taken. (Paper, "Rare-token identifiers": a word
    with a weak prior in both language model and diffusion model.) Of several tokenizers the first decides what is rare: beside CLIP's,
    T5's may read the word in pieces, which mean little together.
    """
    import torch

    tokenizer, table = models.tokenizers[0], models.text_encoders[0].get_input_embeddings().weight
    words, taken = [], [concept.identifier for concept in concepts if concept.identifier != "auto"]
    candidates = rare_words(models.tokenizers[:1], [concept.class_prompt or "" for concept in concepts])
    for concept in concepts:
        if concept.identifier != "auto":
            check_identifier(tokenizer, concept.identifier)
            words.append(concept.identifier)
            continue
        free = [word for word in candidates if word not in taken]
        if not free:
            raise UserError(f'no rare word that this model reads as one token is left for "{concept.name}"; choose one '
                            f"yourself with --identifier")
        shift = embedding_shift(embed, free, concept)
        best = sorted(free, key=shift.get)[:min(20, -(-len(free) // 2))]
        vectors = {word: table[tokenizer.convert_tokens_to_ids(pieces_of(tokenizer, word))].mean(0) for word in best + taken}

        def similarity(word):
            return max([torch.cosine_similarity(vectors[word], vectors[other], dim=0).item() for other in taken], default=0)
        random.Random(f"{seed} {concept.name}").shuffle(best)
        words.append(min(best, key=similarity))
        taken.append(words[-1])
        token = tokenizer.convert_tokens_to_ids(pieces_of(tokenizer, words[-1]))[0]
        say(f'Identifier of "{concept.name}": "{words[-1]}", token {token} of {len(tokenizer)}; it moves the embedding of '
            f'"{concept.class_prompt}" by {shift[words[-1]]:.3f} ({len(free)} rare words move it by '
            f"{min(shift.values()):.3f} to {max(shift.values()):.3f}).")
    return words


def embedding_shift(embed, words, concept):
    """{word: 1 - cosine of the text embeddings, at the end of the text, of the prompt with the word and of the class}."""
    import torch

    bare = fill_identifier(concept.instance_prompt, [Subject("", "", "", concept.name)], "")
    prompts = [" ".join(bare.split())]
    prompts += [fill_identifier(concept.instance_prompt, [Subject(word, "", "", concept.name)], "") for word in words]
    vectors = embed(prompts)
    return dict(zip(words, (1 - torch.cosine_similarity(vectors[1:], vectors[:1])).tolist()))


def check_identifier(tokenizer, identifier):
    """Say so if the tokenizer does not read the identifier as one rare token."""
    pieces = pieces_of(tokenizer, identifier)
    if len(pieces) > 1:
        say(f'Note: the tokenizer splits the identifier "{identifier}" into {len(pieces)} tokens ({" ".join(pieces)}), which '
            f"mean something already; one rare token learns better. --identifier auto finds one.")
    elif not is_rare(tokenizer, tokenizer.convert_tokens_to_ids(pieces[0])):
        say(f'Note: the identifier "{identifier}" is a common word (token {tokenizer.convert_tokens_to_ids(pieces[0])} of '
            f"{len(tokenizer)}): its old meaning mixes with the subject, and prompts with it will show the subject. "
            f"--identifier auto finds a rare one.")

"""The identifier: rare words of CLIP's own vocabulary, and how one is chosen."""

import functools
import gzip
import importlib.util
import itertools
from pathlib import Path

import pytest
import tiny_families
import torch

import dreambooth_implementation as db


@pytest.fixture(scope="session")
def clip():
    """A model with CLIP's own tokenizer and a text encoder of random weights, all that choosing an identifier needs."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    file = Path(importlib.util.find_spec("open_clip").origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    merges = [tuple(line.split()) for line in gzip.open(file, "rt", encoding="utf-8").read().split("\n")[1:48895]]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = (code for code in range(256) if code not in printable)
    letters = [chr(code) for code in printable] + [chr(256 + i) for i, _ in enumerate(rest)]
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges, model_max_length=77)
    assert len(tokenizer) == 49408 and tokenizer("sks").input_ids == [49406, 48136, 49407]

    torch.manual_seed(0)
    text_encoder = CLIPTextModel(CLIPTextConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                                                num_attention_heads=2, eos_token_id=49407)).eval()

    class Pipeline:
        unet = type("UNet", (), {"config": type("Config", (), {"addition_embed_type": None})})

        def maybe_convert_prompt(self, prompts, tokenizer):
            return prompts
    return db.Models("clip", Pipeline(), db.StableDiffusion(), [tokenizer], [text_encoder], None, None)


def concept(class_prompt="a dog", name="rex", identifier="auto"):
    return db.Concept("photos", "class", 2, name, class_prompt, identifier, db.default_instance_prompt(class_prompt))


def ends(models):
    """The function that embeds prompts as these models do, at their ends."""
    return functools.partial(db.embed_ends, models)


def chosen_by(models, concepts, seed):
    return db.choose_identifiers(models, concepts, seed, ends(models))


@pytest.mark.parametrize("class_prompt", ["a dog", "a teddy bear", "an alarm clock", "a photo of a cat"])
def test_every_candidate_is_one_rare_token_of_clip(clip, class_prompt):
    words, tokenizer = db.rare_words(clip.tokenizers, [class_prompt]), clip.tokenizers[0]
    assert len(words) > 40 and "sks" not in words
    for word in words:
        (token,) = tokenizer(word, add_special_tokens=False).input_ids
        assert token >= 40000 - 500
        assert token in tokenizer(f"a {word} {class_prompt}").input_ids and word not in class_prompt
    assert not any(word in db.rare_words(clip.tokenizers, [f"a {word} thing"]) for word in words[:3])


def test_no_candidate_is_a_word_or_an_acronym():
    """Whoever adds to the list: none of these (from CLIP's own rare tokens) may come in."""
    refused = set("sks jap nips fck blob siam lexa ssh uwu nfl nba shih puli kush klan slut milf olga dmitry koko elba".split())
    words = db.RARE_WORDS.split()
    assert len(words) == len(set(words)) and not refused & set(words)
    assert all(word.isascii() and word.islower() and 3 <= len(word) <= 5 for word in words)


def test_choice_is_the_seeds_and_moves_the_meaning_least(clip, capsys):
    chosen = {seed: chosen_by(clip, [concept()], seed)[0] for seed in range(12)}
    assert chosen_by(clip, [concept()], 3) == [chosen[3]] and len(set(chosen.values())) > 4
    free = db.rare_words(clip.tokenizers, ["a dog"])
    shift = db.embedding_shift(ends(clip), free, concept())
    assert set(chosen.values()) <= set(sorted(free, key=shift.get)[:20])
    assert all(0 <= value <= 2 for value in shift.values())
    out = capsys.readouterr().out
    assert f'"{chosen[3]}", token {clip.tokenizers[0](chosen[3]).input_ids[1]} of 49408' in out


def test_shift_is_measured_at_the_end_of_the_text(clip):
    tokenizer, text_encoder = clip.tokenizers[0], clip.text_encoders[0]
    vectors = [text_encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
               for text in ("a dog", "a phol dog")]
    expected = 1 - torch.cosine_similarity(*vectors, dim=0)
    assert db.embedding_shift(ends(clip), ["phol"], concept())["phol"] == pytest.approx(expected.item(), abs=1e-5)


def test_identifiers_of_several_subjects_are_distinct_and_unlike(clip):
    concepts = [concept(name=str(i)) for i in range(6)] + [concept(name="own", identifier="phol")]
    words = chosen_by(clip, concepts, 0)
    assert len(set(words)) == 7 and words[-1] == "phol"
    table = clip.text_encoders[0].get_input_embeddings().weight
    vectors = [table[clip.tokenizers[0](word).input_ids[1]] for word in words]
    assert max(torch.cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(vectors, 2)) < 0.5


@pytest.mark.parametrize("word, said", [("phol", ""), ("xxy5syt00", "into"), ("zwx", "into 2 tokens"), ("dog", "common word"),
                                        ("special", "common word"), ("[V]", "into 3 tokens")])
def test_a_poor_identifier_of_ones_own_is_said(clip, capsys, word, said):
    assert chosen_by(clip, [concept(identifier=word)], 0) == [word]
    out = capsys.readouterr().out
    assert said in out if said else not out


def test_without_rare_words_the_user_must_choose(clip, monkeypatch):
    monkeypatch.setattr(db, "RARE_WORDS", "dog zwx")
    with pytest.raises(db.UserError, match="--identifier"):
        chosen_by(clip, [concept()], 0)


# ---- other kinds of vocabulary


def byte_level():
    return tiny_families.qwen_tokenizer()


def unigram():
    return tiny_families.t5_tokenizer()


@pytest.mark.parametrize("vocabulary", [byte_level, unigram])
def test_a_word_is_looked_for_as_it_stands_in_a_sentence(vocabulary):
    """With the space before it, which byte-level and sentencepiece vocabularies have within the token."""
    tokenizer = vocabulary()
    assert set(db.rare_words([tokenizer], ["a dog"])) == set(tiny_families.RARE)
    for word in tiny_families.RARE:
        (piece,), number = db.pieces_of(tokenizer, word), db.token_within(tokenizer, word, "a dog")
        assert piece[1:] == word and piece[0] in "\u0120\u2581" and number == tokenizer.convert_tokens_to_ids(piece)
        assert number in tokenizer(f"a {word} dog on the moon").input_ids
        assert number in tokenizer(f"<|im_start|>user\na {word} dog<|im_end|>\n").input_ids
    assert db.token_within(tokenizer, "phol", "a dog") is None and len(db.pieces_of(tokenizer, "phol")) > 1
    assert not db.is_rare(tokenizer, db.token_within(tokenizer, "dog", "a cat"))


def test_what_no_piece_stands_for_is_not_rare():
    tokenizer = unigram()
    number = db.token_within(tokenizer, "\u2603", "a dog")
    assert number is None or not db.is_rare(tokenizer, number)


def test_the_first_tokenizer_decides(clip):
    """As of CLIP's and T5's: what is one rare token for the first may be several for the other."""
    two = db.dataclasses.replace(clip, tokenizers=[*clip.tokenizers, unigram()])
    found, = db.choose_identifiers(two, [concept()], 3, ends(clip))
    assert [found] == chosen_by(clip, [concept()], 3) and len(db.pieces_of(two.tokenizers[1], found)) > 1

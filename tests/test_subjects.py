"""Several subjects, captions, and the identifier: which words stand for a subject and how they are chosen."""

import dataclasses
import gzip
import importlib.util
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import picture

import dreambooth_implementation as db

QUICK = ["--num_class_images", "2", "--num_inference_steps", "2", "--steps", "2"]


# ---- the real CLIP vocabulary


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
    return db.Models("clip", Pipeline(), [tokenizer], [text_encoder], None, None, None)


def concept(class_prompt="a dog", name="rex", identifier="auto"):
    return db.Concept("photos", "class", 2, name, class_prompt, identifier, db.default_instance_prompt(class_prompt))


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
    assert all(word.isascii() and word.islower() and 3 <= len(word) <= 4 for word in words)


def test_choice_is_the_seeds_and_moves_the_meaning_least(clip, capsys):
    chosen = {seed: db.choose_identifiers(clip, [concept()], seed)[0] for seed in range(12)}
    assert db.choose_identifiers(clip, [concept()], 3) == [chosen[3]] and len(set(chosen.values())) > 4
    free = db.rare_words(clip.tokenizers, ["a dog"])
    shift = db.embedding_shift(clip, free, concept())
    assert set(chosen.values()) <= set(sorted(free, key=shift.get)[:20])
    assert all(0 <= value <= 2 for value in shift.values())
    out = capsys.readouterr().out
    assert f'"{chosen[3]}", token {clip.tokenizers[0](chosen[3]).input_ids[1]} of 49408' in out


def test_shift_is_measured_at_the_end_of_the_text(clip):
    tokenizer, text_encoder = clip.tokenizers[0], clip.text_encoders[0]
    vectors = [text_encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1] for text in ("a dog", "a phol dog")]
    expected = 1 - torch.cosine_similarity(*vectors, dim=0)
    assert db.embedding_shift(clip, ["phol"], concept())["phol"] == pytest.approx(expected.item(), abs=1e-5)


def test_identifiers_of_several_subjects_are_distinct_and_unlike(clip):
    concepts = [concept(name=str(i)) for i in range(6)] + [concept(name="own", identifier="phol")]
    words = db.choose_identifiers(clip, concepts, 0)
    assert len(set(words)) == 7 and words[-1] == "phol"
    table = clip.text_encoders[0].get_input_embeddings().weight
    vectors = [table[clip.tokenizers[0](word).input_ids[1]] for word in words]
    assert max(torch.cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(vectors, 2)) < 0.5


@pytest.mark.parametrize("word, said", [("phol", ""), ("xxy5syt00", "into"), ("zwx", "into 2 tokens"), ("dog", "common word"),
                                        ("special", "common word"), ("[V]", "into 3 tokens")])
def test_a_poor_identifier_of_ones_own_is_said(clip, capsys, word, said):
    assert db.choose_identifiers(clip, [concept(identifier=word)], 0) == [word]
    out = capsys.readouterr().out
    assert said in out if said else not out


def test_without_rare_words_the_user_must_choose(clip, monkeypatch):
    monkeypatch.setattr(db, "RARE_WORDS", "dog zwx")
    with pytest.raises(db.UserError, match="--identifier"):
        db.choose_identifiers(clip, [concept()], 0)


# ---- what a person gives


def settings(**values):
    return db.Settings("train", **values)


def test_identifier_is_read_from_an_instance_prompt(photos, capsys):
    def read(**values):
        return db.read_concepts(settings(instance_data_dir=str(photos), class_prompt="a dog", **values))[0]
    assert read(instance_prompt="a photo of sks dog").identifier == "sks"
    assert 'Identifier "sks"' in capsys.readouterr().out
    assert read(instance_prompt="my [identifier] dog").identifier == "auto"
    assert read(instance_prompt="a dog", identifier="sks").identifier == "sks"
    assert "does not contain the identifier" in capsys.readouterr().out
    with pytest.raises(db.UserError, match=r"\[identifier\]"):
        read(instance_prompt="my own sks dog")


@pytest.fixture
def two(tmp_path):
    """Two subjects of one class with 3 and 1 photos, one of another; returns the path of their concepts file."""
    for name, count in (("rex", 3), ("lili", 1), ("tom", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            picture(hash((name, i)) % 1000).save(tmp_path / name / f"{i}.png")
    (tmp_path / "tom" / "class_prompt.txt").write_text("a cat")
    entries = [{"name": "rex", "instance_data_dir": "rex", "class_prompt": "a dog"},
               {"name": "lili", "instance_data_dir": "lili", "class_prompt": "a dog", "identifier": "sks", "num_class_images": 3},
               {"name": "tom", "instance_data_dir": "tom", "instance_prompt": "a photo of my [identifier] cat"}]
    (tmp_path / "concepts.json").write_text(json.dumps(entries))
    return tmp_path / "concepts.json"


def test_subjects_are_balanced_and_keep_their_captions(two, tiny_model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(db, "UNGUIDED_CLASS_IMAGE_STEPS", 1)
    s = settings(concepts="concepts.json", num_class_images=2, seed=5)
    concepts = db.read_concepts(s)
    models = db.load_models(str(tiny_model("sd1")), torch.float32)
    subjects = db.settle_subjects(s, models, concepts)
    rex, lili, tom = subjects
    assert len({x.identifier for x in subjects}) == 3 and lili.identifier == "sks" and tom.class_prompt == "a cat"
    assert tom.instance_prompt == f"a photo of my {tom.identifier} cat" and rex.instance_prompt == f"a {rex.identifier} dog"

    class Alone:
        process_index, num_processes = 0, 1

        def wait_for_everyone(self):
            pass
    pools = db.class_pools(s, models, concepts, 32, db.plan_device(s), Alone())
    assert [len(pool) for pool in pools] == [2, 3, 2] and pools[0] == pools[1][:2]  # dogs share their images
    assert {caption for _, caption in pools[1]} == {"a dog"} and {caption for _, caption in pools[2]} == {"a cat"}
    photos = [db.captioned(c, x) for c, x in zip(concepts, subjects)]
    cache = db.cache_latents(models, photos, pools, 32, "cpu")
    assert len(cache.mean) == 3 + 1 + 2 + 3 + 2

    drawn, rows, classes = Counter(), Counter(), Counter()
    for step in range(60):
        batch = db.make_batch(cache, dataclasses.replace(s, train_batch_size=2), step, 1000)
        for prompt, time_id, is_class in zip(batch["prompt"].tolist(), batch["latents"], batch["is_class"].tolist()):
            (classes if is_class else drawn)[cache.prompts[prompt]] += 1
    assert drawn == {x.instance_prompt: 40 for x in subjects}
    assert classes == {"a dog": 80, "a cat": 40}
    for draw in range(36):
        rows.update(db.balanced(cache.photos, draw, 1, 0))
    assert [sorted(rows[row] for row in pool) for pool in cache.photos] == [[4, 4, 4], [12], [6, 6]]


def test_two_subjects_in_one_model(two, run, tiny_model, tmp_path):
    status, out, err = run("--train", "--model_name", tiny_model("sdxl"), "--concepts", "concepts.json", *QUICK)
    assert status == 0, err
    record = json.loads((tmp_path / "output" / "dreambooth.json").read_text())
    words = {x["name"]: x["identifier"] for x in record["subjects"]}
    assert words.keys() == {"rex", "lili", "tom"} and all(f'"{word}"' in out for word in words.values() if word != "sks")
    draw = ["--infer", "--num_images", 1, "--num_inference_steps", 1]
    status, out, err = run(*draw, "--prompt", "a [identifier:tom] cat and a [identifier:rex] dog")
    assert status == 0 and f'"a {words["tom"]} cat and a {words["rex"]} dog"' in out, err
    for prompt in ("a [identifier] dog", "a [identifier:bello] dog"):
        status, _, err = run(*draw, "--prompt", prompt)
        assert status == 2 and "[identifier:rex], [identifier:lili], [identifier:tom]" in err and err.count("\n") == 1
    assert "moon" in run(*draw)[1]


@pytest.mark.parametrize("method", ["lora", "textual_inversion", "pivotal"])
def test_adapters_of_several_subjects(method, two, run, tiny_model, tmp_path):
    for entry in (entries := json.loads(two.read_text())):
        entry.pop("identifier", None)
    two.write_text(json.dumps(entries))
    status, out, err = run("--train", "--model_name", tiny_model("sd1"), "--concepts", "concepts.json", *QUICK, "--method", method)
    assert status == 0, err
    files = {p.name for p in (tmp_path / "output").glob("*.safetensors")}
    assert {f"learned_embeds-{name}.safetensors" for name in ("rex", "lili", "tom")} <= files or method == "lora"
    status, out, err = run("--infer", "--num_images", 1, "--num_inference_steps", 1, "--prompt", "a [identifier:tom] cat")
    assert status == 0 and (method == "lora" or '"a <tom> cat"' in out), err


def test_captions_of_single_photos(photos, capsys):
    (photos / "0.txt").write_text("a [identifier] dog\n asleep")
    (photos / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "no"}\n{"file_name": "1.png", "text": "a dog at sea"}\n')
    (given,) = db.read_concepts(settings(instance_data_dir=str(photos), class_prompt="a dog"))
    out = capsys.readouterr().out
    assert "2 of 3 photos" in out and "1 of them without [identifier]" in out and "Skipped" not in out
    subject = db.Subject("phol", "a dog", "a phol dog")
    captions = [caption for _, caption in db.captioned(given, subject)]
    assert captions == ["a phol dog asleep", "a dog at sea", "a phol dog"]
    (photos / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "fine"}\n{"file_name": "1.png"}\n')
    with pytest.raises(db.UserError, match="metadata.jsonl, line 2"):
        db.read_concepts(settings(instance_data_dir=str(photos), class_prompt="a dog"))


GOOD = {"name": "rex", "instance_data_dir": "photos", "class_prompt": "a dog"}


@pytest.mark.parametrize("text, said", [
    ("{", "not JSON"), ("{}", "must be a list"), ("[]", "must be a list"), ("[1]", "must be a list"),
    (json.dumps([{"name": "rex"}]), 'lacks "instance_data_dir"'),
    (json.dumps([GOOD | {"class_promt": "a dog"}]), '"class_promt"'),
    (json.dumps([GOOD | {"num_class_images": "many"}]), '"num_class_images"'),
    (json.dumps([GOOD | {"num_class_images": True}]), '"num_class_images"'),
    (json.dumps([GOOD | {"num_class_images": -3}]), '"num_class_images"'),
    (json.dumps([GOOD | {"class_prompt": ""}]), '"class_prompt"'),
    (json.dumps([GOOD | {"name": "../rex"}]), "../rex"),
    (json.dumps([GOOD | {"instance_data_dir": "nowhere"}]), "nowhere"),
    (json.dumps([GOOD, GOOD]), 'name "rex"'),
    (json.dumps([GOOD | {"identifier": "sks"}, GOOD | {"name": "tom", "identifier": "sks"}]), 'identifier "sks"'),
    (json.dumps([GOOD | {"class_prompt": "a [identifier] dog"}]), "class_prompt"),
])
def test_a_wrong_concepts_file_is_one_line(photos, run, tmp_path, text, said):
    (tmp_path / "concepts.json").write_text(text)
    status, _, err = run("--train", "--concepts", "concepts.json")
    assert status == 2 and err.count("\n") == 1 and said in err and "concepts.json" in err, err
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("flags, said", [
    (["--rank", "4"], "--rank has no meaning with --method full"),
    (["--method", "textual_inversion", "--train_text_encoder"], "--train_text_encoder has no meaning"),
    (["--method", "lora", "--num_vectors", "2"], "--num_vectors has no meaning with --method lora"),
    (["--method", "dreambooth"], "--method"),
    (["--concepts", "concepts.json", "--class_prompt", "a dog"], "--class_prompt: with --concepts"),
    (["--concepts", "nothing.json"], "--concepts nothing.json"),
])
def test_flags_of_other_methods_are_refused(run, flags, said):
    status, _, err = run("--train", *flags)
    assert status == 2 and err.count("\n") == 1 and said in err, err


@pytest.mark.parametrize("prompt, expected", [("a [identifier] dog", "a phol dog"), ("[identifier:rex] and [identifier]", "phol and phol"),
                                              ("a dog", "a dog"), ("[identify]", "[identify]")])
def test_prompts_are_filled(prompt, expected):
    assert db.fill_identifier(prompt, [db.Subject("phol", "a dog", "a phol dog", "rex")], "x") == expected


def test_the_models_own_subject_comes_before_an_adapters():
    own, other, same = (db.Subject(word, "", "", name) for word, name in (("phol", "rex"), ("<paint>", "paint"), ("<rex>", "rex")))
    prompt = "a [identifier] dog like [identifier:rex] in [identifier:paint]"
    assert db.fill_identifier(prompt, [own], "x", [other, same]) == "a phol dog like phol in <paint>"
    assert db.fill_identifier("[identifier]", [], "x", [other]) == "<paint>"

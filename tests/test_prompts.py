"""The prompts of an evaluation."""

import pytest
from conftest import REPOSITORY

import dreambooth_implementation as db


def test_there_are_25_prompts_of_every_kind():
    bundled = db.read_prompts(db.BUNDLED_PROMPTS, "--prompts_file")
    for prompts in (*db.PROMPTS.values(), bundled):
        assert len(set(prompts)) == len(prompts) == 25
        assert all(prompt.count("[identifier] [class]") == 1 for prompt in prompts)
    assert set(db.PROMPTS) == {"object", "live"}
    common = set(db.PROMPTS["object"]) & set(db.PROMPTS["live"])
    assert len(common) == 15 and "a cube shaped [identifier] [class]" in common  # 10 places and 5 properties
    assert "a [identifier] [class] with the Eiffel Tower in the background" in db.PROMPTS["object"]
    assert "a [identifier] [class] wearing a black top hat and a monocle" in db.PROMPTS["live"]


def test_the_bundled_prompts_are_words_that_the_model_knows():
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(REPOSITORY / "demo" / "model" / "tokenizer")
    for prompt in db.read_prompts(db.BUNDLED_PROMPTS, "--prompts_file"):
        words = prompt.replace("[identifier]", "wjq").replace("[class]", "robot").split()
        assert len(tokenizer(" ".join(words), add_special_tokens=False).input_ids) == len(words), prompt


@pytest.mark.parametrize("template, class_prompt, drawn, of_a_new_word, caption", [
    ("a [identifier] [class] on the moon", "a dog", "a sks dog on the moon", "a sks on the moon", "a dog on the moon"),
    ("a red [identifier] [class]", "an owl", "a red sks owl", "a red sks", "a red owl"),
    ("a [identifier] [class] in space", "an owl", "a sks owl in space", "a sks in space", "an owl in space"),
    ("a [identifier] [class]", "a photo of a teddy bear", "a sks teddy bear", "a sks", "a teddy bear"),
    ("a [identifier] dog asleep", "a dog", "a sks dog asleep", "a sks dog asleep", "a dog asleep"),
    ("a [identifier] in the snow", "a dog", "a sks in the snow", "a sks in the snow", "a dog in the snow"),
    ("[identifier], oil painting", "a dog", "sks, oil painting", "sks, oil painting", "dog, oil painting"),
])
def test_prompts_are_drawn_with_the_identifier_and_compared_without(template, class_prompt, drawn, of_a_new_word, caption):
    subject = db.Subject("sks", class_prompt, "", "dog")
    assert db.fill_template(template, subject, True) == (drawn, caption)
    assert db.fill_template(template, subject, False) == (of_a_new_word, caption)
    assert db.fill_template(template, db.Subject("", class_prompt, "", "dog"), True) == (caption, caption)


@pytest.mark.parametrize("class_prompt, live", [("a dog", True), ("a black Cat", True), ("a teapot", False),
                                                ("a stuffed animal", False), ("a teddy bear", False), ("a toy duck", False)])
def test_living_subjects_are_told_by_their_noun(class_prompt, live):
    assert db.is_live(class_prompt) is live


def test_subject_type_chooses_the_prompts(tmp_path):
    def prompts(base, **options):
        return db.usual_prompts(db.Settings("evaluate", **options), base, db.Subject("sks", "a dog", "", "dog"))

    assert prompts(tmp_path) == db.PROMPTS["live"]
    assert prompts(tmp_path, subject_type="object") == db.PROMPTS["object"]
    assert prompts(REPOSITORY / "demo" / "model") == db.read_prompts(db.BUNDLED_PROMPTS, "")
    assert prompts(REPOSITORY / "demo" / "model", subject_type="live") == db.PROMPTS["live"]

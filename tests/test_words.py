"""The words for a subject: prompts with and without a place for its identifier."""

import pytest

import dreambooth_implementation as db


@pytest.mark.parametrize("class_prompt, expected", [
    ("a dog", "a [identifier] dog"),
    ("an apple", "a [identifier] apple"),
    ("the dog", "a [identifier] dog"),
    ("dog", "a [identifier] dog"),
    ("a teddy bear", "a [identifier] teddy bear"),
    ("a photo of a dog", "a photo of a [identifier] dog"),
    ("a dog on the grass", "a [identifier] dog on the grass"),
])
def test_instance_prompt_follows_from_class_prompt(class_prompt, expected):
    assert db.default_instance_prompt(class_prompt) == expected


@pytest.mark.parametrize("prompt, expected", [
    ("a [identifier] dog", "a phol dog"), ("[identifier:rex] and [identifier]", "phol and phol"), ("a dog", "a dog"),
    ("[identify]", "[identify]")])
def test_prompts_are_filled(prompt, expected):
    assert db.fill_identifier(prompt, [db.Subject("phol", "a dog", "a phol dog", "rex")], "x") == expected


def test_the_models_own_subject_comes_before_an_adapters():
    own, other, same = (db.Subject(word, "", "", name)
                        for word, name in (("phol", "rex"), ("<paint>", "paint"), ("<rex>", "rex")))
    prompt = "a [identifier] dog like [identifier:rex] in [identifier:paint]"
    assert db.fill_identifier(prompt, [own], "x", [other, same]) == "a phol dog like phol in <paint>"
    assert db.fill_identifier("[identifier]", [], "x", [other]) == "<paint>"

"""A subject and the words for it: "a dog" makes "a [identifier] dog", and [identifier] becomes a word.

Knows nothing of tokenizers; which word it is, is chosen in `identifier`.
"""

import re
from dataclasses import dataclass

from dreambooth.base import UserError


@dataclass(frozen=True)
class Subject:
    """A subject as dreambooth.json records it: its words are settled."""

    identifier: str
    class_prompt: str
    instance_prompt: str
    name: str = ""


ARTICLE = re.compile(r"^((?:an? (?:photo|picture|image|drawing|painting|close-up) of )?)(?:(?:an?|the) )?(.+)$", re.IGNORECASE)


def default_instance_prompt(class_prompt, names_class=True):
    """'a dog' makes 'a [identifier] dog' (paper section 3.1: "a [identifier] [class noun]"), or else 'a [identifier]'."""
    opening, noun = ARTICLE.match(class_prompt).groups()
    return f"{opening}a [identifier]{f' {noun}' if names_class else ''}"


def noun_of(class_prompt):
    return ARTICLE.match(class_prompt)[2]


def mentions(prompt, identifier):
    """Whether a prompt has the identifier as a word of its own, or leaves a place for it."""
    return "[identifier" in prompt or bool(re.search(rf"(?<!\w){re.escape(identifier)}(?!\w)", prompt))


def fill_identifier(prompt, subjects, source, others=()):
    """`prompt` with each [identifier] or [identifier:NAME] replaced by the word of the subject in `subjects`.

    Failing that, by that of the subject in `others`. `source`, for complaints, is whose subjects they are.
    """
    def word(match):
        named = ([subject for subject in subjects if match[1] in (None, subject.name)]
                 or [subject for subject in others if match[1] in (None, subject.name)])
        if len(named) == 1:
            return named[0].identifier
        if not subjects and not others:
            raise UserError(f'"{prompt}": {source} has no dreambooth.json to tell what [identifier] stands for; write the '
                            f"word itself or give a model made by --train")
        names = ", ".join(f"[identifier:{subject.name}]" for subject in (*subjects, *others))
        raise UserError(f'"{prompt}": {source} knows {names}; write one of these for {match[0]}')
    return re.sub(r"\[identifier(?::([^\]]*))?\]", word, prompt)

"""A subject and the words for it: "a dog" makes "a [identifier] dog", and [identifier] becomes a word.

Knows nothing of tokenizers; which word it is, is chosen in `identifier`.
"""

import re
from dataclasses import dataclass

from dreambooth.base import UserError
from dreambooth.subjects.nouns import determiner_of, noun_of, take_apart_prompt

# Ways to write [identifier] that can mean nothing else; the last is the paper's.
PLACE = re.compile(r"\[\s*identifier\s*(?::\s*([^\]]*?)\s*)?\]|\{\s*identifier\s*(?::\s*([^}]*?)\s*)?\}|\[V\d?\*?\]", re.IGNORECASE)
CLASS_PLACE = re.compile(r"[\[{]\s*class(?:[ _](?:noun|word|name))?\s*[\]}]", re.IGNORECASE)


@dataclass(frozen=True)
class Subject:
    """A subject as dreambooth.json records it: its words are settled."""

    identifier: str
    class_prompt: str
    instance_prompt: str
    name: str = ""


def default_instance_prompt(class_prompt, names_class=True):
    """'a dog' makes 'a [identifier] dog' (paper section 3.1: "a [identifier] [class noun]"), or else 'a [identifier]'."""
    parts = take_apart_prompt(class_prompt)
    noun = f" {parts.noun}{parts.closing}" if names_class else ""
    return f"{parts.opening}{determiner_of(class_prompt)}[identifier]{noun}"


def with_places(prompt, literal=()):
    """`prompt` with [identifier], [identifier:NAME] and [class] wherever it says so in another way, but for the words `literal`."""
    def place(match):
        name = match[1] or match[2]
        return match[0] if match[0] in literal else f"[identifier:{name}]" if name else "[identifier]"
    return CLASS_PLACE.sub("[class]", PLACE.sub(place, prompt))


def mentions(prompt, identifier):
    """Whether a prompt has the identifier as a word of its own, in whatever capitals, or leaves a place for it."""
    return bool(PLACE.search(prompt) or re.search(rf"(?<!\w){re.escape(identifier)}(?!\w)", prompt, re.IGNORECASE))


def usual_prompts_of(subjects):
    """What is drawn of subjects where nothing else is asked for: each, each on the moon, and its class; and "" to guide against."""
    drawn = [prompt for x in subjects for prompt in (x.instance_prompt, f"{x.instance_prompt} on the moon", x.class_prompt) if prompt]
    return [*dict.fromkeys(drawn), ""]


def fill_identifier(prompt, subjects, source, others=()):
    """`prompt` with each [identifier] or [identifier:NAME] replaced by the word of the subject in `subjects`, [class] by its noun.

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
    whole = with_places(prompt, [subject.identifier for subject in (*subjects, *others)])
    filled = re.sub(r"\[identifier(?::([^\]]*))?\]", word, whole)
    return fill_class(filled, re.findall(r"\[identifier:([^\]]*)\]", whole), subjects or others)


def fill_class(prompt, names, subjects):
    """`prompt` with the noun of the one subject, or of those of `names`, for [class]. UserError if they differ in it."""
    if "[class]" not in prompt:
        return prompt
    named = [subject for subject in subjects if subject.name in names] or subjects
    nouns = {noun_of(subject.class_prompt) for subject in named if subject.class_prompt}
    if len(nouns) != 1:
        raise UserError(f'"{prompt}": write the noun itself for [class]')
    return prompt.replace("[class]", nouns.pop())

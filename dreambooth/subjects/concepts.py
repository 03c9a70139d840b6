"""What is to be learnt, as its owner describes it: by flags, or in a --concepts file for several subjects.

Knows nothing of methods and models: whoever calls says whether there are class images and whether prompts name the class.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from dreambooth.base import UserError, say, slug
from dreambooth.files import read_text
from dreambooth.settings import CONCEPT_FLAGS, SAMPLE_PHOTOS, _value_type
from dreambooth.subjects.photos import find_photos, own_class_images
from dreambooth.subjects.words import default_instance_prompt, fill_identifier, mentions, noun_of


@dataclass(frozen=True)
class Concept:
    """A subject as its owner describes it: an entry of --concepts, or the flags of these names."""

    instance_data_dir: str
    class_data_dir: str
    num_class_images: int
    name: str = ""
    class_prompt: str | None = None
    identifier: str = "auto"
    instance_prompt: str | None = None  # "a [identifier] dog"
    photos: tuple = ()  # (path, its own caption or None)


def read_concepts(s, needs_class, names_class):
    """The subjects to learn, one from the flags or those of --concepts, with their photos found and checked.

    `needs_class`: there will be class images; `names_class`: prompts name the class beside the identifier.
    Raises UserError for anything in photos, prompts or the JSON file that cannot be trained on.
    """
    entries = read_concept_file(s.concepts) if s.concepts else [
        {flag: value for flag in CONCEPT_FLAGS if (value := getattr(s, flag)) is not None}]
    concepts = []
    for entry in entries:
        concept = Concept(**{"instance_data_dir": SAMPLE_PHOTOS, "class_data_dir": s.class_data_dir,
                             "num_class_images": s.num_class_images, **entry})
        where = f'{s.concepts}, "{concept.name}":' if s.concepts else "--"
        concepts.append(complete_concept(concept, where, needs_class, names_class))
    for field in ("name", "identifier"):
        values = [value for concept in concepts if (value := getattr(concept, field)) not in ("", "auto")]
        for value in values:
            if sum(value in other for other in values) > 1:
                raise UserError(f'{s.concepts}: {field} "{value}" is another\'s too, or part of it; they must be distinct')
    owners = {c.class_data_dir: c.class_prompt for c in concepts}
    for c in concepts:
        if owners[c.class_data_dir] != c.class_prompt and own_class_images(c.class_data_dir):
            raise UserError(f"{s.concepts}: {c.class_data_dir} holds your own class images and cannot serve both "
                            f'"{c.class_prompt}" and "{owners[c.class_data_dir]}"; give each its class_data_dir')
    return concepts


def read_concept_file(path):
    """The entries of a --concepts file: a list of {"name", "instance_data_dir", "class_prompt", ...}."""
    try:
        entries = json.loads(read_text(Path(path)))
    except OSError as problem:
        raise UserError(f"--concepts {path}: cannot be read ({problem.strerror})") from None
    except ValueError as problem:
        raise UserError(f"--concepts {path}: not JSON ({problem})") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f'--concepts {path}: must be a list such as [{{"name": "rex", "instance_data_dir": "./rex", '
                        f'"class_prompt": "a dog"}}, ...]')
    kinds = {f.name: _value_type(f.type)[0] for f in dataclasses.fields(Concept) if f.name != "photos"}
    for number, entry in enumerate(entries, 1):
        if unknown := entry.keys() - kinds.keys():
            raise UserError(f'--concepts {path}: entry {number} has "{min(unknown)}"; known are {", ".join(kinds)}')
        for key in {"name", "instance_data_dir"} - entry.keys():
            raise UserError(f'--concepts {path}: entry {number} lacks "{key}"')
        for key, value in entry.items():
            if type(value) is not kinds[key] or not value:
                raise UserError(f'--concepts {path}: entry {number}, "{key}" must be '
                                + ("a number of at least 1" if kinds[key] is int else "a text that is not empty"))
        if not re.fullmatch(r"[\w-]+", entry["name"]):
            raise UserError(f'--concepts {path}: name "{entry["name"]}": letters, digits, - and _ only')
        if entry.get("num_class_images", 1) < 1:
            raise UserError(f'--concepts {path}: entry {number}, "num_class_images" must be a number of at least 1')
    return entries


def complete_concept(concept, where, needs_class, names_class):
    """`concept` with photos, class prompt, instance prompt and name; `where` begins the complaints about it."""
    flag = f"{where} " if where != "--" else where
    photos, class_prompt = find_photos(concept, f"{flag}instance_data_dir")
    instance_prompt = concept.instance_prompt
    if class_prompt is None and (needs_class or instance_prompt is None):
        reason = "prior preservation needs it" if instance_prompt else f"say what kind of thing is in {concept.instance_data_dir}"
        raise UserError(f'{flag}class_prompt is missing: {reason}, such as "a dog"'
                        + ("; or give --no-with_prior_preservation" if instance_prompt else ""))
    if "[identifier" in (class_prompt or ""):
        raise UserError(f'{flag}class_prompt "{class_prompt}": the class goes without the identifier, such as "a dog"')
    if not re.fullmatch(r"\S+", concept.identifier):
        raise UserError(f'{flag}identifier "{concept.identifier}": must be one word without spaces')
    instance_prompt = instance_prompt or default_instance_prompt(class_prompt, names_class)
    identifier = concept.identifier
    if "[identifier" not in instance_prompt and identifier == "auto":  # "a photo of sks dog" for "a photo of a dog"
        own = [word for word in instance_prompt.split() if word not in f"a an the photo picture of {class_prompt}".split()]
        if class_prompt is None and len(own) == 2:  # "a photo of sks dog": the rare word and the noun
            own = own[:1]
        if len(own) != 1:
            raise UserError(f'{flag}instance_prompt "{instance_prompt}": write [identifier] where the rare word belongs')
        identifier = own[0]
        say(f'Identifier "{identifier}", from the instance prompt "{instance_prompt}".')
    if not mentions(instance_prompt, identifier):
        say(f'Note: the instance prompt "{instance_prompt}" does not contain the identifier "{identifier}".')
    if captions := [caption for _, caption in photos if caption]:
        without = sum(not mentions(caption, identifier) for caption in captions)
        say(f"Captions: {len(captions)} of {len(photos)} photos in {concept.instance_data_dir} have their own"
            + (f"; {without} of them without [identifier], which they do not teach." if without else "."))
    return dataclasses.replace(concept, photos=tuple(photos), class_prompt=class_prompt, instance_prompt=instance_prompt,
                               identifier=identifier, name=concept.name or slug(noun_of(class_prompt or "subject")))


def captioned(concept, subject):
    """A subject's photos as (path, caption): its own caption, or the instance prompt."""
    return [(path, fill_identifier(caption, [subject], "the caption") if caption else subject.instance_prompt)
            for path, caption in concept.photos]

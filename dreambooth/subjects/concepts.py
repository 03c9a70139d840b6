"""What is to be learnt, as its owner describes it: by flags, or in a --concepts file for several subjects.

Knows nothing of methods and models: whoever calls says whether there are class images and whether prompts name the class.
"""

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from dreambooth.base import UserError, say, slug
from dreambooth.files import read_text
from dreambooth.settings import CONCEPT_FLAGS, SAMPLE_PHOTOS, _value_type, given_value
from dreambooth.subjects.class_folders import own_class_images
from dreambooth.subjects.identifier import RARE_WORDS
from dreambooth.subjects.masks import find_masks
from dreambooth.subjects.nouns import check_words, head_of, noun_of
from dreambooth.subjects.photos import find_photos
from dreambooth.subjects.syntax import foreign_words, tell_syntax
from dreambooth.subjects.words import CLASS_PLACE, PLACE, Subject, default_instance_prompt, fill_identifier, mentions

FOUND = ("photos", "masks")  # of a Concept: what is found, and not given


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
    masks: dict = dataclasses.field(default_factory=dict, compare=False)  # photo path -> "L" picture


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
        concept = complete_concept(concept, where, needs_class, names_class, s.caption != "none")
        given = find_masks(Path(concept.instance_data_dir), [path for path, _ in concept.photos]) if s.mask != "none" else {}
        concepts.append(dataclasses.replace(concept, masks=given))
    for field in ("name", "identifier"):
        values = [value for concept in concepts if (value := getattr(concept, field)) not in ("", "auto")]
        for value in values:
            if sum(value in other for other in values) > 1:
                raise UserError(f'{s.concepts}: {field} "{value}" is another\'s too, or part of it; they must be distinct')
    check_folders(s, concepts)
    return concepts


def check_folders(s, concepts):
    """UserError if one folder of a person's own class images is to serve two classes; a word if one of photos serves twice."""
    homes = {}
    for c in concepts:
        if (other := homes.setdefault(os.path.realpath(c.instance_data_dir), c.name)) != c.name:
            say(f'Note: {s.concepts}: "{other}" and "{c.name}" have the same photos, {c.instance_data_dir}.')
    owners = {c.class_data_dir: c.class_prompt for c in concepts}
    for c in concepts:
        if owners[c.class_data_dir] != c.class_prompt and own_class_images(c.class_data_dir):
            raise UserError(f"{s.concepts}: {c.class_data_dir} holds your own class images and cannot serve both "
                            f'"{c.class_prompt}" and "{owners[c.class_data_dir]}"; give each its class_data_dir')


def once_each(pairs):
    """A dict of what stands between two braces; ValueError if a key is there twice, of which the first would be lost."""
    if twice := [key for number, (key, _) in enumerate(pairs) if key in [other for other, _ in pairs[:number]]]:
        raise ValueError(f'"{twice[0]}" stands twice in one entry')
    return dict(pairs)


def read_concept_file(path):
    """The entries of a --concepts file: a list of {"name", "instance_data_dir", "class_prompt", ...}."""
    try:
        entries = json.loads(read_text(path, "--concepts"), object_pairs_hook=once_each)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"--concepts {path}: not JSON ({problem})") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f'--concepts {path}: must be a list such as [{{"name": "rex", "instance_data_dir": "./rex", '
                        f'"class_prompt": "a dog"}}, ...]')
    kinds = {f.name: _value_type(f.type)[0] for f in dataclasses.fields(Concept) if f.name not in FOUND}
    for number, entry in enumerate(entries, 1):
        if unknown := entry.keys() - kinds.keys():
            raise UserError(f'--concepts {path}: entry {number} has "{min(unknown)}"; known are {", ".join(kinds)}')
        for key in {"name", "instance_data_dir"} - entry.keys():
            raise UserError(f'--concepts {path}: entry {number} lacks "{key}"')
        for key, value in entry.items():
            if type(value) is not kinds[key] or not value:
                raise UserError(f'--concepts {path}: entry {number}, "{key}" must be '
                                + ("a number of at least 1" if kinds[key] is int else "a text that is not empty"))
            entry[key] = given_value(value, key, f"--concepts {path}: entry {number}, ")
        if not re.fullmatch(r"[\w-]+", entry["name"]) or len(entry["name"].encode()) > 120:  # it becomes part of a file's name
            raise UserError(f'--concepts {path}: name "{entry["name"][:60]}": letters, digits, - and _ only, 120 at most')
        if entry.get("num_class_images", 1) < 1:
            raise UserError(f'--concepts {path}: entry {number}, "num_class_images" must be a number of at least 1')
    return entries


def complete_concept(concept, where, needs_class, names_class, takes_captions=True):
    """`concept` with photos, class prompt, instance prompt and name; `where` begins the complaints about it."""
    flag = f"{where} " if where != "--" else where
    if is_path(given := concept.class_prompt or ""):
        raise UserError(f'{flag}class_prompt "{given}" is a path; say what kind of thing the subject is, such as "a dog"')
    photos, class_prompt = find_photos(concept, f"{flag}instance_data_dir", takes_captions)
    if class_prompt is None and (needs_class or concept.instance_prompt is None):
        reason = ("prior preservation needs it" if concept.instance_prompt else
                  f"say what kind of thing is in {concept.instance_data_dir}")
        raise UserError(f'{flag}class_prompt is missing: {reason}, such as "a dog"'
                        + ("; or give --no-with_prior_preservation" if concept.instance_prompt else ""))
    check_identifier_given(concept.identifier, class_prompt or "", flag)
    name = concept.name or slug(noun_of(class_prompt or "subject"))
    placeholder = [Subject("[identifier]", class_prompt or "", "", name)]

    def settled(prompt, source):
        """A prompt with [class] filled, and [identifier:NAME] if it is this subject's."""
        return fill_identifier(check_words(prompt, source), placeholder, source)
    instance_prompt = (settled(concept.instance_prompt, f"{flag}instance_prompt") if concept.instance_prompt
                       else default_instance_prompt(class_prompt, names_class))
    identifier = concept.identifier
    if not PLACE.search(instance_prompt) and identifier == "auto":  # "a photo of sks dog" for "a photo of a dog"
        identifier = identifier_in(instance_prompt, class_prompt or "", flag)
    if not mentions(instance_prompt, identifier):
        say(f'Note: the instance prompt "{instance_prompt}" does not contain the identifier "{identifier}".')
    if class_prompt and needs_class and head_of(noun_of(class_prompt)) not in instance_prompt.lower():
        say(f'Note: the instance prompt "{instance_prompt}" does not name the class, "{class_prompt}", which is kept beside it; let both '
            f"say the same.")
    photos = tuple((path, caption and settled(caption, f"the caption of {path}")) for path, caption in photos)
    if captions := [caption for _, caption in photos if caption]:
        without = sum(not mentions(caption, identifier) for caption in captions)
        say(f"Captions: {len(captions)} of {len(photos)} photos in {concept.instance_data_dir} have their own"
            + (f"; {without} of them without [identifier], which they do not teach." if without else "."))
    tell_syntax([instance_prompt, class_prompt or "", *captions], [identifier])
    return dataclasses.replace(concept, photos=photos, class_prompt=class_prompt, instance_prompt=instance_prompt,
                               identifier=identifier, name=name)


def is_path(text):
    """Whether a text that should name a thing is the way to a file or folder."""
    return text.startswith(("/", "./", "../", "~")) or bool(re.search(r"[/\\]", text)) and os.path.exists(text)


def check_identifier_given(identifier, class_prompt, flag):
    """UserError for an identifier that is no word, or a class prompt that has one in it."""
    if not re.fullmatch(r"[^\s,;]+", check_words(identifier, f"{flag}identifier")):
        raise UserError(f'{flag}identifier "{identifier}": must be one word without spaces and commas; several subjects are for --concepts')
    if PLACE.fullmatch(identifier) and "identifier" in identifier.lower():
        raise UserError(f'{flag}identifier "{identifier}": that is where the word belongs; give the word itself, or auto')
    if CLASS_PLACE.search(class_prompt):
        raise UserError(f'{flag}class_prompt "{class_prompt}": name the class itself, such as "a dog"')
    if PLACE.search(class_prompt):
        raise UserError(f'{flag}class_prompt "{class_prompt}": the class goes without the identifier, such as "a dog"')
    for word in re.findall(r"[^\s,.;:!?]+", class_prompt):
        if word in RARE_WORDS.split() or foreign_words(word):
            raise UserError(f'{flag}class_prompt "{class_prompt}": the class goes without "{word}", such as "a dog"; a rare '
                            f"word of your own is given by {flag}identifier")
        if word.casefold() == identifier.casefold():
            raise UserError(f'{flag}identifier "{identifier}": the class, "{class_prompt}", has this word already; give one '
                            f"that means nothing yet, or auto")


def identifier_in(instance_prompt, class_prompt, flag):
    """The rare word that an instance prompt has beside the words of the class: "sks" in "a photo of sks dog".

    Raises UserError if that is not clear.
    """
    def words(text):
        return [word.strip(".,;:!?\"“”") for word in text.split()]
    usual = {word.casefold() for word in words(f"a an the my photo picture image photograph portrait close-up of {class_prompt}")}
    own = list(dict.fromkeys(word for word in words(instance_prompt) if word and word.casefold() not in usual))
    own = foreign_words(" ".join(own)) or own
    if not class_prompt and len(own) == 2:  # the rare word and the noun
        own = own[:1]
    if len(own) != 1:
        raise UserError(f'{flag}instance_prompt "{instance_prompt}": write [identifier] where the rare word belongs')
    say(f'Identifier "{own[0]}", from the instance prompt "{instance_prompt}".')
    return own[0]


def captioned(concept, subject):
    """A subject's photos as (path, caption): its own caption, or the instance prompt."""
    return [(path, fill_identifier(caption, [subject], "the caption") if caption else subject.instance_prompt)
            for path, caption in concept.photos]

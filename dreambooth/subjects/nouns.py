"""A class prompt taken apart: "a photo of my dog" is an opening, "a photo of ", a determiner, "my ", and a noun, "dog"."""

import re
from dataclasses import dataclass

from dreambooth.base import UserError
from dreambooth.files import visible
from dreambooth.subjects.languages import WITH_ARTICLE, is_latin


@dataclass(frozen=True)
class Parts:
    """What a class prompt consists of; joined, they are the prompt again."""

    opening: str  # "a photo of "
    determiner: str  # "my "
    noun: str
    closing: str = ""


MEDIA = """photo photograph picture pic image shot snapshot snap selfie portrait headshot close.?up depiction view scan drawing
    painting sketch illustration render rendering rendition watercolou?r cartoon art artwork print poster screenshot
    thumbnail polaroid mugshot still doodle caricature wallpaper""".split()
RELATIONS = "of with in on at from by near beside under over behind holding wearing and or for to like".split()  # end a noun
AROUND = rf"(?:(?!(?:{'|'.join(RELATIONS)})\b)[\w'’.,-]+ ){{0,5}}?"  # "a very old black and white" of a photo, but no second thing
OPENING = rf"(?:{AROUND}(?:black and white |b&w )?(?:{'|'.join(MEDIA)})s?(?: (?:photo|shot|view))?(?: of| showing| depicting|:) )+"
OWNERS = "my your his her its our their".split()
DETERMINERS = ["an?", "one", "the", *OWNERS, "some", "this", "that", "these", "those"]
# "my sister's dog" and "Anna's dog", but not "a dog's bowl".
POSSESSIVE = rf"(?:(?:{'|'.join(OWNERS)}) (?:\w+ )?\w+|(?-i:[^\W\d_a-z])\w*)['’]s? "
COUNTS = "two three four five six several many".split()
WHOLE = re.compile(rf"^({OPENING})?({POSSESSIVE}|(?:{'|'.join(DETERMINERS)}) (?:own )?)?((?:{'|'.join(COUNTS)}) )?(.*)$",
                   re.IGNORECASE | re.DOTALL)
PRONOUNS = "me myself him himself herself them us you yourself it".split()  # of whom the model knows nothing
EMPTY = re.compile(rf"^(?:{'|'.join(DETERMINERS + PRONOUNS)}|(?:.* )?of)?[\s!-/:-@\[-`{{-~]*$", re.IGNORECASE)  # names nothing
CHINESE_LETTER = re.compile("[\u4e00-\u9fff]")
CHINESE = re.compile("^([一两二三四五几这那我你的]*[只条匹头个张幅件把辆朵本位名双台座]|[我你这那]的?)?(.+?)([的の]?(?:照片|图片|图像|相片|画像|肖像|特写|写真))?$", re.DOTALL)
ENDS_IN_S = "lens bus gas canvas atlas christmas james thomas".split()
PLURALS = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose",
           "feet": "foot", "teeth": "tooth", "puppies": "puppy", "ponies": "pony", "babies": "baby", "bunnies": "bunny"}
QUOTED = re.compile("[\"'“‘«「](.*)[\"'”’»」]")


def tidy_class_prompt(text, flag="--class_prompt"):
    """A class prompt without what writing adds: quotes around it, underscores, a full stop. UserError if it names nothing."""
    text = check_words(" ".join(text.replace("_", " ").split()), flag)
    while quoted := QUOTED.fullmatch(text):
        text = quoted[1].strip()
    text = text.rstrip(" .,;:!?。，；！？")
    if not text:
        raise UserError(f'{flag} is empty: say what kind of thing the subject is, such as "a dog"')
    if names_nothing(text):
        raise UserError(f'{flag} "{text}" names no thing: say what kind of thing the subject is, such as "a dog"')
    return text


def check_words(text, flag):
    """`text` without what does not show. UserError if it is not whole letters, as when the terminal or the file has another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{flag} {ascii(text)}: not UTF-8 text; write it in UTF-8") from None
    return visible(text)


def take_apart_prompt(class_prompt):
    """The Parts of a class prompt."""
    if CHINESE_LETTER.search(class_prompt):
        determiner, noun, closing = CHINESE.match(class_prompt).groups(default="")
        return Parts("", f"{determiner} " if determiner else "", noun, closing)
    if foreign := WITH_ARTICLE.match(class_prompt):
        return Parts(*foreign.groups())
    opening, determiner, number, noun = WHOLE.match(class_prompt).groups(default="")
    return Parts(opening, determiner + number, noun)


def noun_of(class_prompt):
    """What a class prompt names, without article and without the kind of picture; all of it if that leaves nothing."""
    return take_apart_prompt(class_prompt).noun or class_prompt


def names_nothing(class_prompt):
    return bool(EMPTY.match(take_apart_prompt(class_prompt).noun))


def head_of(noun):
    """The word of a noun that says what it is: "statue" of "stone statue of a lion"."""
    return (re.split(rf"[,.]| (?:{'|'.join(RELATIONS)}) ", noun.lower())[0].split() or [noun])[-1]


def is_plural(noun):
    word = head_of(noun)
    return word in PLURALS or word[-1:] == "s" and word[-2:] not in ("ss", "us", "is") and word not in ENDS_IN_S


def determiner_of(class_prompt):
    """What stands before the identifier: "a " whatever its sound, a number as it was given, or nothing for several things."""
    parts = take_apart_prompt(class_prompt)
    words = parts.determiner.lower().split() or [""]
    if words[-1] in COUNTS or CHINESE_LETTER.search(class_prompt) or not is_latin(class_prompt) or WITH_ARTICLE.match(class_prompt):
        return f"{words[-1]} ".lstrip()
    return "" if is_plural(parts.noun) and words[0] not in ("a", "an") else "a "


def singular(word):
    return PLURALS.get(word) or (word[:-1] if is_plural(word) else word)


def article_of(class_prompt):
    """What stands before the bare noun: "a", "an", or nothing for several things."""
    if not determiner_of(class_prompt).startswith("a "):
        return ""
    given = take_apart_prompt(class_prompt).determiner.lower().strip()
    return given if given in ("a", "an") else "an" if noun_of(class_prompt)[:1].lower() in tuple("aeiou") else "a"

"""Captions of single photos: a text file of a photo's name, or lines of a list.

Names are compared as people mean them: however capitals and accents are written, and whatever folder stands before them.
"""

import csv
import json
import os
import re
import unicodedata

from dreambooth.base import UserError, say
from dreambooth.files import read_text

CAPTION_SUFFIXES = (".txt", ".caption")
CLASS_PROMPT_FILE = "class_prompt.txt"
CAPTION_LISTS = ("metadata.jsonl", "metadata.csv")  # a {"file_name": ..., "text": ...} for each photo, as in datasets' imagefolder
FILE_KEYS, TEXT_KEYS = ("file_name", "image", "file", "path"), ("text", "caption", "prompt")


def folded(name):
    """A file's name with accents composed and without capitals; one that is not UTF-8 is taken as Latin-1, as old archives are."""
    try:
        name = os.fsencode(name).decode("latin-1" if any("\udc80" <= letter <= "\udcff" for letter in name) else "utf-8")
    except UnicodeError:
        pass
    return unicodedata.normalize("NFC", name).casefold()


def caption_files(photos, files):
    """{photo: its text file} of those photos that have one: dog.txt or dog.jpg.txt for dog.jpg. UserError where two might be it."""
    texts, found = {}, {}
    for path in files:
        if path.suffix.lower() in CAPTION_SUFFIXES and folded(path.name) != CLASS_PROMPT_FILE and path not in photos:
            texts.setdefault(folded(path.stem), []).append(path)
    for photo in photos:
        several = texts.get(folded(photo.stem), []) + texts.get(folded(photo.name), [])
        exact = [path for path in several if path.stem == photo.stem]
        several = exact or several
        if len(several) > 1:
            raise UserError(f"{several[0]} and {several[1].name} may both be the caption of {photo.name}; keep one of them")
        if several:
            found[photo] = several[0]
    return found


def read_captions(photos, files):
    """{photo: its own caption} of those that have one. `files`: all that lies in their folder. Says what is used for no photo."""
    beside = caption_files(photos, files)
    lists = [path for path in files if folded(path.name) in CAPTION_LISTS]
    listed = match_entries([entry for path in lists for entry in read_list(path)], photos)
    captions = {}
    for photo, path in beside.items():
        captions[photo] = " ".join(read_text(path).split())
        if not captions[photo]:
            say(f"Note: {path} is empty: {photo.name} gets the instance prompt.")
        if listed.get(photo, captions[photo]) != captions[photo]:
            say(f"Note: {path} is the caption of {photo.name}, and not what {' or '.join(CAPTION_LISTS)} says.")
    return {photo: caption for photo, caption in {**listed, **captions}.items() if caption}


def read_list(path):
    """[(where, file name, caption)] of a metadata.jsonl or metadata.csv."""
    text, entries = read_text(path), []
    rows = enumerate(csv.DictReader(text.splitlines()), 2) if path.suffix == ".csv" else (
        (number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    for number, row in rows:
        try:
            entry = json.loads(row) if isinstance(row, str) else row
            name, caption = (next(entry[key] for key in keys if key in entry) for keys in (FILE_KEYS, TEXT_KEYS))
            entries.append((f"{path}, line {number}", name.strip(), " ".join(caption.split())))
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RuntimeError, RecursionError):
            raise UserError(f'{path}, line {number}: must be {{"file_name": "1.jpg", "text": "a caption"}}'
                            + " under a heading of these names" * (path.suffix == ".csv")) from None
    return entries


def match_entries(entries, photos):
    """{photo: caption} of a list's entries, by the last part of their names. Says those of no photo; UserError if two differ."""
    by_name, found, strangers = {}, {}, []
    for photo in photos:
        by_name.setdefault(folded(photo.name), []).append(photo)
    for where, name, caption in entries:
        last = re.split(r"[\\/]", name)[-1]
        several = by_name.get(folded(last), [])
        photo = next((photo for photo in several if photo.name == last), several[0] if several else None)
        if photo is None:
            strangers.append((where, name))
        elif found.setdefault(photo, caption) != caption:
            raise UserError(f"{where}: {photo.name} has another caption already; keep one of them")
    if strangers:
        names = ", ".join(name for _, name in strangers[:5]) + ", ..." * (len(strangers) > 5)
        say(f"Note: {strangers[0][0].rpartition(', ')[0]}: {len(strangers)} of {len(entries)} captions are of no photo that is "
            f"used, and are left out: {names}")
    return found

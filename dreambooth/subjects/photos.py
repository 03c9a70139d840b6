"""Folders of photos: which files count, their captions, and whatever a person should know about them.

Knows nothing of models; nothing slow is imported, so that every complaint comes at once.
"""

import hashlib
import json
import os
from pathlib import Path

from dreambooth.base import UserError, say
from dreambooth.files import file_digest, read_sums, read_text
from dreambooth.decode import load_image

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"}
SAMPLE_LIST = "SAMPLES.sha256"  # names the files that came with the program, as `sha256sum` writes them
CLASS_PROMPT_FILE = "class_prompt.txt"
CAPTION_LIST = "metadata.jsonl"  # one {"file_name": ..., "text": ...} a line, as in datasets' imagefolder


def list_images(folder, flag):
    """Paths of the images directly in `folder`, by name. Says what it leaves out; UserError if nothing is left."""
    folder, images = Path(folder), []
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder")
    captions = {f"{path.stem}.txt" for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in (SAMPLE_LIST, CLASS_PROMPT_FILE, CAPTION_LIST, *captions):
            continue
        if reason := why_skipped(path):
            say(f"Skipped {path}{reason}")
        else:
            images.append(path)
    if not images:
        raise UserError(f"{flag} {folder}: no images in this folder; put 3-5 photos ({', '.join(sorted(IMAGE_SUFFIXES))}) in it")
    return images


def why_skipped(path):
    """Why what lies in a folder of images is left out, as the end of a sentence; None if it is an image."""
    if not path.resolve().is_relative_to(path.parent.resolve()):
        return f": a link to a file elsewhere; copy that file into {path.parent} to use it."
    if path.is_dir():
        return f"{os.sep}: folders inside {path.parent} are not searched."
    return None if path.suffix.lower() in IMAGE_SUFFIXES else ": not an image."


def find_photos(concept, flag="--instance_data_dir"):
    """([(photo path, its caption or None)], class prompt or None). Says whatever a person should know about them.

    Photos and class prompt that came with the program are left out as soon as there are others beside them.
    """
    folder = Path(concept.instance_data_dir)
    photos = list_images(folder, flag)
    sums = read_sums(folder / SAMPLE_LIST)
    is_sample = {p: sums.get(p.name) == file_digest(p) for p in photos} if sums else {}
    own = [p for p in photos if not is_sample.get(p)]
    prompt_file = folder / CLASS_PROMPT_FILE
    if own and any(is_sample.values()):
        say(f"{folder} holds {len(own)} photos of your own beside the {len(photos) - len(own)} sample pictures that came with "
            f"the program: the samples are left out. Delete them, or move yours to a folder of their own.")
        photos = own
    class_prompt = concept.class_prompt
    describes_samples = own and prompt_file.is_file() and sums.get(prompt_file.name) == file_digest(prompt_file)
    if class_prompt is None and prompt_file.is_file() and not describes_samples:
        class_prompt = read_text(prompt_file)
        say(f'Class prompt "{class_prompt}", from {prompt_file}.')
    if class_prompt is not None:
        class_prompt = " ".join(class_prompt.split())
        if not class_prompt:
            raise UserError('--class_prompt is empty: say what kind of thing the subject is, such as "a dog"')
    check_photos(photos)
    captions = read_caption_list(folder / CAPTION_LIST)
    return [(path, read_caption(path, captions)) for path in photos], class_prompt


def read_caption(photo, captions):
    """A photo's own caption, from the .txt file of its name or else from `captions`; None without either."""
    beside = photo.with_suffix(".txt")
    if beside.name != CLASS_PROMPT_FILE and beside.is_file():
        return " ".join(read_text(beside).split()) or None
    return captions.get(photo.name)


def read_caption_list(path):
    """{file name: caption} of a metadata.jsonl; {} where there is none."""
    captions = {}
    for number, text in enumerate(read_text(path).splitlines() if path.is_file() else [], 1):
        try:
            entry = json.loads(text)
            captions[entry["file_name"]] = " ".join(entry["text"].split()) or None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f'{path}, line {number}: must be {{"file_name": "1.jpg", "text": "a caption"}}') from None
    return captions


def check_photos(photos):
    """Decode every photo (UserError if one fails) and warn of duplicates and of too few."""
    seen = {}
    for path in photos:
        image = load_image(path)
        pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        if pixels in seen:
            say(f"Note: {path} is the same picture as {seen[pixels]}; remove one, a repeated photo counts twice.")
        seen.setdefault(pixels, path)
    if len(photos) < 3:
        names = ", ".join(str(p) for p in photos)
        say(f"Note: only {len(photos)} photo{'s' * (len(photos) > 1)} ({names}); 3-5 different ones are usual.")


def own_class_images(root):
    """Whether somebody put images of their own directly in the class image folder."""
    return Path(root).is_dir() and any(p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES for p in Path(root).iterdir())

"""Folders of photos: which files count, and whatever a person should know about them.

Knows nothing of models; nothing slow is imported, so that every complaint comes at once.
"""

import hashlib
import os
from pathlib import Path

from dreambooth.base import UserError, say
from dreambooth.decode import load_image, picture_kind
from dreambooth.files import file_digest, read_sums, read_text
from dreambooth.images import LONG, is_flat
from dreambooth.subjects.captions import (
    CAPTION_LISTS,
    CAPTION_SUFFIXES,
    CLASS_PROMPT_FILE,
    caption_files,
    folded,
    read_captions,
)
from dreambooth.subjects.masks import MASK_FOLDER, is_mask_name, may_be_mask_of
from dreambooth.subjects.nouns import tidy_class_prompt

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"}
RARER_SUFFIXES = {".jpe", ".pjpeg", ".mpo", ".apng", ".dib", ".hif", ".jp2", ".j2k", ".tga"}  # read as well, and not advertised
SAMPLE_LIST = "SAMPLES.sha256"  # names the files that came with the program, as `sha256sum` writes them
READ_HERE = {SAMPLE_LIST.casefold(), CLASS_PROMPT_FILE, *CAPTION_LISTS}
# What holds pictures, but not such as are read: of cameras, of editors, films, archives.
OTHER_PICTURES = """.dng .cr2 .cr3 .nef .nrw .arw .raf .orf .rw2 .pef .srw .raw .psd .psb .xcf .kra .svg .svgz .eps .pdf .ai .jxl .jxr
    .exr .hdr .ico .icns .ppm .pgm .mov .mp4 .m4v .avi .webm .mkv .zip .rar .7z .tar .gz""".split()


def entries_of(folder, flag):
    """Paths of all that lies in a folder, by name. UserError if there is none or it cannot be read."""
    try:
        return sorted(Path(folder).iterdir())
    except NotADirectoryError:
        raise UserError(f"{flag} {folder}: a file, and no folder; give the folder that the photos are in") from None
    except FileNotFoundError:
        raise UserError(f"{flag} {folder}: no such folder") from None
    except PermissionError:
        raise UserError(f"{flag} {folder}: you may not read this folder; give yourself the right to, or give another") from None
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise UserError(f"{flag} {folder}: cannot be read ({reason}); give another folder") from None


def list_images(folder, flag):
    """Paths of the images directly in `folder`, by name. Says what it leaves out; UserError if nothing is left."""
    everything = entries_of(folder, flag)
    images = [path for path in everything if is_picture(path)]
    known = {*caption_files(images, everything).values()}
    for path in images:
        if photo := may_be_mask_of(path, images):
            raise UserError(f"{path}: is it the mask of {photo.name}? Then call it {photo.stem}.mask.png; if it is a photo, give it another name")
    for path in everything:
        if path in images and not has_picture_suffix(path):
            say(f"Note: {path} is a picture ({picture_kind(path)}), whatever its name, and is used.")
        elif path not in images and path not in known and folded(path.name) not in READ_HERE:
            if reason := why_skipped(path):
                say(f"Skipped {path}{reason}")
    if not images:
        raise UserError(f"{flag} {folder}: no images in this folder{where_else(everything)}; put 3-5 photos "
                        f"({', '.join(sorted(IMAGE_SUFFIXES))}) in it")
    return images


def has_picture_suffix(path):
    return path.suffix.lower().rstrip() in IMAGE_SUFFIXES | RARER_SUFFIXES


def is_picture(path):
    """Whether a file, or one that a link leads to, counts as an image: by its name, or else by its first bytes."""
    if path.name.startswith(".") or is_mask_name(path) or not os.path.isfile(path):
        return False
    return has_picture_suffix(path) or path.suffix.lower() not in OTHER_PICTURES and picture_kind(path) is not None


def why_skipped(path):
    """Why what lies in a folder of images is left out, as the end of a sentence; None if it is not worth a word."""
    if path.name.startswith("."):  # what systems keep there, such as ._dog.jpg on Macs, is not
        return ": its name begins with a dot, which hides it; rename it to use it." if picture_kind(path) else None
    if is_mask_name(path) or folded(path.name) == MASK_FOLDER:
        return None  # whoever uses masks tells of those that are of no use
    if os.path.isdir(path):
        return f"{os.sep}: folders inside {path.parent} are not searched."
    if not os.path.exists(path):
        return ": a link that leads nowhere." if os.path.islink(path) else ": you may not look into its folder."
    if path.suffix.lower() in CAPTION_SUFFIXES:
        return ": not an image, and no image here has this name, whose caption it would be."
    if path.suffix.lower() in OTHER_PICTURES:
        return f": {path.suffix.lower()} is not read; convert it to JPEG or PNG."
    return ": not an image."


def where_else(everything):
    """What to say of pictures in folders inside, as the middle of a sentence."""
    full = next((path for path in everything if holds_pictures(path)), None)
    return f", but there are in {full}: give that folder, or move them up" if full else ""


def holds_pictures(folder):
    """Whether there are pictures directly in a folder, or in folders inside."""
    try:
        return os.path.isdir(folder) and any(
            has_picture_suffix(Path(name)) and not name.startswith(".") for _, _, names in os.walk(folder) for name in names)
    except OSError:
        return False


def find_photos(concept, flag="--instance_data_dir", takes_captions=True):
    """([(photo path, its caption or None)], class prompt or None). Says whatever a person should know about them.

    Photos and class prompt that came with the program are left out as soon as there are others beside them.
    """
    folder = Path(concept.instance_data_dir)
    photos = list_images(folder, flag)
    everything = entries_of(folder, flag)
    captions = read_captions(photos, everything) if takes_captions else {}
    sums = read_sums(folder / SAMPLE_LIST)
    own = [p for p in photos if not is_sample(p, sums)]
    if 0 < len(own) < len(photos):
        say(f"{folder} holds {len(own)} photos of your own beside the {len(photos) - len(own)} sample pictures that came with "
            f"the program: the samples are left out. Delete them, or move yours to a folder of their own.")
        photos = own
    class_prompt, said = concept.class_prompt, flag.replace("instance_data_dir", "class_prompt")
    prompt_file = next((path for path in everything if folded(path.name) == CLASS_PROMPT_FILE), None)
    if class_prompt is None and prompt_file and not (own and is_sample(prompt_file, sums)):
        class_prompt = tidy_class_prompt(read_text(prompt_file), f"{prompt_file}: class_prompt")
        say(f'Class prompt "{class_prompt}", from {prompt_file}.')
    elif class_prompt is not None:
        class_prompt = tidy_class_prompt(class_prompt, said)
    check_photos(photos)
    return [(path, captions.get(path)) for path in photos], class_prompt


def is_sample(path, sums):
    """Whether a file is one of those that came with the program, unchanged."""
    try:
        return path.name in sums and sums[path.name] == file_digest(path)
    except OSError:  # whoever needs it will say so
        return False


def check_photos(photos, kind="photo"):
    """Decode every photo (UserError if one fails) and say what is doubtful: duplicates, strips, blank ones, too few.

    Returns {digest of the pixels: path}.
    """
    seen = {}
    for path in photos:
        image = load_image(path)
        if (pixels := pixels_digest(image)) in seen:
            say(f"Note: {path} is the same picture as {seen[pixels]}; remove one, a repeated {kind} counts twice.")
        seen.setdefault(pixels, path)
        if is_flat(image):
            say(f"Note: {path} is all one colour, which teaches nothing.")
        if max(image.size) >= LONG / 2 * min(image.size):
            say(f"Note: {path} is {image.width} x {image.height}; much of it is cut off. Cut out the part that shows the subject.")
    if kind == "photo" and len(photos) < 3:
        names = ", ".join(str(p) for p in photos)
        say(f"Note: only {len(photos)} photo{'s' * (len(photos) > 1)} ({names}); 3-5 different ones are usual.")
    return seen


def pixels_digest(image):
    """A hex digest of size and pixels, taken strip by strip: a copy of a large photo would fill the memory."""
    digest = hashlib.sha256(repr(image.size).encode())
    for top in range(0, image.height, 256):
        digest.update(image.crop((0, top, image.width, min(top + 256, image.height))).tobytes())
    return digest.hexdigest()

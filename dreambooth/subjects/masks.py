"""Masks that a person gives to photos: white where the subject is. A file beside the photo or in a folder `masks`, or what of the
photo is transparent.

Knows nothing of what is done with them.
"""

import os
import re

from PIL import Image, ImageChops

from dreambooth.base import UserError, say
from dreambooth.decode import load_image, load_opacity
from dreambooth.subjects.captions import folded

MASK_ENDS = (".mask", "-masklabel")  # of names: dog.mask.png or dog-masklabel.png for dog.jpg
MASK_FOLDER = "masks"  # beside the photos: masks/dog.png
LARGEST_MASK = 1024  # pixels along a side; more are not kept
LEAST_SHARE = 0.002  # of a picture that a subject has to cover


def is_mask_name(path):
    """Whether a file says by its name that it is a mask."""
    return path.stem.casefold().endswith(MASK_ENDS)


def may_be_mask_of(path, photos):
    """The photo that a picture is the mask of, if it is called as other programs call masks: dog_mask.png, mask-dog.png; else None."""
    own = folded(path.stem)
    stem = re.sub(r"^mask[-_ ]|[-_ ]mask$", "", own)
    return next((photo for photo in photos if folded(photo.stem) == stem), None) if stem != own else None


def masked_stem(path):
    """The name of the photo that a mask of this name belongs to, folded."""
    stem = folded(path.stem)
    return next((stem.removesuffix(end) for end in MASK_ENDS if stem.endswith(end)), stem)


def find_masks(folder, photos):
    """{photo: its mask, an "L" picture} of those photos that have one; says how many. UserError for a mask that is of no use.

    A mask is as large as its photo, but for what LARGEST_MASK leaves of it.
    """
    files, masks = mask_files(folder, photos), {}
    for photo in photos:
        opacity = None if photo in files else load_opacity(photo)
        if photo in files:
            masks[photo] = smaller(read_mask(files[photo], photo))
        elif opacity:
            check_covers(opacity, photo, "is transparent nearly everywhere; give it a mask that shows the subject, or remove it")
            masks[photo] = smaller(opacity)
    if masks:
        own = len(masks) - len(files)
        by_themselves = f", {own} by their own transparency" * (own > 0)
        say(f"Masks: {len(masks)} of {len(photos)} photos in {folder} have one{by_themselves}.")
    return masks


def mask_files(folder, photos):
    """{photo: its mask file}. Says which are of no photo; UserError where two might be a photo's."""
    inside = next((path for path in folder.iterdir() if folded(path.name) == MASK_FOLDER and path.is_dir()), None)
    beside = [path for path in sorted(folder.iterdir()) if is_mask_name(path) and path not in photos]
    by_stem, found = {}, {}
    for path in (*beside, *(sorted(inside.iterdir()) if inside else ())):
        if os.path.isfile(path) and not path.name.startswith("."):
            by_stem.setdefault(masked_stem(path), []).append(path)
    for photo in photos:
        several = by_stem.get(folded(photo.stem), []) + by_stem.get(folded(photo.name), [])
        if len(several) > 1:
            raise UserError(f"{several[0]} and {several[1]} may both be the mask of {photo.name}; keep one of them")
        if several:
            found[photo] = several[0]
    for path in (path for paths in by_stem.values() for path in paths if path not in found.values()):
        say(f"Skipped {path}: no image in {folder} has the name of this mask.")
    return found


def read_mask(path, photo):
    """The mask in a file, an "L" picture of its photo's size. UserError if it is of another size or shows nothing."""
    mask, opacity, size = load_image(path).convert("L"), load_opacity(path), load_image(photo).size
    if opacity:  # what is seen through is no subject
        mask = ImageChops.multiply(mask, opacity)
    if mask.size != size:
        raise UserError(f"{path}: {mask.width} x {mask.height} pixels, but {photo.name} has {size[0]} x {size[1]}; a mask has to "
                        f"be of its photo's size")
    check_covers(mask, path, "is black nearly everywhere; paint the subject white, or remove it")
    if is_inside_out(mask):
        say(f"Note: {path} is white along the borders and black in the middle. White is what is learnt: is it inverted?")
    return mask


def check_covers(mask, path, problem):
    """UserError, which names `problem`, unless a mask shows something."""
    if share_of(mask) < LEAST_SHARE:
        raise UserError(f"{path} {problem}")


def share_of(mask):
    """How much of a picture its mask covers, from 0 to 1."""
    small = mask.resize((64, 64), Image.Resampling.BOX)
    return small.convert("F").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) / 255


def is_inside_out(mask):
    """Whether nearly all of the border is white and most of the middle black."""
    small = mask.resize((16, 16), Image.Resampling.BOX)
    inner = small.crop((4, 4, 12, 12))
    border = [small.getpixel((x, y)) for x in range(16) for y in range(16) if x in (0, 15) or y in (0, 15)]
    return sum(border) > 0.9 * 255 * len(border) and share_of(inner) < 0.5


def smaller(mask):
    """A mask of at most LARGEST_MASK pixels along a side."""
    share = LARGEST_MASK / max(mask.size)
    return mask if share >= 1 else mask.resize([max(1, round(side * share)) for side in mask.size], Image.Resampling.BOX)

"""Folders of class images as people bring them: what is in them is used, or said not to be."""

import os
from pathlib import Path

from dreambooth.base import UserError, say
from dreambooth.decode import load_image
from dreambooth.subjects.captions import CAPTION_LISTS
from dreambooth.subjects.photos import check_photos, entries_of, holds_pictures, is_picture, list_images, pixels_digest

MADE_HERE = ("settings.json", "MANIFEST.sha256")  # are in each folder of class images that the program drew


def own_class_images(root):
    """Paths of the images that somebody put directly in the class image folder, by name."""
    return [path for path in entries_of(root, "--class_data_dir") if is_picture(path)] if os.path.isdir(root) else []


def check_class_folders(concepts):
    """Look through the folders of class images before anything is loaded, and say how they are used.

    UserError if one is a folder of photos of a subject, which would teach the class to be the subject.
    """
    counts = {}
    for concept in concepts:
        counts[concept.class_data_dir] = max(concept.num_class_images, counts.get(concept.class_data_dir, 0))
    for folder, count in counts.items():
        for concept in concepts:
            if os.path.realpath(folder) == os.path.realpath(concept.instance_data_dir):
                raise UserError(f"--class_data_dir {folder}: holds the photos of the subject, which would make the class what the "
                                f"subject is; give other pictures of its class, or another folder to have them drawn into")
        if own_class_images(folder):
            check_own(folder, count, concepts)
        else:
            tell_strangers(folder, concepts)


def check_own(folder, count, concepts):
    """Decode a person's own class images, and say of those that are photos of a subject and of what is left out."""
    images = list_images(folder, "--class_data_dir")
    used = images[:count]
    if images[count:]:
        say(f"Note: {folder} holds {len(images)} class images, of which the first {count} are used; --num_class_images "
            f"{len(images)} would use all.")
    texts = [path.with_suffix(".txt") for path in used] + [Path(folder) / name for name in CAPTION_LISTS]
    if any(path.exists() for path in texts):
        say(f"Note: the captions in {folder} are not used; every class image gets the class prompt.")
    photos = {pixels_digest(load_image(path)) for concept in concepts for path, _ in concept.photos}
    if same := [path for digest, path in check_photos(used, "class image").items() if digest in photos]:
        names = ", ".join(path.name for path in same[:5])
        say(f"Note: {len(same)} of the class images in {folder} are photos of the subject ({names}), which makes the class what the subject is; remove them.")


def tell_strangers(folder, concepts):
    """Say if there are pictures in a folder inside that the program did not draw; it does not look there."""
    photos = {os.path.realpath(concept.instance_data_dir) for concept in concepts}
    for path in entries_of(folder, "--class_data_dir") if os.path.isdir(folder) else ():
        is_ours = any((path / name).exists() for name in MADE_HERE)
        if not is_ours and os.path.realpath(path) not in photos and holds_pictures(path):
            say(f"Note: the pictures in {path} are not used, and class images are drawn: your own have to lie directly in the "
                f'folder that --class_data_dir names, such as --class_data_dir "{path}".')

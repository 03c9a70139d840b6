"""Captions that the program writes: what a network of BLIP's kind says of a photo once it is told what the subject is."""

import dataclasses
import re
from pathlib import Path

from dreambooth.base import UserError, default, is_first_process, say, short_path
from dreambooth.decode import load_image
from dreambooth.files import check_writable, read_text, whole_file
from dreambooth.models.vision import check_network, load_network
from dreambooth.progress import progress
from dreambooth.subjects.captions import CAPTION_SUFFIXES, caption_files, folded

CAPTION_MODEL = "Salesforce/blip-image-captioning-base"
LONGEST_CAPTION = 30  # tokens


def without_caption(concept):
    """{photo: the file that its caption is to be in} of those that have none, not even an empty one."""
    stems, has_file = [folded(path.stem) for path, _ in concept.photos], files_beside(concept)

    def file_of(path):
        return path.with_name((path.name if stems.count(folded(path.stem)) > 1 else path.stem) + CAPTION_SUFFIXES[0])
    return {path: file_of(path) for path, caption in concept.photos if not caption and path not in has_file}


def files_beside(concept):
    """{photo: its caption file} of those that have one."""
    return caption_files([path for path, _ in concept.photos], sorted(Path(concept.instance_data_dir).iterdir()))


def check_describing(s, concepts):
    """UserError if captions are to be written and cannot be, or the network for it is not to be had."""
    wanting = [concept for concept in concepts if s.caption == "auto" and without_caption(concept)]
    for concept in wanting:
        if not concept.class_prompt:
            raise UserError('--caption auto: --class_prompt is missing; say what the subject is, such as "a dog"')
        check_writable(concept.instance_data_dir, "--caption auto writes beside the photos:")
    if wanting:
        check_network("--caption_model", default(s.caption_model, CAPTION_MODEL), "blip")


def described(s, concepts, device):
    """`concepts` with a caption for each photo that had none, with --caption auto: written beside the photo, and said."""
    if s.caption != "auto":
        return concepts
    jobs = {path: (concept, file) for concept in concepts for path, file in without_caption(concept).items()}
    if jobs and is_first_process():
        name = default(s.caption_model, CAPTION_MODEL)
        for path, text in continuations(name, {path: concept.class_prompt for path, (concept, _) in jobs.items()}, device):
            concept, file = jobs[path]
            caption = f"{concept.instance_prompt} {text}".strip()
            with whole_file(file) as part:
                part.write_text(caption + "\n", encoding="utf-8")
            say(f'Caption of {path.name}: "{caption}". Change it in {short_path(file)} if it is not true.')
    return [with_files(concept) for concept in concepts]


def with_files(concept):
    """`concept` with what is in its caption files by now, whichever process has written it."""
    texts = {path: " ".join(read_text(file).split()) for path, file in files_beside(concept).items()}
    photos = tuple((path, caption or texts.get(path) or None) for path, caption in concept.photos)
    return dataclasses.replace(concept, photos=photos)


def continuations(name, photos, device):
    """(photo, how the network goes on after the class prompt) of each of {photo: class prompt}: "lying on a sofa"."""
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, BlipForConditionalGeneration

    kinds = BlipForConditionalGeneration, AutoImageProcessor, AutoTokenizer
    network, prepare, tokenizer = load_network("--caption_model", name, *kinds)
    network.to(device)
    for path, class_prompt in progress(list(photos.items()), "captions", "photo"):
        pixels, begun = prepare([load_image(path)], return_tensors="pt"), tokenizer([class_prompt.lower()], return_tensors="pt")
        with torch.no_grad():
            tokens = network.generate(pixels.pixel_values.to(device), begun.input_ids.to(device), begun.attention_mask.to(device),
                                      max_new_tokens=LONGEST_CAPTION, num_beams=3)
        told = tokenizer.decode(begun.input_ids[0], skip_special_tokens=True)
        yield path, tidy_continuation(tokenizer.decode(tokens[0], skip_special_tokens=True), told)


def tidy_continuation(text, begun):
    """What a network's words say after those that it was given, without marks and without a word twice in a row."""
    words = re.sub(r"[^\w\s,'’-]", " ", text.strip().removeprefix(begun)).split()
    return " ".join(word for i, word in enumerate(words) if i == 0 or word != words[i - 1]).strip(" ,-")

"""Masks that the program draws: where in a photo a network of CLIPSeg's kind sees what the class noun says.

Each is drawn once and kept under a name made of the photo's content, the network and the noun.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from PIL import Image

from dreambooth.base import UserError, default, is_first_process, say
from dreambooth.decode import load_image
from dreambooth.files import file_digest, whole_file
from dreambooth.models.vision import check_network, load_network, revision_of
from dreambooth.progress import progress
from dreambooth.subjects.masks import LARGEST_MASK, share_of
from dreambooth.subjects.nouns import noun_of

MASK_MODEL = "CIDAS/clipseg-rd64-refined"
FEWEST, MOST = 0.01, 0.95  # of a photo that a mask which is of use covers
DOUBT = 0.25  # what is nowhere likelier than this to be the subject is not taken for it


def drawn_masks(s, concepts):
    """{photo: file of the mask that is, or is to be, drawn} of all photos without one. UserError if no noun says what to look
    for."""
    model, files = default(s.mask_model, MASK_MODEL), {}
    weights = [file_digest(path) for path in sorted(Path(model).glob("*.safetensors"))] or [model, revision_of(model)]
    for concept in concepts:
        if not concept.class_prompt:
            raise UserError("--mask auto: --class_prompt is missing; say what to look for in the photos, such as \"a dog\"")
        for path in (path for path, _ in concept.photos if path not in concept.masks):
            key = json.dumps([file_digest(path), noun_of(concept.class_prompt), weights])
            files[path] = Path(s.mask_dir) / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.png"
    return files


def check_drawing_masks(s, concepts):
    """UserError if masks are to be drawn and the network for it is not to be had."""
    if s.mask == "auto" and not all(file.is_file() for file in drawn_masks(s, concepts).values()):
        check_network("--mask_model", default(s.mask_model, MASK_MODEL), "clipseg")


def with_drawn_masks(s, concepts, device):
    """`concepts` with a mask for each photo that has none, with --mask auto; says which are of no use."""
    if s.mask != "auto":
        return concepts
    files = drawn_masks(s, concepts)
    nouns = {path: noun_of(concept.class_prompt) for concept in concepts for path, _ in concept.photos}
    if missing := [path for path, file in files.items() if not file.is_file()]:
        draw_masks(s, {path: (nouns[path], files[path]) for path in missing}, device)
    masks = {path: mask for path, file in files.items() if (mask := of_use(path, load_image(file).convert("L"), nouns[path]))}
    if files:
        say(f"Masks: {len(masks)} of {len(files)} photos without one have one that the program drew, kept in {s.mask_dir}.")
    return [dataclasses.replace(c, masks=c.masks | {path: masks[path] for path, _ in c.photos if path in masks}) for c in concepts]


def of_use(path, likely, noun):
    """The mask made of how likely each place shows the noun, its most likely place white; None, and says so, if it tells
    nothing."""
    most = likely.getextrema()[1]
    mask = likely.point([min(255, round(value / max(1, most) * 255)) for value in range(256)])
    share = share_of(mask.point([255 * (value > 127) for value in range(256)]))
    if most < DOUBT * 255 or share < FEWEST:
        say(f"Note: {path}: no {noun} was found in it; it is trained on without a mask. Beside it you can lay one of your own.")
    elif share > MOST:
        say(f"Note: {path}: the {noun} would be all of it; it is trained on without a mask.")
    else:
        return mask


def draw_masks(s, jobs, device):
    """Draw the masks of `jobs`, {photo: (noun, file)}."""
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPSegForImageSegmentation

    name = default(s.mask_model, MASK_MODEL)
    network, prepare, tokenizer = load_network("--mask_model", name, CLIPSegForImageSegmentation, AutoImageProcessor, AutoTokenizer)
    network.to(device)
    Path(s.mask_dir).mkdir(parents=True, exist_ok=True)
    for path, (noun, file) in progress(list(jobs.items()), "masks", "photo", hidden=not is_first_process()):
        image = load_image(path)
        pixels, words = prepare([image], return_tensors="pt"), tokenizer([noun], return_tensors="pt")
        with torch.no_grad():
            logits = network(pixel_values=pixels.pixel_values.to(device), input_ids=words.input_ids.to(device),
                             attention_mask=words.attention_mask.to(device)).logits
        likely = (255 * logits.sigmoid()).round().byte().cpu().reshape(logits.shape[-2:])
        share = min(1, LARGEST_MASK / max(image.size))
        size = [max(1, round(side * share)) for side in image.size]
        with whole_file(file) as part:
            Image.fromarray(likely.numpy()).resize(size, Image.Resampling.BILINEAR).save(part, format="PNG")

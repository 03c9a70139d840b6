"""Class images: pictures of the class by the model as it was, which keep it from being forgotten (paper, section 3.2).

They are cached by all that shapes them, so that no stale one is ever trained on.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from dreambooth.base import UserError, default, say, slug
from dreambooth.drawing.draw import draw, placed
from dreambooth.files import file_digest, read_sums, whole_file
from dreambooth.images import is_flat
from dreambooth.models.load import load_pipeline
from dreambooth.subjects.class_folders import own_class_images

MANIFEST = "MANIFEST.sha256"


def class_image_plan(s, plan):
    """The Plan of drawing class images. UserError for fp16 without a CUDA GPU."""
    if s.prior_generation_precision == "fp16" and plan.device.type != "cuda":
        raise UserError("--prior_generation_precision fp16 needs a CUDA GPU and this machine has none; give fp32 or bf16")
    precision = {None: plan.precision, "fp32": "no"}.get(s.prior_generation_precision, s.prior_generation_precision)
    return dataclasses.replace(plan, precision=precision)


def class_image_look(s, family):
    """(denoising steps, guidance scale) of the class images."""
    scale = default(s.class_guidance_scale, family.class_guidance)
    guided, unguided = family.class_steps
    return guided if scale > 1 else unguided, scale


def class_image_settings(s, models, class_prompt, resolution, plan):
    """Everything that shapes a class image. Two runs that differ in any of it never share a cache folder."""
    configs = {**models.pipeline.config, **models.pipeline.scheduler.config}
    steps, scale = class_image_look(s, models.family)
    base = {} if models.base_precision == "bf16" else {"base_precision": models.base_precision}
    return {**base, "prompt": class_prompt, "model": models.fingerprint, "resolution": resolution,
            **models.family.class_sampler, "num_inference_steps": steps, "guidance_scale": scale, "precision": plan.precision, "seed": "index",
            "config": {k: str(v) for k, v in configs.items() if not k.startswith("_")}}


def missing_class_images(folder, count):
    """Indices of the first `count` class images that `folder` lacks, or holds other than as they were made."""
    made = read_sums(folder / MANIFEST)
    names = {i: class_image_name(i) for i in range(count)}
    return [i for i, name in names.items()
            if not (folder / name).is_file() or made.get(name) != file_digest(folder / name)]


def class_image_name(index):
    return f"{index:05d}.png"


def class_pools(s, models, concepts, resolution, plan, accelerator):
    """A list of (path, class prompt) for each concept. Concepts of one class share its images."""
    counts, keys = {}, [(c.class_prompt, c.class_data_dir) for c in concepts]
    for key, concept in zip(keys, concepts):
        counts[key] = max(concept.num_class_images, counts.get(key, 0))
    paths = {key: prepare_class_images(s, models, *key, count, resolution, plan, accelerator) for key, count in counts.items()}
    return [[(path, c.class_prompt) for path in paths[key][:c.num_class_images]] for key, c in zip(keys, concepts)]


def prepare_class_images(s, models, class_prompt, class_data_dir, count, resolution, plan, accelerator):
    """Paths of `count` class images (paper section 3.2: samples of the frozen model), making only what is missing.

    Every process makes its share, each image from the seed of its own index, so neither an interruption nor the number
    of GPUs changes what is made (but for rounding). The manifest grows by one line as each image is complete.
    """
    root = Path(class_data_dir)
    if own := own_class_images(root)[:count]:
        say(f"Class images: the {len(own)} pictures in {root} are used as they are.")
        return own
    settings = class_image_settings(s, models, class_prompt, resolution, plan)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = root / f"{slug(class_prompt)}-{key}"
    paths = [folder / class_image_name(i) for i in range(count)]
    missing = missing_class_images(folder, count)
    say(f"Class images: {len(paths) - len(missing)} of {len(paths)} are in {folder}"
        + (f"; drawing {len(missing)} in {settings['num_inference_steps']} steps, guidance {settings['guidance_scale']:g}."
           if missing else "."))
    accelerator.wait_for_everyone()  # all have counted before any draws
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        share = missing[accelerator.process_index::accelerator.num_processes]
        draw_class_images(s, models, settings, plan, folder, share)
    accelerator.wait_for_everyone()
    return paths


def draw_class_images(s, models, settings, plan, folder, indices):
    """Draw the class images of these indices, as `settings` say, into `folder` and enter each in its manifest."""
    # In another precision the model is read a second time, but for a denoiser that is in that precision already: what is to be
    # trained keeps all its digits.
    pipeline, shares = models.pipeline, models.denoiser.dtype == plan.dtype
    if plan.precision != "no" or not shares:
        parts = {models.family.denoiser: models.denoiser.to(plan.device)} if shares else {}
        parts |= dict.fromkeys(models.book.shelf.texts) if models.book else {}
        pipeline = load_pipeline(models.name, plan.dtype, parts=parts, variant=s.variant)
    own_scheduler = pipeline.scheduler
    pipeline.scheduler = models.family.class_scheduler(own_scheduler)
    placed(pipeline, plan.device)
    look = dict(steps=settings["num_inference_steps"], guidance_scale=settings["guidance_scale"], title="class images", models=models,
                height=settings["resolution"], width=settings["resolution"])
    pictures = draw(pipeline, [(settings["prompt"], index) for index in indices], batch_size=s.sample_batch_size, **look)
    for picture, index in zip(pictures, indices):
        if is_flat(picture):  # another seed; a class image teaches nothing if it shows nothing
            picture = next(draw(pipeline, [(settings["prompt"], index + 2**32)], batch_size=1, **look))
        name = class_image_name(index)
        with whole_file(folder / name) as part:
            picture.save(part, format="PNG")
        with open(folder / MANIFEST, "a", encoding="utf-8") as manifest:
            manifest.write(f"{file_digest(folder / name)}  {name}\n")
    pipeline.scheduler = own_scheduler
    pipeline.remove_all_hooks()
    models.denoiser.to("cpu")

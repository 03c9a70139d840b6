"""Where trained weights come from: what a resumed training must have in common with the one it goes on from."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from dreambooth.base import UserError, short_path
from dreambooth.files import file_digest, read_text
from dreambooth.settings import MODES
from dreambooth.subjects.class_folders import own_class_images
from dreambooth.subjects.concepts import FOUND
from dreambooth.subjects.photos import pixels_digest
from dreambooth.training.course import decisions

# Flags that leave the weights as they are. What the paths among them hold is compared instead; --steps see origin_of().
FREE_FLAGS = ("mode", "model_name", "instance_data_dir", "caption", "caption_model", "aspect_ratio_buckets", "mask", "mask_model",
              "mask_dir", "class_data_dir", "concepts", "output_dir", "overwrite", "steps",
              "checkpointing_steps", "checkpoints_total_limit", "resume", "validation_prompt", "validation_steps", "select_best",
              "subject_type", "prompts_file", "dino_model", "clip_model", "num_inference_steps", "guidance_scale",
              "class_guidance_scale", "sample_batch_size", "mixed_precision", "max_vram", "optimizer", "weights",
              "gradient_checkpointing", "split_batch", "fused_backward", "offload_optimizer", "shard", "offload_blocks", "compile", "channels_last",
              "lr_scheduler", "use_ema", "snr_gamma", "base_precision", "revision", "variant", "cache_dir",
              "prior_generation_precision", "save_as_full_pipeline",
              "scale_lr", "num_train_epochs", "repeats", "validation_epochs", "num_validation_images", "logging_dir",
              "push_to_hub", "hub_model_id")
# Compared as they were decided, not as flags.
SHAPING_DECISIONS = ("resolution", "precision", "learning_rates", "lr_scheduler", "use_ema", "snr_gamma", "optimizer", "weights",
                     "fused_backward", "base_precision")
WHERE_AND_WHAT = ("instance_data_dir", "class_data_dir", *FOUND)  # of a Concept: what these hold is compared
ANY = "any"  # number of processes: what was split goes on in any
COUNTED = {"photos": "photos, their captions or masks", "class images": "class images"}


def shaping_flags(s):
    """{"--flag": value} of those flags that the trained weights depend on."""
    return {f"--{f.name}": getattr(s, f.name) for f in dataclasses.fields(s)
            if f.name not in FREE_FLAGS and "train" in MODES[f.metadata["mode"]]}


def origin_of(s, course, groups, fingerprint, pictures, processes):
    """{what: value} that a resumed training must have in common with the one it goes on from."""
    origin = {"the base model": fingerprint, "the photos or class images": pictures, **shaping_flags(s),
              "the number of processes": ANY if course.levers.shard else processes}
    decided = decisions(course, groups)
    origin |= {f"the {key.replace('_', ' ')}": decided[key] for key in SHAPING_DECISIONS}
    if not course.lr_scheduler.startswith("constant") or any(group.until < 1 for group in groups):
        origin["--steps"] = course.steps  # elsewhere a longer training begins as a shorter one does
    return origin


def pictures_digest(photos, class_images, views):
    """A hex digest of everything in these pools of (path, caption), and of how it is seen."""
    pools = [[(file_digest(path), caption, *(views[path].traits() if path in views else ())) for path, caption in pool]
             for pool in (*photos, *class_images)]
    return hashlib.sha256(json.dumps(pools).encode()).hexdigest()


def what_was_given(s, concepts, needs_class, name):
    """What a person gave beside the flags, as dreambooth.json keeps it: each subject's words and the digests of its pictures and of the
    model of this name."""
    given = {}
    for concept in concepts:
        entry = {f.name: getattr(concept, f.name) for f in dataclasses.fields(concept) if f.name not in WHERE_AND_WHAT}
        masks = {path: f" {pixels_digest(mask)}" for path, mask in concept.masks.items()}
        entry["photos"] = [text_digest(f"{file_digest(path)} {caption or ''}{masks.get(path, '')}")
                           for path, caption in concept.photos]
        own = own_class_images(concept.class_data_dir)[:concept.num_class_images] if needs_class else []
        given[concept.name] = entry | {"class images": [file_digest(path) for path in own]}
    return {"subjects": given, "prompts_file": s.prompts_file and text_digest(read_text(s.prompts_file, "--prompts_file")),
            "model": None if same_place(name, s.output_dir) else model_digest(Path(name))}


def same_place(one, other):
    return os.path.realpath(one) == os.path.realpath(other)


def model_digest(path):
    """A digest of a local model's files by their names, sizes, beginnings and ends, in which all weights differ once they have trained.
    None where there are none, as of what the hub keeps."""
    files = [path] if path.is_file() else sorted(file for kind in ("json", "safetensors") for file in path.glob(f"*/*.{kind}"))
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            start, size = content.read(2**16), content.seek(0, os.SEEK_END)
            content.seek(max(0, size - 2**16))
            digest.update(f"{file.relative_to(path)} {size} ".encode(errors="surrogateescape") + start + content.read())
    return digest.hexdigest() if files else None


def text_digest(text):
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def differences(made, ours):
    """In words, what of what_was_given() is not as it was when an output was made."""
    before, now, found = made["subjects"], ours["subjects"], []
    found += [f'"{name}" was not there' for name in now.keys() - before.keys()]
    found += [f'"{name}" is gone' for name in before.keys() - now.keys()]
    for name in now.keys() & before.keys():
        for key, value in now[name].items():
            old = before[name].get(key)
            if old != value:
                found.append(f'of "{name}" the {COUNTED[key]} ({len(old or [])}, now {len(value)})' if key in COUNTED else
                             f'of "{name}" {key} ("{old}", now "{value}")')
    found += ["the model's weights"] * (made.get("model", ours["model"]) != ours["model"])
    return sorted(found) + ["--prompts_file"] * (made["prompts_file"] != ours["prompts_file"])


def check_origin(path, state, origin):
    """Raises UserError, naming every difference, unless what was trained so far came about as `origin` says."""
    now = json.loads(json.dumps(origin))
    if ANY in (now.get("the number of processes"), state["origin"].get("the number of processes")):
        now.pop("the number of processes", None)
    if differences := [f"{key} ({state['origin'].get(key)}, now {value})" if len(str(value)) < 40 else key
                       for key, value in now.items() if state["origin"].get(key) != value]:
        raise UserError(f"--resume {short_path(path)}: it was made with other settings: {', '.join(differences)}; give the same, "
                        f"or start without --resume")

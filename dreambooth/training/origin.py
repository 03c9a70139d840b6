"""Where trained weights come from: what a resumed training must have in common with the one it goes on from."""

import dataclasses
import hashlib
import json

from dreambooth.base import UserError, short_path
from dreambooth.files import file_digest
from dreambooth.settings import MODES
from dreambooth.training.course import decisions

# Flags that leave the weights as they are. What the paths among them hold is compared instead; --steps see origin_of().
FREE_FLAGS = ("mode", "model_name", "instance_data_dir", "class_data_dir", "concepts", "output_dir", "overwrite", "steps",
              "checkpointing_steps", "checkpoints_total_limit", "resume", "validation_prompt", "validation_steps", "select_best",
              "subject_type", "prompts_file", "dino_model", "clip_model", "num_inference_steps", "guidance_scale",
              "class_guidance_scale", "sample_batch_size", "mixed_precision", "max_vram", "optimizer", "weights",
              "gradient_checkpointing", "split_batch", "fused_backward", "offload_optimizer", "compile", "channels_last",
              "lr_scheduler", "use_ema", "revision", "variant", "cache_dir", "prior_generation_precision", "save_as_full_pipeline",
              "scale_lr", "num_train_epochs", "repeats", "validation_epochs", "num_validation_images", "logging_dir",
              "push_to_hub", "hub_model_id")
# Compared as they were decided, not as flags.
SHAPING_DECISIONS = ("resolution", "precision", "learning_rates", "lr_scheduler", "use_ema", "optimizer", "weights",
                     "fused_backward")


def shaping_flags(s):
    """{"--flag": value} of those flags that the trained weights depend on."""
    return {f"--{f.name}": getattr(s, f.name) for f in dataclasses.fields(s)
            if f.name not in FREE_FLAGS and "train" in MODES[f.metadata["mode"]]}


def origin_of(s, course, groups, fingerprint, pictures, processes):
    """{what: value} that a resumed training must have in common with the one it goes on from."""
    origin = {"the base model": fingerprint, "the photos or class images": pictures, **shaping_flags(s),
              "the number of processes": processes}
    decided = decisions(course, groups)
    origin |= {f"the {key.replace('_', ' ')}": decided[key] for key in SHAPING_DECISIONS}
    if not course.lr_scheduler.startswith("constant") or any(group.until < 1 for group in groups):
        origin["--steps"] = course.steps  # elsewhere a longer training begins as a shorter one does
    return origin


def pictures_digest(photos, class_images):
    """A hex digest of everything in these pools of (path, caption)."""
    pools = [[(file_digest(path), caption) for path, caption in pool] for pool in (*photos, *class_images)]
    return hashlib.sha256(json.dumps(pools).encode()).hexdigest()


def check_origin(path, state, origin):
    """Raises UserError, naming every difference, unless what was trained so far came about as `origin` says."""
    now = json.loads(json.dumps(origin))
    if differences := [f"{key} ({state['origin'].get(key)}, now {value})" if len(str(value)) < 40 else key
                       for key, value in now.items() if state["origin"].get(key) != value]:
        raise UserError(f"--resume {short_path(path)}: it was made with other settings: {', '.join(differences)}; give the same, "
                        f"or start without --resume")

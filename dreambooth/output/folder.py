"""The output folder: written whole or not at all, and an earlier one is never lost."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from dreambooth.base import UserError, default, is_first_process, say, short_path
from dreambooth.drawing.trained import read_record
from dreambooth.files import check_room, check_writable, delete, tidy, unused_name
from dreambooth.methods.full import save_pipeline
from dreambooth.methods.table import METHODS, saves_of
from dreambooth.training.checkpoints import checkpoints_in
from dreambooth.training.levers import BYTES
from dreambooth.training.optimizers import state_sizes
from dreambooth.training.origin import differences

MARKS = (".lock", "checkpoints", "dreambooth.json")  # one of which a training's own folder has


def check_output_dir(s):
    """UserError unless --output_dir can be made, is empty, or is an earlier output of --train that can be renamed; and beside it
    the folder that a training fills first."""
    folder, flag = Path(s.output_dir).resolve(), f"--output_dir {s.output_dir}:"
    check_writable(s.output_dir, "--output_dir")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "dreambooth.json").is_file():
        raise UserError(f"{flag} the folder holds something else (no dreambooth.json); give another folder")
    if Path.cwd().is_relative_to(folder) or os.path.ismount(folder):
        raise UserError(f"{flag} this folder cannot be renamed; give one inside it")
    if str(folder) != str(folder).encode(errors="replace").decode():
        raise UserError(f"{flag} its name is not UTF-8, and weights in it could not be read again; give another folder")
    check_room(folder, "--output_dir", len(".partial-1000000"))
    check_writable(folder.parent, "--output_dir")
    beside = workplace(s)
    if beside.exists() and not (beside.is_dir() and (not any(beside.iterdir()) or any((beside / mark).exists() for mark in MARKS))):
        raise UserError(f"{flag} {short_path(beside)}, where it would be made, holds something else; rename that, or give "
                        f"another folder")
    check_logging_dir(s)


# What an output has by these names; all else in it has a "." in its name.
TAKEN_NAMES = ("checkpoints", "samples", "unet", "transformer", "vae", "scheduler", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")


def check_logging_dir(s):
    """UserError unless --logging_dir is a place of its own, in the output or elsewhere."""
    name = logs_in(s)
    if name in TAKEN_NAMES or "." in name or not name:
        raise UserError(f"--logging_dir {s.logging_dir}: give a name that nothing else in the output has, such as logs, or an "
                        f"absolute path")
    if Path(name).is_absolute():
        check_writable(s.logging_dir, "--logging_dir")


def logs_in(s):
    """What of --output_dir TensorBoard's files are in: the first part of --logging_dir, the root of an absolute one."""
    return next(iter(Path(default(s.logging_dir, "logs")).parts), "")


def check_apart(s, concepts):
    """UserError if what a training reads lies in --output_dir, which gets another name in the end or is deleted."""
    given = [(name, getattr(concept, name)) for name in ("instance_data_dir", "class_data_dir") for concept in concepts]
    for name, path in given + [(name, getattr(s, name)) for name in ("concepts", "prompts_file")]:
        for folder in (Path(s.output_dir).resolve(), workplace(s)):
            if path and Path(path).resolve().is_relative_to(folder):
                raise UserError(f"--output_dir {s.output_dir}: {name} {path} lies in {short_path(folder)}, which is renamed when "
                                f"the training is done; give another folder")


def workplace(s):
    """Where a training writes until its output is complete; an interrupted one leaves its checkpoints there."""
    target = Path(s.output_dir).resolve()
    return target.with_name(f"{target.name}.partial")


def unfinished(s):
    """Where the checkpoints of an earlier training of this output are."""
    return workplace(s) if workplace(s).exists() else Path(s.output_dir).resolve()


@contextlib.contextmanager
def new_output(s):
    """A folder to fill that becomes --output_dir if the block succeeds. If it fails, checkpoints and logs stay in it."""
    folder = workplace(s)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)  # the system lets go of it when the process ends, however that happens
    except Timeout:
        raise UserError(f"--output_dir {s.output_dir}: another training is writing to it; give another folder") from None
    except (OSError, NotImplementedError) as problem:
        if isinstance(problem, PermissionError):
            raise
        say(f"Note: the disk of {short_path(folder)} has no locks; see to it that no other training writes there.")
    try:
        yield folder
    except BaseException:
        lock.release()
        if is_finished(folder):
            finish_renaming(s)
        elif checkpoints_in(folder):
            tidy(folder, keep=("checkpoints", logs_in(s), "samples"))
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    lock.release()
    finish_renaming(s)


def is_finished(folder):
    """Whether an output is complete: dreambooth.json is written last."""
    return (folder / "dreambooth.json").is_file()


def finish_renaming(s):
    """Give a complete output its name, if it still lacks it."""
    folder = workplace(s)
    if is_first_process() and is_finished(folder):
        delete(folder / ".lock")
        replace_output(folder, Path(s.output_dir).resolve(), s.overwrite)


def clear(folder, checkpoint, overwrite, logs="logs"):
    """Make `folder` ready for a training that goes on from `checkpoint`, or begins if that is None or lies elsewhere.

    An interrupted training that is not gone on with gets another name, or is deleted if `overwrite`.
    """
    interrupted = checkpoints_in(folder)
    if checkpoint in interrupted:
        return tidy(folder, keep=(".lock", "checkpoints", logs, "samples"))
    if interrupted and overwrite:
        say(f"--overwrite: the interrupted training of {interrupted[-1].name} in {short_path(folder)} is deleted; --resume would "
            f"have gone on with it.")
    elif interrupted:
        kept = unused_name(folder)
        kept.mkdir()
        (folder / "checkpoints").rename(kept / "checkpoints")
        say(f"Note: the interrupted training of {interrupted[-1].name} is kept in {short_path(kept)}; --resume would have "
            f"gone on with it.")
    tidy(folder, keep=(".lock",))


def replace_output(folder, target, overwrite):
    """Rename `folder` to `target`; what was there is kept under another name, or deleted if `overwrite`."""
    earlier = None
    try:
        if target.is_dir() and not any(target.iterdir()):
            target.rmdir()
        if target.exists():
            earlier = unused_name(target)
            target.rename(earlier)
        folder.rename(target)
    except OSError as problem:
        if earlier and earlier.exists() and not target.exists():
            with contextlib.suppress(OSError):
                earlier.rename(target)
        raise UserError(f"{target} cannot be replaced ({problem.strerror}); the new model is complete in {folder}") from None
    if earlier and overwrite:
        delete(earlier)
    elif earlier:
        say(f"The earlier {target.name} is kept as {short_path(earlier)}; --overwrite would have deleted it.")


def is_complete(s, given):
    """Whether --output_dir already holds what these settings make of what_was_given(), and no interrupted training would replace
    it. Says so if only what was given differs."""
    if workplace(s).exists() or not Path(s.output_dir).is_dir():
        return False
    record = read_record(s.output_dir)
    made, ours = record.get("settings", {}), json.loads(json.dumps(dataclasses.asdict(s)))
    if any(made.get(key) != value for key, value in ours.items()
           if key not in ("resume", "overwrite", "checkpointing_steps", "checkpoints_total_limit", "cache_dir", "logging_dir", "shard",
                          "push_to_hub", "hub_model_id", "samples", "export_precision")):
        return False
    if not isinstance(record.get("given"), dict):
        say(f"Note: {s.output_dir} does not tell which photos it was made from; without --resume it is trained anew.")
        return True
    try:
        changed = differences(record["given"], json.loads(json.dumps(given)))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{Path(s.output_dir) / 'dreambooth.json'}: cannot be read; it is damaged, train the model again") from None
    if changed:
        say(f"{s.output_dir} is complete, but was made from something else: {'; '.join(changed)}.")
    return not changed


def disk_sizes(s, course, models, groups):
    """Bytes of (the output, a checkpoint, the weights alone that --select_best keeps)."""
    shapes = [parameter.shape for group in groups for parameter in group.parameters]
    weights = sum(map(math.prod, shapes))
    frozen = sum(module.num_parameters() for module in (models.denoiser, models.vae, *models.text_encoders)) - weights
    frozen += models.book.weights if models.book and not models.text_encoders else 0
    trained = BYTES[course.levers.weights] * weights
    output = 2 * trained if METHODS[s.method].is_adapter else trained
    output += 4 * frozen if save_pipeline in saves_of(s) else 0
    return output, trained * (2 if course.use_ema else 1) + sum(state_sizes(shapes, course.levers)), trained


def check_space(s, course, models, groups):
    """UserError unless the disk has room for the output, one checkpoint more than are kept, and two bests."""
    output, checkpoint, best = disk_sizes(s, course, models, groups)
    needed = output + checkpoint * (s.checkpoints_total_limit + 1) + 2 * best * s.select_best
    free = shutil.disk_usage(next(p for p in Path(s.output_dir).resolve().parents if p.exists())).free
    if free < needed:
        raise UserError(f"--output_dir {s.output_dir}: output and checkpoints need {needed / 1e9:.1f} GB of disk and "
                        f"{free / 1e9:.1f} GB are free; make room, or give another folder or fewer --checkpoints_total_limit")

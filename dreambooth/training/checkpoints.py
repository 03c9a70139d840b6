"""Checkpoints: what an interrupted training goes on from, whole or not there at all."""

import contextlib
import hashlib
import json
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

from dreambooth.base import UserError, say, short_path
from dreambooth.files import file_digest, hidden_name, renamed_when_complete, save_tensors
from dreambooth.methods.groups import check_finite, own_share, trained_parameters, trained_tensors
from dreambooth.training.origin import check_origin, shaping_flags
from dreambooth.training.run import best_of
from dreambooth.training.shards import load_shares, save_shares, share_like
from dreambooth.training.state import flatten_state, give_state, restore_state

TENSORS_FILE, STATE_FILE = "training.safetensors", "state.json"


def checkpoints_in(folder):
    """Paths of the checkpoints of a training in `folder`, oldest first."""
    found = [p for p in (Path(folder) / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def best_file(folder, step):
    return folder / "checkpoints" / f"best-{step:06d}.safetensors"


def best_files(folder):
    return list((folder / "checkpoints").glob("best-*.safetensors"))


def read_state(path):
    """What state.json of a checkpoint says. Raises UserError if the checkpoint is not whole."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        own = state.pop("state_sha256", None)
        whole = own in (None, state_digest(state)) and state["sha256"] == tensors_digest(path) and is_whole_state(state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"--resume {short_path(path)}: this checkpoint is missing or damaged; give another, or start without "
                        f"--resume")
    return state


def tensors_digest(folder):
    """sha256 of the one file of a checkpoint's tensors; where each process wrote its shares, of the digests of all these files."""
    digests = [file_digest(path) for path in sorted(folder.glob("*.safetensors"))]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def state_digest(state):
    """sha256 of what state.json says beside it."""
    return hashlib.sha256(json.dumps(state, default=float, sort_keys=True).encode()).hexdigest()


def is_whole_state(state):
    """Whether a state.json holds what write_checkpoint() puts there."""
    def are_numbers(row, count):
        return len(row) == count and all(value is None or type(value) in (int, float) for value in row)
    kinds = {"origin": dict, "history": list, "scores": list, "optimizer": list, "optimizer_numbers": dict,
             "scaler": (dict, type(None))}
    return (all(isinstance(state[name], kind) for name, kind in kinds.items())
            and all(are_numbers(row, 3) for row in state["history"])
            and all(row.keys() >= {"step", "dino", "clip_t", "score"} and are_numbers(row.values(), len(row))
                    for row in state["scores"])
            and all(isinstance(value, (int, float, list, type(None))) for group in state["optimizer"] for value in group.values()))


def find_checkpoint(s, folder):
    """The checkpoint to go on from, named by --resume or the newest of those in `folder`; None to begin at the beginning.

    Damaged ones in `folder` are passed over, and that is said.

    Raises UserError if the one named by --resume is damaged, or belongs to a training with other settings.
    """
    if s.resume is None:
        return None
    if s.resume != "latest":
        check_origin(Path(s.resume), read_state(Path(s.resume)), shaping_flags(s))
        return Path(s.resume).resolve()
    for path in reversed(checkpoints_in(folder)):
        try:
            state = read_state(path)
        except UserError:
            say(f"Skipped the checkpoint {short_path(path)}: it is damaged.")
        else:
            check_origin(path, state, shaping_flags(s))
            return path
    say(f"--resume: no checkpoint in {short_path(folder)}; starting at the beginning.")
    return None


def write_checkpoint(run, folder):
    """Write folder/checkpoints/step-N, whole or not at all, and delete those beyond --checkpoints_total_limit."""
    check_finite(run.groups)
    path, is_main = Path(folder) / "checkpoints" / f"step-{len(run.history):06d}", run.accelerator.is_main_process
    with renamed_when_complete(path) if is_main else contextlib.nullcontext(hidden_name(path)) as new:
        run.accelerator.wait_for_everyone()  # the folder is there
        optimizer = run.optimizer.state_dict()
        tensors, numbers = tensors_of(run, optimizer)
        if run.hollow:
            save_shares(tensors, new)
        elif is_main:
            save_tensors(tensors, new / TENSORS_FILE)
        if is_main:
            scaler = run.accelerator.scaler and run.accelerator.scaler.state_dict()
            state = {"origin": run.origin, "history": run.history, "scores": run.scores,
                     "optimizer": optimizer["param_groups"], "optimizer_numbers": numbers, "scaler": scaler,
                     "processes": run.accelerator.num_processes, "sha256": tensors_digest(new)}
            # torchao keeps its learning rate in a tensor
            text = json.dumps(state | {"state_sha256": state_digest(state)}, default=float)
            (new / STATE_FILE).write_text(text, encoding="utf-8")
    if is_main:
        for old in (*checkpoints_in(folder)[:-run.s.checkpoints_total_limit], *path.parent.glob(".step-*")):
            discard(old)
    run.accelerator.wait_for_everyone()


def tensors_of(run, optimizer):
    """({name: tensor}, {name: number}) of what a checkpoint holds: weights, their averages, and an optimizer's state_dict()."""
    parameters = trained_parameters(run.groups)
    moments, numbers = flatten_state(optimizer["state"])
    averages = {f"average.{i}": share_like(*pair) for i, pair in enumerate(zip(run.averages, parameters.values()))}
    return {name: parameter.data for name, parameter in parameters.items()} | moments | averages, numbers


def discard(checkpoint):
    """Delete a checkpoint, or what a killed process left of one; at no time is there half of one."""
    hidden = checkpoint.with_name(f".{checkpoint.name.removeprefix('.')}")
    with contextlib.suppress(OSError):  # another program has it open: it is deleted the next time
        checkpoint.rename(hidden)
        shutil.rmtree(hidden)


def load_checkpoint(run, path):
    """Put weights, optimizer, schedule and history of a checkpoint into `run`. UserError if they came about otherwise."""
    state = read_state(path)
    check_origin(path, state, run.origin)
    done = len(state["history"])
    if done > run.course.steps:
        raise UserError(f"--resume {short_path(path)}: it has {done} steps already; give --steps of at least that")
    try:
        restore(run, read_tensors(run, path), state)
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
        if "out of memory" in str(problem):
            raise
        raise UserError(f"--resume {short_path(path)}: this checkpoint is damaged, or of another version of this program "
                        f"({' '.join(str(problem).split())[:200]}); start without --resume") from None
    tell_processes(run, path, state.get("processes"))
    run.lr_scheduler.last_epoch = done
    run.history.extend(state["history"])
    if state["scores"] and best_file(path.parent.parent, best_of(state["scores"])["step"]).is_file():
        run.scores.extend(state["scores"])
    elif state["scores"]:
        say("Note: the best weights of the steps before are gone; --select_best goes by what follows.")
    say(f"Going on after step {done} of {run.course.steps}, from {short_path(path)}.")


def tell_processes(run, path, before):
    """Say where a checkpoint was written by another number of processes than go on from it."""
    now, each = run.accelerator.num_processes, run.s.train_batch_size * run.s.gradient_accumulation_steps
    if before not in (None, now):
        say(f"Note: {short_path(path)} is of {before} processes, and there are {now} now: from here a step sees {now * each} "
            f"photos instead of {before * each}, and other noise.")


def read_tensors(run, path):
    """{name: tensor} of a checkpoint, whoever wrote it; of what is split in this run its shares."""
    from safetensors.torch import load_file

    if not run.hollow and (path / TENSORS_FILE).is_file():
        return load_file(path / TENSORS_FILE)
    named = trained_parameters(run.groups)
    numbered = list(named.values())
    return load_shares(path, lambda name: named[name] if name in named else numbered[int(name.split(".")[1])])


def restore(run, saved, state):
    """Put the tensors and the optimizer's state of a checkpoint into `run`."""
    import torch

    averages = {f"average.{i}": average for i, average in enumerate(run.averages)}
    for name, tensor in {**trained_tensors(run.groups), **averages}.items():
        tensor.copy_(own_share(saved.pop(name)))
    param_groups = [{key: torch.tensor(value) if torch.is_tensor(group.get(key)) else value for key, value in old.items()}
                    for group, old in zip(run.optimizer.param_groups, state["optimizer"])]
    run.optimizer.load_state_dict({"state": {}, "param_groups": param_groups})
    give_state(run.optimizer, restore_state(saved, state["optimizer_numbers"]), run.course.levers.offload_optimizer)
    if state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])

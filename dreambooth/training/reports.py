"""What a training says of itself on the way: losses, to people and to TensorBoard."""

import contextlib
import math

from dreambooth.base import GIB, UserError, is_first_process, say, short_path
from dreambooth.training.checkpoints import checkpoints_in
from dreambooth.training.loss import loss_means

REPORT_EVERY = 10  # optimizer steps between reads of the losses; reading makes the CPU wait for the GPU


def report_losses(run, folder, unread, bar, writer):
    """Append what train_step() measured to the history, to the progress bar and to TensorBoard.

    Raises UserError if something is not finite: the weights are of no use from that step on.
    """
    import torch

    per_step = torch.stack(unread).view(-1, run.s.gradient_accumulation_steps, 3)
    read = torch.cat([per_step[..., :2].mean(1), per_step[:, -1:, 2]], dim=1)  # [steps, 3]
    has_class = bool(run.cache.class_images)
    for instance, prior, norm in run.accelerator.reduce(read, "mean").tolist():
        done = len(run.history) + 1
        checked = {"instance loss": instance, "prior loss": prior if has_class else 0,
                   "gradient norm": norm if run.accelerator.scaler is None else 0}  # fp16's scaler skips such a step itself
        if wrong := next((f"the {what} is {value}" for what, value in checked.items() if not math.isfinite(value)), None):
            saved = next(reversed(checkpoints_in(folder)), None)
            raise UserError(f"training stopped: {wrong} at step {done}; {cause_of(run, done)}"
                            + (f" (the last good checkpoint is {short_path(saved)})" if saved else ""))
        run.history.append((instance, prior if has_class else None, norm))
        log_scalars(writer, done, {"loss/instance": instance, "gradient_norm": norm} | ({"loss/prior": prior} if has_class else {}))
    rates = dict(zip((group.name for group in run.groups), run.lr_scheduler.get_last_lr()))
    log_scalars(writer, len(run.history), {f"lr/{name}": lr for name, lr in rates.items()})
    shown = {k: f"{v:.4f}" for k, v in loss_means(run.history[-50:]).items() if v is not None}
    device, lr = run.accelerator.device, next(rates[group.name] for group in run.groups if group.until >= 1)  # of what does not rest
    used = {"memory": f"{torch.cuda.memory_allocated(device) / GIB:.1f}GiB"} if device.type == "cuda" else {}
    bar.set_postfix(shown | {"lr": f"{lr:.1e}"} | used)


def cause_of(run, done):
    """Why step number `done` gave no numbers, and what to do. No rate has had an effect in the first."""
    if done > 1:
        return "the learning rate is too high or the arithmetic too coarse: give a smaller --learning_rate, or --mixed_precision no"
    weights = f"weights of {run.models.name} are no numbers (NaN or infinite)"
    another = "give another copy of the model, or another model"
    return (f"nothing was learnt yet, so {weights}: {another}" if run.course.precision == "no" else
            f"nothing was learnt yet, so {weights}, or the arithmetic is too coarse for them: give --mixed_precision no, or else {another}")


def log_scalars(writer, step, values):
    """Write {name: value} to TensorBoard in the process that has a writer."""
    for name, value in values.items() if writer else ():
        writer.add_scalar(name, value, step)


class LossWriter:
    """TensorBoard's writer, to use in a `with`. No training ends for its logs: once they cannot be written, that is said, and it
    is silent."""

    def __init__(self, log_dir, done):
        self.writer = None
        self.attempt(lambda: self.open(log_dir, done))

    def open(self, log_dir, done):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(log_dir, purge_step=done + 1)

    def attempt(self, write):
        try:
            write()
        except Exception as problem:  # a full disk, or tensorboard not installed, or not as torch needs it
            reason = " ".join(str(problem).split())[:200]
            say(f"Note: no more logs for TensorBoard ({type(problem).__name__}: {reason}); the training goes on without.")
            self.writer = None

    def add_scalar(self, *values):
        if self.writer:
            self.attempt(lambda: self.writer.add_scalar(*values))

    def add_image(self, *values, **options):
        if self.writer:
            self.attempt(lambda: self.writer.add_image(*values, **options))

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        if self.writer:
            self.attempt(self.writer.close)


def loss_writer(log_dir, done):
    """A LossWriter to use in a `with`, None on all processes but the first. Of earlier logs `done` steps count."""
    return LossWriter(log_dir, done) if is_first_process() else contextlib.nullcontext()

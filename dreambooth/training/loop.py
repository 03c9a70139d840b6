"""The training loop.

Knows no family, no method and no flag that saves memory: it sees parameter groups, a loss and a Run.
"""

import contextlib
import math

from dreambooth.base import Interrupted, default, is_first_process
from dreambooth.data.batches import make_batch, random_source
from dreambooth.device import moved
from dreambooth.methods.groups import check_finite, trained_tensors
from dreambooth.progress import progress
from dreambooth.threads import threads_that_help
from dreambooth.training.checkpoints import write_checkpoint
from dreambooth.training.loss import denoising_loss, split_means
from dreambooth.training.prepare import unwrap
from dreambooth.training.reports import REPORT_EVERY, loss_writer, report_losses
from dreambooth.training.run import ema_decay
from dreambooth.training.samples import view
from dreambooth.training.selection import keep_best
from dreambooth.training.shards import whole
from dreambooth.training.signals import deferred_stop, stop_agreed

COUNTED_ON_CPU = ("prompt", "is_class")  # of a batch: what is counted there does not wait for the GPU


def optimize(run, folder, viewer):
    """Take `run` to its last step, with logs, checkpoints and what `viewer` draws on the way in `folder`.

    Raises Interrupted, once the step is done and a checkpoint written, on Ctrl-C or SIGTERM; UserError on a loss that is
    not finite.
    """
    s, steps, unread = run.s, run.course.steps, []
    threads = threads_that_help(run.accelerator.device)
    with loss_writer(folder / default(s.logging_dir, "logs"), len(run.history)) as writer, deferred_stop() as signals:
        bar = progress(range(len(run.history), steps), "training", "step", steps, len(run.history), not is_first_process())
        for done in (step + 1 for step in bar):
            with threads.timed() if threads else contextlib.nullcontext():
                unread += train_step(run, done - 1)
            stop = stop_agreed(run.accelerator, signals, done)
            views = viewer.every and (done % viewer.every == 0 or done == steps)
            saves = stop or (s.checkpointing_steps and done % s.checkpointing_steps == 0 and done < steps)
            if saves or views or done % REPORT_EVERY == 0 or done == steps:
                report_losses(run, folder, unread, bar, writer)
                unread = []
            if views:
                with bar.aside("samples", times(viewer.every, done, steps) + (done < steps)):
                    view(run, folder, viewer, writer)
            if saves:
                with bar.aside("checkpoint", times(s.checkpointing_steps, done, steps)):
                    write_checkpoint(run, folder)
            if stop and done < steps:
                raise Interrupted(f"interrupted after step {done} of {steps}; go on with the same command and --resume", stop)
    check_finite(run.groups)
    for tensor, average in zip(trained_tensors(run.groups).values(), run.averages):
        tensor.copy_(average)
    if run.scores:
        keep_best(run, folder)
    unwrap(run)


def times(every, done, steps):
    """How many multiples of `every`, if that is anything, lie between steps `done` and `steps`."""
    return len(range(done - done % every + every, steps, every)) if every else 0


def train_step(run, step):
    """One optimizer step. Returns for each micro-step a tensor [instance loss, prior loss, gradient norm].

    A batch depends on the number of its step alone, so nothing has to be remembered from one step to the next but weights
    and optimizer.
    """
    import torch

    s, accelerator, measured = run.s, run.accelerator, []
    torch.manual_seed(random_source("rounding", s.seed, step).initial_seed())  # of bf16 weights; the same in all processes
    for micro_step in range(step * s.gradient_accumulation_steps, (step + 1) * s.gradient_accumulation_steps):
        batch = make_batch(run.cache, s, micro_step, run.noise, accelerator.process_index, accelerator.num_processes)
        batch = {key: value if key in COUNTED_ON_CPU else moved(value, accelerator.device) for key, value in batch.items()}
        with accelerator.accumulate(*run.modules):
            losses = []
            for start in range(0, len(batch["weight"]), run.at_once):
                part = {key: value[start:start + run.at_once] for key, value in batch.items()}
                loss, per_picture = denoising_loss(run.noise, part, run.denoiser, run.untouched)
                accelerator.backward(loss)
                losses.append(per_picture.detach())
            norm = clip_gradients(run) if accelerator.sync_gradients else loss.new_zeros(())
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
        measured.append(torch.stack([*split_means(torch.cat(losses), moved(batch["is_class"], accelerator.device)), norm]))
    run.lr_scheduler.step()
    if run.averages:
        torch._foreach_lerp_(run.averages, list(trained_tensors(run.groups).values()), 1 - ema_decay(step))
    return measured


def clip_gradients(run):
    """Scale each group's gradients down to --max_grad_norm; returns the norm of all before that."""
    import torch

    run.accelerator.unscale_gradients(run.optimizer)
    limit = run.s.max_grad_norm or math.inf
    norms = run.grad_norms or [whole(torch.nn.utils.clip_grad_norm_(group.parameters, limit)) for group in run.groups]
    norm = torch.stack(norms).norm()
    run.grad_norms.clear()
    return norm

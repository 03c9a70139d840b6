"""Ctrl-C and signals that end programs: a training finishes its step first, and what is being saved is saved."""

import contextlib
import signal
import threading

from dreambooth.base import ending_signals, say
from dreambooth.training.reports import REPORT_EVERY


@contextlib.contextmanager
def deferred_stop(promise="this step is finished and a checkpoint written"):
    """A list that receives the number of a first Ctrl-C or signal that ends programs; a second one acts at once, as does one
    outside. `promise` is what is said to be done before."""
    received, handlers = [], {}

    def note(number, frame):
        received.append(number)
        restore()
        say(f"\nStopping: {promise}. Once more stops at once.")

    def restore():
        while handlers:
            signal.signal(*handlers.popitem())
    if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
        handlers |= {number: signal.signal(number, note) for number in (signal.SIGINT, *ending_signals())}
    try:
        yield received
    finally:
        restore()


def stop_agreed(accelerator, signals, done):
    """The signal to stop for, or 0. Several processes must all stop at one step, so they ask each other now and then."""
    import torch

    if accelerator.num_processes == 1 or done % REPORT_EVERY:
        return signals[0] if signals and accelerator.num_processes == 1 else 0
    received = torch.tensor(signals[0] if signals else 0, device=accelerator.device)
    return int(accelerator.gather(received[None]).max())

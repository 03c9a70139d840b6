"""The command line: one command, one line for every error, and the exit status."""

import contextlib
import logging
import signal
import sys
import threading

from dreambooth.arguments import parse_settings
from dreambooth.base import Interrupted, UserError
from dreambooth.evaluate import evaluate
from dreambooth.export import export
from dreambooth.infer import infer
from dreambooth.models.hub import cache_at
from dreambooth.train import train

REMEDIES = {  # what an exception of any library says -> what to tell
    "out of memory": "the GPU's memory is full; for --train try --gradient_checkpointing, --train_batch_size 1, a smaller "
                     "--resolution or --sample_batch_size 1; otherwise --sample_batch_size 1 or --mixed_precision fp16",
    "No space left on device": "the disk is full; make room and give the same command again (with --resume after training "
                               "steps); what was complete is still there",
}


# Libraries that say at length on loading what nobody here needs: torchao of kernels for GPUs that are not there, and torch of it.
TALKATIVE = ("torchao", "torch.utils._pytree")


def main(argv=None):
    """Run one command. The exit status is 0; or 2 after one line on standard error if the user can put it right; or 128 +
    the signal's number after Ctrl-C or SIGTERM."""
    try:
        with terminable():
            settings = parse_settings(argv)
            for name in TALKATIVE:
                logging.getLogger(name).setLevel(logging.ERROR)
            with cache_at(settings.cache_dir):
                {"train": train, "infer": infer, "evaluate": evaluate, "export": export}[settings.mode](settings)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        message, number = stop.args or ("interrupted; pictures drawn so far are kept, and so is an earlier output", signal.SIGINT)
        print(message, file=sys.stderr)
        return 128 + number
    except Exception as problem:
        remedy = next((remedy for sign, remedy in REMEDIES.items() if sign in str(problem)), None)
        if remedy is None:
            raise
        print(f"error: {remedy}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def terminable():
    """SIGTERM ends the block as Ctrl-C does."""
    def stop(number, frame):
        raise Interrupted("terminated; pictures drawn so far are kept, and so is an earlier output", number)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)

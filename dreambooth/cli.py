"""The command line: one command, one line for every error, and the exit status."""

import contextlib
import logging
import os
import signal
import sys
import threading

from dreambooth.arguments import parse_settings
from dreambooth.base import Interrupted, UserError, ending_signals, say_once
from dreambooth.console import lasting_console
from dreambooth.evaluate import evaluate
from dreambooth.export import export
from dreambooth.infer import infer
from dreambooth.mishaps import mishap
from dreambooth.models.hub import cache_at
from dreambooth.train import train

# Libraries that say at length on loading what nobody here needs: torchao of kernels for GPUs that are not there, and torch of it.
TALKATIVE = ("torchao", "torch.utils._pytree")
KEPT_SO_FAR = "pictures drawn so far are kept, and so is an earlier output"


def main(argv=None):
    """Run one command. The exit status is 0; or 2 after one line on standard error if the user can put it right; or 128 +
    the signal's number after Ctrl-C or a signal that ends programs."""
    with lasting_console():
        try:
            with terminable():
                run_command(argv)
        except UserError as problem:
            return refusal(problem)
        except KeyboardInterrupt as stop:
            message, number = stop.args or (f"interrupted; {KEPT_SO_FAR}", signal.SIGINT)
            print(message, file=sys.stderr)
            return 128 + number
        except SystemExit as end:  # --help has said everything
            return end.code or 0
        except Exception as problem:
            line = mishap(problem)
            if line is None:
                raise
            return refusal(line)
    return 0


def run_command(argv):
    """Parse the flags and do what they say."""
    say_once.cache_clear()  # in a notebook, another command may have been before
    settings = parse_settings(argv)
    try:
        os.getcwd()
    except OSError:
        raise UserError("the folder that this was started in is gone; change to another (cd)") from None
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    with cache_at(settings.cache_dir):
        {"train": train, "infer": infer, "evaluate": evaluate, "export": export}[settings.mode](settings)


def refusal(problem):
    """Say in one line what is wrong; returns the exit status."""
    print("error:", " ".join(str(problem).splitlines()), file=sys.stderr)
    return 2


@contextlib.contextmanager
def terminable():
    """Signals that end programs end the block as Ctrl-C does."""
    def stop(number, frame):
        how = "the terminal was closed" if number == getattr(signal, "SIGHUP", None) else "terminated"
        raise Interrupted(f"{how}; {KEPT_SO_FAR}", number)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, stop) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)

"""The command line: one command, one line for every error, and the exit status."""

import contextlib
import logging
import os
import re
import signal
import sys
import threading

from dreambooth.arguments import parse_settings
from dreambooth.base import Interrupted, UserError, ending_signals, say_once
from dreambooth.compatible import FOREIGN_FLAGS
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
    with own_environment():
        follow(parse_settings(argv))


def follow(settings):
    """Do what settings say."""
    try:
        os.getcwd()
    except OSError:
        raise UserError("the folder that this was started in is gone; change to another (cd)") from None
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    with cache_at(settings.cache_dir):
        {"train": train, "infer": infer, "evaluate": evaluate, "export": export}[settings.mode](settings)


@contextlib.contextmanager
def own_environment():
    """What flags put into the environment is there within the block alone: the next command of a notebook has its own."""
    names = [foreign.environment for foreign in FOREIGN_FLAGS.values() if foreign.environment]
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def refusal(problem):
    """Say in one line what is wrong; returns the exit status."""
    line = re.sub(r"(\S{150})\S{200,}(\S{50})", r"\1...\2", " ".join(str(problem).splitlines()))  # no remedy is seen behind a wall
    print("error:", line, file=sys.stderr)
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

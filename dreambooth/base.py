"""What every module may use: complaints, lines said once, small words and paths.

Knows nothing of models, pictures or flags.
"""

import functools
import os
import re
import signal
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1 if __package__ else 0]  # where what comes with the program lies, such as demo/
GIB = 2**30


class UserError(Exception):
    """Something the user can put right. Its text is one line that names the flag or file and the remedy."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a signal that ends programs. Arguments: what to tell, the signal's number."""


def place_among_processes():
    """(rank, rank on this machine, number of processes) of one of several that train together; (0, 0, 1) for one alone.

    As `accelerate launch` says in the environment. What says less than they need to meet was left there by something else, and is
    not believed.
    """
    read = os.environ.get
    try:
        rank, local_rank, number, port = (int(read(name, "")) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"))
    except ValueError:
        return 0, 0, 1
    can_meet = read("MASTER_ADDR", "").strip() and 0 < port < 2**16 and 0 <= local_rank <= rank < number > 1
    return (rank, local_rank, number) if can_meet else (0, 0, 1)


def is_first_process():
    """False in all but one of the processes that `accelerate launch` starts."""
    return place_among_processes()[0] == 0


@functools.cache
def say_once(message):
    """say(), but not again if the same line comes up again."""
    say(message)


def say(message):
    """Print one line, once however many processes train together."""
    if is_first_process():
        print(message, flush=True)


def processes():
    """How many train together, as `accelerate launch` says."""
    return place_among_processes()[2]


def ending_signals():
    """Signals that ask a program to end, beside Ctrl-C: of the system, of a terminal that closes; none that is ignored, as nohup
    has it."""
    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def default(value, otherwise):
    return otherwise if value is None else value


def short_path(path):
    """`path` as seen from the working folder, whole if it lies on another drive."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


def own_command():
    """How this program is called, as one types it: the file, `python -m dreambooth`, or the command that pip installed."""
    if __package__:
        return "dreambooth" if Path(sys.argv[0]).stem == "dreambooth" else "python -m dreambooth"
    program = short_path(__file__)
    return "python " + (f'"{program}"' if " " in program else program)


def slug(text):
    """A prompt as part of a file name: words joined by "-", short enough for every file system."""
    return re.sub(r"\W+", "-", text.lower()).encode()[:120].decode(errors="ignore").strip("-") or "prompt"

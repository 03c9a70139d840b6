"""What every module may use: complaints, lines said once, small words and paths.

Knows nothing of models, pictures or flags.
"""

import functools
import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1 if __package__ else 0]  # where what comes with the program lies, such as demo/
GIB = 2**30


class UserError(Exception):
    """Something the user can put right. Its text is one line that names the flag or file and the remedy."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM. Arguments: what to tell, the signal's number."""


def is_first_process():
    """False in all but one of the processes that `accelerate launch` starts."""
    return os.environ.get("RANK", "0") == "0"


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
    return int(os.environ.get("WORLD_SIZE", "1"))


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

"""Where lines go: nothing that becomes of the console, or was never there, ends a command.

Knows nothing of what is said.
"""

import contextlib
import os
import sys

LOST = (OSError, ValueError, RuntimeError)  # the reader is gone, the stream is closed, a signal's handler speaks within a line


class LastingStream:
    """A text stream that never fails: letters that its encoding lacks are written as \\u4e00, and what nobody reads is dropped."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def isatty(self):
        with contextlib.suppress(AttributeError, *LOST):
            return self.stream.isatty()
        return False

    def write(self, text):
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(self.stream, "encoding", None) or "ascii"
            with contextlib.suppress(*LOST):
                self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except LOST:
            pass
        return len(text)

    def flush(self):
        with contextlib.suppress(AttributeError, *LOST):
            self.stream.flush()

    def settle(self):
        """Send what could not be written nowhere, or Python would complain of it in the end."""
        try:
            self.stream.flush()
        except OSError:
            with contextlib.suppress(*LOST), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())
        except (AttributeError, *LOST):
            pass


@contextlib.contextmanager
def lasting_console():
    """Within the block, standard output and error are there and never fail."""
    own = sys.stdout, sys.stderr
    open_descriptors()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        streams = [LastingStream(nowhere if stream is None else stream) for stream in own]
        sys.stdout, sys.stderr = streams
        try:
            yield
        finally:
            for stream in streams:
                stream.settle()
            sys.stdout, sys.stderr = own


def open_descriptors():
    """Have 0, 1 and 2 lead somewhere: the next file opened would get the number of one that is closed, and what a library
    writes to the console would go into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                opened = os.open(os.devnull, os.O_RDWR)
                if opened != number:
                    os.dup2(opened, number)
                    os.close(opened)

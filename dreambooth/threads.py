"""How many threads torch computes with on a CPU that other programs use as well.

Threads wait for one another several hundred times in a step, and they wait by spinning: once another program has taken a core,
all spin until the one without a core has its turn, and a step takes ten times as long. Fewer threads then are faster. That is
measured, and nothing else is assumed.
"""

import contextlib
import functools
import os
import time

from dreambooth.base import say_once

WINDOW = 1.0  # seconds, and at least two steps, that a pace is measured over
PATIENCE = 30.0, 300.0  # seconds until a number that was slower is tried again: at first, and at most
HELD = 0.9  # of the threads: with less of the CPU than this, others want it too


class Threads:
    """Tries fewer threads while the process gets less of the CPU than it has threads, and all of them now and then, and keeps
    what is faster.

    Results are the same to the last bit only for one number of threads; where OMP_NUM_THREADS gives it, it stays.
    """

    def __init__(self, most, number, use, clock=time.monotonic, cpu_clock=time.process_time):
        """torch computes with `number` of `most` threads; `use(n)` has it compute with n; `cpu_clock` counts seconds of all
        threads together."""
        self.most, self.number, self.use, self.clock, self.cpu_clock = most, number, use, clock, cpu_clock
        self.tried_from = None  # (number, pace) that a number under trial is compared with
        self.waits = {}  # whether it is more: (when to try it again, seconds that it waited)
        self.forget()

    def forget(self):
        self.laps = self.amount = self.seconds = self.cpu_seconds = 0

    @contextlib.contextmanager
    def timed(self):
        """A step is inside."""
        self.start()
        yield
        self.lap()

    def start(self):
        """A step begins now."""
        self.since = self.clock(), self.cpu_clock()

    def lap(self, amount=1):
        """A step of so much work ends now, and the next one begins. The number of threads may change."""
        (started, cpu_started), self.since = self.since, (self.clock(), self.cpu_clock())
        self.laps += 1
        self.amount += amount
        self.seconds += self.since[0] - started
        self.cpu_seconds += self.since[1] - cpu_started
        if self.laps >= 2 and self.seconds >= WINDOW:
            pace, cores = self.seconds / self.amount, self.cpu_seconds / self.seconds
            self.forget()
            self.judge(pace) if self.tried_from else self.try_another(pace, cores)

    def judge(self, pace):
        """Keep the number under trial if its pace, in seconds for one piece of work, is better than before; else go back and wait."""
        (before, pace_before), self.tried_from = self.tried_from, None
        is_more = self.number > before
        if pace < 0.95 * pace_before:
            self.waits.pop(is_more, None)
            if not is_more:
                self.waits[True] = (self.clock() + PATIENCE[0], PATIENCE[0])
                say_once(f"Other programs use the CPU: computing with {self.number} of {self.most} threads while that is "
                         f"faster. OMP_NUM_THREADS in the environment fixes their number.")
        else:
            wait = min(2 * self.waits[is_more][1], PATIENCE[1]) if is_more in self.waits else PATIENCE[0]
            self.waits[is_more] = (self.clock() + wait, wait)
            self.set(before)

    def try_another(self, pace, cores):
        """Try as many threads as there were `cores` for the process, or all again, unless that was slower of late."""
        fewer = min(self.number, max(1, int(cores))) if cores < HELD * self.number else self.number
        for number in (fewer, self.most):
            if number != self.number and self.clock() >= self.waits.get(number > self.number, (0, 0))[0]:
                self.tried_from = self.number, pace
                return self.set(number)

    def set(self, number):
        self.number = number
        self.use(number)


def threads_that_help(device):
    """A Threads to tell of each step of some work on the device; None where there is nothing to choose, or the number is given.

    Each kind of work has one of its own and begins with the number that the one before it ended with.
    """
    import torch

    if device.type != "cpu" or all_threads() == 1 or {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
        return None
    return Threads(all_threads(), torch.get_num_threads(), torch.set_num_threads)


@functools.cache
def all_threads():
    """How many threads torch takes by itself."""
    import torch

    return torch.get_num_threads()

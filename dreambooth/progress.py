"""How far a piece of work is: a bar on a terminal, now and then a line in a file, a pipe or a notebook's log.

Knows nothing of the work.
"""

import contextlib
import os
import sys
import time

from tqdm import tqdm

EVERY, SELDOM = 10, 600  # seconds between lines: at least, and at most as long as anything moves
BAR_LAYOUT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"  # tqdm's own


def one(item):
    """How much an item is, where each is as much as any other."""
    return 1


def progress(iterable, title, unit, total=None, done=0, hidden=False, weigh=one):
    """`iterable`, and on standard error how far it is; `done` of `total` items were there before. An item is weigh(item) of them.

    What it returns has tqdm's set_postfix(), which takes {name: value} to show, and aside(). DREAMBOOTH_PROGRESS=bar in the
    environment asks for the bar where no terminal is, for programs that read it.
    """
    if hidden or sys.stderr.isatty() or os.environ.get("DREAMBOOTH_PROGRESS") == "bar":
        bar = Bar(iterable, desc=title, unit=unit, total=total, initial=done, disable=hidden, bar_format=BAR_LAYOUT)
        bar.weigh = weigh
        return bar
    return Lines(iterable, title, unit, len(iterable) if total is None else total, done, weigh=weigh)


class Asides:
    """The time that is spent on other things than items, and how much of it is still to come."""

    def __init__(self):
        self.spent, self.to_come = 0, {}  # seconds; {name: those that are still to come}

    def add(self, name, seconds, still):
        self.spent += seconds
        self.to_come[name] = seconds * still

    @property
    def left(self):
        return sum(self.to_come.values())


class Bar(tqdm):
    """tqdm's bar, for items of several weights. What is done aside has no part in its pace."""

    weigh = staticmethod(one)

    def __init__(self, *args, **options):
        self.asides = Asides()
        super().__init__(*args, **options)

    def __iter__(self):
        with self:
            for item in self.iterable:
                yield item
                self.update(self.weigh(item))

    @contextlib.contextmanager
    def aside(self, name, still):
        """What is done now and then beside the items, in a `with`; `still` times more after this. It counts to the time left, but
        not to the pace, which would seem that of a standstill."""
        began = 0 if self.disable else self._time()
        yield
        if not self.disable:
            seconds = self._time() - began
            self.asides.add(name, seconds, still)
            self.last_print_t += seconds  # so that tqdm's mean of late does not see them

    @property
    def format_dict(self):
        """tqdm's, with a pace and a time left that know of what is done aside."""
        known = super().format_dict
        counted, new = known["elapsed"] - self.asides.spent, known["n"] - (known.get("initial") or 0)
        rate = known.get("rate") or (new / counted if counted > 0 and new > 0 else None)
        if rate and known["total"]:
            known |= {"rate": rate, "remaining": tqdm.format_interval((known["total"] - known["n"]) / rate + self.asides.left)}
        return known


class Lines:
    """`iterable` with a line every ten seconds, and whenever another tenth of the work is done, but never more than a hundred
    or so; a piece of work that takes less than a second gets one line in the end."""

    def __init__(self, iterable, title, unit, total, done=0, clock=time.monotonic, weigh=one):
        self.iterable, self.title, self.unit, self.total, self.done, self.clock = iterable, title, unit, total, done, clock
        self.shown, self.weigh, self.asides = {}, weigh, Asides()

    def set_postfix(self, values):
        """Show {name: value} in the lines that follow."""
        self.shown = values

    @contextlib.contextmanager
    def aside(self, name, still):
        """As Bar.aside()."""
        began = self.clock()
        yield
        self.asides.add(name, self.clock() - began, still)

    def __iter__(self):
        started = said_at = self.clock()
        before = said = self.done
        for item in self.iterable:
            yield item
            self.done += self.weigh(item)
            now = self.clock()
            is_tenth = 10 * self.done // self.total > 10 * said // self.total and now - said_at >= 1
            is_due = is_tenth or now - said_at >= (EVERY if 100 * (self.done - said) >= self.total else SELDOM)
            if is_due or self.done == self.total:
                self.say(now - started, (now - started - self.asides.spent) / (self.done - before))
                said, said_at = self.done, now

    def say(self, seconds, pace):
        """One line. `seconds` have been spent, at `pace` seconds an item."""
        values = "".join(f", {name} {value}" for name, value in self.shown.items())
        left = self.total - self.done
        time_left = (f"{tqdm.format_interval(pace * left + self.asides.left)} left" if left else
                     f"took {tqdm.format_interval(seconds)}")
        print(f"{self.title}: {self.done} of {self.total} {self.unit}s{values}; {time_left}", file=sys.stderr, flush=True)

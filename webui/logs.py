"""What a command printed: how far it is, losses, lines, errors. A log is read on from where it was read before."""

import re
import threading
from dataclasses import dataclass, field

LINES = 300  # of a log that are kept
BAR = re.compile(  # as tqdm writes it
    r"^(?P<title>\w[^|]*?): +\d+%\|.*?\| (?P<done>\d+)/(?P<total>\d+) \[[\d:]+<(?P<left>[\d:?]+)(?P<values>[^\]]*)\]")
OTHER_BAR = re.compile(r"^(?P<title>[^|]*?): *(?P<percent>\d+)%\|")  # of a download, in megabytes
AGAIN = "---- once more ----"  # between two runs of a job
LOSS = re.compile(r"(instance|prior)=([\d.e+-]+)")


@dataclass
class Report:
    """What a log says so far."""

    lines: list = field(default_factory=list)  # the last ones, bars left out
    error: str = ""  # the program's last complaint
    bar: dict = field(default_factory=dict)  # of the work under way: title, done, total, left (seconds, None: not known)
    training: dict = field(default_factory=dict)  # the bar of the training itself
    losses: list = field(default_factory=list)  # [step, instance, prior or None]: each the mean of the steps before

    def take(self, line, is_whole=True):
        """One more line; of one that is not whole yet, what counts is whether it is a bar."""
        line = line.replace("\x1b[A", "").rstrip()
        if found := BAR.match(line):
            return self.take_bar(found)
        if found := OTHER_BAR.match(line):
            self.bar = {"title": found["title"], "done": int(found["percent"]), "total": 100, "left": None}
        elif line and is_whole:
            self.lines.append(line)
            del self.lines[:-LINES]
        if line.startswith("error: "):
            self.error = line.removeprefix("error: ")

    def take_bar(self, found):
        done, total = int(found["done"]), int(found["total"])
        self.bar = {"title": found["title"], "done": done, "total": total, "left": seconds_of(found["left"])}
        if found["title"] != "training":
            return
        self.training, values = self.bar, dict(LOSS.findall(found["values"]))
        if "instance" in values:
            losses = [float(values["instance"]), float(values["prior"]) if "prior" in values else None]
            while self.losses and self.losses[-1][0] > self.bar["done"]:  # gone on with from an earlier step
                self.losses.pop()
            if not self.losses or self.losses[-1][1:] != losses:
                self.losses.append([self.bar["done"], *losses])

    def begin(self):
        """Another run of the same job follows: its errors and bars are its own."""
        self.error, self.bar, self.training = "", {}, {}


def seconds_of(text):
    """Seconds of "04:10" or "1:04:10"; None of "?"."""
    return None if "?" in text else sum(int(part) * 60 ** place for place, part in enumerate(reversed(text.split(":"))) if part)


class Logs:
    """Reports of log files, each read once."""

    def __init__(self):
        self.lock, self.known = threading.Lock(), {}

    def report(self, path):
        """The Report of a log; an empty one where there is none yet."""
        with self.lock:
            offset, rest, report = self.known.get(path, (0, b"", Report()))
            try:
                with open(path, "rb") as file:
                    if file.seek(0, 2) < offset:  # written anew
                        offset, rest, report = 0, b"", Report()
                    file.seek(offset)
                    new = file.read()
            except OSError:
                return Report()
            *lines, rest = re.split(rb"[\r\n]", rest + new)
            for line in (line.decode("utf-8", errors="replace") for line in lines):
                report.begin() if line == AGAIN else report.take(line)
            if rest.endswith(b"]"):  # a bar, which ends its line with the next one
                report.take(rest.decode("utf-8", errors="replace"), is_whole=False)
            self.known[path] = offset + len(new), rest, report
            return report

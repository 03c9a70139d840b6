"""A command of the program as a folder, which tells how it stands to whoever looks, after a restart as well.

    command.json  what it is, and the flags       log.txt  what it printed
    process.json  the processes that run it       exit     its exit status, once it has ended
    stop          how often it was asked to stop  beside   there if it need not wait for a training
"""

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import psutil  # which accelerate brings
from filelock import FileLock, Timeout

import dreambooth_implementation as db
from webui.logs import AGAIN

ENDED = ("done", "stopped", "failed", "lost")


def identity(pid):
    """[pid, when it began], by which a process is known when its number has been given to another; None if it is gone."""
    try:
        return [pid, psutil.Process(pid).create_time()]
    except psutil.Error:
        return None


def is_alive(known):
    """Whether the process of an identity() runs still."""
    with contextlib.suppress(psutil.Error, OSError, TypeError, LookupError):
        process = psutil.Process(known[0])
        return abs(process.create_time() - known[1]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    return False


@dataclass(frozen=True)
class Job:
    """A command in its folder. What it is stays; how it stands is asked of the files each time."""

    folder: Path

    @classmethod
    def make(cls, folder, kind, flags, **more):
        """A job that waits; `more` is what the page wants to know of it. Nothing of a job is there before all of it is."""
        folder.mkdir(parents=True)
        job = cls(folder)
        job.write("command.json", {"kind": kind, "flags": flags, "made": time.time(), "folder": str(Path.cwd()), **more})
        return job

    @property
    def log(self):
        return self.folder / "log.txt"

    @property
    def lock(self):
        return FileLock(self.folder / ".lock")

    def read(self, name, kind):
        """The contents of a file of JSON; None if it is not there, not whole, or not of this kind."""
        try:
            value = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, kind) else None

    def write(self, name, value):
        with db.whole_file(self.folder / name) as part:
            part.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")

    @property
    def command(self):
        return self.read("command.json", dict) or {}

    @property
    def is_whole(self):
        command = self.command
        return isinstance(command.get("made"), float) and isinstance(command.get("flags"), list) and "kind" in command

    @property
    def stops(self):
        """How often it was asked to stop."""
        return self.read("stop", int) or 0

    @property
    def status(self):
        """Its exit status, None before it has ended."""
        return self.read("exit", int)

    def state(self):
        """waiting, running, stopping, done, stopped, failed, or lost if it ended without a word, as in a power cut."""
        status, processes = self.status, self.read("process.json", list)
        if status is not None:
            return "done" if status == 0 else "stopped" if self.stops or status >= 128 or status < 0 else "failed"
        if processes is None:
            return "waiting"
        if any(map(is_alive, processes)) or self.is_locked():
            return "stopping" if self.stops else "running"
        return "lost" if self.status is None else self.state()  # it may have ended between the two looks

    def is_locked(self):
        """Whether its runner holds its lock, whatever the clock says of when it began."""
        try:
            with self.lock.acquire(timeout=0):
                return False
        except Timeout:
            return True
        except (OSError, NotImplementedError):
            return False

    def stop(self):
        """Ask it to stop, as Ctrl-C does; once more: at once. One that waits will not begin."""
        if self.state() == "waiting":
            self.write("exit", 130)
        self.write("stop", self.stops + 1)
        runner, *program = self.read("process.json", list) or [None]
        if runner and not is_alive(runner):  # nobody looks at the file
            for known in filter(is_alive, program):
                psutil.Process(known[0]).terminate()

    def again(self, flags=None):
        """Have a job that has ended wait once more, with other flags."""
        for name in ("process.json", "stop", "exit", "beside"):
            (self.folder / name).unlink(missing_ok=True)
        if self.log.exists():
            with open(self.log, "a", encoding="utf-8") as log:
                log.write(f"\n{AGAIN}\n")
        self.write("command.json", self.command | {"made": time.time()} | ({"flags": flags} if flags else {}))

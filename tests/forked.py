"""Processes that run the program and may be killed at any moment. They start at once, forked from a process that has imported
all that is slow."""

import contextlib
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import sys
from pathlib import Path

import libraries  # noqa: F401  (here, once, for all that are forked)
import torch.distributed

import dreambooth_implementation as db

LOG = "log.txt"
REPOSITORY = Path(__file__).resolve().parent.parent


def work(folder, environment, task, arguments):
    """In the new process: words go to log.txt in `folder`."""
    os.chdir(folder)
    os.environ.pop("PYTHONPATH", None)
    os.environ |= environment
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(task(*arguments))


@functools.cache
def loaded():
    """The context of a server that has imported this module, and forks from there. It passes over what it does not find, in silence, and
    looks for it where PYTHONPATH says alone."""
    context, before = multiprocessing.get_context("forkserver"), os.environ.get("PYTHONPATH")
    context.set_forkserver_preload(["forked"])
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        os.environ.update({"PYTHONPATH": before} if before else {})
    return context


def begin(folder, task, *arguments, **environment):
    """Start `task`, a function of some module; returns its multiprocessing.Process."""
    given = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
    process = loaded().Process(target=work, args=(str(folder), given | environment, task, arguments))
    process.start()
    return process


def start(folder, *flags, **environment):
    """Start the program with these flags in `folder`."""
    return begin(folder, db.main, [str(flag) for flag in flags], **environment)


def finish(processes, folder, seconds=600):
    """Wait for them all; (exit status of each, what they said)."""
    for process in processes:
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in processes], (folder / LOG).read_text()


def program(folder, *flags):
    """(exit status, what it said) of the program in a process of its own."""
    (status,), said = finish([start(folder, *flags)], folder)
    return status, said


def forget_repository():
    """Have this process find nothing of the repository, and nothing that it has imported from there."""
    def is_of_it(place):
        place = Path(place or "").resolve()
        return place.is_relative_to(REPOSITORY) and not place.is_relative_to(sys.prefix)

    sys.path[:] = [place for place in sys.path if not is_of_it(place)]
    for name in [name for name, module in sys.modules.items() if is_of_it(getattr(module, "__file__", None) or sys.prefix)]:
        del sys.modules[name]


@contextlib.contextmanager
def as_many(number):
    """[{variable: value}] for processes that are to train together, as torch's launcher sets them; the port is free."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"} for rank in range(number)]


def together(number, folder, task, *arguments):
    """(exit status of each, what they said) of so many processes that do `task` together."""
    with as_many(number) as environments:
        return finish([begin(folder, task, *arguments, **each) for each in environments], folder)

"""`run`: the process beside a command. It starts the command, passes on that it is to stop, and notes how it ended.

It is the leader of a session of its own, so that neither Ctrl-C in the page's terminal nor the page's end reaches it.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from filelock import Timeout

import dreambooth_implementation as db
from webui.jobs import Job, identity
from webui.program import command, environment

LOOKS_EVERY = 0.2  # seconds between looks for a wish to stop
WINDOWS = os.name == "nt"


def start_runner(job):
    """Have a job run; returns its runner, which is known in the job's folder before this returns."""
    webui = Path(__file__).resolve().parent.parent / "webui.py"
    apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if WINDOWS else {"start_new_session": True}
    runner = subprocess.Popen([sys.executable, str(webui), "run", str(job.folder.resolve())], stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=job.command.get("folder"), **apart)
    job.write("process.json", [identity(runner.pid)])
    return runner


def run(folder):
    """Run the job in a folder to its end. Returns its exit status; that of a job which another runner has is 1."""
    job = Job(Path(folder))
    try:
        with job.lock.acquire(timeout=10):
            return 1 if job.status is not None else run_program(job)
    except Timeout:
        return 1


def run_program(job):
    asked = []
    for number in (signal.SIGINT, *db.ending_signals()):  # whoever ends this, as the system does when it shuts down
        signal.signal(number, lambda number, frame: asked.append(number))
    apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if WINDOWS else {}
    with open(job.log, "ab") as log:
        program = subprocess.Popen(command(job.command["flags"]), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                   env=environment(), **apart)
    job.write("process.json", [identity(os.getpid()), *filter(None, [identity(program.pid)])])
    passed_on = 0
    while True:
        try:
            status = program.wait(LOOKS_EVERY)
            break
        except subprocess.TimeoutExpired:
            if (stops := job.stops + len(asked)) > passed_on:
                passed_on = stops
                program.send_signal(signal.CTRL_BREAK_EVENT) if WINDOWS else program.terminate()
    job.write("exit", status)
    return status

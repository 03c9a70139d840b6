"""Which job is next: one training at a time, and whatever draws goes before trainings that wait."""

import threading
import time

from webui.runner import start_runner

RUNS = ("running", "stopping")


def next_jobs(states):
    """The jobs to start now, of {job: state}.

    While one runs no other begins; but one that draws or measures, and was told not to wait, begins beside a training. Never do
    two trainings run.
    """
    waiting = sorted((job for job, state in states.items() if state == "waiting"), key=order_of)
    running = {job.command["kind"] for job, state in states.items() if state in RUNS}
    if running == {"train"}:
        waiting = [job for job in waiting if job.command["kind"] != "train" and (job.folder / "beside").exists()]
    elif running:
        waiting = []
    return waiting[:1]


def order_of(job):
    command = job.command
    return command["kind"] == "train", command["made"]


class Line:
    """The jobs of a library, one after the other, as long as the page is there."""

    def __init__(self, library, pause=0.5):
        self.library, self.pause, self.runners, self.ended = library, pause, [], threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self):
        while not self.ended.wait(self.pause):
            try:
                self.step()
            except OSError as problem:  # a full disk, or one that is gone: once it is back the line goes on
                print(f"error: {problem}", flush=True)
                time.sleep(5)

    def step(self):
        """Start what is next."""
        for runner in self.runners:
            runner.poll()  # an ended one stays a zombie otherwise
        with self.library.lock:
            for job in next_jobs({job: job.state() for job in self.library.jobs().values()}):
                self.runners.append(start_runner(job))

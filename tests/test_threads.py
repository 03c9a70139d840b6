"""Fewer threads where other programs want the CPU, and all again when they no longer do; by a made-up clock."""

import pytest
import torch

import dreambooth_implementation as db


class Machine:
    """Cores that other programs want too, and steps whose threads spin while they wait for one another."""

    def __init__(self, cores, monkeypatch):
        self.cores, self.others, self.now, self.spent, self.used = cores, 0, 0.0, 0.0, cores
        self.threads = db.Threads(cores, cores, self.use, lambda: self.now, lambda: self.spent)
        monkeypatch.setattr(db, "say_once", lambda message: None)

    def use(self, number):
        self.used = number

    def step(self):
        """Work of a tenth of a second for all cores, ten times slower if there are more threads than cores for them."""
        crowded = self.used + self.others > self.cores
        share = min(1.0, self.cores / (self.used + self.others))  # of a core, for each thread
        seconds = 0.1 * self.cores / self.used / share * (10 if crowded and self.used > 1 else 1)
        with self.threads.timed():
            self.now += seconds
            self.spent += seconds * self.used * share
        return seconds

    def run(self, seconds):
        """The mean length of a step over this time."""
        until, steps = self.now + seconds, []
        while self.now < until:
            steps.append(self.step())
        return sum(steps) / len(steps)


def test_alone_all_threads_stay(monkeypatch):
    machine = Machine(4, monkeypatch)
    assert machine.run(600) == pytest.approx(0.1) and machine.used == 4


@pytest.mark.parametrize("cores, others", [(2, 3), (2, 1), (4, 2), (16, 4)])
def test_beside_busy_programs_a_step_takes_what_is_fair(cores, others, monkeypatch):
    machine = Machine(cores, monkeypatch)
    machine.others = others
    machine.run(30)  # until it has found its number
    number = machine.used
    assert 1 <= number < cores
    with_all = 0.1 * (cores + others) / cores * 10
    assert machine.run(1200) < 0.4 * with_all
    if number == 1:
        assert machine.run(1200) < 1.3 * 0.1 * cores / min(1.0, cores / (1 + others))  # one thread's pace, and a trial now and then


def test_when_the_others_are_done_all_threads_come_back(monkeypatch):
    machine = Machine(2, monkeypatch)
    machine.others = 3
    machine.run(600)
    assert machine.used == 1
    machine.others = 0
    machine.run(db.PATIENCE[1] + 5)
    assert machine.used == 2 and machine.run(60) == pytest.approx(0.1)


def test_fewer_threads_that_help_nothing_are_left(monkeypatch):
    """A process may get less of the CPU than it has threads since they sleep: then all of them stay."""
    machine = Machine(4, monkeypatch)
    monkeypatch.setattr(machine.threads, "cpu_clock", lambda: machine.spent / 4)
    assert machine.run(600) < 0.101 and machine.run(0.05) == pytest.approx(0.1)


def test_work_of_several_sizes_is_compared_by_its_amount(monkeypatch):
    """The last batch of pictures is smaller: its steps are shorter, and no reason to change anything."""
    machine = Machine(2, monkeypatch)
    machine.others = 3
    for _ in range(40):
        machine.threads.start()
        for amount in (16, 16, 16, 3):
            threads, share = machine.used, 2 / (machine.used + 3)
            seconds = amount * (1.0 if threads == 2 else 0.2)
            machine.now += seconds
            machine.spent += seconds * threads * share
            machine.threads.lap(amount)
    assert machine.used == 1 and len(machine.threads.waits) == 1


def test_drawing_tells_of_every_step(tiny_model, capsys):
    class Watch:
        laps, start = [], staticmethod(lambda: None)

        def lap(self, amount):
            self.laps.append(amount)
    pipeline = db.load_pipeline(str(tiny_model("sd1")), torch.float32)
    jobs = [("a dog", seed) for seed in range(3)]
    look = dict(steps=4, guidance_scale=1.0, height=32, width=32, batch_size=2)
    plain = list(db.draw(pipeline, jobs, **look))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(db, "threads_that_help", lambda device: Watch())
        watched = list(db.draw(pipeline, jobs, **look))
    steps = len(Watch.laps) // 2
    assert steps >= 4 and Watch.laps == [2] * steps + [1] * steps
    assert [picture.tobytes() for picture in plain] == [picture.tobytes() for picture in watched]


@pytest.mark.parametrize("device, variable, number, chooses", [
    ("cpu", None, 4, True), ("cpu", None, 1, False), ("cuda", None, 4, False),
    ("cpu", "OMP_NUM_THREADS", 4, False), ("cpu", "MKL_NUM_THREADS", 4, False)])
def test_where_the_number_is_given_it_stays(device, variable, number, chooses, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "2")
    monkeypatch.setattr(db, "all_threads", lambda: number)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # what the work before it ended with
    threads = db.threads_that_help(torch.device(device))
    assert bool(threads) == chooses and (not chooses or (threads.most, threads.number) == (4, 2))

"""Fewer threads where other programs want the CPU, and all again when they no longer do; by a made-up clock."""

import contextlib

import pytest
import torch

import dreambooth_implementation as db


class Machine:
    """Cores that other programs want too, and steps whose threads spin while they wait for one another."""

    def __init__(self, cores, monkeypatch):
        self.cores, self.others, self.now, self.spent, self.used = cores, 0, 0.0, 0.0, cores
        self.threads = db.Threads(cores, self.use, lambda: self.now, lambda: self.spent)
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


def test_where_the_number_is_given_it_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for device in ("cpu", "cuda"):
        with db.as_many_threads_as_help(torch.device(device)) as timed:
            assert timed is contextlib.nullcontext


def test_otherwise_it_is_torchs_and_comes_back_in_the_end(monkeypatch):
    number, asked = [6], []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    with db.as_many_threads_as_help(torch.device("cpu")) as timed:
        timed.__self__.set(2)
    assert asked == [2, 6]

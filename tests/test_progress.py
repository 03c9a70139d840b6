"""How far the work is: a bar on a terminal, few lines elsewhere."""

import re
import sys

import pytest

import dreambooth_implementation as db


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def lines_of(total, seconds_each, capsys, done=0, values=None):
    """What is said of items done + 1 .. total that take so long each."""
    clock = Clock()
    bar = db.Lines(range(done, total), "training", "step", total, done, clock)
    for _ in bar:
        clock.now += seconds_each
        bar.set_postfix(values or {})
    captured = capsys.readouterr()
    assert not captured.out
    return captured.err.splitlines()


def test_a_line_tells_step_losses_and_time_left(capsys):
    lines = lines_of(100, 1.0, capsys, values={"instance": "0.0123", "prior": "0.0456"})
    assert lines[0] == "training: 10 of 100 steps, instance 0.0123, prior 0.0456; 01:30 left"
    assert lines[-1] == "training: 100 of 100 steps, instance 0.0123, prior 0.0456; took 01:40"
    assert len(lines) == 10


@pytest.mark.parametrize("total, seconds_each, least, most", [
    (5, 0.1, 1, 1),         # half a second: the end alone
    (1600, 0.1, 16, 26),    # every ten seconds, every tenth
    (4, 60.0, 4, 4),        # slow items: each
    (100_000, 0.5, 90, 115),  # fourteen hours: no more than a hundred or so
])
def test_lines_are_few(total, seconds_each, least, most, capsys):
    assert least <= len(lines_of(total, seconds_each, capsys)) <= most


def test_what_was_there_before_counts_but_takes_no_time(capsys):
    lines = lines_of(100, 1.0, capsys, done=80)
    assert lines == ["training: 90 of 100 steps; 00:10 left", "training: 100 of 100 steps; took 00:20"]


def test_nothing_to_do_says_nothing(capsys):
    assert lines_of(100, 1.0, capsys, done=100) == [] and list(db.progress([], "encoding", "image")) == []


def test_a_batch_counts_when_it_is_there_and_as_much_as_it_holds(capsys, monkeypatch):
    clock = Clock()

    def batches():
        for size in (16, 16, 8):
            clock.now += size
            yield ["picture"] * size
    assert sum(map(len, db.Lines(batches(), "drawing", "image", 40, 0, clock, len))) == 40
    assert capsys.readouterr().err.splitlines() == ["drawing: 16 of 40 images; 00:24 left", "drawing: 32 of 40 images; 00:08 left",
                                                    "drawing: 40 of 40 images; took 00:40"]
    monkeypatch.setenv("DREAMBOOTH_PROGRESS", "bar")
    bar = db.progress(iter([[1, 2], [3]]), "drawing", "image", 3, weigh=len)
    assert list(bar) == [[1, 2], [3]] and bar.n == 3


def test_the_iterable_passes_through_unchanged(capsys):
    assert list(db.progress(iter("abc"), "drawing", "image", 3)) == ["a", "b", "c"]
    assert re.fullmatch(r"drawing: 3 of 3 images; took 00:00\n", capsys.readouterr().err)
    assert list(db.progress("abc", "drawing", "image", hidden=True)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_terminal_and_whoever_asks_gets_the_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    list(db.progress("abc", "drawing", "image"))
    assert "100%|" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    list(db.progress("abc", "drawing", "image"))
    assert "100%|" not in capsys.readouterr().err
    monkeypatch.setenv("DREAMBOOTH_PROGRESS", "bar")
    list(db.progress("abc", "drawing", "image"))
    assert "100%|" in capsys.readouterr().err

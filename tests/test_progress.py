"""How far the work is: a bar on a terminal, few lines elsewhere."""

import io
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


def steps_with_samples(items, bar, clock):
    """Steps of a second each; after every 200 of them samples of two minutes and a checkpoint of ten seconds."""
    for step in items:
        yield step + 1
        clock.now += 1
        if (step + 1) % 200 == 0:
            with bar.aside("samples", db.times(200, step + 1, 1000) + (step + 1 < 1000)):
                clock.now += 120
            with bar.aside("checkpoint", db.times(200, step + 1, 1000)):
                clock.now += 10


@pytest.mark.parametrize("done", [0, 198])
def test_samples_count_to_the_time_left_and_not_to_the_pace(done, capsys):
    clock, said = Clock(), io.StringIO()
    bar = db.Bar(range(done, 1000), desc="training", unit="step", total=1000, initial=done, file=said, bar_format=db.BAR_LAYOUT)
    bar._time, bar.start_t, bar.last_print_t = clock, 0, 0
    left = {step: bar.format_dict.get("remaining") for step in steps_with_samples(bar, bar, clock)}
    assert left[done + 1] is None and left[200] == "13:21"  # no sample is known yet
    assert left[201] == "21:50"  # 800 steps, 4 times samples, 3 checkpoints
    assert left[401] == "16:20" and left[1000] == "02:01"  # 600 steps, 3 times samples and 2 checkpoints
    assert "1000/1000 [" in said.getvalue() and "<00:00,  1.00step/s]" in said.getvalue().splitlines()[-1]
    lines = db.Lines(range(done, 1000), "training", "step", 1000, done, clock)
    assert sum(1 for _ in steps_with_samples(lines, lines, clock)) == 1000 - done
    said = capsys.readouterr().err
    assert "training: 200 of 1000 steps; 21:50 left" in said and "training: 500 of 1000 steps; 14:40 left" in said


def test_a_bar_that_is_hidden_has_no_clock():
    bar = db.progress(range(2), "training", "step", hidden=True)
    for _ in bar:
        with bar.aside("samples", 1):
            pass
    assert bar.asides.left == 0


def test_what_is_still_to_come_is_between_now_and_the_last_step():
    assert [db.times(4, done, 10) for done in (0, 4, 5, 8, 10)] == [2, 1, 1, 0, 0] and db.times(None, 3, 10) == 0


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

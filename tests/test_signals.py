"""Ctrl-C and SIGTERM."""

import os
import signal

import dreambooth_implementation as db


def test_a_second_signal_stops_at_once(flags, run, tmp_path, monkeypatch):
    monkeypatch.setattr(db, "train_step", lambda *args: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])
    status, _, err = run(*flags("lora"))
    assert status == 143 and err.splitlines()[-1].startswith("terminated")
    assert not list(tmp_path.glob("output*"))

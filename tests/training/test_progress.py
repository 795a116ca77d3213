"""What a person sees, and the signals that a person sends."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from edgewright.training.interrupt import StopSignals
from edgewright.training.progress import Progress, batch_amount


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_amounts() -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert batch_amount(ids) == (10, "tokens")
    assert batch_amount({"input_ids": ids, "x": 1}) == (10, "tokens")
    assert batch_amount(torch.zeros(3, 4)) == (3, "samples")
    assert batch_amount({"name": "a", "x": (torch.zeros(6, 2),)}) == (6, "samples")
    assert batch_amount("text") == (1, "samples")


def test_a_terminal_gets_a_bar(monkeypatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress(True, "tune", 2, 10) as bar:
        bar.update(3, 1.5, 1e-3, 64, "tokens")
        with bar.paused():
            pass
    shown = screen.getvalue()
    assert "tune" in shown and "3/10" in shown and "loss 1.5" in shown and "tokens/s" in shown


def test_a_pipe_gets_a_line_every_ten_seconds(capsys, monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress(True, "tune", 0, 100) as bar:
        for step in range(1, 31):
            clock[0] += 1.0
            bar.update(step, 2.0, 1e-3, 5, "samples")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tune: 10/100  loss 2  lr 1.00e-03  5 samples/s  0:01:30 left" and len(lines) == 3


def test_quiet_is_quiet(capsys) -> None:
    with Progress(False, "tune", 0, 1) as bar:
        bar.update(1, 2.0, 1e-3, 5, "samples")
    assert capsys.readouterr() == ("", "")


def test_first_signal_asks_second_leaves_and_unanswered_ones_are_passed_on(capfd) -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        stop.requested = None
    assert "press Ctrl-C again" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):  # Python's own handler, after ours is gone
        with StopSignals(announce=False):
            signal.raise_signal(signal.SIGINT)


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    code = (
        "import signal; from edgewright.training.interrupt import StopSignals\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with StopSignals() as stop: signal.raise_signal(signal.SIGINT); print(stop.requested)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "None\n"

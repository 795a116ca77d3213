"""A bar on a terminal, a line at least every ten seconds elsewhere."""

from __future__ import annotations

import io
import sys
import time

from edgewright.measure import progress
from edgewright.measure.progress import ProgressBar


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with ProgressBar("sort [bold]", 10, start=2, transient=False) as bar:
        bar.advance(facts="3 files")
        with bar.paused():
            pass
    assert "sort [bold]" in screen.getvalue() and "3/10" in screen.getvalue() and "3 files" in screen.getvalue()


def test_a_pipe_gets_lines_while_nothing_moves(capsys, monkeypatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.2)
    with ProgressBar("outer", None), ProgressBar("inner", 4) as bar:
        bar.advance(facts="slow")
        time.sleep(0.9)  # one step that takes long: no call comes in
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 5
    assert all(line.startswith("inner: 1/4  slow  0:00:0") and line.endswith(" left") for line in lines)


def test_an_outer_bar_speaks_when_no_inner_one_is_open(capsys, monkeypatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.2)
    with ProgressBar("outer", None):
        with ProgressBar("inner", 4):
            pass
        time.sleep(0.5)
    assert capsys.readouterr().err.startswith("outer: 0:00:00 so far\n")


def test_quiet_is_quiet(capsys, monkeypatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with ProgressBar("outer", 3, shown=False) as bar:
        bar.advance()
    assert capsys.readouterr() == ("", "")

"""Progress of long work on standard error: a bar on a terminal, a line every ten seconds elsewhere, or nothing.

Every bar of the package is one of these. Where standard error is no terminal, one background thread prints a line of
the innermost open bar whenever ten seconds have passed without one, so that work whose single steps take minutes does
not look dead either.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LINE_SECONDS = 9.5  # with the time until it is noticed: a line at least every ten seconds


class ProgressBar:
    """A context manager that shows how much of `total` is done.

    Args:
        label: what is going on, in a few words.
        total: number of units of work, or None where it is not known beforehand.
        shown: False shows nothing at all.
        start: units that were done before this call; they do not count into the time left.
        transient: remove the bar from a terminal at the end.
        lines_only: nothing on a terminal; for work in which other bars open.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        *,
        shown: bool = True,
        start: int = 0,
        transient: bool = True,
        lines_only: bool = False,
    ) -> None:
        self.label, self.total, self.done, self.facts = label, total, start, ""
        self._start, self._began = start, time.monotonic()
        self._lines = shown and not sys.stderr.isatty()
        self._bar = _rich_bar(transient) if shown and not self._lines and not lines_only else None
        self._task: Any = None

    def __enter__(self) -> ProgressBar:
        self._began = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, facts="")
            self._bar.start()
        elif self._lines:
            _lines.open(self)
        return self

    def __exit__(self, *details: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._lines:
            _lines.close(self)

    def advance(self, units: int = 1, facts: str | None = None) -> None:
        """Count `units` as done; `facts`: a few figures to show beside the bar."""
        self.update(self.done + units, facts)

    def update(self, done: int, facts: str | None = None, total: int | None = None) -> None:
        """Set how much is done in all, and what is shown beside it."""
        self.done, self.total = done, self.total if total is None else total
        if facts is not None:
            self.facts = facts
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total, facts=self.facts)
        elif self._lines:
            _lines.speak()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the bar off a terminal for code that may draw its own."""
        if self._bar is not None:
            self._bar.stop()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.start()

    def line(self) -> str:
        """The state as one line of text."""
        elapsed = time.monotonic() - self._began
        parts = [f"{self.label}: {self.done}/{self.total}" if self.total else f"{self.label}: {clock(elapsed)} so far"]
        if self.facts:
            parts.append(self.facts)
        if self.total and self.done > self._start:
            parts.append(f"{clock(elapsed / (self.done - self._start) * max(self.total - self.done, 0))} left")
        return "  ".join(parts)


class _Lines:
    """The open bars of a process whose standard error is no terminal, innermost last, and the thread that prints."""

    def __init__(self) -> None:
        self._open: list[ProgressBar] = []
        self._lock = threading.RLock()
        self._spoke = 0.0
        self._quit = threading.Event()

    def open(self, bar: ProgressBar) -> None:
        with self._lock:
            self._open.append(bar)
            if len(self._open) == 1:
                self._spoke = time.monotonic()
                self._quit = threading.Event()
                threading.Thread(target=self._watch, args=(self._quit,), daemon=True, name="progress").start()

    def close(self, bar: ProgressBar) -> None:
        with self._lock:
            self._open.remove(bar)
            if not self._open:
                self._quit.set()

    def speak(self) -> None:
        """Print a line of the innermost bar if the last one is old enough."""
        with self._lock:
            now = time.monotonic()
            if self._open and now - self._spoke >= LINE_SECONDS:
                self._spoke = now
                print(self._open[-1].line(), file=sys.stderr, flush=True)

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(LINE_SECONDS / 20):
            self.speak()


_lines = _Lines()


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _rich_bar(transient: bool) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=transient, refresh_per_second=4)

"""metrics.csv and loss.png: one row a logged step, on disk before the next step begins."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from edgewright.errors import OutputError
from edgewright.io.atomic import atomic_file
from edgewright.measure.plot import plot

Row = dict[str, float]


class MetricsLog:
    """Rows of one run, kept in memory (`rows`) and, where `path` is given, in a CSV file.

    A row is written and flushed at once, so a process that dies loses none. New columns rewrite the file whole or not
    at all. Numbers are written so that reading them gives the same bits; an empty cell is a metric not taken then.
    `keep` = None starts afresh; a number keeps the rows of an earlier run up to that step and cuts what came later.
    """

    def __init__(self, path: Path | None, keep: int | None = None) -> None:
        self.path = path
        self.rows: list[Row] = [] if path is None or keep is None else _read(path, keep)
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
        self._file: io.TextIOWrapper | None = None
        if path is not None:
            self._rewrite()

    @staticmethod
    def last_step(path: Path) -> int:
        """The last step that a file of rows has, 0 where there is none."""
        rows = _read(path, sys.maxsize)
        return int(rows[-1]["step"]) if rows else 0

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def append(self, row: Row) -> None:
        self.rows.append(row)
        new = [name for name in row if name not in self.columns]
        self.columns += new
        if self.path is None:
            return
        if new or self._file is None:
            self._rewrite()
            return
        try:
            self._file.write(_line(row.get(name) for name in self.columns))
            self._file.flush()
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error

    def sync(self) -> None:
        """Force the rows to the disk, so that a checkpoint never outlives the rows before it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rewrite(self) -> None:
        assert self.path is not None
        self.close()
        with atomic_file(self.path) as temporary:
            lines = [_line(self.columns)] if self.columns else []
            lines += [_line(row.get(name) for name in self.columns) for row in self.rows]
            temporary.write_text("".join(lines), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8", newline="")


def write_loss_plot(path: Path, rows: list[Row], title: str) -> None:
    """Loss over steps, with a running mean and any evaluation metric that shares its scale, as a PNG."""
    with plot(path, (7, 4)) as axes:
        rows = [row for row in rows if "loss" in row]
        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        axes.plot(steps, losses, color="#9db8d2", linewidth=0.8, marker="." if len(rows) < 50 else "", label="loss")
        if len(rows) >= 20:
            smooth = _running_mean(losses, len(rows) // 20 + 1)
            axes.plot(steps, smooth, color="#1f5a92", linewidth=1.6, label="running mean")
        evaluated = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
        if evaluated:
            axes.plot(*zip(*evaluated, strict=True), color="#c4572b", marker="o", markersize=3, label="evaluation loss")
        axes.set(title=title, xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)


def _running_mean(values: list[float], window: int) -> list[float]:
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means


def _line(cells: Iterable[object]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _read(path: Path, keep: int) -> list[Row]:
    """Whole rows of an earlier run with step <= keep; a line torn by a crash is not one."""
    if not path.exists():
        return []
    rows: list[Row] = []
    text = path.read_text(encoding="utf-8", errors="replace")
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    try:
        for cells in reader:
            row: Row = {name: float(cell) for name, cell in cells.items() if cell}
            row["step"] = int(cells["step"])
            if row["step"] > keep:
                break
            rows.append(row)
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error):
        pass  # the rows before it are whole
    return rows

"""The Pareto plot: file size against distance from the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgewright.measure.plot import plot
from edgewright.measure.report import Report, Row

NEGLIGIBLE = 1e-3  # a file this close to the model is drawn as a line at its size: it would flatten the rest
LABEL_HEIGHT = 13.0  # points between two labels


def save_pareto(report: Report, path: Path, metric: str = "kl") -> None:
    """One point a file: megabytes across, KL to the reference up (log scale, with standard errors), names beside."""
    sizes = {row.subject: row.value for row in report.rows if row.metric == "file_size"}
    rows = [row for row in report.rows if row.metric == metric and row.subject in sizes]
    points = [row for row in rows if row.value > NEGLIGIBLE] or [row for row in rows if row.value > 0]
    with plot(path, (7.5, 4.5)) as axes:
        axes.set(yscale="log", xlabel="file size (MB)", ylabel="KL to the original model (nats per token)")
        axes.set_title(report.title)
        axes.set_xlim(0, 1.3 * max(sizes.values(), default=1.0))
        axes.grid(which="both", alpha=0.25)
        for row in points:
            marker = "s" if row.subject.startswith("llama.cpp") else "o"
            axes.errorbar(sizes[row.subject], row.value, yerr=row.se or 0.0, fmt=marker, capsize=3)
        for row in rows:
            if row not in points:
                place = (sizes[row.subject], 0.02)
                axes.axvline(place[0], linestyle="--", color="gray")
                axes.annotate(row.subject, place, xycoords=("data", "axes fraction"), rotation=90, ha="right")
        axes.figure.canvas.draw()  # fixes the limits, so that labels can be placed
        _label(axes, points, sizes)


def _label(axes: Any, points: list[Row], sizes: dict[str, float]) -> None:
    """Names to the right of their points, pushed up where they would lie on one another."""
    scale = 72.0 / axes.figure.dpi  # pixels to points
    taken: list[tuple[float, float]] = []
    for row in sorted(points, key=lambda row: row.value):
        x, y = (scale * value for value in axes.transData.transform((sizes[row.subject], row.value)))
        height = y
        for other_x, other_height in taken:
            if abs(other_x - x) < 120 and height - other_height < LABEL_HEIGHT:
                height = other_height + LABEL_HEIGHT
        taken.append((x, height))
        line = {"arrowstyle": "-", "color": "gray", "lw": 0.6}
        point, offset = (sizes[row.subject], row.value), (16, height - y - 3)
        axes.annotate(row.subject, point, textcoords="offset points", xytext=offset, fontsize=9, arrowprops=line)

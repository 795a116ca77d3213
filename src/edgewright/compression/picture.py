"""The Pareto plot: file size against distance from the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgewright.io.atomic import atomic_file
from edgewright.measure.report import Report, Row

NEGLIGIBLE = 1e-3  # a file this close to the model is drawn as a line at its size: it would flatten the rest
LABEL_HEIGHT = 13.0  # points between two labels


def save_pareto(report: Report, path: Path, metric: str = "kl") -> None:
    """One point a file: megabytes across, KL to the reference up (log scale, with standard errors), names beside."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = {row.subject: row.value for row in report.rows if row.metric == "file_size"}
    rows = [row for row in report.rows if row.metric == metric and row.subject in sizes]
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    axes.set_yscale("log")
    axes.set_xlabel("file size (MB)")
    axes.set_ylabel("KL to the original model (nats per token)")
    axes.set_title(report.title)
    axes.grid(True, which="both", alpha=0.25)
    points = [row for row in rows if row.value > NEGLIGIBLE] or [row for row in rows if row.value > 0]
    for row in points:
        marker = "s" if row.subject.startswith("llama.cpp") else "o"
        axes.errorbar(sizes[row.subject], row.value, yerr=row.se or 0.0, fmt=marker, capsize=3)
    for row in rows:
        if row not in points:
            axes.axvline(sizes[row.subject], linestyle="--", color="gray")
            axes.annotate(row.subject, (sizes[row.subject], 0.02), xycoords=("data", "axes fraction"), rotation=90,
                          ha="right", fontsize=9)  # fmt: skip
    axes.set_xlim(0, 1.3 * max(sizes.values(), default=1.0))
    figure.canvas.draw()  # fixes the limits, so that labels can be placed
    _label(axes, points, sizes)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png", bbox_inches="tight")
    plt.close(figure)


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
        axes.annotate(row.subject, (sizes[row.subject], row.value), textcoords="offset points",
                      xytext=(16, height - y - 3), fontsize=9, arrowprops=line)  # fmt: skip

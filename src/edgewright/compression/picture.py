"""The Pareto plot: file size against distance from the reference."""

from __future__ import annotations

from pathlib import Path

from edgewright.io.atomic import atomic_file
from edgewright.measure.report import Report


def save_pareto(report: Report, path: Path, metric: str = "kl") -> None:
    """One point a file: megabytes across, KL to the reference up (log scale, with standard errors), names beside."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = []
    for row in report.rows:
        if row.metric == metric and row.value > 0:
            size = [
                other.value for other in report.rows if other.metric == "file_size" and other.subject == row.subject
            ]
            if size:
                points.append((size[0], row.value, row.se or 0.0, row.subject))
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for size, value, se, name in points:
        marker = "s" if name.startswith("llama.cpp") else "o"
        axes.errorbar(size, value, yerr=se, fmt=marker, capsize=3)
        axes.annotate(name, (size, value), textcoords="offset points", xytext=(7, 4), fontsize=9)
    axes.set_yscale("log")
    axes.set_xlabel("file size (MB)")
    axes.set_ylabel("KL to the reference (nats per token)")
    axes.set_title(report.title)
    axes.grid(True, which="both", alpha=0.25)
    axes.margins(x=0.15)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png", bbox_inches="tight")
    plt.close(figure)

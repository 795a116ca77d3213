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

    sizes = {row.subject: row.value for row in report.rows if row.metric == "file_size"}
    rows = [row for row in report.rows if row.metric == metric and row.value > 0 and row.subject in sizes]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for row in rows:
        place = (sizes[row.subject], row.value)
        marker = "s" if row.subject.startswith("llama.cpp") else "o"
        axes.errorbar(*place, yerr=row.se or 0.0, fmt=marker, capsize=3)
        axes.annotate(row.subject, place, textcoords="offset points", xytext=(7, 4), fontsize=9)
    axes.set_yscale("log")
    axes.set_xlabel("file size (MB)")
    axes.set_ylabel("KL to the reference (nats per token)")
    axes.set_title(report.title)
    axes.grid(True, which="both", alpha=0.25)
    axes.margins(x=0.15)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png", bbox_inches="tight")
    plt.close(figure)

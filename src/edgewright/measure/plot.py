"""Plots for reports: a figure that needs no screen, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgewright.io.atomic import atomic_file


@contextmanager
def plot(path: str | Path, size: tuple[float, float] = (7.0, 4.5)) -> Iterator[Any]:
    """Yield matplotlib axes; what is drawn on them becomes the PNG `path`. size: inches. Raises OutputError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    yield axes
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")

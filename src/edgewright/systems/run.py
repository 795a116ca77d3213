"""The run of a recipe: what was measured is kept, figures of several seeds become rows, rows become plots.

run = Run(output, "APOLLO: loss and state of optimizers")
for method in settings.methods:
    points = run.over_seeds(method, settings.seeds, lambda seed: train(method, seed))
    run.add("loss", [point["loss"] for point in points], subject=method, unit="nats a byte")
run.bars("loss.png", "loss", "held-out loss, nats a byte")
return run.report
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, TypeVar

from edgewright.errors import FormatError
from edgewright.evaluation.language import add_rows, evaluate_language
from edgewright.io.atomic import write_text
from edgewright.io.hashing import json_hash
from edgewright.io.json_file import read_object
from edgewright.measure.plot import plot
from edgewright.measure.report import Report

if TYPE_CHECKING:
    from torch import Tensor

    from edgewright.evaluation.language import LogitsFunction

T = TypeVar("T")
POINTS = "points.json"


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """One figure from several seeds, as `Report.add` takes it.

    Args:
        values: one a seed.

    Returns:
        {"value": mean, "se": its standard error, None for a single seed, "n": seeds}
    """
    se = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"value": mean(values), "se": se, "n": len(values)}


def row_over_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same row of several seeds as one; a single seed's row stays as it is, with its own standard error."""
    return rows[0] if len(rows) == 1 else {**rows[0], **over_seeds([row["value"] for row in rows])}


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Each value with the mean of itself and the `window` before it."""
    return [mean(values[max(0, i - window) : i + 1]) for i in range(len(values))]


def language_rows(
    logits: LogitsFunction,
    blocks: Tensor,
    reference: LogitsFunction,
    subject: str = "",
    metrics: Sequence[str] = ("perplexity", "kl", "top1_agreement"),
) -> list[dict[str, Any]]:
    """How a language model does on blocks of held-out text beside a reference, as rows of a report.

    Args:
        logits, reference: token ids, int64 [B, T] -> logits [B, T, V].
        blocks: int64 [N, T].
    """
    part = Report("")
    add_rows(part, evaluate_language({subject: logits}, blocks, reference=reference, progress=False))
    return [asdict(row) for row in part.rows if row.metric in metrics]


class Run:
    """A run in its folder. Points are kept in points.json as soon as they are measured, so that it resumes there.

    Args:
        output: the folder of the run.
        title: of the report.

    Raises:
        FormatError: points.json is not as a run wrote it.
    """

    def __init__(self, output: Path, title: str) -> None:
        self.output, self.report = output, Report(title)
        path = output / POINTS
        stored: dict[str, Any] = read_object(path) if path.exists() else {"points": {}, "sha256": _digest({})}
        self.points: dict[str, Any] = stored.get("points", {})
        if stored.get("sha256") != _digest(self.points):
            raise FormatError(f"{path} is not as the run left it; --fresh clears the folder")

    def memo(self, key: str, measure: Callable[[], T]) -> T:
        """What `measure` gives, JSON values, or what it gave when it was called under that key before."""
        if key not in self.points:
            self.points[key] = json.loads(json.dumps(measure()))
            text = json.dumps({"points": self.points, "sha256": _digest(self.points)}, indent=1)
            write_text(self.output / POINTS, text + "\n")
        value: T = self.points[key]
        return value

    def over_seeds(self, key: str, seeds: int | Iterable[int], measure: Callable[[int], T]) -> list[T]:
        """`memo` of each seed under "<key>/<seed>".

        Args:
            key: what the seeds have in common.
            seeds: the seeds, or how many from 0 on.
            measure: seed -> JSON values.
        """
        seeds = range(seeds) if isinstance(seeds, int) else seeds
        return [self.memo(f"{key}/{seed}", lambda: measure(seed)) for seed in seeds]  # noqa: B023

    def add(self, metric: str, values: float | Sequence[float], subject: str = "", unit: str = "", **row: Any) -> None:
        """A row of the report: a number as it is, several as their mean over seeds with its standard error."""
        figure = over_seeds(values) if isinstance(values, Sequence) else {"value": values}
        self.report.add(metric, subject=subject, unit=unit, **{**figure, **row})

    def add_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows as they are: mappings of what `Report.add` takes."""
        for row in rows:
            self.report.add(**row)

    def note(self, text: str) -> None:
        """A sentence under the report's table."""
        self.report.notes.append(text)

    # -- plots ---------------------------------------------------------------------------------------------------------

    def bars(self, name: str, metric: str, label: str, subjects: Iterable[str] | None = None, **axes: Any) -> None:
        """A bar for the metric of each subject, with its standard error.

        Args:
            name: of the file, such as "loss.png".
            metric: of the report.
            label: of the axis.
            subjects: which, in order, from top to bottom; left out, all that have the metric.
            axes: settings of the axes, such as xscale="log".
        """
        rows = [row for row in self.report.rows if row.metric == metric]
        if subjects is not None:
            rows = [row for subject in subjects for row in rows if row.subject == subject]
        with plot(self.output / name, (6.5, 0.8 + 0.3 * len(rows))) as figure:
            errors = [row.se or 0.0 for row in rows]
            figure.barh([row.subject for row in rows], [row.value for row in rows], xerr=errors, capsize=3)
            figure.invert_yaxis()
            figure.set(xlabel=label, **axes)

    def lines(
        self, name: str, curves: Mapping[str, Any], xlabel: str, ylabel: str, *, style: str = "-", **axes: Any
    ) -> None:
        """A line for each curve.

        Args:
            name: of the file, such as "loss.png".
            curves: label -> values, (x, y) or (x, y, errors of y).
            xlabel, ylabel: of the axes.
            style: matplotlib's, such as "o-".
            axes: settings of the axes, such as yscale="log".
        """
        with plot(self.output / name) as figure:
            for number, (label, curve) in enumerate(curves.items()):
                whole = isinstance(curve, tuple)
                x, y = (curve[0], curve[1]) if whole else (range(len(curve)), curve)
                errors = curve[2] if whole and len(curve) > 2 else None
                colours = 10  # after which matplotlib's repeat
                figure.errorbar(x, y, errors, fmt=style if number < colours else "--", label=label, capsize=3)
            figure.set(xlabel=xlabel, ylabel=ylabel, **axes)
            figure.grid(alpha=0.25)
            figure.legend(fontsize="small")

    def curve(self, metric: str, subjects: Sequence[str], x: Sequence[float]) -> tuple[list[float], ...]:
        """(x, y, errors) of a metric of the report, for `lines`; subjects that have none are left out."""
        rows = {row.subject: row for row in self.report.rows if row.metric == metric}
        found = [(place, rows[subject]) for place, subject in zip(x, subjects, strict=True) if subject in rows]
        return [p for p, _ in found], [row.value for _, row in found], [row.se or 0.0 for _, row in found]


def _digest(points: Mapping[str, Any]) -> str:
    return json_hash(points)

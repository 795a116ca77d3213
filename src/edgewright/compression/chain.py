"""A chain of compressions in a fixed order: every stage saved, measured and skipped when it is there already.

    stages = [prune_stage(...), train_stage("recover", ...), quantize_stage(...), cut_stage(ids), export_stage(...)]
    result = run_chain(stages, lambda: model, "runs/guard", evaluate=measure, settings={"seed": 0})

A stage is a name and a function (model, folder for its own files) -> model. After each one the model is written to
`<output>/<name>/model`, then its figures to `<output>/<name>/done.json`, which is what marks the stage as done. The
same call goes on after the last stage that is done; other settings, names or order are refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewright.errors import UsageError
from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_object
from edgewright.io.run_folder import holds_run
from edgewright.measure.plot import plot
from edgewright.measure.report import Report

MARKER = "chain.json"
Figures = Mapping[str, float]
Evaluate = Callable[[Any], Figures]


@dataclass(frozen=True)
class ChainStage:
    """One step. run(model, folder) -> model may leave its own files (training checkpoints, an exported file) in folder.

    save(model, folder) and load(folder) are a pair that keeps every bit; settings: JSON values that a resume must
    repeat.
    """

    name: str
    run: Callable[[Any, Path], Any]
    save: Callable[[Any, Path], object]
    load: Callable[[Path], Any]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class ChainResult:
    """The last model and the figures after every stage, "start" first, in order."""

    model: Any
    figures: dict[str, dict[str, float]]
    output: Path

    def report(self, title: str, units: Mapping[str, str] | None = None) -> Report:
        """One subject a stage, one metric a figure; "<metric>_se" is the standard error of a metric."""
        report = Report(title)
        for name, figures in self.figures.items():
            for metric, value in figures.items():
                if not metric.endswith("_se"):
                    error = figures.get(f"{metric}_se")
                    report.add(metric, value, subject=name, se=error, unit=(units or {}).get(metric, ""))
        return report


def run_chain(
    stages: Sequence[ChainStage],
    start: Callable[[], Any],
    output: str | Path,
    *,
    evaluate: Evaluate | None = None,
    settings: Mapping[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> ChainResult:
    """Run the stages on the model that `start()` gives, or go on where an earlier call in `output` ended.

    evaluate(model) gives the figures of a stage; settings: further JSON values (model name, data, seed) that a resume
    must repeat. Raises UsageError for two stages of one name and for a folder of another chain, and what a stage
    raises; finished stages stay.
    """
    names = [stage.name for stage in stages]
    if not stages or len(set(names)) != len(names) or "start" in names:
        raise UsageError(f"a chain needs stages, each with a name of its own and none called 'start'; got {names}")
    output = Path(output)
    _claim(output, stages, settings or {})
    done = [_figures(output / name) for name in ("start", *names)]
    count = next((i for i, figures in enumerate(done) if figures is None), len(done))  # stages after a gap run again
    figures = {name: dict(part or {}) for name, part in zip(("start", *names), done[:count], strict=False)}

    def finish(name: str, model: Any) -> None:
        figures[name] = {key: float(value) for key, value in (evaluate(model) if evaluate else {}).items()}
        write_text(output / name / "done.json", json.dumps(figures[name], indent=1) + "\n")

    model = stages[count - 2].load(output / names[count - 2] / "model") if count >= 2 else start()
    if count == 0:
        finish("start", model)
        count = 1
    for stage in stages[count - 1 :]:
        if say is not None:
            say(f"stage {stage.name}")
        folder = output / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        model = stage.run(model, folder)
        stage.save(model, folder / "model")
        model = stage.load(folder / "model")  # what is measured and handed on is what a resume would find
        finish(stage.name, model)
        shutil.rmtree(folder / "training" / "checkpoints", ignore_errors=True)
    return ChainResult(model, figures, output)


def waterfall(result: ChainResult, size: str, quality: str, path: str | Path, *, scale: float = 1e6) -> Path:
    """A picture: bars of `size` (in units of `scale`) falling from stage to stage, `quality` as a line above them."""
    names = list(result.figures)
    sizes = [result.figures[name][size] / scale for name in names]
    values = [result.figures[name][quality] for name in names]
    with plot(path, (1.3 * len(names) + 2, 4)) as axes:
        axes.bar(names, sizes, color="#9db7d5", width=0.6)
        for place in range(1, len(names)):
            axes.plot([place - 1.3, place + 0.3], [sizes[place - 1]] * 2, color="#888888", linewidth=0.8)
            axes.annotate(
                f"{sizes[place] - sizes[place - 1]:+.1f}", (place, max(sizes[place - 1 : place + 1])),
                ha="center", va="bottom", fontsize=8,
            )  # fmt: skip
        axes.set_ylabel(size.replace("_", " ") + (" (millions)" if scale == 1e6 else ""))
        axes.set_ylim(0, 1.15 * max(sizes))
        line = axes.twinx()
        line.plot(names, values, color="#b5432c", marker="o")
        for place, value in enumerate(values):
            line.annotate(f"{value:.3f}", (place, value), xytext=(0, 6), textcoords="offset points", ha="center")
        line.set_ylabel(quality)
        line.margins(y=0.2)
    return Path(path)


def _claim(output: Path, stages: Sequence[ChainStage], settings: Mapping[str, Any]) -> None:
    """Write down what this chain is, or find that the folder holds the same one."""
    record = {"stages": [{"name": s.name, **s.settings} for s in stages], "settings": dict(settings)}
    if not holds_run(output, MARKER, record, "chain"):
        write_text(output / MARKER, json.dumps(record, indent=1) + "\n")


def _figures(folder: Path) -> dict[str, float] | None:
    path = folder / "done.json"
    if not path.is_file():
        return None
    return read_object(path, hint="remove the stage's folder to run it again")

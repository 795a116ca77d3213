"""All widths of one model, one resumable folder each, and one Pareto plot of real file sizes over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edgewright.compression.picture import save_pareto
from edgewright.compression.pipeline import compress
from edgewright.compression.settings import WIDTHS, CompressSettings
from edgewright.measure.report import Report


def sweep(
    settings: CompressSettings,
    output: str | Path,
    *,
    widths: tuple[float, ...] = tuple(reversed(WIDTHS)),
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> Report:
    """Run `compress` at every width in `output`/<width>bit; finished widths are read back, not run again.

    Subjects of the joint report are "<method> <width> bit"; the reference appears once.
    """
    output = Path(output)
    joint = Report(f"{settings.model}: width sweep", {**settings.to_dict(), "bits": list(widths)})
    for width in widths:
        say(f"--- {width:g} bits")
        point = compress(replace(settings, bits=width), output / f"{width:g}bit", say=say, progress=progress)
        assert point is not None  # only a run for files alone has no report
        for row in point.rows:
            if row.subject == "reference" or row.subject.startswith("llama.cpp"):
                if any(known.subject == row.subject and known.metric == row.metric for known in joint.rows):
                    continue
                subject = row.subject
            else:
                subject = f"{row.subject} {width:g} bit"
            joint.add(row.metric, row.value, subject=subject, se=row.se, n=row.n, unit=row.unit)
    joint.save(output)
    save_pareto(joint, output / "pareto.png")
    return joint

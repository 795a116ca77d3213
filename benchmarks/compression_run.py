"""Run (or read back) one `edgewright compress` in runs/<name> and record it: the CSV and the Pareto picture."""

from __future__ import annotations

from edgewright.compression.pipeline import compress
from edgewright.compression.settings import CompressSettings
from edgewright.io.atomic import atomic_file
from results import ROOT, save


def record(settings: CompressSettings, name: str) -> None:
    folder = ROOT / "runs" / name
    report = compress(settings, folder)
    assert report is not None  # only a run for files alone has none
    report.print_table()
    print(save(report, name))
    with atomic_file(ROOT / "docs" / "images" / f"{name}.png") as temporary:
        temporary.write_bytes((folder / "pareto.png").read_bytes())

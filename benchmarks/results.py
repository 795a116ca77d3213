"""Where figures go: results/<name>.csv, one line a row of a report, written by the tools alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from edgewright.io.atomic import write_text
from edgewright.measure.report import Report
from edgewright.systems.recipe import ClaimVerdict

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
COLUMNS = ("metric", "subject", "value", "se", "n", "unit", "machine")


def save(report: Report, name: str) -> Path:
    """Write the rows of a report with the machine's name on each."""
    machine = report.to_dict()["machine"]
    host = ", ".join(str(machine[key]) for key in ("cpu", "cores") if key in machine) + " cores"
    if machine.get("gpu"):
        host += f", {machine['gpu']}"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in report.rows:
        numbers = [f"{row.value:.6g}", "" if row.se is None else f"{row.se:.3g}", "" if row.n is None else row.n]
        writer.writerow([row.metric, row.subject, *numbers, row.unit, host])
    path = RESULTS / f"{name}.csv"
    write_text(path, text.getvalue())
    return path


def load(name: str) -> Report:
    """The rows of results/<name>.csv as a report."""
    report = Report(name)
    with (RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            se, n = line["se"], line["n"]
            report.add(
                line["metric"],
                float(line["value"]),
                subject=line["subject"],
                se=float(se) if se else None,
                n=int(n) if n else None,
                unit=line["unit"],
            )
    return report


def save_claims(verdicts: Iterable[ClaimVerdict], name: str) -> Path:
    """Write what became of a recipe's claims to results/<name>-claims.csv."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("held", "claim"))
    writer.writerows((("no", "yes")[verdict.held], verdict.text) for verdict in verdicts)
    path = RESULTS / f"{name}-claims.csv"
    write_text(path, text.getvalue())
    return path


def load_claims(name: str) -> list[tuple[bool, str]]:
    """(held, claim) of results/<name>-claims.csv."""
    with (RESULTS / f"{name}-claims.csv").open(encoding="utf-8", newline="") as file:
        return [(line["held"] == "yes", line["claim"]) for line in csv.DictReader(file)]

"""Fill the catalogue's headline figures and counts of claims from results/*.csv; none is typed by hand.

python benchmarks/headlines.py            # writes src/edgewright/systems/measured.json
python benchmarks/headlines.py --check    # exit code 1 if that file is not what results/ gives
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

from edgewright.systems.recipe import Cell, Headline, load_recipe, runnable

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "src" / "edgewright" / "systems" / "measured.json"


def measured(results: Path = ROOT / "results") -> dict[str, Any]:
    """Slug -> headline, and [claims that held, all claims], for every recipe that names a headline."""
    found = {}
    for slug in runnable():
        if (headline := load_recipe(slug).HEADLINE) is not None:
            with (results / f"{slug}-claims.csv").open(encoding="utf-8", newline="") as file:
                held = [row["held"] == "yes" for row in csv.DictReader(file)]
            found[slug] = {"headline": fill(headline, results), "claims": [sum(held), len(held)]}
    return found


def fill(headline: Headline, results: Path) -> str:
    """The headline's sentence with each gap filled from its cell."""
    return headline.text.format(**{name: read(cell, results) for name, cell in headline.cells.items()})


def read(cell: Cell, results: Path) -> float:
    """The number in one cell; LookupError unless exactly one line matches."""
    with (results / cell.csv).open(encoding="utf-8", newline="") as file:
        lines = [
            line for line in csv.DictReader(file) if all(line.get(key) == want for key, want in cell.where.items())
        ]
    if len(lines) != 1:
        raise LookupError(f"{cell.csv}: {len(lines)} lines match {cell.where}, a headline needs exactly one")
    return float(lines[0][cell.column])


def main() -> int:
    text = json.dumps(measured(), indent=2, ensure_ascii=False) + "\n"
    if "--check" in sys.argv[1:]:
        return int(TARGET.read_text(encoding="utf-8") != text)
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The recipes at size small: results/<slug>.csv and results/<slug>_claims.csv.

python benchmarks/recipes.py SLUG...      # some of them; a finished run is read back, a broken-off one goes on
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from edgewright.recipes.recipe import run_recipe, runnable
from results import ROOT, save, save_claims


def main(slugs: Sequence[str] = ()) -> None:
    for slug in slugs or runnable():
        outcome = run_recipe(slug, "small", output=ROOT / "runs" / f"{slug}-small")
        assert outcome.report is not None  # only a dry run has none
        outcome.report.print_table()
        for verdict in outcome.verdicts:
            print("held    " if verdict.held else "NOT HELD", verdict.text)
        print(save(outcome.report, slug), save_claims(outcome.verdicts, slug))


if __name__ == "__main__":
    main(sys.argv[1:])

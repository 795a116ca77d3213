"""The recipes at size small: results/<slug>.csv."""

from __future__ import annotations

from edgewright.recipes.recipe import run_recipe, runnable
from results import ROOT, save


def main() -> None:
    for slug in runnable():
        outcome = run_recipe(slug, "small", output=ROOT / "runs" / f"{slug}-small")
        assert outcome.report is not None  # only a dry run has none
        outcome.report.print_table()
        for verdict in outcome.verdicts:
            print("held    " if verdict.held else "NOT HELD", verdict.text)
        print(save(outcome.report, slug))

"""The recipes at size small: results/<slug>.csv and results/<slug>-claims.csv.

python benchmarks/recipes.py SLUG...      # some of them; a finished run is read back, a broken-off one goes on
python benchmarks/recipes.py --claims     # run nothing: hold the claims as they are now against the figures in results/
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from edgewright.systems.recipe import check_claims, load_recipe, run_recipe, runnable
from results import RESULTS, ROOT, load, save, save_claims


def main(slugs: Sequence[str] = ()) -> None:
    for slug in slugs or runnable():
        outcome = run_recipe(slug, "small", output=ROOT / "runs" / f"{slug}-small")
        assert outcome.report is not None  # only a dry run has none
        outcome.report.print_table()
        for verdict in outcome.verdicts:
            print("held    " if verdict.held else "NOT HELD", verdict.text)
        print(save(outcome.report, slug), save_claims(outcome.verdicts, slug))


def hold_claims() -> None:
    """Write results/<slug>-claims.csv of every recipe that has figures."""
    for slug in runnable():
        if (RESULTS / f"{slug}.csv").exists():
            claims = (claim for claim in load_recipe(slug).CLAIMS if "small" in claim.sizes)
            verdicts = check_claims(load(slug), claims)
            print(f"{slug}: {sum(verdict.held for verdict in verdicts)} of {len(verdicts)} claims held")
            save_claims(verdicts, slug)


if __name__ == "__main__":
    hold_claims() if sys.argv[1:] == ["--claims"] else main(sys.argv[1:])

"""PARQ on digits with a fifth of the steps of size small: results/parq-short.csv.

Gradual hardening needs time: this is where it has too little.
"""

from __future__ import annotations

from edgewright.systems.recipe import run_recipe
from results import ROOT, save

STEPS = 300


def main() -> None:
    overrides = [f"steps={STEPS}", "sentences.seeds=0"]
    outcome = run_recipe("parq", "small", overrides, ROOT / "runs" / "parq-short")
    assert outcome.report is not None  # only a dry run has none
    print(save(outcome.report, "parq-short"))


if __name__ == "__main__":
    main()

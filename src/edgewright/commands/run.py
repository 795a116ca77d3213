"""Run the recipe of one published system and check its claims.

The folder (runs/SLUG-SIZE, or --output) ends with report.json, report.md, plots and the exact settings. The same
command on the same folder resumes. The exit code is 1 when a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout

from edgewright.systems.recipe import run_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slug", help="the system, as `edgewright systems` names it, e.g. paretoq")
    parser.add_argument(
        "--size", default="tiny", help="tiny: seconds; small: minutes; paper: as published (default: tiny)"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change a setting, e.g. seed=1",
    )
    parser.add_argument("--output", metavar="DIR", help="the folder of the run (default: runs/SLUG-SIZE)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan with its time, memory and disk, and stop"
    )
    parser.add_argument("--fresh", action="store_true", help="clear the folder of an earlier run and start again")
    parser.add_argument("--json", action="store_true", help="print one object; progress goes to stderr")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    with redirect_stdout(sys.stderr if args.json else sys.stdout):
        outcome = run_recipe(args.slug, args.size, args.overrides, args.output, dry_run=args.dry_run, fresh=args.fresh)
        console = Console(highlight=False, markup=False)
        if outcome.report is not None:
            outcome.report.print_table(console)
        for verdict in outcome.verdicts:
            console.print(f"{'held    ' if verdict.held else 'NOT held'}  {verdict.text}")
        if outcome.report is not None:
            console.print(f"report, settings and plots: {outcome.folder}")
    if args.json:
        print(json.dumps(outcome.to_dict(), indent=2, ensure_ascii=False))
    return 0 if outcome.held else 1

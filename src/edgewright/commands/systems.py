"""List the catalogue of published systems, or print the page of one."""

from __future__ import annotations

import argparse
import json
import sys

from edgewright.errors import UsageError
from edgewright.systems import catalogue


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slug", nargs="?", help="print the page of this system instead of the list")
    parser.add_argument("--area", help="only systems of this area, e.g. quantization")
    parser.add_argument("--state", help="only systems in this state: planned, built or reproduced")
    parser.add_argument("--json", action="store_true", help="print objects instead of a table or page")


def run(args: argparse.Namespace) -> int:
    if args.slug is not None:
        if args.area or args.state:
            raise UsageError(
                f"--area and --state choose from the list; print one page with `edgewright systems {args.slug}`"
            )
        row = catalogue.find(args.slug)
        print(json.dumps(row.to_dict(), indent=2, ensure_ascii=False)) if args.json else _print_page(
            catalogue.page(row.slug)
        )
        return 0
    rows = catalogue.select(args.area, args.state)
    print(json.dumps([row.to_dict() for row in rows], indent=2, ensure_ascii=False)) if args.json else _print_list(rows)
    return 0


def _print_list(rows: list) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # A pipe has no width of its own: give it one line a system, so that grep and awk can read the list.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=200)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("area", "system", "arXiv", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("what it does, and our own headline figure", overflow="fold")
    for i, row in enumerate(rows):
        last_of_area = i + 1 == len(rows) or rows[i + 1].area != row.area
        text = escape(row.summary) + (f" [bold]{escape(row.headline)}[/bold]" if row.headline else "")
        colour = {"reproduced": "green", "built": "yellow"}.get(row.state, "dim")
        held = f" {row.claims[0]}/{row.claims[1]}" if row.state == "built" else ""
        table.add_row(row.area, row.slug, row.arxiv, f"[{colour}]{row.state}{held}[/]", text, end_section=last_of_area)
    console.print(table)
    reproduced, built = (sum(row.state == state for row in rows) for state in ("reproduced", "built"))
    console.print(
        f"{len(rows)} systems: {reproduced} reproduced, {built} built (n of m claims of the paper hold here). "
        "`edgewright systems SLUG` prints the page of one.",
        style="dim",
    )


def _print_page(text: str) -> None:
    if not sys.stdout.isatty():
        print(text, end="" if text.endswith("\n") else "\n")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))

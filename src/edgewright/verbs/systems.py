"""List the catalogue of published systems, or print the page of one."""

from __future__ import annotations

import argparse
import json
import sys

from edgewright.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slug", nargs="?", help="print the page of this system instead of the list")
    parser.add_argument("--room", help="only systems of this room of the house, e.g. quantization")
    parser.add_argument("--state", help="only systems in this state: planned, partial or working")
    parser.add_argument("--json", action="store_true", help="print objects instead of a table or page")


def run(args: argparse.Namespace) -> int:
    from edgewright import systems

    if args.slug is not None:
        if args.room or args.state:
            raise UsageError(
                f"--room and --state choose from the list; print one page with `edgewright systems {args.slug}`"
            )
        row = systems.find(args.slug)
        print(json.dumps(row.to_dict(), indent=2, ensure_ascii=False)) if args.json else _print_page(
            systems.page(row.slug)
        )
        return 0
    rows = systems.select(args.room, args.state)
    print(json.dumps([row.to_dict() for row in rows], indent=2, ensure_ascii=False)) if args.json else _print_list(rows)
    return 0


def _print_list(rows: list) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # A pipe has no width of its own: give it one line a system, so that grep and awk can read the list.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=200)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("room", "system", "arXiv", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("what it does, and our own headline figure", overflow="fold")
    for i, row in enumerate(rows):
        last_of_room = i + 1 == len(rows) or rows[i + 1].room != row.room
        text = escape(row.summary) + (f" [bold]{escape(row.headline)}[/bold]" if row.headline else "")
        colour = {"working": "green", "partial": "yellow"}.get(row.state, "dim")
        table.add_row(row.room, row.slug, row.arxiv, f"[{colour}]{row.state}[/]", text, end_section=last_of_room)
    console.print(table)
    working, partial = (sum(row.state == state for row in rows) for state in ("working", "partial"))
    console.print(
        f"{len(rows)} systems, {working} working, {partial} partial (built, but not every claim of theirs holds here). "
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

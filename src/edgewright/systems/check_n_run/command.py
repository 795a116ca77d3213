"""Checkpoints of rows (Check-N-Run): what lies in a folder, whether it can be used, and updates for devices.

edgewright checkpoint list runs/ck                     sizes, rows, status; --json for scripts
edgewright checkpoint verify runs/ck                   every byte against its sha256; exit code 1 where one differs
edgewright checkpoint restore runs/ck --to m.safetensors
edgewright checkpoint gc runs/ck --keep 2              delete what the newest two do not need
edgewright checkpoint diff runs/ck/ckpt-A runs/ck/ckpt-B --to update.bin
edgewright checkpoint apply m.safetensors update.bin --to new.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from edgewright.errors import FormatError, UsageError
from edgewright.training.checkpoint.files import open_files, output_error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="part", required=True, metavar="list|verify|restore|gc|diff|apply")
    for name, text in (("list", "what lies in a folder"), ("verify", "read and compare every byte")):
        part = parts.add_parser(name, help=text)
        part.add_argument("dir", metavar="DIR", help="a folder of checkpoints, or an fsspec URL")
        part.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    restore = parts.add_parser("restore", help="the model of a checkpoint as one file, rows in float")
    restore.add_argument("dir", metavar="DIR", help="a folder of checkpoints, or an fsspec URL")
    restore.add_argument("--id", metavar="CKPT", help="which one (default: the newest that can be used)")
    restore.add_argument("--to", required=True, metavar="FILE", help="new .safetensors file")
    collect = parts.add_parser("gc", help="delete what the newest checkpoints do not need")
    collect.add_argument("dir", metavar="DIR", help="a folder of checkpoints, or an fsspec URL")
    collect.add_argument("--keep", type=int, default=2, help="restorable checkpoints that stay (default 2)")
    difference = parts.add_parser("diff", help="an update from one checkpoint's model to another's")
    difference.add_argument("before", metavar="A", help="a checkpoint's folder")
    difference.add_argument("after", metavar="B", help="a checkpoint's folder")
    difference.add_argument("--to", required=True, metavar="FILE", help="new file")
    apply = parts.add_parser("apply", help="an update on a model's file, verified")
    apply.add_argument("model", metavar="MODEL", help=".safetensors file, as restore writes it")
    apply.add_argument("update", metavar="UPDATE", help="file that diff wrote")
    apply.add_argument("--to", required=True, metavar="FILE", help="new .safetensors file")


def run(args: argparse.Namespace) -> int:
    actions = {"list": _list, "verify": _list, "restore": _restore, "gc": _collect, "diff": _diff, "apply": _apply}
    return actions[args.part](args)


def _list(args: argparse.Namespace) -> int:
    from edgewright.systems.check_n_run.recovery import inspect_dir, need_checkpoints

    files = open_files(args.dir)
    listing = inspect_dir(files, content=args.part == "verify")
    need_checkpoints(files, listing)
    if args.json:
        print(json.dumps(dataclasses.asdict(listing), indent=2))
    else:
        _table(listing)
    return 0 if all(entry.usable for entry in listing.entries) or args.part == "list" else 1


def _table(listing: Any) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("id", "kind", "step", "bits", "rows", "bytes", "of full", "status"):
        justify: Any = "right" if column in ("step", "bits", "rows", "bytes", "of full") else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column == "id")  # names are for copying
    for entry in listing.entries:
        mark = " (LATEST)" if entry.id == listing.latest else ""
        raw = f" ({entry.raw_rows} as float)" if entry.raw_rows else ""
        bits = "float" if entry.bits is None else str(entry.bits)
        cells = (
            entry.id, entry.kind, str(entry.step), bits, f"{entry.rows}{raw}", str(entry.bytes),
            f"{entry.ratio:.1%}", entry.status + mark,
        )  # fmt: skip
        table.add_row(*map(escape, cells))  # names and reasons come from files: their brackets are no markup
    console = Console()
    console.print(table)
    if listing.orphans:
        console.print(escape(f"left by a process that ended early: {', '.join(listing.orphans)}"))


def _restore(args: argparse.Namespace) -> int:
    to = _new(args.to)

    from edgewright.systems.check_n_run.recovery import load_model

    chain, tensors = load_model(open_files(args.dir), args.id)
    _save(tensors, to, {"checkpoint": chain[-1].id, "step": str(chain[-1].step)})
    print(f"{chain[-1].id} (step {chain[-1].step}, {len(chain)} checkpoints read) is in {to}")
    return 0


def _collect(args: argparse.Namespace) -> int:
    if args.keep < 1:
        raise UsageError(f"--keep {args.keep}; give 1 or more")

    from edgewright.systems.check_n_run.recovery import inspect_dir, need_checkpoints
    from edgewright.training.checkpoint.chain import clean, collect

    files = open_files(args.dir)
    need_checkpoints(files, inspect_dir(files))
    try:
        held = files.lock()
        try:
            gone = [*collect(files, args.keep, broken=True), *clean(files)]
        finally:
            files.unlock(held)
    except OSError as error:
        if isinstance(error, FormatError | UsageError):
            raise
        raise output_error(files, error) from error
    print("\n".join(f"deleted {name}" for name in gone) or "nothing to delete")
    return 0


def _diff(args: argparse.Namespace) -> int:
    to = _new(args.to)

    from edgewright.systems.check_n_run.update import diff

    fields = diff(args.before, args.after, to)
    rows = sum(record["rows"] for record in fields["records"])
    print(f"{to}: {to.stat().st_size} bytes, {rows} rows and {len(fields['dense'])} tensors, from {fields['base']} to "
          f"{fields['id']}")  # fmt: skip
    return 0


def _apply(args: argparse.Namespace) -> int:
    to = _new(args.to)

    from edgewright.io.tensors import load_tensors
    from edgewright.systems.check_n_run.update import apply_delta

    tensors = load_tensors(args.model)
    fields = apply_delta(tensors, args.update)
    _save(tensors, to, {"checkpoint": fields["id"]})
    print(f"{fields['id']} is in {to}, verified by its sha256")
    return 0


def _new(text: str) -> Path:
    path = Path(text)
    if path.exists():
        raise UsageError(f"{path} exists already; choose a new file for --to")
    return path


def _save(tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
    from edgewright.io.tensors import save_tensors

    save_tensors(path, tensors, metadata)

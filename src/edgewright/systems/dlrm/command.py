"""Train a model of clicks on your own log, and write it for a runtime.

FILE is in Criteo's layout: label, 13 numbers, 26 categories, tab-separated without a header; or a CSV, TSV or Parquet
file whose columns have names: label, I1.. and C1.., or those that you name. Rows are taken in order: the last ones are
held out. The same command again goes on where it was stopped.

  edgewright train dlrm --data day_0.gz --rows 5e6 --output runs/clicks
  edgewright train dlrm --data log.csv --label bought --dense price,age --categorical user,item,shop
  edgewright train dlrm --data log.parquet --to onnx,executorch
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from edgewright.checks import Allowed, check, number, one_of, optional
from edgewright.errors import UsageError
from edgewright.io.atomic import atomic_directory
from edgewright.io.run_folder import claim_folder, working_in
from edgewright.measure.report import Report
from edgewright.systems.catalogue import did_you_mean

MODELS = ("dlrm",)
FORMATS = {"onnx": "model.onnx", "executorch": "model.pte"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"what to train: {', '.join(MODELS)}")
    add("--data", metavar="FILE", required=True, help="click log: CSV, TSV (also .gz) or Parquet")
    add("--label", metavar="COLUMN", help="column with 0 and 1 (default: label, click, clicked or target)")
    add("--dense", metavar="A,B", help="columns with numbers (default: I1, I2, ...)")
    add("--categorical", metavar="A,B", help="columns with categories (default: C1, C2, ...)")
    add("--rows", type=float, metavar="N", help="read no more than the first N rows")
    add("--valid", type=float, default=0.1, help="share of the rows, the last ones, to judge by (default 0.1)")
    add("--hash-rows", type=int, default=1 << 18, metavar="N", help="buckets of a column (default 262144)")
    add("--min-count", type=int, default=4, metavar="N", help="rarer categories share a row (default 4)")
    add("--dim", type=int, default=16, metavar="N", help="width of the vectors (default 16)")
    add("--bottom", default="64", metavar="A,B", help="hidden units for the numbers (default 64)")
    add("--top", default="64", metavar="A,B", help="hidden units above the interaction (default 64)")
    add("--epochs", type=float, default=1.0, help="passes over the training rows (default 1)")
    add("--batch", type=int, default=256, metavar="N", help="rows of an update (default 256)")
    add("--lr", type=float, default=1e-3, help="learning rate of the networks, Adam (default 1e-3)")
    add("--table-lr", type=float, default=0.02, help="learning rate of the tables, row-wise Adagrad (default 0.02)")
    add("--ordered", action="store_true", help="train in the order of the rows instead of shuffled")
    add("--checkpoint-every", type=int, default=500, metavar="N", help="steps that a kill costs at most (default 500)")
    add("--to", metavar="LIST", help=f"also write the model for a runtime: {', '.join(FORMATS)}")
    add("--seed", type=int, default=0)
    add("--output", metavar="DIR", help="folder of the run (default runs/dlrm-FILE)")
    add("--fresh", action="store_true", help="start again instead of going on")
    add("--json", action="store_true", help="print the report as JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    if args.model not in MODELS:
        raise UsageError(f"cannot train {args.model!r}{did_you_mean(args.model, MODELS)}; models: {', '.join(MODELS)}")
    formats = [] if args.to is None else [name.strip() for name in args.to.split(",")]
    for name in formats:
        check("--to", name, one_of(*FORMATS))
    check("--rows", args.rows, optional(number(2)), "one to train on and one to judge by")

    output = Path(args.output or f"runs/dlrm-{Path(args.data).name.partition('.')[0]}")
    with working_in(output):
        report = train_dlrm(args, output, formats)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
        return 0
    report.print_table()
    print(f"the model, its vocabulary and loss.png are in {output}")
    return 0


def train_dlrm(args: argparse.Namespace, output: Path, formats: list[str]) -> Report:
    """Read, train, judge, save and export; the report, which is in `output` as well."""
    from edgewright.systems.dlrm.click_log import prepare_clicks, read_layout
    from edgewright.systems.dlrm.metrics import Popularity, check_labels, evaluate
    from edgewright.systems.dlrm.model import DLRM, DLRMConfig
    from edgewright.systems.dlrm.optimizers import ClickTraining, train_clicks

    claim_folder(output, "train dlrm")
    say = (lambda text: None) if args.json else (lambda text: print(text, file=sys.stderr, flush=True))
    layout = read_layout(args.data, args.label, _names(args.dense), _names(args.categorical))
    bottom, top = _widths("--bottom", args.bottom), _widths("--top", args.top)
    train, valid, vocabulary = prepare_clicks(
        args.data,
        layout,
        output / "data",
        hash_rows=args.hash_rows,
        min_count=args.min_count,
        valid=args.valid,
        limit=None if args.rows is None else int(args.rows),
        tick=lambda rows: say(f"read {rows} rows"),
    )
    check_labels(valid.labels, "labels of the held-out rows", "; hold more of them out with --valid 0.3")
    schema = vocabulary.schema
    config = DLRMConfig(
        len(schema.dense), schema.sizes, args.dim, (*bottom, args.dim), (*top, 1), table_names=schema.tables
    )
    model = DLRM(config, args.seed)
    say(f"{len(train)} rows to train on, {len(valid)} to judge by; tables of {sum(schema.sizes)} rows in all")
    settings = ClickTraining(
        args.epochs,
        args.batch,
        args.lr,
        args.table_lr,
        shuffled=not args.ordered,
        checkpoint_every=args.checkpoint_every,
        seed=args.seed,
    )
    result = train_clicks(
        model,
        train,
        valid,
        settings,
        output=output / "training",
        progress=not args.json,
        resume="never" if args.fresh else "auto",
        label="training",
    )
    model.eval()
    with atomic_directory(output / "model", ours=True) as temporary:  # either alone could not serve a request
        model.write_into(temporary)
        vocabulary.write_into(temporary)
    report = Report(f"DLRM on {Path(args.data).name}", {"steps": result.steps, "seed": args.seed})
    columns = [k for k, name in enumerate(schema.tables) if schema.slots[k] == 1]
    busiest = schema.tables[max(columns, key=lambda k: schema.sizes[k])]
    for name, judged in (("dlrm", model), (f"popularity of {busiest}", Popularity(train, busiest))):
        found = evaluate(judged, valid)
        report.add("auc", found.auc, subject=name, se=found.auc_se, n=found.n)
        report.add("logloss", found.logloss, subject=name, se=found.logloss_se, n=found.n, unit="nats")
        report.add("ne", found.ne, subject=name, n=found.n)
        report.add("calibration", found.calibration, subject=name, n=found.n)
    report.notes.append("the weights with the lowest log-loss on the held-out rows, judged on the same rows")
    for name in formats:
        from edgewright.systems.dlrm.serving import export_dlrm

        done = export_dlrm(model, output / FORMATS[name], name, slots=schema.slots)
        report.notes.append(f"{FORMATS[name]}: {done.bytes / 1e6:.2f} MB, ran in its runtime and equals the model")
    report.save(output)
    return report


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _widths(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    widths = tuple(int(part) if part.isascii() and part.isdecimal() else 0 for part in parts)
    check(option, text, Allowed("widths of layers, e.g. 512,256", lambda _: all(widths)))
    return widths

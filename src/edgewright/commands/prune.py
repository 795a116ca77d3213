"""Cut a decoder to fewer blocks and narrower MLPs, by importance measured on text; the result is a plain checkpoint.

Blocks that change the residual stream least go first (the first and the last stay), then the MLP neurons with the
smallest mean norm, as many in every block. Statistics are taken once, from the whole model. Without training after it a
cut costs quality: the table says how much. FOLDER is loaded by transformers and by every other command.

  edgewright prune smollm2-135m --layers 26 --mlp 1408 --output runs/smaller
  edgewright prune MODEL --layers 24 --text calibration.jsonl --output smaller
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edgewright
from edgewright.errors import UsageError
from edgewright.io.atomic import atomic_directory
from edgewright.io.run_folder import require_empty
from edgewright.measure.plot import plot
from edgewright.measure.report import Report
from edgewright.measure.size import bytes_by_part, parameter_counts

if TYPE_CHECKING:
    from edgewright.pruning.importance import Importance

# An argument of the Python interface as this command calls it (see `commands.option_names`).
WORDS = ((r"\bblock_length=", "length="), (r"\bwidth=", "mlp="), (r"\bprotect=\(\)", "--protect ''"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model folder, a .gguf file or a bundled name")
    parser.add_argument("--layers", type=int, metavar="N", help="blocks to keep (default: all)")
    parser.add_argument("--mlp", type=int, metavar="M", help="neurons to keep in every MLP (default: all)")
    parser.add_argument(
        "--multiple", type=int, default=32, help="M must divide by this quantisation group (default 32)"
    )
    parser.add_argument("--protect", default="0,-1", help="blocks that stay in any case (default 0,-1; '' for none)")
    parser.add_argument("--iterative", action="store_true", help="measure the blocks again after each one that goes")
    parser.add_argument("--text", help="text, .jsonl, .json or .csv file to measure and evaluate on (split by itself)")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences (default 64)")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence (default 128)")
    parser.add_argument("--blocks", type=int, default=8, help="evaluation sequences (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder for the smaller model")
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    require_empty(output)
    if args.layers is None and args.mlp is None:
        raise UsageError("nothing to prune: give --layers N, --mlp M, or both")
    protect = _indices(args.protect)

    from edgewright.evaluation.language import add_rows, check_positions, evaluate_language, model_logits
    from edgewright.io.text import split_blocks
    from edgewright.pruning.cut_folder import save_checkpoint
    from edgewright.pruning.depth import prune_depth_
    from edgewright.pruning.importance import collect, decoder_layers
    from edgewright.pruning.width import prune_mlp_

    def say(sentence: str) -> None:
        if not args.json:
            print(sentence, file=sys.stderr, flush=True)

    model, tokenizer = edgewright.load(args.model)
    count = len(decoder_layers(model))
    check_positions(model, args.length, args.model)
    calibration, held_out = split_blocks(
        args.text, tokenizer, args.length, calibration=args.samples, evaluation=args.blocks, seed=args.seed
    )
    say(f"measuring {count} blocks on {calibration.numel()} tokens")
    stats = collect(model, calibration.split(8))
    pruned = copy.deepcopy(model)

    def measure(part: Any) -> Importance:
        return collect(part, calibration.split(8), neurons=False)

    layers = count if args.layers is None else args.layers
    kept = prune_depth_(pruned, layers, stats, protect=protect, iterative=measure if args.iterative else None)
    if args.mlp is not None:
        prune_mlp_(pruned, args.mlp, stats.keep(kept), multiple=args.multiple)
    say("evaluating before and after")
    models = {"original": model, "pruned": pruned}
    functions = {name: model_logits(each) for name, each in models.items()}
    results = evaluate_language(functions, held_out, reference=functions["original"], progress=not args.json)

    report = Report(f"{args.model} pruned", {**vars(args), "kept": list(kept)})
    for name, each in models.items():
        report.add("blocks", len(decoder_layers(each)), subject=name)
        report.add("mlp", int(each.config.intermediate_size), subject=name)
        report.add("parameters", parameter_counts(each).total, subject=name)
        report.add("bytes", sum(bytes_by_part(each).values()), subject=name, unit="bytes")
    add_rows(report, results)
    for index, value in enumerate(stats.blocks.tolist()):
        report.add("block_importance", value, subject=f"block {index}", n=stats.tokens)
    gone = [i for i in range(count) if i not in kept]
    report.notes.append(f"blocks left out: {', '.join(map(str, gone)) or 'none'} (counted from 0)")
    report.notes.append(f"KL to the original on {held_out.numel()} held-out tokens; no training after the cut")
    with atomic_directory(output) as folder:
        save_checkpoint(pruned, tokenizer, folder)
        _plot(stats, kept, folder / "importance.png")
        report.save(folder)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
        return 0
    shown = Report(report.title)
    for row in report.rows:
        if row.subject in models and not row.metric.startswith("kl_"):
            shown.add(row.metric, row.value, subject=row.subject, se=row.se, n=row.n, unit=row.unit)
    shown.notes = report.notes
    shown.print_table(metrics=["blocks", "mlp", "parameters", "bytes", "perplexity", "kl", "top1_agreement"])
    print(f"the model, report.md and importance.png are in {output}")
    return 0


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"--protect {text!r}: block numbers separated by commas, such as 0,-1") from None


def _plot(stats: Importance, kept: tuple[int, ...], path: Path) -> None:
    values = stats.blocks.tolist()
    with plot(path, (7.0, 3.0)) as axes:
        for label, color, chosen in (
            ("kept", "#4f7cac", list(kept)),
            ("left out", "#d08c60", [i for i in range(len(values)) if i not in kept]),
        ):
            axes.bar(chosen, [values[i] for i in chosen], color=color, label=label)
        axes.set_xlabel("block")
        axes.set_ylabel("block importance (BI)")
        axes.set_yscale("log")
        axes.legend(frameon=False)

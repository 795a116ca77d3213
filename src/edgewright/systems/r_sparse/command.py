"""Skip the weights of small inputs while a model decodes (R-Sparse): thresholds and low-rank rescue, no training.

Every linear layer reads the weights of its largest inputs only; rho gives a part of the reads to a low-rank copy that
stands in for the rest. Embeddings, head and prompts stay dense. FOLDER is an ordinary checkpoint, which every command
loads dense, plus rsparse.json and rsparse.safetensors, which `load_rsparse(FOLDER)` puts back.

  edgewright sparsify smollm2-135m --sparsity 0.4 --output runs/sparse
  edgewright sparsify MODEL --sparsity 0.5 --plan search --evals 200 --resume search.json --output runs/searched
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import edgewright
from edgewright.errors import UsageError
from edgewright.io.atomic import atomic_directory
from edgewright.io.run_folder import require_empty
from edgewright.measure.plot import plot
from edgewright.measure.report import Report

PLANS = ("uniform", "default", "teal", "search")

# An argument of the Python interface as this command calls it (see `commands.option_names`).
WORDS = ((r"\bblock_length=", "length="),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model folder, a .gguf file or a bundled name")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of weight reads left out (default 0.5)")
    parser.add_argument("--rho", type=float, default=1.0, help="part of the reads that goes to channels (default 1)")
    parser.add_argument("--score", default="weighted", help="weighted (|x| times column norm, default) or magnitude")
    parser.add_argument(
        "--plan",
        choices=PLANS,
        default="uniform",
        help="uniform: every layer as --sparsity and --rho say; default: low rank in the first block's attention; "
        "teal: sparsity greedily by block; search: rho by evolution",
    )
    parser.add_argument("--evals", type=int, default=200, help="plans that --plan search scores (default 200)")
    parser.add_argument("--resume", metavar="FILE", help="file of scores, so that a search can go on")
    parser.add_argument("--sequential", action="store_true", help="calibrate each block on the sparsified ones before")
    parser.add_argument("--share-mask", action="store_true", help="one choice of channels for q, k, v and for gate, up")
    parser.add_argument("--text", help="text or .jsonl file to calibrate and evaluate on (split by itself)")
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences (default 16)")
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence (default 512)")
    parser.add_argument("--blocks", type=int, default=8, help="evaluation sequences (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder for the model")
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    require_empty(output)
    if args.resume and args.plan != "search":
        raise UsageError("--resume belongs to --plan search; other plans are made at once")

    from edgewright.evaluation.language import add_rows, check_positions, evaluate_language
    from edgewright.io.text import split_blocks
    from edgewright.kernels.sparse_rows import why_no_kernel
    from edgewright.systems.r_sparse.allocation import calibrate_sequential
    from edgewright.systems.r_sparse.folder import save_rsparse
    from edgewright.systems.r_sparse.layer import Factors
    from edgewright.systems.r_sparse.model import (
        achieved_sparsity,
        apply_rsparse,
        dense_logits,
        model_traffic,
        sparse_logits,
    )
    from edgewright.systems.r_sparse.plan import RSparseConfig, calibrate, target_layers

    config = RSparseConfig(args.sparsity, args.rho, args.score, share_mask=args.share_mask)
    progress = not args.json

    def say(sentence: str) -> None:
        if progress:
            print(sentence, file=sys.stderr, flush=True)

    model, tokenizer = edgewright.load(args.model)
    check_positions(model, args.length, args.model)
    calibration, held_out = split_blocks(
        args.text, tokenizer, args.length, calibration=args.samples, evaluation=args.blocks, seed=args.seed
    )
    layers = target_layers(model, config)
    say(f"calibrating {len(layers)} layers on {calibration.numel()} tokens")
    factors = Factors()
    stats = calibrate(model, calibration.split(4), config, progress=progress)
    plan = _plan(args, model, calibration, config, stats, factors, say)
    if args.sequential:
        batches = calibration.split(4)
        stats = calibrate_sequential(model, batches, config, plan, factors=factors, progress=progress)
    apply_rsparse(model, config, stats, plan, factors=factors, progress=progress)
    say("evaluating dense and sparse")
    functions = {"dense": dense_logits(model), "sparse": sparse_logits(model)}
    results = evaluate_language(functions, held_out, reference=functions["dense"], progress=progress)
    achieved = achieved_sparsity(model, held_out.split(1))

    report = Report(f"{args.model} sparsified", vars(args))
    add_rows(report, results)
    traffic = model_traffic(model, achieved)
    report.add("bytes_per_token", traffic.dense + traffic.rest, subject="dense", unit="bytes")
    report.add("bytes_per_token", traffic.sparse + traffic.rest, subject="sparse", unit="bytes")
    report.add("layer_reads", 1.0, subject="dense")
    report.add("layer_reads", traffic.ratio, subject="sparse")
    report.add("factor_bytes", traffic.factors, subject="sparse", unit="bytes")
    for name, value in achieved.items():
        report.add("channels_left_out", value, subject=name)
    report.notes.append(f"KL to the dense model on {held_out.numel()} held-out tokens, all but the first sparse")
    report.notes.append("layer_reads: bytes read of the sparsified layers, factors included, over their dense bytes")
    if reason := why_no_kernel():
        report.notes.append(f"no compiled kernel here, so decoding will not be faster: {reason}")
    with atomic_directory(output) as folder:
        save_rsparse(model, tokenizer, folder, config, stats, plan)
        _plot(achieved, folder / "sparsity.png")
        report.save(folder)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
        return 0
    shown = Report(report.title)
    for row in report.rows:
        if row.subject in functions and not row.metric.startswith("kl_"):
            shown.add(row.metric, row.value, subject=row.subject, se=row.se, n=row.n, unit=row.unit)
    shown.notes = report.notes
    shown.print_table(metrics=["perplexity", "kl", "top1_agreement", "layer_reads", "bytes_per_token"])
    print(f"the model, report.md and sparsity.png are in {output}")
    return 0


def _plan(
    args: argparse.Namespace, model: Any, calibration: Any, config: Any, stats: Any, factors: Any, say: Any
) -> Any:
    """Sparsity and rho of every layer, as --plan asks."""
    from edgewright.systems.r_sparse.allocation import search_rho, teal_greedy
    from edgewright.systems.r_sparse.plan import default_plan, target_layers, uniform_plan

    names = list(target_layers(model, config))
    progress = not args.json
    if args.plan == "default":
        return default_plan(names, config)
    if args.plan == "teal":
        say("allocating sparsity inside every block")
        return teal_greedy(model, calibration[:1].split(1), config, stats, progress=progress)
    if args.plan == "search":
        say(f"searching rho with {args.evals} plans")
        options = {"stats": stats, "factors": factors, "resume": args.resume, "progress": progress}
        best = search_rho(model, calibration, config, evals=args.evals, **options)
        say(f"calibration nats per token: {best.start:.4f} at rho = 1, {best.fitness:.4f} after the search")
        return best.plan
    return uniform_plan(names, config)


def _plot(achieved: dict[str, float], path: Path) -> None:
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in achieved))
    with plot(path, (7.0, 3.5)) as axes:
        for kind in kinds:
            values = [value for name, value in achieved.items() if name.rpartition(".")[2] == kind]
            axes.plot(range(len(values)), values, marker=".", label=kind)
        axes.set_xlabel("block")
        axes.set_ylabel("input channels left out, held out")
        axes.legend(frameon=False, ncols=4)
        axes.grid(alpha=0.25)

"""Quantise a model, train it under quantisation, export it, verify the file, and report.

The run ends with one table: the reference, every method and llama.cpp's own quantiser, each with file size, distance
from the reference and speed. It can be interrupted and repeated at any time; finished stages are kept.

  edgewright compress smollm2-135m --bits 4 --output runs/demo
  edgewright compress smollm2-135m --bits 1.58 --budget 10m
  edgewright compress MODEL --bits 4 --method rtn
  edgewright compress smollm2-135m --sweep --output runs/sweep
  edgewright compress efficientnet-lite0 --bits 8 --to onnx,pte    # an image classifier: int8
  edgewright compress runs/dlrm-log --data new.csv --budget 0.0005    # a click model: precisions behind a gate
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from edgewright.commands.export import default_name
from edgewright.compression.settings import VISION_MODELS, CompressSettings, TrainingBudget
from edgewright.errors import UsageError
from edgewright.io.run_folder import working_in
from edgewright.measure.report import Report

DEFAULT_BUDGET = "24"
# Arguments of the Python interface as this command calls them (see `commands.option_names`).
WORDS = ((r"\bevaluation_blocks=", "blocks="),)
COLUMNS = ("file_size", "bits_per_weight", "kl", "perplexity", "top1_agreement", "decode", "roofline")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder, .gguf file, bundled name such as smollm2-135m or efficientnet-lite0")
    parser.add_argument("--bits", type=float, default=4.0, help="1, 1.58, 2, 3, 4 or 8 (default 4)")
    parser.add_argument("--method", default="qat", help="rtn, mse, gptq or qat (default): the way to the shipped file")
    parser.add_argument(
        "--no-baselines", action="store_true", help="only the chosen method, no other row but the reference"
    )
    parser.add_argument(
        "--budget",
        default=DEFAULT_BUDGET,
        help="training: optimizer steps such as 40, or minutes such as 4m; of a click model the share of normalised "
        "entropy that may be lost (default 0.0005)",
    )
    parser.add_argument(
        "--data", help="text, .jsonl, .json or .csv file to calibrate, train and evaluate on (split by itself)"
    )
    parser.add_argument("--kv", type=int, help="width of the key-value cache: 8 or 4 (default: float16)")
    parser.add_argument(
        "--layout", default="auto", help="auto, portable, small or fast: which GGUF types hold the codes"
    )
    parser.add_argument("--learning-rate", type=float, help="default: 2e-5, or 1e-4 at 2 bits and below")
    parser.add_argument("--blocks", type=int, default=12, help="evaluation blocks (default 12)")
    parser.add_argument("--block-length", type=int, default=256, help="tokens a block (default 256)")
    parser.add_argument(
        "--files-only", action="store_true", help="write and verify the files; no evaluation, no report"
    )
    parser.add_argument(
        "--lenient", action="store_true", help="mark tensors that cannot have their type instead of failing"
    )
    parser.add_argument("--no-bench", action="store_true", help="leave out the timings")
    parser.add_argument("--sweep", action="store_true", help="all widths, one folder each, and one plot over them")
    parser.add_argument("--to", help="files of an image classifier: onnx (default), or onnx,pte for ExecuTorch too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="folder of the run (default runs/MODEL-BITSbit)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    if args.model in VISION_MODELS:
        return _run_vision(args)
    if (Path(args.model) / "config.json").is_file() or (Path(args.model) / "model" / "config.json").is_file():
        from edgewright.systems.low_precision_recsys.export import click_folder

        if (folder := click_folder(args.model)) is not None:
            return _run_clicks(args, folder)
    return _run_language(args)


def _run_clicks(args: argparse.Namespace, folder: Path) -> int:
    from edgewright.systems.low_precision_recsys.export import BUDGET, compress_clicks

    if args.data is None:
        raise UsageError(f"{args.model} is a click model: --data names a log in its layout that it was not trained on")
    try:
        budget = BUDGET if args.budget == DEFAULT_BUDGET else float(args.budget)
    except ValueError:
        budget = -1.0
    if not 0 <= budget < 1:
        raise UsageError(f"--budget {args.budget}: of a click model the share of normalised entropy, such as 0.0005")
    say = (lambda text: None) if args.json else (lambda text: print(text, file=sys.stderr, flush=True))
    targets = [part.strip() for part in (args.to or "").split(",") if part.strip()]
    output = Path(args.output or f"runs/{Path(args.model).resolve().name}-low")
    with working_in(output):
        report = compress_clicks(folder, args.data, output, budget=budget, targets=targets, say=say)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
        return 0
    report.print_table()
    print(f"the model, recipe.json and report.md are in {output}")
    return 0


def _run_vision(args: argparse.Namespace) -> int:
    from edgewright.compression.vision import VisionSettings, compress_bundled

    def say(sentence: str) -> None:
        if not args.json:
            print(sentence, file=sys.stderr, flush=True)

    if args.method not in ("rtn", "qat") or args.sweep or args.kv or args.data or args.files_only:
        raise UsageError(
            f"{args.model} is an image classifier: --method is rtn (calibrate) or qat (also train, below 8 bits), and "
            "--sweep, --kv, --data and --files-only are for language models"
        )
    if args.bits != int(args.bits):
        raise UsageError(f"--bits {args.bits:g}: an image classifier takes whole widths from 2 to 8")
    budget = TrainingBudget.parse(args.budget)
    if budget.steps is None:
        raise UsageError(f"--budget {args.budget}: an image classifier is trained for a number of steps, such as 150")
    settings = VisionSettings(
        bits=int(args.bits),
        steps=budget.steps if args.method == "qat" and args.bits < 8 else 0,
        learning_rate=args.learning_rate or VisionSettings.learning_rate,
        runs=0 if args.no_bench else VisionSettings.runs,
        seed=args.seed,
        targets=tuple(part.strip() for part in (args.to or "onnx").split(",") if part.strip()),
    )
    if "pte" in settings.targets:  # a missing extra says so before the work
        from edgewright.export.executorch.layers import import_executorch

        import_executorch()
    output = Path(args.output or f"runs/{args.model}-{args.bits:g}bit")
    with working_in(output):
        report = compress_bundled(args.model, output, settings, say=say)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
        return 0
    report.print_table()
    say(f"files, report.md and plots are in {output}")
    return 0


def _run_language(args: argparse.Namespace) -> int:
    from edgewright.compression.pipeline import compress
    from edgewright.compression.sweep import sweep

    def say(sentence: str) -> None:
        if not args.json:
            print(sentence, file=sys.stderr, flush=True)

    if args.to is not None:
        raise UsageError(
            f"--to {args.to} is for image classifiers: compressing a language model gives GGUF; other files are "
            f"written by edgewright export {args.model} --to {args.to}"
        )
    settings = CompressSettings(
        model=args.model,
        bits=args.bits,
        method=args.method,
        baselines=() if args.no_baselines or args.method != "qat" else ("rtn", "mse", "gptq"),
        budget=TrainingBudget.parse(args.budget),
        data=args.data,
        kv=args.kv,
        layout=args.layout,
        learning_rate=args.learning_rate,
        block_length=args.block_length,
        evaluation_blocks=args.blocks,
        benchmark=not args.no_bench,
        seed=args.seed,
        lenient=args.lenient,
    )
    name = default_name(args.model) or "model"
    if args.sweep:
        output = Path(args.output or f"runs/{name}-sweep")
        report: Report | None = sweep(settings, output, say=say, progress=not args.json)
    else:
        output = Path(args.output or f"runs/{name}-{args.bits:g}bit")
        report = compress(settings, output, say=say, progress=not args.json, files_only=args.files_only)
    if report is None:
        say(f"{output / (args.method + '.gguf')} is written and verified")
        return 0
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
        return 0
    report.print_table(metrics=[metric for metric in COLUMNS if any(row.metric == metric for row in report.rows)])
    print(f"files, report.md and pareto.png are in {output}")
    if not args.sweep:
        print(f"next: edgewright chat {output / (args.method + '.gguf')}")
    return 0

"""edgewright bench: size, speed, memory and share of the bandwidth limit of exported files, side by side.

Language models are timed writing text, other programs (.onnx, .pte) running once.
"""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="exported files (.gguf, .onnx, .pte) to compare")
    parser.add_argument("--prompt-tokens", type=int, default=256, metavar="N", help="prompt length (default 256)")
    parser.add_argument("--decode-tokens", type=int, default=64, metavar="N", help="tokens to decode (default 64)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows of a program's inputs (default 1)")
    parser.add_argument(
        "--length",
        type=int,
        default=128,
        metavar="N",
        help="length of a program's inputs where it is free (default 128)",
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="counted rounds (default 5)")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="threads (default: every core)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    parser.add_argument("--output", metavar="FOLDER", help="also write report.json and report.md there")


def run(args: argparse.Namespace) -> int:
    from edgewright.runtime.benchmark import benchmark_files, report_columns

    report = benchmark_files(
        args.files,
        prompt_tokens=args.prompt_tokens,
        decode_tokens=args.decode_tokens,
        batch=args.batch,
        length=args.length,
        repeats=args.repeats,
        threads=args.threads,
        progress=not args.json,
    )
    if args.output:
        report.save(args.output)
    if args.json:
        sys.stdout.write(report.to_json())
    else:
        report.print_table(metrics=report_columns(report))
    return 0

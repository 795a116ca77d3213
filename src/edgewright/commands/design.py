"""Shapes of a decoder for a number of weights: one candidate a depth, with its predicted size and speed.

Widths are solved so that every candidate has the same number of stored weights within 1 %. The speed is a bound: the
bytes that decoding a token reads over the bytes that memory gives in a second, measured here or told.

  edgewright design --params 1.5e6 --vocab 4096 --depths 2,4,8,16,24
  edgewright design --params 125e6 --vocab 32000 --bits 4.5 --context 2048 --output shapes
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from edgewright.errors import UsageError
from edgewright.io.atomic import write_text
from edgewright.measure.machine import read_bandwidth
from edgewright.measure.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", type=float, required=True, metavar="N", help="stored weights, table included")
    parser.add_argument("--vocab", type=int, default=32000, metavar="V", help="tokens (default 32000)")
    parser.add_argument("--depths", default="4,8,12,16,24,30", help="numbers of blocks (default 4,8,12,16,24,30)")
    parser.add_argument("--kv-ratio", type=int, default=3, help="query heads for each key head (default 3)")
    parser.add_argument("--head-dim", type=int, help="width of a head (default 64, or less for small models)")
    parser.add_argument("--share", action="store_true", help="run each stored block twice (MobileLLM-LS)")
    parser.add_argument("--bits", type=float, default=4.5, help="bits of a stored weight, steps included (default 4.5)")
    parser.add_argument("--kv-bits", type=float, default=16, help="bits of a cached number (default 16)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of context (default 2048)")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="of the device's memory (default: measured)")
    parser.add_argument("--output", metavar="FOLDER", help="also write each candidate as FOLDER/<depth>.json")
    parser.add_argument("--json", action="store_true", help="print the candidates as JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    try:
        depths = [int(part) for part in args.depths.split(",")]
    except ValueError:
        raise UsageError(f"--depths {args.depths!r}: numbers separated by commas, such as 4,8,16") from None
    if args.bandwidth is not None and not args.bandwidth > 0:
        raise UsageError(f"--bandwidth {args.bandwidth:g}: gigabytes a second, more than 0")

    from edgewright.models.decoder.design import design_sweep
    from edgewright.models.decoder.footprint import footprint

    configs = design_sweep(args.params, depths, args.vocab, args.kv_ratio, args.head_dim, args.share)
    bandwidth = 1e9 * args.bandwidth if args.bandwidth else read_bandwidth().median
    report = Report(f"decoders of {args.params:,.0f} weights", {**vars(args), "bytes_per_second": bandwidth})
    candidates = []
    for config in configs:
        cost = footprint(config, args.bits, args.kv_bits, args.context)
        subject = f"{config.num_stored_layers} blocks"
        candidates.append({"config": config.to_diff_dict(), **cost.to_dict()})
        for metric, value, unit in (
            ("hidden", config.hidden_size, ""),
            ("feed_forward", config.of_layer("intermediate_size", 0), ""),
            ("heads", config.of_layer("num_attention_heads", 0), ""),
            ("key_heads", config.of_layer("num_key_value_heads", 0), ""),
            ("weights", cost.stored, ""),
            ("table_share", cost.embedding_share, ""),
            ("file_bytes", cost.weight_bytes, "bytes"),
            ("cache_bytes", cost.cache_bytes, "bytes"),
            ("prefill_flops", cost.prefill_flops, "operations/token"),
            ("decode_bound", cost.tokens_per_second(bandwidth), "tokens/s"),
        ):
            report.add(metric, value, subject=subject, unit=unit)
        if args.output:
            path = Path(args.output) / f"{config.num_stored_layers}.json"
            write_text(path, json.dumps(config.to_diff_dict(), indent=2) + "\n")
    if args.json:
        print(json.dumps({"bytes_per_second": bandwidth, "candidates": candidates}, indent=2))
        return 0
    report.print_table()
    if skipped := len(depths) - len(configs):
        print(f"{skipped} of {len(depths)} depths have no width within 1 % of {args.params:,.0f} weights")
    print(f"decode_bound: memory of {bandwidth / 1e9:.1f} GB/s over the bytes of a token at {args.context} tokens")
    return 0

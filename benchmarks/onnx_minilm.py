"""MiniLM-L6 in ONNX Runtime: float, 8-bit, 4-bit and 2-bit weights from `export_onnx`: bytes, latency in turn, error.

python benchmarks/onnx_minilm.py [--repeats 9] [--threads 1]

Weights are rounded to nearest with searched steps, one a row; the error is that of the file against its own model in
PyTorch, the cosine that of its sentence vectors against the float model's.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import edgewright
from edgewright import QuantConfig, Report, WeightConfig, convert_, quantize_
from edgewright.export.onnx.exporter import OnnxExport, export_onnx
from edgewright.io.text import load_texts, token_blocks
from edgewright.measure.timing import paired_ratio
from edgewright.quantization.config import Rule
from edgewright.runtime.benchmark import benchmark_files
from edgewright.runtime.program import open_program
from edgewright.runtime.program_benchmark import time_programs
from results import save

CASES = {"float": None, "int8": "int8", "int4": "int4", "seq2 (2 bits)": "seq2"}
LENGTH = 128
SENTENCES = 64
TEXT_LENGTH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    model, tokenizer = edgewright.load("minilm-l6")
    texts = token_blocks(load_texts(None), tokenizer, TEXT_LENGTH)[:SENTENCES]
    with tempfile.TemporaryDirectory() as folder:
        exports = {name: export(model, grid, Path(folder) / f"{name.split()[0]}.onnx") for name, grid in CASES.items()}
        files = {name: result.path for name, result in exports.items()}
        memory = benchmark_files(list(files.values()), length=LENGTH, repeats=1, threads=args.threads)
        turns = time_programs(files, 1, LENGTH, args.repeats, args.threads)
        vectors = {name: embed(path, texts) for name, path in files.items()}
    report = Report("onnx", {"length": LENGTH, "repeats": args.repeats, "threads": args.threads})
    for name, result in exports.items():
        report.add("file_size", result.bytes / 1e6, subject=name, unit="MB")
        latency = turns[name].map(lambda seconds: seconds * 1e3, "ms")
        report.add("latency", latency.median, subject=name, se=latency.spread, n=latency.n, unit="ms")
        ratio = paired_ratio(turns[name], turns["float"])
        report.add("latency against float", ratio.median, subject=name, se=ratio.spread, n=ratio.n, unit="x")
        report.add("peak_memory", memory.value("peak_memory", result.path.name), subject=name, unit="MB")
        report.add("error against PyTorch", result.max_error, subject=name)
        cosine = torch.cosine_similarity(vectors[name], vectors["float"])
        error = float(cosine.std() / len(cosine) ** 0.5)
        report.add("cosine to float", float(cosine.mean()), subject=name, se=error, n=len(cosine))
    report.notes.append(f"batch 1, {LENGTH} tokens, threads: {args.threads}; ± of times: half the interquartile range")
    report.print_table()
    print(save(report, "onnx"))


def export(model: torch.nn.Module, grid: str | None, path: Path) -> OnnxExport:
    copied = copy.deepcopy(model)
    if grid is not None:
        quantize_(copied, QuantConfig((Rule("*", WeightConfig(grid, scale="mse")),), skip=()))
        convert_(copied)
    return export_onnx(copied, path, storage="smallest" if grid == "seq2" else "nibbles")


def embed(path: Path, tokens: Tensor) -> Tensor:
    """Sentence vectors [n, 384]: the mean of the last hidden states."""
    with open_program(path) as program:
        ids = tokens.to(torch.int64)
        hidden = program.run({"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})[0]
    return torch.from_numpy(hidden).mean(1)


if __name__ == "__main__":
    main()

"""Decoding speed of our files beside llama.cpp's own file of the same type: same engine, alternating runs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import edgewright
from edgewright.compression.methods import round_to_nearest
from edgewright.export.gguf.exporter import export_gguf, llama_cpp_quantize
from edgewright.measure.report import Report
from edgewright.runtime.benchmark import benchmark_files
from results import save


def main(repeats: int = 9) -> None:
    model, tokenizer = edgewright.load("smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for bits, kind in ((4, "Q4_0"), (8, "Q8_0")):
            ours, theirs = Path(folder) / f"edgewright-{kind}.gguf", Path(folder) / f"llama.cpp-{kind}.gguf"
            export_gguf(round_to_nearest(model, bits), tokenizer, ours, verify=False)
            llama_cpp_quantize(model, tokenizer, theirs, type=kind)
            files += [ours, theirs]
        measured = benchmark_files(files, prompt_tokens=128, decode_tokens=64, repeats=repeats)
    report = Report("Decoding speed, ours and llama.cpp's own file of the same type")
    for row in measured.rows:
        subject = row.subject.removesuffix(".gguf")
        report.add(row.metric, row.value, subject=subject, se=row.se, n=row.n, unit=row.unit)
    for kind in ("Q4_0", "Q8_0"):
        ratio = report.value("decode", f"edgewright-{kind}") / report.value("decode", f"llama.cpp-{kind}")
        report.add("decode_ratio", ratio, subject=f"edgewright-{kind}")
    report.print_table()
    print(save(report, "decode-speed"))

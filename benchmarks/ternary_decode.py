"""What ternary weights weigh and how fast they decode in llama.cpp: each layout beside Q4_0 and F16 of one model.

SmolLM2-135M has rows of 576, which TQ2_0 (blocks of 256) cannot hold: they go to Q2_0 or, for speed, to Q4_0, which
holds ternary codes as they are; rows of 1536 take TQ1_0 or TQ2_0. All files but F16 have an 8-bit table.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import edgewright
from edgewright.compression.methods import round_to_nearest
from edgewright.export.gguf.exporter import export_gguf
from edgewright.measure.report import Report
from edgewright.quantization.api import convert_
from edgewright.runtime.benchmark import benchmark_files
from edgewright.systems.ternary_binary_nlg.model import quantize_encoder_decoder_
from results import save

LAYOUTS = ("small", "auto")  # "fast" picks the same types as "auto" here


def measure(folder: Path, repeats: int, decode_tokens: int = 64) -> Report:
    """Export, run the smallest file against PyTorch, and time all files in turns."""
    model, tokenizer = edgewright.load("smollm2-135m")
    ternary = convert_(quantize_encoder_decoder_(copy.deepcopy(model), "ternary", embedding="int8"))
    files = []
    types: dict[str, str] = {}
    for layout in LAYOUTS:
        files.append(folder / f"ternary, {layout}.gguf")
        # Both hold the same codes: one of them is run against PyTorch.
        export = export_gguf(ternary, tokenizer, files[-1], layout=layout, verify=layout == "small", progress=False)
        types[files[-1].stem] = ", ".join(sorted({row.written for row in export.table if "ternary" in row.holds}))
    files += [folder / "Q4_0.gguf", folder / "F16.gguf"]
    export_gguf(round_to_nearest(model, 4), tokenizer, files[-2], verify=False, progress=False)
    export_gguf(model, tokenizer, files[-1], embedding="F16", verify=False, progress=False)
    measured = benchmark_files(files, prompt_tokens=128, decode_tokens=decode_tokens, repeats=repeats)
    report = Report("Decoding SmolLM2-135M with ternary weights in llama.cpp, by layout")
    for row in measured.rows:
        name = row.subject.removesuffix(".gguf")
        subject = f"{name} ({types[name]})" if name in types else name
        report.add(row.metric, row.value, subject=subject, se=row.se, n=row.n, unit=row.unit)
    for name, kinds in types.items():
        for other in ("Q4_0", "F16"):
            ratio = report.value("decode", f"{name} ({kinds})") / report.value("decode", other)
            report.add(f"decode_against_{other}", ratio, subject=f"{name} ({kinds})")
    return report


def main(repeats: int = 9) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), repeats)
    report.print_table()
    print(save(report, "ternary-decode"))

"""Blocks that run twice beside blocks that run once, at 4 bits: bytes and decoding speed in llama.cpp and ExecuTorch.

The weights are SmolLM2's first blocks. A GGUF file holds every executed layer, a .pte every stored block once.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import edgewright
from edgewright.compression.methods import round_to_nearest
from edgewright.export.executorch.exporter import export_executorch
from edgewright.export.gguf.exporter import export_gguf
from edgewright.measure.report import Report
from edgewright.models.decoder.from_native import from_native
from edgewright.models.decoder.native import share_blocks
from edgewright.pruning.depth import keep_layers_
from edgewright.runtime.benchmark import benchmark_files
from results import save

BLOCKS = 10
CONTEXT = 256


def main(repeats: int = 7) -> None:
    model, tokenizer = edgewright.load("smollm2-135m")
    keep_layers_(model, range(BLOCKS))
    once = from_native(model)
    variants: dict[str, Any] = {"run once": once, "run twice": share_blocks(once)}
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, decoder in variants.items():
            packed = round_to_nearest(decoder, 4)
            path = Path(folder) / name.replace(" ", "-")
            files[path.with_suffix(".gguf")] = f"{BLOCKS} blocks {name}, llama.cpp"
            files[path.with_suffix(".pte")] = f"{BLOCKS} blocks {name}, ExecuTorch"
            export_gguf(packed, tokenizer, path.with_suffix(".gguf"), verify=False)
            export_executorch(packed, tokenizer, path.with_suffix(".pte"), context=CONTEXT, verify=False)
        measured = benchmark_files(list(files), prompt_tokens=96, decode_tokens=48, repeats=repeats)
    report = Report(f"{BLOCKS} blocks of SmolLM2 at 4 bits, run once and run twice")
    names = {path.name: name for path, name in files.items()}
    for row in measured.rows:
        subject = names.get(row.subject, row.subject)
        report.add(row.metric, row.value, subject=subject, se=row.se, n=row.n, unit=row.unit)
    for runtime in ("llama.cpp", "ExecuTorch"):
        pair = [f"{BLOCKS} blocks {name}, {runtime}" for name in ("run twice", "run once")]
        for metric in ("decode", "file_size"):
            ratio = report.value(metric, pair[0]) / report.value(metric, pair[1])
            report.add(f"{metric}_ratio", ratio, subject=pair[0])
    report.print_table()
    print(save(report, "mobilellm-sharing"))


if __name__ == "__main__":
    main()

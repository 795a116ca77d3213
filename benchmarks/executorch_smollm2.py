"""SmolLM2 as a .pte: seconds to lower, bytes beside the arithmetic of its parts, speed, and what the file changes."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import edgewright
from edgewright.compression.methods import round_to_nearest
from edgewright.export.executorch.exporter import export_executorch
from edgewright.io.text import load_texts, token_blocks
from edgewright.measure.machine import usable_cores
from edgewright.measure.report import Report
from edgewright.measure.timing import Measurement
from edgewright.runtime.executorch import ExecuTorchEngine
from results import save

TOKENS = 512  # compared with PyTorch
PROMPT, DECODED = 128, 64


def main(repeats: int = 7, bits: float = 4) -> None:
    model, tokenizer = edgewright.load("smollm2-135m")
    packed = round_to_nearest(model, bits)
    report = Report("SmolLM2-135M as an ExecuTorch file", {"bits": bits, "threads": usable_cores()})
    subject = f"smollm2-{bits:g}bit.pte"
    with tempfile.TemporaryDirectory() as folder:
        busy = time.process_time()
        export = export_executorch(packed, tokenizer, Path(folder) / subject)
        report.add("processor_seconds", time.process_time() - busy, subject=subject, unit="s")
        report.add("trace_and_lower", export.seconds["trace"] + export.seconds["lower"], subject=subject, unit="s")
        report.add("file_size", export.bytes / 1e6, subject=subject, unit="MB")
        report.add("arithmetic", sum(export.parts.values()) / 1e6, subject=subject, unit="MB")
        report.add("size_ratio", export.ratio, subject=subject)
        report.add("delegated", 100 * export.delegation.share, subject=subject, unit="%")
        with ExecuTorchEngine(export.path, check=False) as engine:
            _quality(report, engine, model, packed, tokenizer, subject)
            _speed(report, engine, subject, repeats)
    report.notes += [*export.summary(), f"{PROMPT} prompt tokens, {DECODED} decoded, medians of {repeats} after one."]
    report.print_table()
    print(save(report, "executorch-smollm2"))


def _quality(report: Report, engine: ExecuTorchEngine, model, packed, tokenizer, subject: str) -> None:
    """KL and top-1 of the file against the packed model (its 8-bit inputs) and against the float model."""
    ids = token_blocks(load_texts(split="evaluation"), tokenizer, TOKENS, 1)[0].tolist()
    theirs = torch.from_numpy(engine.logits(ids)).log_softmax(-1)
    for name, reference in (("packed", packed), ("float", model)):
        with torch.no_grad():
            ours = reference(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
        kl = (ours.exp() * (ours - theirs)).sum(-1)
        same = (ours.argmax(-1) == theirs.argmax(-1)).float()
        for metric, values in ((f"kl_to_{name}", kl), (f"top1_as_{name}", same)):
            error = float(values.std()) / len(values) ** 0.5
            report.add(metric, float(values.mean()), subject=subject, se=error, n=len(values))


def _speed(report: Report, engine: ExecuTorchEngine, subject: str, repeats: int) -> None:
    prompt = np.random.default_rng(0).integers(0, engine.tokens, PROMPT).tolist()
    runs = [engine.generate(prompt, DECODED + 1, ignore_end=True) for _ in range(repeats + 1)][1:]
    for metric in ("prefill", "decode"):
        value = Measurement.of(getattr(run, f"{metric}_tokens_per_second") for run in runs)
        report.add(metric, value.median, subject=subject, se=value.spread, n=value.n, unit="tok/s")


if __name__ == "__main__":
    main()

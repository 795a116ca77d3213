"""Peak memory of second-order calibration for few and for many samples: it must not grow with their number."""

from __future__ import annotations

import torch

import edgewright
from edgewright.compression.methods import linear_config
from edgewright.measure.memory import peak_memory
from edgewright.measure.report import Report
from edgewright.quantization.gptq import gptq_
from results import save

LENGTH = 64


def load_only() -> int:
    model, _ = edgewright.load("smollm2-135m")
    return 4 * sum(p.numel() for p in model.parameters())


def calibrate(samples: int) -> None:
    model, _ = edgewright.load("smollm2-135m")
    blocks = torch.randint(0, 40000, (samples, LENGTH), generator=torch.Generator().manual_seed(0))
    gptq_(model, linear_config(model, 4, "mse"), blocks)


def main() -> None:
    report = Report("Peak memory of second-order calibration, SmolLM2-135M")
    loaded = peak_memory(load_only)
    report.add("peak_memory", loaded.peak / 1e6, subject="load only", unit="MB")
    report.add("weights", loaded.result / 1e6, subject="load only", unit="MB")
    report.add("bound", (1.5 * loaded.result + 300e6) / 1e6, subject="load only", unit="MB")
    for samples in (8, 64):
        peak = peak_memory(calibrate, samples)
        report.add("peak_memory", peak.peak / 1e6, subject=f"{samples} x {LENGTH} tokens", unit="MB")
    report.print_table()
    print(save(report, "gptq-memory"))

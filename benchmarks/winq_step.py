"""Cost of WinQ on a training step under quantisation: time and peak memory with and without, and one reset.

MiniLM-L6 at 2 bits, 16 sentences of 32 tokens: few tokens a step, so the price of the noise shows most. The variants
take turns in one process for time; each has a process of its own for memory.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch

from edgewright.data.sentences import SentenceBench, SentenceSettings, embedding_loss
from edgewright.measure.memory import peak_memory
from edgewright.measure.report import Report
from edgewright.measure.timing import Measurement, alternate, paired_ratio
from edgewright.quantization.api import quantize_
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.systems.winq.training import WinQ
from results import save

VARIANTS = {
    "plain": None,
    "winq": WinQ(sigma=0.05, sigma_scale=0.05, sigma_mode="relative"),
    "winq, flips not counted": WinQ(sigma=0.05, sigma_scale=0.05, sigma_mode="relative", count_flips=False),
}
ENDLESS = 10**6  # steps of the run that the measured ones belong to
BATCH = 16


def bench() -> SentenceBench:
    return SentenceBench(SentenceSettings(training_sentences=64, held_out_sentences=8))


class Step:
    """One optimizer step on a fixed batch."""

    def __init__(self, bench: SentenceBench, winq: WinQ | None) -> None:
        self.model = copy.deepcopy(bench.model).train()
        quantize_(self.model, QuantConfig(rules=(Rule("encoder.layer.*", WeightConfig("seq2", initial="mse")),)))
        self.batch = {name: value[:BATCH] for name, value in bench.train.items()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        self.loss: Any = embedding_loss if winq is None else winq.attach(self.model, embedding_loss, ENDLESS)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.model, self.batch).backward()
        self.optimizer.step()


def memory_of(name: str) -> None:
    step = Step(bench(), VARIANTS[name])
    for _ in range(3):
        step()
    if VARIANTS[name] is not None:
        step.loss.reset(1)
        step()


def main(repeats: int = 15) -> None:
    report = Report("Training step with and without WinQ, MiniLM-L6 at 2 bits, 16 x 32 tokens")
    shared = bench()
    steps = {name: Step(shared, winq) for name, winq in VARIANTS.items()}
    times = alternate(steps, repeats=repeats, warmup=2)
    for name, taken in times.items():
        report.add("step", taken.median, subject=name, se=taken.spread, n=taken.n, unit="s")
        ratio = paired_ratio(taken, times["plain"])
        report.add("step_ratio", ratio.median, subject=name, se=ratio.spread, n=ratio.n)
    resets = []
    for turn in range(5):
        began = time.perf_counter()
        steps["winq"].loss.reset(turn)
        resets.append(time.perf_counter() - began)
    reset = Measurement.of(resets, "s")
    report.add("reset", reset.median, subject="winq", se=reset.spread, n=reset.n, unit="s")
    peaks = {name: peak_memory(memory_of, name).peak for name in VARIANTS}
    for name, peak in peaks.items():
        report.add("peak_memory", peak / 1e6, subject=name, unit="MB")
        report.add("memory_ratio", peak / peaks["plain"], subject=name)
    report.print_table()
    print(save(report, "winq-step"))

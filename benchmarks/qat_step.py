"""Cost of training under quantisation: step time and peak memory beside plain fine-tuning and torchao's QAT.

Same model, same batch, same loss, same optimizer; each variant has its own process for memory, and all of them take
turns in one process for time.
"""

from __future__ import annotations

import gc

import torch
from torch import nn

import edgewright
from edgewright.measure.memory import peak_memory
from edgewright.measure.report import Report
from edgewright.measure.timing import alternate, paired_ratio
from edgewright.quantization.api import quantize_
from edgewright.quantization.config import QuantConfig
from results import save

GROUP = 32
TOKENS = (2, 256)


def plain() -> nn.Module:
    model, _ = edgewright.load("smollm2-135m")
    return model


def ours() -> nn.Module:
    return quantize_(plain(), QuantConfig.weights("int4", GROUP))


def torchao_qat() -> nn.Module:
    from torchao.quantization import quantize_ as torchao_quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model = plain()
    config = QATConfig(
        weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=GROUP, is_symmetric=True), step="prepare"
    )
    torchao_quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name)
    return model


VARIANTS = {"plain": plain, "edgewright": ours, "torchao": torchao_qat}


class Step:
    """One optimizer step on a fixed batch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, foreach=False, fused=True)
        self.tokens = torch.randint(0, 40000, TOKENS, generator=torch.Generator().manual_seed(0))

    def __call__(self) -> None:
        loss = self.model(self.tokens, labels=self.tokens, use_cache=False).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def memory_of(name: str) -> None:
    step = Step(VARIANTS[name]())
    for _ in range(2):
        step()


def main(repeats: int = 5) -> None:
    report = Report("Training step under quantisation, int4 in groups of 32, SmolLM2-135M, 2 x 256 tokens")
    times = alternate({name: Step(build()) for name, build in VARIANTS.items()}, repeats=repeats, warmup=1)
    for name, time in times.items():
        report.add("step", time.median, subject=name, se=(time.high - time.low) / 2, n=time.n, unit="s")
        ratio = paired_ratio(time, times["plain"])
        report.add("step_ratio", ratio.median, subject=name, se=(ratio.high - ratio.low) / 2, n=ratio.n)
    gc.collect()
    peaks = {name: peak_memory(memory_of, name).peak for name in VARIANTS}
    for name, peak in peaks.items():
        report.add("peak_memory", peak / 1e6, subject=name, unit="MB")
        report.add("memory_ratio", peak / peaks["plain"], subject=name)
    report.print_table()
    print(save(report, "qat-step"))

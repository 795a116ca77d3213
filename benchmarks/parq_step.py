"""Cost of quantising inside the optimizer: one step beside the bare base optimizer and torchao's prototype of PARQ.

20 million parameters in matrices of a small transformer, AdamW underneath, every variant on the same gradients. Steps
are timed in the middle of the annealing, where the map works hardest; one step in ten refits the targets, and a sample
is the mean of ten steps, so every sample pays for one refit. Variants take turns in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from edgewright.measure.memory import peak_memory
from edgewright.measure.report import Report
from edgewright.measure.timing import alternate, paired_ratio
from edgewright.systems.parq.lsbq import LSBQ, Uniform
from edgewright.systems.parq.optimizer import QuantOptimizer
from edgewright.systems.parq.proximal import ProxPARQ
from results import save

SHAPES = ((512, 512), (512, 512), (512, 512), (512, 512), (2048, 512), (512, 2048)) * 6  # 18.9 million
VOCABULARY = (4096, 384)  # 1.6 million, not quantised
STEPS = 10
TARGETS = {
    "seq2 by row": Uniform("seq2", "mean", "row", "float32"),
    "seq2 by tensor": Uniform("seq2", "mean", "tensor", "float32"),
    "LSBQ 2 bit by row": LSBQ(2, granularity="row"),
}
ANNEALING = (0, 10**6)  # long enough to stay in its middle


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in (*SHAPES, VOCABULARY):
        parameter = nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
        parameter.grad = torch.randn(shape, generator=generator) * 1e-3
        made.append(parameter)
    return made


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-5, fused=True)


def bare() -> torch.optim.Optimizer:
    return adamw(weights())


def ours(name: str) -> torch.optim.Optimizer:
    parameters = weights()
    groups = [{"params": parameters[:-1], "targets": TARGETS[name]}, {"params": parameters[-1:]}]
    optimizer = QuantOptimizer(adamw(groups), ProxPARQ(*ANNEALING))
    for group in optimizer.quantized_groups():
        group["quant_steps"] = ANNEALING[1] // 2
    return optimizer


def torchao(name: str) -> torch.optim.Optimizer:
    from torchao.prototype.parq import optim, quant

    parameters, config = weights(), TARGETS[name]
    bits = config.bits if isinstance(config, LSBQ) else 2
    groups = [{"params": parameters[:-1], "quant_bits": bits}, {"params": parameters[-1:]}]
    quantizer = quant.LSBQuantizer() if isinstance(config, LSBQ) else quant.UnifQuantizer()
    optimizer = optim.QuantOptimizer(
        adamw(groups), quantizer, optim.ProxPARQ(*ANNEALING), quant_per_channel=config.granularity == "row"
    )
    optimizer.step()  # it insists on beginning at step 0
    optimizer.num_steps = ANNEALING[1] // 2
    return optimizer


def steps(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def run() -> None:
        for _ in range(STEPS):
            optimizer.step()

    return run


def memory_of(side: str, name: str) -> None:
    optimizer = {"bare": lambda: bare(), "edgewright": lambda: ours(name), "torchao": lambda: torchao(name)}[side]()
    steps(optimizer)()


def main(repeats: int = 5) -> None:
    report = Report("Optimizer step at 20 million parameters: AdamW bare, with PARQ, with torchao's PARQ")
    for name in TARGETS:
        cases = {"bare": bare(), "edgewright": ours(name), "torchao": torchao(name)}
        times = alternate({side: steps(made) for side, made in cases.items()}, repeats=repeats, warmup=1)
        for side, time in times.items():
            step = time.map(lambda seconds: seconds / STEPS * 1e3)
            report.add("step", step.median, subject=f"{name}, {side}", se=step.spread, n=step.n, unit="ms")
        for metric, side, other in (
            ("step_ratio", "edgewright", "bare"),
            ("step_ratio", "torchao", "bare"),
            ("against_torchao", "edgewright", "torchao"),
        ):
            ratio = paired_ratio(times[side], times[other])
            report.add(metric, ratio.median, subject=f"{name}, {side}", se=ratio.spread, n=ratio.n)
        del cases
    name = "seq2 by row"
    copy = 4 * sum(rows * columns for rows, columns in SHAPES)
    peaks = {side: peak_memory(memory_of, side, name).peak for side in ("bare", "edgewright", "torchao")}
    for side, peak in peaks.items():
        report.add("peak_memory", peak / 1e6, subject=f"{name}, {side}", unit="MB")
        if side != "bare":
            report.add("extra_copies", (peak - peaks["bare"]) / copy, subject=f"{name}, {side}", unit="latents")
    report.notes.append("extra_copies: peak memory above the bare optimizer, in copies of the quantised weights")
    report.print_table()
    print(save(report, "parq-step"))

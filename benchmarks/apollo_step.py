"""One optimizer step on the weights of SmolLM2-135M, in time and memory: APOLLO beside AdamW and what else saves state.

Every optimizer has its own 134.5 million random weights and the same gradients; steps take turns in one process.
"AdamW" is torch's fused kernel, "AdamW, foreach" its list operations; torchao compiles its step first, where a
compiler is found. The slow ones, Muon with its matrix products and GaLore with its singular vectors, stand beside the
others on the matrices of one layer of the 30.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from edgewright.errors import MissingPackage
from edgewright.measure.memory import peak_memory
from edgewright.measure.report import Report
from edgewright.measure.timing import alternate, paired_ratio
from edgewright.systems.apollo import APOLLO, APOLLOMini, apollo_param_groups, state_bytes
from edgewright.systems.apollo.peers import named_optimizer
from results import save

RANK = 64
SHAPES = {
    "q_proj": (576, 576),
    "k_proj": (192, 576),
    "v_proj": (192, 576),
    "o_proj": (576, 576),
    "gate_proj": (1536, 576),
    "up_proj": (1536, 576),
    "down_proj": (576, 1536),
}
WHOLE = (
    "AdamW",
    "AdamW, foreach",
    "AdamW 8-bit (torchao)",
    "APOLLO",
    "APOLLO, projections kept",
    "APOLLO-Mini",
)
LAYER = ("AdamW", "AdamW 8-bit (torchao)", "Adafactor", "Muon", "GaLore", "APOLLO", "APOLLO-Mini")


def weights(layers: int, embedding: bool) -> nn.Module:
    """The shapes of SmolLM2 as named parameters with gradients."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> nn.Parameter:
        parameter = nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
        parameter.grad = torch.randn(shape, generator=generator) * 1e-3
        return parameter

    model = nn.Module()
    if embedding:
        model.embed_tokens = nn.Embedding(1, 576)
        model.embed_tokens.weight = made(49152, 576)
    model.norm = nn.RMSNorm(576)
    model.norm.weight = made(576)
    model.layers = nn.ModuleList()
    for _ in range(layers):
        block = nn.Module()
        for name, shape in SHAPES.items():
            holder = nn.Module()
            holder.weight = made(*shape)
            block.add_module(name, holder)
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = nn.RMSNorm(576)
            norm.weight = made(576)
            block.add_module(name, norm)
        model.layers.append(block)
    return model


def optimizer(method: str, layers: int, embedding: bool) -> torch.optim.Optimizer:
    model = weights(layers, embedding)
    if method == "APOLLO, projections kept":
        return APOLLO(apollo_param_groups(model, RANK), 1e-5, scale="auto", cache_projection=True)
    if method == "APOLLO-Mini":
        return APOLLOMini(apollo_param_groups(model, 1), 1e-5)
    return named_optimizer(method, model, 1e-5, RANK)


def step_of(made: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        made.step()

    return step


def one_step(method: str) -> int:
    made = optimizer(method, 30, True)
    made.step()
    return state_bytes(made)


def compare(report: Report, part: str, methods: tuple[str, ...], layers: int, repeats: int) -> None:
    cases = {}
    for method in methods:
        try:
            cases[method] = optimizer(method, layers, part == "whole")
        except MissingPackage as error:
            report.notes.append(str(error))
    times = alternate({method: step_of(made) for method, made in cases.items()}, repeats=repeats, warmup=2)
    for method, time in times.items():
        subject = f"{part}: {method}"
        step = time.map(lambda seconds: seconds * 1e3)
        report.add("step", step.median, subject=subject, se=step.spread, n=step.n, unit="ms")
        ratio = paired_ratio(time, times["AdamW"])
        report.add("step_ratio", ratio.median, subject=subject, se=ratio.spread, n=ratio.n, unit="x AdamW")
        report.add("state", state_bytes(cases[method]) / 1e6, subject=subject, unit="MB")


def main(repeats: int = 7) -> None:
    report = Report("Optimizer step on the weights of SmolLM2-135M")
    compare(report, "whole", WHOLE, 30, repeats)
    compare(report, "one layer", LAYER, 1, repeats)
    for method in ("AdamW", "APOLLO", "APOLLO-Mini"):
        peak = peak_memory(one_step, method)
        report.add("peak_memory", peak.peak / 1e6, subject=f"whole: {method}", unit="MB")
    report.notes.append("peak_memory: of a fresh process with weights, gradients, state and one step")
    report.print_table()
    print(save(report, "apollo-step"))

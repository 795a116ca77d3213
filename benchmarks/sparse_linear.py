"""R-Sparse's kernel beside torch's dense layer, on matrices larger than the cache, and SmolLM2-135M decoding.

`layer` rows: one token through one matrix, the dense side `F.linear` of the same weights; "s 50%, rank 2%" adds the
low-rank path. `codes` are int8 codes in groups of 32, whose dense side is what a packed layer does without the kernel.
`all layers` rows: one token through the 210 sparsified layers of SmolLM2, without attention and head;
`decode` rows: tokens/s of the whole model as transformers runs it, greedily, after the same prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import edgewright
from edgewright.io.packed import PackedLinear, PackedTensor
from edgewright.io.text import load_texts, token_blocks
from edgewright.io.transformers_names import cache_of, with_cache
from edgewright.kernels.sparse_rows import PreparedRows, RowMatrix, why_no_kernel
from edgewright.measure.report import Report
from edgewright.measure.timing import Measurement, alternate, paired_ratio
from edgewright.systems.r_sparse.layer import RSparseLinear
from edgewright.systems.r_sparse.model import achieved_sparsity, apply_rsparse, model_traffic, setting, sparse_layers
from edgewright.systems.r_sparse.plan import RSparseConfig, calibrate
from results import save

SHAPES = ((4096, 11008), (11008, 4096))  # inputs, outputs: 180 MB in float32
SPARSITIES = (0.0, 0.5, 0.7)
PROMPT = "The bicycle was invented because"
TOKENS = 24


def layer_cases(n: int, out: int, kind: str) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=generator)
    weight = torch.randn(out, n, generator=generator) / n**0.5
    scale = torch.linalg.vector_norm(weight, dim=0)
    score = (x.abs() * scale).sort().values
    limits = {s: float(score[int(n * s) - 1]) if s else -1.0 for s in SPARSITIES}
    cases: dict[str, Callable[[], object]] = {}
    if kind == "codes":
        step = weight.reshape(out, -1, 32).abs().amax(-1) / 7
        codes = (weight.reshape(out, -1, 32) / step.unsqueeze(-1)).round().clamp(-8, 7).to(torch.int8)
        packed = PackedLinear(PackedTensor(codes.reshape(out, n), step, "int4"))
        cases["dense"] = lambda: packed(x.unsqueeze(0))
        rows = RowMatrix(packed.codes.t().contiguous(), packed.step.t().contiguous())
    else:
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        weight, token = weight.to(dtype), x.to(dtype)
        cases["dense"] = lambda: F.linear(token.unsqueeze(0), weight)
        rows = RowMatrix(weight.t().contiguous())
    for s, limit in limits.items():
        cases[f"s {s:.0%}"] = PreparedRowsCase(PreparedRows(rows, scale, limit), x)
    rank = round(0.02 * n * out / (n + out))
    down, up = torch.randn(n, rank, generator=generator), torch.randn(rank, out, generator=generator)
    if kind != "float32":
        down, up = down.bfloat16(), up.bfloat16()
    cases["s 50%, rank 2%"] = PreparedRowsCase(PreparedRows(rows, scale, limits[0.5], down, up), x)
    return cases


class PreparedRowsCase:
    """One call of a prepared product."""

    def __init__(self, rows: PreparedRows, x: torch.Tensor) -> None:
        self.rows, self.x = rows, x

    def __call__(self) -> object:
        return self.rows(self.x)


def add(report: Report, times: dict[str, Measurement], label: str, scale: float, unit: str) -> None:
    for name, time in times.items():
        subject = f"{name}, {label}"
        report.add("time", time.median * scale, subject=subject, se=time.spread * scale, n=time.n, unit=unit)
        ratio = paired_ratio(times["dense"], time)
        report.add("speedup", ratio.median, subject=subject, se=ratio.spread, n=ratio.n)


def decoder(model: Any, prompt: torch.Tensor, active: bool) -> Callable[[], list[int]]:
    """Greedy decoding of TOKENS tokens; the prompt is dense in both cases."""

    @torch.no_grad()
    def decode() -> list[int]:
        with setting(model, active=active):
            out = model(input_ids=prompt, use_cache=True)
            cache, tokens = cache_of(out), []
            for _ in range(TOKENS):
                token = out.logits[:, -1:].argmax(-1)
                tokens.append(int(token))
                out = model(input_ids=token, use_cache=True, **with_cache(cache))
            return tokens

    return decode


def all_layers(layers: dict[str, RSparseLinear], inputs: dict[str, torch.Tensor], active: bool) -> Callable[[], None]:
    @torch.no_grad()
    def once() -> None:
        for name, layer in layers.items():
            layer.active = active
            layer(inputs[name])

    return once


def whole_model(report: Report, repeats: int, threads: str) -> None:
    model, tokenizer = edgewright.load("smollm2-135m")
    calibration = token_blocks(load_texts(None, "calibration"), tokenizer, 256, 8)
    config = RSparseConfig(0.5)
    apply_rsparse(model, config, calibrate(model, calibration.split(4), config))
    achieved = achieved_sparsity(model, calibration[:2].split(1))
    traffic = model_traffic(model, achieved)
    for name, value in (("dense", traffic.dense), ("s 50%", traffic.sparse)):
        report.add("bytes_per_token", value + traffic.rest, subject=f"{name}, decode SmolLM2", unit="bytes")
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    layers, inputs = sparse_layers(model), {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, n=name: inputs.__setitem__(n, args[0].clone()))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(input_ids=prompt[:, :1], use_cache=False)
        model(input_ids=prompt, use_cache=False)
    for handle in handles:
        handle.remove()
    inputs = {name: x[:, -1:].contiguous() for name, x in inputs.items()}  # the last token's, of a real prompt
    cases = {"dense": all_layers(layers, inputs, False), "s 50%": all_layers(layers, inputs, True)}
    add(report, alternate(cases, repeats=4 * repeats, warmup=2), f"all layers SmolLM2, {threads}", 1e3, "ms")
    for layer in layers.values():
        layer.active = True
    times = alternate({"dense": decoder(model, prompt, False), "s 50%": decoder(model, prompt, True)}, repeats, 1)
    for name, time in times.items():
        rate = time.map(lambda s: TOKENS / s)
        subject = f"{name}, decode SmolLM2, {threads}"
        report.add("tokens", rate.median, subject=subject, se=rate.spread, n=rate.n, unit="tokens/s")
        ratio = paired_ratio(times["dense"], time)
        report.add("speedup", ratio.median, subject=subject, se=ratio.spread, n=ratio.n)


def measure(repeats: int = 9) -> Report:
    report = Report("R-Sparse: one token through layers that read half of their weights")
    if reason := why_no_kernel():
        report.notes.append(f"no compiled kernel here: {reason}")
        return report
    most = torch.get_num_threads()
    for count in dict.fromkeys((1, most)):
        torch.set_num_threads(count)
        threads = f"{count} thread{'s' if count > 1 else ''}"
        for kind in ("float32", "bfloat16", "codes"):
            for n, out in SHAPES:
                times = alternate(layer_cases(n, out, kind), repeats=repeats, warmup=1)
                add(report, times, f"layer {n} to {out}, {kind}, {threads}", 1e3, "ms")
        whole_model(report, repeats, threads)
    torch.set_num_threads(most)
    return report


def main() -> None:
    report = measure()
    report.print_table()
    print(save(report, "r-sparse-linear"))


if __name__ == "__main__":
    main()

"""Low-bit arena: every method of the house and two peers at 1 to 4 bits, on one model, one text, one budget, one scale.

A sentence encoder (MiniLM-L6) learns under quantisation to give its own full-precision embeddings. All methods quantise
the linear layers of its blocks with one step a row, see the same sentences in the same order for the same number of
steps, and are judged after conversion. llama.cpp's quantiser has its own block formats, which cost more bits: the
picture's axis is what a weight really takes, scales included.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgewright.data.sentences import SentenceBench, SentenceSettings, embedding_loss
from edgewright.errors import MissingPackage
from edgewright.export.gguf import ggml
from edgewright.export.gguf.blocks import ggml_type
from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_object
from edgewright.io.text import load_texts, token_blocks
from edgewright.measure.plot import plot
from edgewright.measure.report import Report
from edgewright.quantization.api import convert_, quantize_
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.quantization.gptq import gptq_
from edgewright.systems.parq.model import convert_parq_, quantized_groups
from edgewright.systems.parq.optimizer import QuantOptimizer
from edgewright.systems.parq.proximal import ProxPARQ
from edgewright.systems.recipe import Claim, Headline, Plan
from edgewright.systems.run import over_seeds
from edgewright.systems.winq.training import WinQ

if TYPE_CHECKING:
    from torch import Tensor

GRIDS = {"1": "binary", "1.58": "ternary", "2": "seq2", "3": "int3", "4": "int4"}
ON_SEQ = "GPTQ-style, no zero"
UNTRAINED = ("RTN", "MSE", "GPTQ-style", ON_SEQ, "llama.cpp")
FROM_GPTQ = "GPTQ, then ParetoQ"  # how `edgewright compress` trains
TRAINED = ("LLM-QAT", "torchao QAT", "PARQ", "ParetoQ", "ParetoQ + WinQ", FROM_GPTQ)
# Formats of llama.cpp nearest to each width, and what it falls back to where rows are no multiple of 256.
LLAMA_CPP = {
    "1": ("Q1_0", "Q1_0"),
    "1.58": ("TQ2_0", "Q4_0"),
    "2": ("Q2_K", "IQ4_NL"),
    "3": ("Q3_K", "IQ4_NL"),
    "4": ("Q4_0", "Q4_0"),
}
TORCHAO_WIDTHS = ("2", "3", "4")  # its grids are integers: no binary, no ternary
INTEGER_AT_TWO = (
    "RTN",
    "MSE",
    "GPTQ-style",
)  # as their sources have it; SEQ's four levels, none of them zero, are ParetoQ's
SCALE_BITS = 16  # one bfloat16 step a row
CALIBRATION_BLOCKS = 128


@dataclass(frozen=True)
class LowBitArena:
    """Budget of each training: steps of `batch` sentences. layers 0 keeps the whole encoder."""

    seed: int = 0
    seeds: int = 2
    steps: int = 80
    batch: int = 16
    tokens: int = 32
    learning_rate: float = 3e-4
    layers: int = 0
    training_sentences: int = 3000
    held_out_sentences: int = 256
    widths: tuple[str, ...] = ("4", "3", "2", "1.58", "1")
    methods: tuple[str, ...] = (*UNTRAINED, *TRAINED)


def tiny() -> LowBitArena:
    return LowBitArena(
        seeds=1,
        steps=12,
        batch=8,
        tokens=16,
        learning_rate=1e-3,
        layers=1,
        training_sentences=96,
        held_out_sentences=48,
        widths=("2",),
    )


def small() -> LowBitArena:
    return LowBitArena()


def paper() -> LowBitArena:
    """No paper has this comparison; these are epochs instead of a taste."""
    return LowBitArena(seeds=3, steps=5000, batch=64, tokens=64, learning_rate=1e-4, training_sentences=100000)


CLAIMS = (
    *(
        Claim("embedding_error", f"{method} 2 bit", "<", against="RTN 2 bit", factor=0.6)
        for method in ("ParetoQ", "GPTQ-style", "PARQ")
    ),
    *(
        Claim("embedding_error", f"ParetoQ {width} bit", "<", against=f"{other} {width} bit", sizes=("small", "paper"))
        for width in ("1", "1.58", "2")
        for other in ("RTN", "MSE", "LLM-QAT")
    ),
)
CLOCKED: tuple[str, ...] = ()
HEADLINE: Headline | None = None


def plan(settings: LowBitArena) -> Plan:
    layers = settings.layers or 6
    per_step = 0.5 * layers / 6 * settings.batch * settings.tokens / 512
    trained = [m for m in settings.methods if m in TRAINED]
    trainings = sum(applies(m, w) for m in trained for w in settings.widths)
    return Plan(
        steps=(
            f"embed {settings.held_out_sentences} held-out sentences with MiniLM-L6 in full precision",
            f"quantise at {', '.join(settings.widths)} bits without training: "
            + ", ".join(m for m in settings.methods if m in UNTRAINED),
            f"train {trainings * settings.seeds} models for {settings.steps} steps: {', '.join(trained)}",
        ),
        seconds=30 + trainings * settings.seeds * (settings.steps * per_step + 5),
        memory_bytes=int(1.5e9),
        disk_bytes=int(1e8),
        outputs=("arena.png", "points.json"),
    )


def applies(method: str, width: str) -> bool:
    """Whether a method has a grid of this width."""
    if method == ON_SEQ:
        return width == "2"
    return method != "torchao QAT" or width in TORCHAO_WIDTHS


def run(settings: LowBitArena, output: Path) -> Report:
    """Every point is kept in points.json when it is done, so a second call goes on after the last one."""
    store = output / "points.json"
    points: dict[str, dict[str, float]] = read_object(store) if store.exists() else {}
    bench: SentenceBench | None = None
    for width in settings.widths:
        for method in settings.methods:
            if not applies(method, width):
                continue
            for seed in range(settings.seeds if method in TRAINED else 1):
                key = f"{method} {width} bit/{seed}"
                if key not in points:
                    if bench is None:
                        bench = SentenceBench(
                            SentenceSettings(
                                settings.layers,
                                settings.tokens,
                                settings.training_sentences,
                                settings.held_out_sentences,
                            )
                        )
                    student, bits = make(bench, settings, method, width, settings.seed + seed)
                    points[key] = {"embedding_error": bench.error(student), "bits_per_weight": bits}
                    write_text(store, json.dumps(points, indent=1) + "\n")
    report = Report("Low-bit arena: MiniLM-L6 distilled to itself, by method and width")
    for subject in (f"{m} {w} bit" for w in settings.widths for m in settings.methods if applies(m, w)):
        found = [value for key, value in points.items() if key.rpartition("/")[0] == subject]
        errors = [value["embedding_error"] for value in found]
        report.add("embedding_error", subject=subject, unit="1 - cosine", **over_seeds(errors))
        report.add("bits_per_weight", found[0]["bits_per_weight"], subject=subject, unit="bits")
    report.notes.append(
        "standard errors are over seeds of the training order; bits per weight of the linear layers, scales included"
    )
    report.notes.append(
        "at 2 bits RTN, MSE and GPTQ (also before training) use integers (-2 to 1); 'no zero': GPTQ on SEQ's levels"
    )
    _plot(report, output / "arena.png")
    return report


def make(bench: SentenceBench, settings: LowBitArena, method: str, width: str, seed: int) -> tuple[nn.Module, float]:
    """(the quantised student as it would ship, bits per weight of its linear layers)."""
    student = copy.deepcopy(bench.model)
    if method == "llama.cpp":
        return student, _llama_cpp_(student, width)
    weights = list(linear_weights(student).values())
    bits = _nominal(width) + SCALE_BITS * sum(w.shape[0] for w in weights) / sum(w.numel() for w in weights)
    if method == "torchao QAT":
        return _torchao(bench, settings, student, int(width), seed), bits
    if method == "PARQ":
        return _parq(bench, settings, student, width, seed), bits
    return _ours(bench, settings, student, method, width, seed), bits


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name -> weight [out, in] of the linear layers that all methods quantise: those inside the blocks."""
    return {
        f"encoder.layer.{name}": module.weight
        for name, module in model.encoder.layer.named_modules()  # type: ignore[union-attr, operator]
        if isinstance(module, nn.Linear)
    }


def _nominal(width: str) -> float:
    return math.log2(3) if width == "1.58" else float(width)


def _budget(settings: LowBitArena, seed: int) -> dict[str, Any]:
    return {
        "steps": settings.steps,
        "batch": settings.batch,
        "learning_rate": settings.learning_rate,
        "seed": seed,
    }


def _ours(
    bench: SentenceBench, settings: LowBitArena, student: nn.Module, method: str, width: str, seed: int
) -> nn.Module:
    grid = "int2" if width == "2" and method in INTEGER_AT_TWO else GRIDS[width]
    nearest = "absmean" if grid == "binary" else "absmax"  # absmax would make every weight of a binary row huge
    # LLM-QAT: min-max at 3 bits and more, its statistics of the mean below.
    statistic = "absmax" if width in ("3", "4") else "absmean"
    weight = {
        "RTN": WeightConfig(grid, scale=nearest),
        "MSE": WeightConfig(grid, scale="mse"),
        "GPTQ-style": WeightConfig(grid, scale="mse"),
        ON_SEQ: WeightConfig(grid, scale="mse"),
        "LLM-QAT": WeightConfig(grid, scale=statistic),
        "ParetoQ": WeightConfig(grid, initial="mse"),
        "ParetoQ + WinQ": WeightConfig(grid, initial="mse"),
        FROM_GPTQ: WeightConfig(grid, initial="mse"),
    }[method]
    config = QuantConfig(rules=(Rule("encoder.layer.*", weight),))
    if method in ("GPTQ-style", ON_SEQ, FROM_GPTQ):
        texts = load_texts(None, "calibration")
        gptq_(student, config, token_blocks(texts, bench.tokenizer, settings.tokens, CALIBRATION_BLOCKS, seed=seed))
    else:
        quantize_(student, config)
    if method == "ParetoQ + WinQ":
        # The encoder's weights are not of the published 0.02: noise in proportion to each layer's own.
        winq = WinQ(sigma=0.05, sigma_scale=0.05, sigma_mode="relative", seed=seed)
        with winq.attach(student, embedding_loss, settings.steps) as loss_function:
            bench.distil(student, **_budget(settings, seed), loss_function=loss_function)
    elif method in TRAINED:
        bench.distil(student, **_budget(settings, seed))
    return convert_(student)


def _parq(bench: SentenceBench, settings: LowBitArena, student: nn.Module, width: str, seed: int) -> nn.Module:
    """Quantisation inside AdamW, on the same grids; hard from 80 % of the run on."""
    config = QuantConfig(rules=(Rule("encoder.layer.*", WeightConfig(GRIDS[width], scale="mse")),))
    groups = quantized_groups(student, config, lr=settings.learning_rate)
    prox = ProxPARQ(anneal_start=0, anneal_end=max(1, round(0.8 * settings.steps)))
    optimizer = QuantOptimizer(torch.optim.AdamW(groups, lr=settings.learning_rate), prox)
    bench.distil(student, **_budget(settings, seed), optimizer=optimizer)
    return convert_parq_(student, optimizer)


def _torchao(bench: SentenceBench, settings: LowBitArena, student: nn.Module, width: int, seed: int) -> nn.Module:
    """torchao's own QAT: symmetric integers per row, scales recomputed from the largest weight at each step."""
    try:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    except ImportError as error:
        raise MissingPackage("the peer torchao is missing: pip install 'edgewright[peers]'") from error
    weights = linear_weights(student)
    dtype = getattr(torch, f"int{width}")
    config = QATConfig(weight_config=IntxFakeQuantizeConfig(dtype, "per_channel", is_symmetric=True), step="prepare")
    quantize_(student, config, lambda module, name: name in weights)
    bench.distil(student, **_budget(settings, seed))
    return student  # its fake-quantised forward is what its conversion computes, in float32


def _llama_cpp_(student: nn.Module, width: str) -> float:
    """Put llama.cpp's quantised values into the weights, in place; bits per weight."""
    first, fallback = LLAMA_CPP[width]
    total = bits = 0
    for weight in linear_weights(student).values():
        name = first if weight.shape[1] % ggml_type(first).block == 0 else fallback
        raw = ggml.quantize(weight.detach().cpu().numpy(), name)
        values = torch.from_numpy(ggml.dequantize(raw, name)).reshape(weight.shape)
        with torch.no_grad():
            weight.copy_(values)
        total, bits = total + weight.numel(), bits + 8 * raw.size
    return bits / total


def _plot(report: Report, path: Path) -> None:
    series: dict[str, list[tuple[float, float, float]]] = {}
    for row in report.rows:
        if row.metric == "embedding_error":
            method = row.subject.removesuffix(" bit").rpartition(" ")[0]
            bits = report.value("bits_per_weight", row.subject)
            series.setdefault(method, []).append((bits, row.value, row.se or 0.0))
    with plot(path, (7.5, 4.5)) as axes:
        for method, found in series.items():
            x, y, error = zip(*sorted(found), strict=True)
            style = {"linestyle": "--" if method in UNTRAINED else "-", "marker": "o"}
            if method == ON_SEQ:  # a single point
                style = {"linestyle": "", "marker": "x", "color": "black"}
            axes.errorbar(x, y, yerr=error, label=method, **style)
        axes.set_yscale("log")
        axes.set_xlabel("bits per weight, scales included")
        axes.set_ylabel("1 - cosine to full precision, held out")
        axes.grid(which="both", alpha=0.25)
        axes.legend(fontsize=8)

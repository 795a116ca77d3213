"""The methods that the arena compares: a quantised copy of the sentence encoder by each, at a width.

llama.cpp's quantiser has its own block formats, which cost more bits; all others have one bfloat16 scale by row.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgewright.data.sentences import SentenceBench, embedding_loss
from edgewright.errors import MissingPackage
from edgewright.export.gguf import ggml
from edgewright.export.gguf.blocks import ggml_type
from edgewright.io.text import load_texts, token_blocks
from edgewright.quantization.api import convert_, quantize_
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.quantization.gptq import gptq_
from edgewright.systems.parq.model import convert_parq_, quantized_groups
from edgewright.systems.parq.optimizer import QuantOptimizer
from edgewright.systems.parq.proximal import ProxPARQ
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
# At 2 bits as their sources have it; SEQ's four levels, none of them zero, are ParetoQ's.
INTEGER_AT_TWO = ("RTN", "MSE", "GPTQ-style")
SCALE_BITS = 16  # one bfloat16 scale by row
CALIBRATION_BLOCKS = 128


def applies(method: str, width: str) -> bool:
    """Whether a method has a grid of this width."""
    if method == ON_SEQ:
        return width == "2"
    return method != "torchao QAT" or width in TORCHAO_WIDTHS


def quantized(bench: SentenceBench, method: str, width: str, budget: dict[str, Any]) -> tuple[nn.Module, float]:
    """(the quantised student as it would ship, bits per weight of its linear layers).

    Args:
        budget: steps, batch, learning_rate and seed of the methods that train.
    """
    student = copy.deepcopy(bench.model)
    if method == "llama.cpp":
        return student, _llama_cpp_(student, width)
    weights = list(linear_weights(student).values())
    nominal = math.log2(3) if width == "1.58" else float(width)
    bits = nominal + SCALE_BITS * sum(w.shape[0] for w in weights) / sum(w.numel() for w in weights)
    if method == "torchao QAT":
        return _torchao(bench, student, int(width), budget), bits
    if method == "PARQ":
        return _parq(bench, student, width, budget), bits
    return _ours(bench, student, method, width, budget), bits


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name -> weight [out, in] of the linear layers that all methods quantise: those inside the blocks."""
    return {
        f"encoder.layer.{name}": module.weight
        for name, module in model.encoder.layer.named_modules()  # type: ignore[union-attr, operator]
        if isinstance(module, nn.Linear)
    }


def _ours(bench: SentenceBench, student: nn.Module, method: str, width: str, budget: dict[str, Any]) -> nn.Module:
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
        texts, tokens, seed = load_texts(None, "calibration"), bench.settings.tokens, budget["seed"]
        gptq_(student, config, token_blocks(texts, bench.tokenizer, tokens, CALIBRATION_BLOCKS, seed=seed))
    else:
        quantize_(student, config)
    if method == "ParetoQ + WinQ":
        # The encoder's weights are not of the published 0.02: noise in proportion to each layer's own.
        winq = WinQ(sigma=0.05, sigma_scale=0.05, sigma_mode="relative", seed=budget["seed"])
        with winq.attach(student, embedding_loss, budget["steps"]) as loss_function:
            bench.distil(student, **budget, loss_function=loss_function)
    elif method in TRAINED:
        bench.distil(student, **budget)
    return convert_(student)


def _parq(bench: SentenceBench, student: nn.Module, width: str, budget: dict[str, Any]) -> nn.Module:
    """Quantisation inside AdamW, on the same grids; hard from 80 % of the run on."""
    config = QuantConfig(rules=(Rule("encoder.layer.*", WeightConfig(GRIDS[width], scale="mse")),))
    groups = quantized_groups(student, config, lr=budget["learning_rate"])
    prox = ProxPARQ(anneal_start=0, anneal_end=max(1, round(0.8 * budget["steps"])))
    optimizer = QuantOptimizer(torch.optim.AdamW(groups, lr=budget["learning_rate"]), prox)
    bench.distil(student, **budget, optimizer=optimizer)
    return convert_parq_(student, optimizer)


def _torchao(bench: SentenceBench, student: nn.Module, width: int, budget: dict[str, Any]) -> nn.Module:
    """Torchao's own QAT: symmetric integers per row, scales recomputed from the largest weight at each step."""
    try:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    except ImportError as error:
        raise MissingPackage("the peer torchao is missing: pip install 'edgewright[peers]'") from error
    weights = linear_weights(student)
    dtype = getattr(torch, f"int{width}")
    config = QATConfig(weight_config=IntxFakeQuantizeConfig(dtype, "per_channel", is_symmetric=True), step="prepare")
    quantize_(student, config, lambda module, name: name in weights)
    bench.distil(student, **budget)
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

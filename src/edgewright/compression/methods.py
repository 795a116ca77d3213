"""From a float language model to packed integer weights: four methods, one set of grids.

All methods quantise every linear layer on the grid of the chosen width and the token table (tied head included) to
8 bits in groups of 32. They differ in how codes and steps are chosen: round-to-nearest, searched steps, second-order
calibration, or training from there.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.distillation.language import LanguageDistillation
from edgewright.errors import UsageError
from edgewright.io.packed import as_matrix
from edgewright.quantization.api import convert_, dequantize_, quantizable_layers, quantize_
from edgewright.quantization.config import KVConfig, QuantConfig, Rule, WeightConfig
from edgewright.quantization.gptq import gptq_
from edgewright.quantization.grids import grid_for_bits
from edgewright.quantization.layers import WeightStack
from edgewright.training.batches import BlockBatches
from edgewright.training.loop import TrainConfig, TrainResult, fit

TABLE = WeightConfig("int8", 32, scale="absmax")
TABLE_NAMES = ("*embed_tokens", "*lm_head")


def weight_config(bits: float, columns: int, scale: str, coarse_rows: bool = False) -> WeightConfig:
    """Grid and group for rows of `columns` weights, chosen so that a GGUF block type holds them exactly.

    4 and 8 bits: groups of 32 (Q4_0, Q8_0). 3 bits: groups of 256 (Q3_K) where they divide the row, else 32 (in Q4_0).
    2 bits: SEQ in groups of 256 (Q2_K) where all rows allow it, else int2 in groups of 64 (Q2_0). 1.58 bits: ternary in
    groups of 64. 1 bit: binary in groups of 128 (Q1_0), else 64.
    """
    grid = grid_for_bits(bits).name
    wanted = {"int8": (32,), "int4": (32,), "int3": (256, 32), "ternary": (64, 32), "binary": (128, 64, 32)}
    if grid == "seq2" and not coarse_rows:
        grid = "int2"
    sizes = {"seq2": (256,), "int2": (64, 32), **wanted}[grid]
    group = next((size for size in sizes if columns % size == 0), "row")
    return WeightConfig(grid, group, scale=scale, initial="mse")  # type: ignore[arg-type]


def linear_config(model: nn.Module, bits: float, scale: str, kv: KVConfig | None = None) -> QuantConfig:
    """Rules for every linear layer and stack of experts of a language model but its head, one rule a layer."""
    probe = QuantConfig(rules=(Rule("*"),))
    inputs = {
        name: _inputs(layer)
        for name, layer in quantizable_layers(model).items()
        if isinstance(layer, nn.Linear | WeightStack) and probe.rule_for(name) is not None
    }
    if not inputs:
        raise UsageError(f"{type(model).__name__} has no linear layers that compress knows how to quantise")
    coarse = all(columns % 256 == 0 for columns in inputs.values())
    rules = tuple(Rule(name, weight_config(bits, columns, scale, coarse)) for name, columns in inputs.items())
    return QuantConfig(rules=rules, kv=kv)


def _inputs(layer: nn.Linear | WeightStack) -> int:
    """Length of the rows that groups divide."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    return int(as_matrix(layer.weight, layer.group_axis).shape[1])


def table_config() -> QuantConfig:
    """Token embedding and head as one 8-bit table."""
    return QuantConfig(rules=tuple(Rule(name, TABLE) for name in TABLE_NAMES), skip=(), tied="together")


@torch.no_grad()
def with_rounded_table(model: nn.Module) -> nn.Module:
    """A copy whose token table holds its 8-bit values, still as floats: what the layers after it will see."""
    return dequantize_(quantize_(copy.deepcopy(model), table_config()))


def packed(model: nn.Module) -> nn.Module:
    """Convert a model under quantisation, in place: linear layers to codes, then the token table."""
    convert_(model)
    return convert_(quantize_(model, table_config()))


def round_to_nearest(model: nn.Module, bits: float, scale: str = "absmax") -> nn.Module:
    """A packed copy with steps from absmax, or with steps of least squared error (scale="mse"). No data needed."""
    student = with_rounded_table(model)
    return packed(quantize_(student, linear_config(student, bits, scale)))


def calibrated(
    model: nn.Module, bits: float, blocks: Tensor, on_layer: Callable[[int, int], None] | None = None
) -> nn.Module:
    """A copy under quantisation with trainable scales, its codes chosen by second-order calibration on `blocks`."""
    student = with_rounded_table(model)
    gptq_(student, linear_config(student, bits, "learned"), blocks, on_layer=on_layer)
    return student


def train(
    student: nn.Module,
    teacher: nn.Module,
    blocks: Tensor,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    output: Path | None,
    progress: bool = True,
    settings: dict[str, Any] | None = None,
) -> TrainResult:
    """Distil the teacher into the student under quantisation, in place; only linear layers, scales and norms train."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("embed_tokens" not in name and "lm_head" not in name)
    config = TrainConfig(
        steps=steps, learning_rate=learning_rate, schedule="cosine", clip_norm=1.0, seed=seed, checkpoint_every=20
    )
    return fit(
        student,
        LanguageDistillation(teacher),
        BlockBatches(blocks, batch_size, seed=seed),
        config,
        output=output,
        progress=progress,
        label="training under quantisation",
        settings=settings,
    )


def seconds_per_step(student: nn.Module, teacher: nn.Module, batch: Tensor) -> float:
    """Time of one forward and backward, for turning a budget of minutes into steps. Changes nothing."""
    loss_function = LanguageDistillation(teacher)
    began = time.perf_counter()
    for attempt in range(2):
        if attempt:  # the first one warms up
            began = time.perf_counter()
        loss_function(student, batch)[0].backward()
        student.zero_grad(set_to_none=True)
    return (time.perf_counter() - began) * 1.08  # the optimizer's share

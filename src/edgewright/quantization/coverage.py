"""Which weights of a model are quantised, which are not, and why: `compress` prints it, `quantize_` warns of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from edgewright.io.packed import PackedConv2d, PackedEmbedding, PackedLinear, PackedStack
from edgewright.quantization.config import QuantConfig
from edgewright.quantization.layers import QuantConv2d, QuantEmbedding, QuantLinear, QuantStack

QUANTIZED = (QuantLinear, QuantEmbedding, QuantConv2d, QuantStack)
PACKED = (PackedLinear, PackedEmbedding, PackedConv2d, PackedStack)
LAYERS = (nn.Linear, nn.Embedding, nn.Conv2d)
WORTH_A_WARNING = 0.01  # share of the model's weights
LISTED = 4  # kinds of weights named in a line


@dataclass(frozen=True)
class CoverageRow:
    """One tensor of weights.

    Args:
        name: of the parameter or packed module.
        weights: how many.
        grid: that it is quantised on; None: a float.
        reason: why it is not quantised, else empty.
    """

    name: str
    weights: int
    grid: str | None
    reason: str = ""


def coverage(model: nn.Module) -> list[CoverageRow]:
    """Every weight of the model, each once: modules that share a tensor count as one.

    Args:
        model: float, under quantisation, or converted.

    Returns:
        One row a parameter or packed tensor, in model order.
    """
    rows: list[CoverageRow] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, PACKED) and module.codes.data_ptr() not in seen:
            seen.add(module.codes.data_ptr())
            rows.append(CoverageRow(name, module.codes.numel(), module.grid))
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or key == "weight_scale":
                continue
            seen.add(id(parameter))
            quantizer = module.quantizer if key == "weight" and isinstance(module, QUANTIZED) else None
            full = f"{name}.{key}" if name else key
            if quantizer is not None:
                rows.append(CoverageRow(full, parameter.numel(), quantizer.quantizer.grid.name))
            else:
                rows.append(CoverageRow(full, parameter.numel(), None, _reason(module, key, parameter.ndim)))
    return rows


def summary(rows: Sequence[CoverageRow]) -> str:
    """One line: the share of the weights that is quantised, and the largest kinds of weights that are not, with why.

    Args:
        rows: of `coverage`.
    """
    total = sum(row.weights for row in rows)
    done = sum(row.weights for row in rows if row.grid is not None)
    line = f"quantised {_share(done, total)} of {total:,} weights"
    kinds = _kinds([row for row in rows if row.grid is None])
    if not kinds:
        return line
    named = [f"{kind} {_share(count, total)} ({reason})" for (kind, reason), count in kinds[:LISTED]]
    more = f" and {len(kinds) - LISTED} smaller kinds" if len(kinds) > LISTED else ""
    return f"{line}; left as they are: {', '.join(named)}{more}"


def warn_left_out(model: nn.Module, config: QuantConfig) -> None:
    """UserWarning for matrices that no rule could reach because their module is no layer that quantisation knows."""
    rows = coverage(model)
    total = max(sum(row.weights for row in rows), 1)
    missed = [row for row in rows if row.reason.startswith("of a ") and not _skipped(row.name, config)]
    share = sum(row.weights for row in missed) / total
    if any(rule.pattern == "*" for rule in config.rules) and share >= WORTH_A_WARNING:
        warnings.warn(
            f"{share:.1%} of the weights stay as they are: {summary(missed).partition('left as they are: ')[2]}",
            stacklevel=3,
        )


def _skipped(name: str, config: QuantConfig) -> bool:
    owner = name.rpartition(".")[0]
    return any(fnmatchcase(name, pattern) or fnmatchcase(owner, pattern) for pattern in config.skip)


def _share(part: int, total: int) -> str:
    """In percent with one decimal; never "100.0%" of what has an exception, nor "0.0%" of what is something."""
    if part and part / total < 0.0005:
        return "under 0.1%"
    if part < total and part / total >= 0.9995:
        return "over 99.9%"
    return f"{part / max(total, 1):.1%}"


def _reason(module: nn.Module, key: str, axes: int) -> str:
    if axes < 2:
        return "a vector"
    if isinstance(module, LAYERS) and key == "weight":
        return "no rule selects it"
    return f"of a {type(module).__name__}, which is no linear, embedding or convolution layer or known stack of experts"


def _kinds(rows: Sequence[CoverageRow]) -> list[tuple[tuple[str, str], int]]:
    """(name with * for the numbers, reason) -> weights, largest first; all vectors as one kind."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        vector = row.reason == "a vector"
        kind = ("vectors", "biases and norms") if vector else (re.sub(r"\d+", "*", row.name), row.reason)
        counts[kind] = counts.get(kind, 0) + row.weights
    return sorted(counts.items(), key=lambda item: -item[1])

"""The numeric debugger: which module loses what, on its own and through the modules before it.

    SQNR = 10 log10(||y||^2 / ||y - y_q||^2)   in dB

Both models run on the same batch. Local error: the low-precision module gets the reference's own input. Accumulated
error: what it gives inside the low-precision model, where its input is already wrong.

Modules are ranked by what each of them alone, in the float model, does to the output: a table whose extremes nothing
reads has a fine SQNR of its own and still ruins the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.measure.report import Report
from edgewright.quantization.static.sqnr import sqnr
from edgewright.systems.dlrm.clicks import ClickData
from edgewright.systems.dlrm.tables import QREmbeddingBag
from edgewright.systems.low_precision_recsys.bag import (
    RowwiseQuantEmbedding,
    RowwiseQuantEmbeddingBag,
    RowwiseQuantQRBag,
)
from edgewright.systems.low_precision_recsys.calibration import hooked
from edgewright.systems.low_precision_recsys.examples import Examples, as_examples
from edgewright.systems.low_precision_recsys.linear import HalfLinear, Int8Linear, RowsLinear
from edgewright.systems.low_precision_recsys.model import QuantizedModel
from edgewright.systems.low_precision_recsys.rows import HalfRows, StoredRows
from edgewright.systems.low_precision_recsys.units import swapped

_LOW = (RowwiseQuantEmbedding, RowwiseQuantEmbeddingBag, RowwiseQuantQRBag, Int8Linear, HalfLinear, RowsLinear)


@dataclass(frozen=True)
class ModuleError:
    """One module. output: SQNR in dB of the model's output with this module alone at low precision.

    local and accumulated: SQNR of the module's own output; max_error: the largest local difference.

    saturation: share of values beyond the range that they are stored in: inputs of a static layer, rows of a table.
    """

    name: str
    kind: str
    output: float
    local: float
    accumulated: float
    max_error: float
    saturation: float


@dataclass(frozen=True)
class Comparison:
    """modules: the worst first, by what they do to the output. output: SQNR of the whole model's output."""

    modules: tuple[ModuleError, ...]
    output: float

    def table(self) -> str:
        """The ranking as text, a module a line."""
        header, lines = self.report().table()
        widths = [max(len(row[i]) for row in (header, *lines)) for i in range(len(header))]

        def line(row: list[str]) -> str:
            numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            return "  ".join([row[0].ljust(widths[0]), *numbers])

        return "\n".join(line(row) for row in (header, *lines))

    def report(self) -> Report:
        """The same as a Report."""
        report = Report("low-precision modules, the worst first")
        for found in self.modules:
            subject = f"{found.name} ({found.kind})"
            report.add("output_sqnr", found.output, subject=subject, unit="dB")
            report.add("local_sqnr", found.local, subject=subject, unit="dB")
            report.add("accumulated_sqnr", found.accumulated, subject=subject, unit="dB")
            report.add("max_error", found.max_error, subject=subject)
            report.add("saturation", 100 * found.saturation, subject=subject, unit="%")
        return report


@torch.no_grad()
def compare_numerics(model: nn.Module, quantized: nn.Module, batch: Any) -> Comparison:
    """A float model beside its low-precision copy on one batch: a tuple of arguments, or clicks (their first batch).

    Raises UsageError where the copy has no low-precision module.
    """
    if isinstance(batch, ClickData | Examples):
        batch = as_examples(batch).batches[0]
    arguments = batch if isinstance(batch, tuple) else (batch,)
    copy = quantized.module if isinstance(quantized, QuantizedModel) else quantized
    low = {name: m for name, m in copy.named_modules() if isinstance(m, _LOW)}
    if not low:
        raise UsageError("the second model has no low-precision module; give what apply_recipe returned")
    calls: dict[str, list[tuple[tuple[Any, ...], Tensor]]] = {name: [] for name in low}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: calls[name].append((inputs, output))
        )
        for name in low
    ]
    was = model.training, copy.training
    try:
        clean = model.eval()(*arguments).float()
    finally:
        for handle in handles:
            handle.remove()
    chain: dict[str, list[Tensor]] = {name: [] for name in low}
    with hooked(copy, low, lambda name, module, x, y: chain[name].append(y)):
        noisy = copy.eval()(*arguments)
    found = []
    for name, module in low.items():
        if not calls[name]:
            continue
        wanted = torch.cat([y.reshape(-1) for _, y in calls[name]])
        alone = torch.cat([module(*inputs).reshape(-1) for inputs, _ in calls[name]])
        found.append(
            ModuleError(
                name,
                _kind(module),
                float(sqnr(clean, _alone(model, name, module, arguments))),
                float(sqnr(wanted, alone)),
                float(sqnr(wanted, torch.cat([y.reshape(-1) for y in chain[name]]))),
                float((wanted - alone).abs().max()) if len(wanted) else 0.0,
                _saturation(model.get_submodule(name), module, [inputs[0] for inputs, _ in calls[name]]),
            )
        )
    model.train(was[0])
    copy.train(was[1])
    found.sort(key=lambda m: (-math.inf if math.isnan(m.output) else m.output, m.local, m.name))
    return Comparison(tuple(found), float(sqnr(clean, noisy.float())))


def _alone(model: nn.Module, name: str, module: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    with swapped(model, nn.ModuleDict({name.replace(".", "/"): module})):
        output: Tensor = model(*arguments)
    return output.float()


def _saturation(original: nn.Module, module: nn.Module, inputs: list[Tensor]) -> float:
    if isinstance(module, Int8Linear):
        shares = [(module.saturation(x), x.numel()) for x in inputs]
        return sum(share * count for share, count in shares) / max(sum(count for _, count in shares), 1)
    if isinstance(module, HalfLinear):
        return float(module.weight.isinf().float().mean())
    pairs: Mapping[StoredRows, Any]
    if isinstance(original, QREmbeddingBag) and isinstance(module, RowwiseQuantQRBag):
        pairs = {module.quotient: original.quotient, module.remainder: original.remainder}
    else:
        pairs = {module.stored: original.weight}  # type: ignore[dict-item]
    cut = sum(_cut(stored, weight.detach().float()) for stored, weight in pairs.items())
    return cut / max(sum(weight.numel() for weight in pairs.values()), 1)


def _cut(stored: StoredRows, weight: Tensor) -> int:
    """How many values lie more than half a step beyond the least or greatest value of their stored row."""
    if isinstance(stored.rows, HalfRows):
        return int(stored.packed.isinf().sum())
    low, high = stored.weight.aminmax(dim=1, keepdim=True)
    slack = (high - low) / (2 * (2**stored.bits - 1)) + 1e-6 * weight.abs().amax(1, keepdim=True)
    return int(((weight < low - slack) | (weight > high + slack)).sum())


def _kind(module: nn.Module) -> str:
    if isinstance(module, Int8Linear):
        return "int8 " + ("dynamic" if module.step is None else "static")
    if isinstance(module, HalfLinear):
        return str(module.weight.dtype).removeprefix("torch.")
    stored: Any = module.quotient if isinstance(module, RowwiseQuantQRBag) else module.stored
    return f"{stored.bits}-bit rows"

"""Low-precision modules for files: bags as lookup, mask and sum, linear layers in the forms that exporters know."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.errors import Unsupported
from edgewright.io.packed import PackedLinear, PackedTensor
from edgewright.quantization.config import ActivationConfig
from edgewright.systems.dlrm.model import DLRM
from edgewright.systems.dlrm.tables import EmbeddingTable, ProjectedTable, QREmbeddingBag
from edgewright.systems.low_precision_recsys.bag import (
    RowwiseQuantEmbedding,
    RowwiseQuantEmbeddingBag,
    RowwiseQuantQRBag,
)
from edgewright.systems.low_precision_recsys.gathered import gathered
from edgewright.systems.low_precision_recsys.linear import HalfLinear, Int8Linear, RowsLinear, input_codes, row_range
from edgewright.systems.low_precision_recsys.rows import StoredRows

Vectors = Callable[[StoredRows], nn.Module]  # int64 [...] -> float32 [..., dim]


class PortableBag(nn.Module):
    """Bags of a fixed width as lookup, mask and sum. ids [B, m] (with weights [B, m]) -> [B, dim]."""

    def __init__(self, bag: RowwiseQuantEmbeddingBag, vectors: nn.Module) -> None:
        super().__init__()
        if bag.mode == "max":
            raise Unsupported("a bag with mode='max' cannot be written for a runtime; sum and mean can")
        self.vectors, self.mode, self.padding_idx = vectors, bag.mode, bag.padding_idx

    def forward(self, ids: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        if offsets is not None or ids.ndim != 2:
            raise Unsupported("an exported bag takes ids [batch, width] without offsets; pad the bags")
        there = torch.ones_like(ids) if self.padding_idx is None else (ids != self.padding_idx).long()
        mask = there.float() if weights is None else there.float() * weights
        sums = (self.vectors(ids) * mask.unsqueeze(-1)).sum(1)
        return sums if self.mode == "sum" else sums / there.sum(1, keepdim=True).clamp_min(1).float()


class PortableQR(nn.Module):
    """Vectors of a table as quotient and remainder: int64 [...] -> [..., d]."""

    def __init__(self, bag: RowwiseQuantQRBag, quotient: nn.Module, remainder: nn.Module) -> None:
        super().__init__()
        self.collisions, self.combine = bag.collisions, bag.combine
        self.quotient, self.remainder = quotient, remainder

    def forward(self, ids: Tensor) -> Tensor:
        high = self.quotient(torch.div(ids, self.collisions, rounding_mode="floor"))
        low = self.remainder(ids % self.collisions)
        if self.combine == "concat":
            return torch.cat([high, low], -1)
        return high * low if self.combine == "mult" else high + low


class RoundedRows(nn.Module):
    """The dynamic 8-bit rounding of a layer's input. Its `config` tells ExecuTorch that its kernel does the same."""

    config = ActivationConfig(bits=8, granularity="token", symmetric=False)

    def forward(self, x: Tensor) -> Tensor:
        step, zero = row_range(x)
        return (input_codes(x, step, zero) - zero) * step


class StaticLinear(nn.Module):
    """An int8 layer with a fixed input range, by torch's fake quantisation: exporters place its codes as they are."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    zeros: Tensor

    def __init__(self, layer: Int8Linear) -> None:
        super().__init__()
        assert layer.step is not None and layer.zero is not None
        self.step, self.zero = float(layer.step), int(layer.zero)
        self.register_buffer("weight", layer.weight)
        self.register_buffer("scale", layer.scale)
        self.register_buffer("zeros", torch.zeros_like(layer.scale, dtype=torch.int32))
        self.register_buffer("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fake_quantize_per_tensor_affine(x, self.step, self.zero, 0, 255)
        weight = torch.fake_quantize_per_channel_affine(self.weight, self.scale, self.zeros, 0, -127, 127)
        return F.linear(x, weight, self.bias)


class PortableDLRM(nn.Module):
    """A low-precision DLRM over padded ids, as `serving.DLRMProgram` is the float one."""

    def __init__(self, model: DLRM, slots: list[int], vectors: Vectors) -> None:
        super().__init__()
        self.sizes, self.slots = model.config.table_sizes, slots
        tables = [t.table if isinstance(t, ProjectedTable) else t for t in model.tables]
        self.tables = nn.ModuleList(_table(table, vectors) for table in tables)
        self.lifts = [t.lift.detach() if isinstance(t, ProjectedTable) else None for t in model.tables]
        shell = copy.copy(model)  # everything but the tables
        shell._modules = {name: m for name, m in model._modules.items() if name != "tables"}
        self.networks = portable(shell, vectors)

    def forward(self, dense: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Dense [B, n], ids [B, S], weights [B, S] -> probabilities [B]."""
        parts = zip(self.tables, ids.split(self.slots, 1), weights.split(self.slots, 1), strict=True)
        sums = []
        for (table, chosen, counted), rows, lift in zip(parts, self.sizes, self.lifts, strict=True):
            total = (table(chosen.clamp(0, rows - 1)) * counted.unsqueeze(-1)).sum(1)
            sums.append(total if lift is None else F.linear(total, lift))
        return self.networks.join(self.networks.bottom(dense), sums).sigmoid()  # type: ignore[operator]


def portable(model: nn.Module, vectors: Vectors = gathered) -> nn.Module:
    """A copy of a low-precision model with every module of ours in portable operators. Raises Unsupported."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, RowwiseQuantEmbeddingBag):
            memo[id(module)] = PortableBag(module, vectors(module.stored))
        elif isinstance(module, RowwiseQuantEmbedding):
            memo[id(module)] = vectors(module.stored)
        elif isinstance(module, RowwiseQuantQRBag):
            memo[id(module)] = PortableQR(module, vectors(module.quotient), vectors(module.remainder))
        elif isinstance(module, Int8Linear):
            memo[id(module)] = _int8(module)
        elif isinstance(module, HalfLinear):
            memo[id(module)] = _plain(module.weight.float(), module.bias)
        elif isinstance(module, RowsLinear):
            memo[id(module)] = _plain(module.stored.weight, module.bias)
    return copy.deepcopy(model, memo).eval().requires_grad_(False)


def _table(table: nn.Module, vectors: Vectors) -> nn.Module:
    if isinstance(table, RowwiseQuantEmbeddingBag):
        return vectors(table.stored)
    if isinstance(table, RowwiseQuantQRBag):
        return PortableQR(table, vectors(table.quotient), vectors(table.remainder))
    if isinstance(table, EmbeddingTable):
        return nn.Embedding.from_pretrained(table.weight.detach())
    assert isinstance(table, QREmbeddingBag)
    return PortableQR(
        table,  # type: ignore[arg-type]
        nn.Embedding.from_pretrained(table.quotient.detach()),
        nn.Embedding.from_pretrained(table.remainder.detach()),
    )


def _int8(layer: Int8Linear) -> nn.Module:
    if layer.accumulate != 32:
        raise Unsupported("16-bit accumulation is emulated to predict it; no runtime here computes so")
    if layer.step is not None:
        return StaticLinear(layer)
    packed = PackedTensor(layer.codes, layer.scale.unsqueeze(1), "int8")
    return PackedLinear(packed, layer.bias, RoundedRows())


def _plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer

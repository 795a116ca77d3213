"""Truncated singular value decompositions of weights for the low-rank path of R-Sparse, none done twice.

W = U S V^T in float64; up = (U_r S_r)^T [r, m] and down = V_r [n, r], in the dtype of the weight (bfloat16 for packed
weights, whose own numbers are narrower still). A lower rank is a part of a higher one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import CheckFailed, FormatError
from edgewright.io.packed import PackedLinear
from edgewright.io.safetensors_header import check_safetensors
from edgewright.io.tensors import load_tensors, save_tensors
from edgewright.systems.r_sparse.layer import float_weight, weight_hash


class Factors:
    """Factors of layers by weight hash, in memory and, where `folder` is given, in one file a weight and rank there."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._known: dict[str, tuple[Tensor, Tensor]] = {}
        self._hashes: dict[int, tuple[nn.Module, str]] = {}  # the module is held, so that its id stays its own

    def fingerprint(self, layers: Iterable[nn.Module]) -> str:
        """SHA-256 over the hashes of several layers' weights."""
        return hashlib.sha256("".join(self._hash(layer) for layer in layers).encode()).hexdigest()

    def prepare(self, layer: nn.Module, rank: int) -> None:
        """Decompose a layer up to `rank`, unless that is known."""
        if rank:
            self.get(layer, rank)

    def get(self, layer: nn.Module, rank: int) -> tuple[Tensor | None, Tensor | None]:
        """(down [n, r], up [r, m]), contiguous; (None, None) for rank 0. Raises CheckFailed for NaN in the weight."""
        if rank == 0:
            return None, None
        key = self._hash(layer)
        known = self._known.get(key)
        if known is None or len(known[1]) < rank:
            known = self._known[key] = self._read(key, layer, rank) or self._compute(key, layer, rank)
        down, up = known
        return down[:, :rank].contiguous(), up[:rank].contiguous()

    def _hash(self, layer: nn.Module) -> str:
        if id(layer) not in self._hashes:
            self._hashes[id(layer)] = (layer, weight_hash(layer))
        return self._hashes[id(layer)][1]

    def _compute(self, key: str, layer: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
        down, up = truncated_svd(layer, rank)
        if self.folder is not None:
            save_tensors(self.folder / f"{key[:32]}.safetensors", {"down": down, "up": up})
        return down, up

    def _read(self, key: str, layer: Any, rank: int) -> tuple[Tensor, Tensor] | None:
        path = None if self.folder is None else self.folder / f"{key[:32]}.safetensors"
        if path is None or not path.is_file():
            return None
        try:
            entries = check_safetensors(path)
            stored = entries["up"].shape[0]
            fits = entries["up"].shape == (stored, layer.out_features)
            fits = fits and entries["down"].shape == (layer.in_features, stored)
        except (FormatError, KeyError, IndexError):
            return None  # a cache: what cannot be read is computed again
        if not fits or stored < rank:
            return None
        tensors = load_tensors(path)
        like = layer.weight
        down, up = (tensors[name].to(like.device) for name in ("down", "up"))
        return (down, up) if down.dtype == up.dtype == factor_dtype(layer) else None


def factor_dtype(layer: Any) -> torch.dtype:
    """bfloat16 for packed weights, else the weight's own."""
    return torch.bfloat16 if isinstance(layer, PackedLinear) else layer.weight.dtype


def truncated_svd(layer: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    """(down [n, r], up [r, m]) with (down @ up)^T the nearest matrix of that rank to the weight."""
    weight = float_weight(layer)
    if not torch.isfinite(weight).all():
        raise CheckFailed("a weight holds NaN or infinity and has no singular values; look at the checkpoint")
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    dtype = factor_dtype(layer)
    return vh[:rank].t().to(dtype).contiguous(), (u[:, :rank] * s[:rank]).t().to(dtype).contiguous()

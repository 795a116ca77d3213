"""`edgewright::sparse_gemv`: the sparse product of one token as a PyTorch operator, for graphs that should keep it.

`operator()` registers it on first use. torch.export records it as one node with its own shape rule; runtimes without an
implementation of that name cannot run such a graph, which is why models export their masked dense form unless asked.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from edgewright.kernels.sparse_rows import RowMatrix, sparse_rows


@functools.cache
def operator() -> Any:
    """sparse_gemv(x [..., n], rows [n, m], scale [n], threshold [], down [n, r] | None, up [r, m] | None,
    bias [m] | None) -> [..., m] in x's dtype; every leading row is a token of its own.
    """

    @torch.library.custom_op("edgewright::sparse_gemv", mutates_args=())
    def sparse_gemv(
        x: Tensor,
        rows: Tensor,
        scale: Tensor,
        threshold: Tensor,
        down: Tensor | None = None,
        up: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        weight, limit = RowMatrix(rows.contiguous()), float(threshold)
        tokens = x.reshape(-1, x.shape[-1])
        y = [sparse_rows(token, weight, scale, limit, down=down, up=up, bias=bias)[0] for token in tokens]
        return torch.stack(y).to(x.dtype).reshape(*x.shape[:-1], rows.shape[1])

    @sparse_gemv.register_fake
    def _(x: Tensor, rows: Tensor, scale: Tensor, threshold: Tensor, down=None, up=None, bias=None) -> Tensor:  # type: ignore[no-untyped-def]
        return x.new_empty(*x.shape[:-1], rows.shape[1])

    return sparse_gemv

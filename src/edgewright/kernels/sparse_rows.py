"""A linear layer for one token that reads only the weight rows of large inputs: y = W (k x) + A B ((1 - k) x) + b.

k_i = 1 where |x_i| * scale_i > threshold. Weights lie transposed, one contiguous row an input channel, so that a
channel left out is memory not read. `sparse_rows` has two ways: the compiled kernel (sparse_rows.cpp), whose every
output is the sum in the order of the channels, and its vectorised form in plain torch, which sums as torch's product.
Weights may be float32, bfloat16, or int8 codes with scales: value = scale * (code + offset).
Shapes: n inputs, m outputs, r rank, g groups of inputs.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgewright.checks import check, one_of
from edgewright.errors import EdgewrightError, UsageError
from edgewright.kernels.build import load_kernel

PATHS = ("auto", "kernel", "torch")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
FACTOR_KINDS = {torch.float32: 0, torch.bfloat16: 1}
PRODUCTS_PER_THREAD = 1 << 19  # below it a second thread costs more than it saves


@dataclass(frozen=True)
class RowMatrix:
    """A weight by input channel. rows: [n, m] contiguous; scale [g, m] float32 and offset where the rows are codes."""

    rows: Tensor
    scale: Tensor | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.rows.dtype not in KINDS or self.rows.ndim != 2 or not self.rows.is_contiguous():
            raise UsageError(
                f"rows of {self.rows.dtype} {tuple(self.rows.shape)}: a contiguous matrix [inputs, outputs] of "
                "float32, bfloat16 or int8 is needed; weight.t().contiguous() makes one"
            )
        if (self.scale is not None) != (self.rows.dtype == torch.int8):
            raise UsageError("codes need scales, and only codes have them")
        if self.scale is not None and (self.scale.shape[1] != self.rows.shape[1] or len(self.rows) % len(self.scale)):
            raise UsageError(f"scales {tuple(self.scale.shape)} do not fit codes {tuple(self.rows.shape)}")

    def values(self, index: Tensor | None = None) -> Tensor:
        """float32 rows, all or those of `index`."""
        rows = self.rows if index is None else self.rows[index]
        if self.scale is None:
            return rows.float()
        every = torch.arange(len(self.rows), device=rows.device) if index is None else index
        return (rows.float() + self.offset) * self.scale[every // (len(self.rows) // len(self.scale))]


def sparse_rows(
    x: Tensor,
    weight: RowMatrix,
    scale: Tensor,
    threshold: float,
    *,
    down: Tensor | None = None,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    path: str = "auto",
) -> tuple[Tensor, int]:
    """(y float32 [m], channels kept) for one input x [n].

    scale: float32 [n]. down [n, r] and up [r, m], contiguous: B and A transposed. bias: float32 [m].
    path: "kernel" (compiled, CPU), "torch" (torch, any device); "auto": the kernel where there is one. No gradients.
    """
    check("path", path, one_of(*PATHS))
    if path == "auto":
        path = "kernel" if x.device.type == "cpu" and why_no_kernel() is None else "torch"
    _check_shapes(x, weight, scale, down, up)
    if path == "torch":
        return _in_torch(x.detach().float(), weight, scale, threshold, down, up, bias)
    return PreparedRows(weight, scale, threshold, down, up, bias)(x)


def _check_shapes(x: Tensor, weight: RowMatrix, scale: Tensor, down: Tensor | None, up: Tensor | None) -> None:
    n, out = weight.rows.shape
    rank = 0 if up is None else len(up)
    fits = x.shape == (n,) and scale.shape == (n,) and (down is None) == (up is None)
    if not fits or (down is not None and up is not None and (down.shape != (n, rank) or up.shape != (rank, out))):
        raise UsageError(
            f"x {tuple(x.shape)}, scale {tuple(scale.shape)} and factors "
            f"{[tuple(f.shape) for f in (down, up) if f is not None]} do not fit a weight of {n} inputs, {out} outputs"
        )


def _in_torch(
    x: Tensor,
    weight: RowMatrix,
    scale: Tensor,
    threshold: float,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, int]:
    keep = x.abs() * scale > threshold
    if weight.rows.dtype == torch.float32:  # gathering rows copies them, which takes longer than reading them all
        y = x.masked_fill(~keep, 0.0) @ weight.rows
    else:  # here a copy is made in any case: of the kept rows alone
        index = keep.nonzero().squeeze(-1)
        y = x[index] @ weight.values(index)
    if down is not None and up is not None:
        y = y + (x.masked_fill(keep, 0.0) @ down.float()) @ up.float()
    return (y if bias is None else y + bias.float()), int(keep.sum())


def why_no_kernel() -> str | None:
    """None where the compiled kernel works here, else the reason in one sentence."""
    return _kernel()[1]


@functools.cache
def _kernel(extra: tuple[str, ...] = ()) -> tuple[ctypes.CDLL | None, str | None]:
    """(library, None), or (None, why not); compiled at the first call."""
    try:
        library = load_kernel("sparse_rows", extra)
    except EdgewrightError as error:
        return None, str(error)
    pointer, size, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    function = library.edgewright_sparse_rows
    function.argtypes = [
        *(pointer, pointer, real, pointer, number, pointer, size, real),
        *(pointer, pointer, number, size, pointer, pointer, size, size, number),
    ]
    function.restype = size
    return library, None


class PreparedRows:
    """The compiled product with its weight bound: a call costs little more than the reads. x [n] -> (y [m], kept).

    Holds its tensors, in the layout that the kernel reads; nothing is copied that lies right already.
    """

    def __init__(
        self,
        weight: RowMatrix,
        scale: Tensor,
        threshold: float,
        down: Tensor | None = None,
        up: Tensor | None = None,
        bias: Tensor | None = None,
        extra: tuple[str, ...] = (),
    ) -> None:
        library, reason = _kernel(extra)
        if library is None:
            raise UsageError(f"path='kernel' cannot be taken: {reason}; path='auto' takes another")
        if weight.rows.device.type != "cpu":
            raise UsageError(f"the kernel runs on the CPU, the weight is on {weight.rows.device}; take path='torch'")
        self.inputs, self.outputs = weight.rows.shape
        rank = 0 if up is None else len(up)
        factor = torch.float32 if up is None else up.dtype
        if factor not in FACTOR_KINDS or (down is not None and down.dtype != factor):
            raise UsageError(f"factors of {factor}: two matrices of float32 or two of bfloat16 are needed")
        # A pointer does not keep its tensor alive: all of them are held here.
        self._held = [
            None if t is None else t.detach().contiguous()
            for t in (scale.float(), weight.rows, weight.scale, down, up, None if bias is None else bias.float())
        ]
        scale_at, rows, step, down_at, up_at, bias_at = (None if t is None else t.data_ptr() for t in self._held)
        group = self.inputs if weight.scale is None else self.inputs // len(weight.scale)
        self._before: tuple[Any, ...] = (
            scale_at,
            threshold,
            rows,
            KINDS[weight.rows.dtype],
            step,
            group,
            weight.offset,
        )
        self._before += (down_at, up_at, FACTOR_KINDS[factor], rank, bias_at)
        self._function = library.edgewright_sparse_rows

    def __call__(self, x: Tensor) -> tuple[Tensor, int]:
        if x.numel() != self.inputs or x.device.type != "cpu":
            raise UsageError(f"x {tuple(x.shape)} on {x.device}: {self.inputs} numbers on the CPU are needed")
        x = x.detach().float().contiguous()
        y = torch.empty(self.outputs)
        threads = max(1, min(torch.get_num_threads(), self.inputs * self.outputs // PRODUCTS_PER_THREAD))
        kept = self._function(x.data_ptr(), *self._before, y.data_ptr(), self.inputs, self.outputs, threads)
        if kept < 0:
            raise EdgewrightError(f"out of memory in a sparse layer of {self.inputs} inputs and {self.outputs} outputs")
        return y, int(kept)

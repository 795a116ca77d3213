"""Fully connected layers at low precision: int8 by integers, float16 or bfloat16 weights, and 16-bit accumulation.

    y = s_x s_c (q_x - z_x) . q_w + b          q_w int8, s_c = max|W_c| / 127 for output channel c
                                               q_x uint8, (s_x, z_x) of each row of x (dynamic) or fixed (static)

The sum is over integers in 32 bits. 16-bit accumulation, which old x86 needs for speed, is emulated: weights beyond 7
bits go another way (a sparse product in float), what is left is added in saturating 16-bit integers that are emptied
into 32 bits every `spill` products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.systems.low_precision_recsys.rows import StoredRows

CODES = 127
LEVELS = 255
SPILL = 64  # products that 16 bits hold before they are emptied
_SEVEN_BITS = (-64, 63)
_EXACT = 512  # products of 255 x 128 whose sum float32 holds exactly


def weight_codes(weight: Tensor, clip: str = "max", nbins: int = 200, ratio: float = 0.5) -> tuple[Tensor, Tensor]:
    """(codes int8 [out, in], scale float32 [out]) of W [out, in]: symmetric, one scale an output channel.

    clip: "max", or "l2": the range is cut step by step, as the greedy search of tables does at both ends, and the
    scale with the least squared error is taken. A channel of zeros has scale 1. Raises UsageError for NaN or infinity.
    """
    if clip not in ("max", "l2"):
        raise UsageError(f"clip={clip!r}; 'max' is the whole range, 'l2' the one of least squared error")
    weight = weight.detach().float()
    reach = weight.abs().amax(1)
    if not bool(reach.isfinite().all()):
        raise UsageError(f"output channel {int((~reach.isfinite()).nonzero()[0])} holds NaN or infinity")
    best = _scale(reach)
    if clip == "l2":
        least = _error(weight, best)
        for step in range(1, int(nbins * ratio) + 1):
            scale = _scale(reach * (1 - step / nbins))
            error = _error(weight, scale)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
    return _codes(weight, best).to(torch.int8), best


def row_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """(s_x, z_x) of every row of x [..., in], float32 [..., 1]: from min(x, 0) to max(x, 0) in 255 steps."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0.0), x.amax(-1, keepdim=True).clamp_min(0.0)
    return range_parameters(low, high)


def range_parameters(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Step and zero point of uint8 codes for a range that holds 0; step 1 where the range is empty."""
    step = (high - low) / LEVELS
    step = torch.where(step > 0, step, torch.ones_like(step))
    return step, (-low / step).round().clamp(0, LEVELS)


def input_codes(x: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """uint8 codes of x, as float32 whole numbers from 0 to 255."""
    return (x / step).round_().add_(zero).clamp_(0, LEVELS)


def integer_product(codes: Tensor, weights: Tensor) -> Tensor:
    """Codes [B, in] (whole numbers from -255 to 255) . weights [out, in] (int8) -> int32 [B, out], exactly.

    float32 holds every whole number up to 2^24, so that 512 products at a time are exact in any order of adding; the
    parts are added as integers. On a CPU without integer instructions this is many times faster than integer loops.
    """
    x, w = codes.float(), weights.float()
    total = (x[:, :_EXACT] @ w[:, :_EXACT].t()).to(torch.int32)
    for start in range(_EXACT, x.shape[1], _EXACT):
        part = slice(start, start + _EXACT)
        total += (x[:, part] @ w[:, part].t()).to(torch.int32)
    return total


class Int8Linear(nn.Module):
    """A linear layer in int8. [..., in] float32 -> [..., out] float32.

    activation: (s_x, z_x) for static ranges, None to take those of each row. accumulate: 32, or 16 to emulate 16-bit
    sums with outliers split off; `overflows` then counts the saturated sums of the last call.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    step: Tensor | None
    zero: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        activation: tuple[float, int] | None = None,
        accumulate: int = 32,
        spill: int = SPILL,
    ) -> None:
        super().__init__()
        if accumulate not in (16, 32) or spill < 2 or spill % 2:
            raise UsageError(f"accumulate={accumulate}, spill={spill}: 32 or 16 bits, and an even number of products")
        self.out_features, self.in_features = codes.shape
        self.accumulate, self.spill, self.overflows = accumulate, spill, 0
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        step, zero = activation or (None, None)
        self.register_buffer("step", None if step is None else torch.tensor(step, dtype=torch.float32))
        self.register_buffer("zero", None if zero is None else torch.tensor(zero, dtype=torch.int32))

    @property
    def weight(self) -> Tensor:
        """The float32 matrix [out, in] that the codes stand for."""
        return self.codes.float() * self.scale.unsqueeze(1)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, bias and fixed ranges."""
        there = [t for t in (self.scale, self.bias, self.step, self.zero) if t is not None]
        return self.codes.numel() + 4 * sum(t.numel() for t in there)

    def activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(s_x, z_x) that `x` is read with."""
        if self.step is None or self.zero is None:
            return row_range(x)
        return self.step, self.zero.float()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features).float()
        step, zero = self.activation(flat)
        codes = input_codes(flat, step, zero)
        if self.accumulate == 16:
            product = self._sixteen(codes, zero)
        else:
            product = integer_product(codes.sub_(zero), self.codes).float()
        y = product * self.scale * step
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def saturation(self, x: Tensor) -> float:
        """Share of the values of x that lie outside the range they are read with."""
        flat = x.reshape(-1, self.in_features).float()
        step, zero = self.activation(flat)
        exact = (flat / step).round() + zero
        return float(((exact < 0) | (exact > LEVELS)).float().mean())

    def _sixteen(self, codes: Tensor, zero: Tensor) -> Tensor:
        main, outliers = split_outliers(self.codes)
        sums, self.overflows = accumulate_16(codes, main, self.spill)
        exact = (codes - zero) @ outliers.t()
        return (sums - (zero.to(torch.int32) * main.sum(1, dtype=torch.int32))).float() + exact

    def extra_repr(self) -> str:
        kind = "dynamic" if self.step is None else f"static step {float(self.step):.4g}"
        return f"{self.in_features} -> {self.out_features}, {kind}, {self.accumulate}-bit sums"


def split_outliers(codes: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes as (those within 7 bits, others 0; float32 of the others, the rest 0)."""
    inside = (codes >= _SEVEN_BITS[0]) & (codes <= _SEVEN_BITS[1])
    return torch.where(inside, codes, torch.zeros_like(codes)), torch.where(inside, 0.0, codes.float())


def accumulate_16(codes: Tensor, weights: Tensor, spill: int = SPILL) -> tuple[Tensor, int]:
    """(codes [B, in] (0 to 255) . weights [out, in] (7 bits) through 16 bits: int32 [B, out], saturated sums).

    Pairs of products are added first, then saturating sums of pairs, emptied into 32 bits every `spill` products.
    """
    low, high = torch.iinfo(torch.int16).min, torch.iinfo(torch.int16).max
    pad = codes.shape[1] % 2
    x, w = F.pad(codes, (0, pad)).to(torch.int32), F.pad(weights, (0, pad)).to(torch.int32)
    total = torch.zeros(len(x), len(w), dtype=torch.int32, device=x.device)
    part, lost = torch.zeros_like(total), 0
    for place in range(0, x.shape[1], 2):
        pair = x[:, place, None] * w[:, place] + x[:, place + 1, None] * w[:, place + 1]
        for sums in (pair, part.add_(pair.clamp_(low, high))):
            lost += int(((sums < low) | (sums > high)).sum())
        part.clamp_(low, high)
        if (place + 2) % spill == 0:
            total += part
            part.zero_()
    return total + part, lost


class HalfLinear(nn.Module):
    """A linear layer whose weight is float16 or bfloat16 and whose arithmetic is float32."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight.detach().to(dtype))
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return 2 * self.weight.numel() + (0 if self.bias is None else 4 * self.bias.numel())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float(), self.bias)


class RowsLinear(nn.Module):
    """A linear layer whose weight is a table's rows: what is left of a layer that was tied to an embedding."""

    bias: Tensor | None

    def __init__(self, stored: StoredRows, bias: Tensor | None) -> None:
        super().__init__()
        self.stored = stored
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.stored.weight, self.bias)


def _scale(reach: Tensor) -> Tensor:
    scale = reach / CODES
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _codes(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale.unsqueeze(1)).round_().clamp_(-CODES, CODES)


def _error(weight: Tensor, scale: Tensor) -> Tensor:
    return (_codes(weight, scale) * scale.unsqueeze(1) - weight).square().sum(1)

"""Affine and symmetric quantisers of integer arithmetic: a range becomes a scale and an integer zero point.

Source: "Quantizing deep convolutional networks for efficient inference: A whitepaper", arXiv 1806.08342, section 2.
With N = 2^bits levels and a range [low, high] that is first widened to include 0:
    scale = (high - low) / (N - 1),  zero = round(-low / scale),  code = clamp(round(x / scale) + zero)
    value = scale * (code - zero), so 0.0 is a code and padding with zeros costs nothing.
Symmetric: zero = 0 and scale = max|x| / (N/2 - 1). Weights use the narrow range, one code less, so that -127..127.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgewright.checks import check, whole
from edgewright.errors import FormatError

SMALLEST_SCALE = torch.finfo(torch.float32).eps  # a range of width zero still needs a scale to divide by
BITS = range(2, 9)


@dataclass(frozen=True)
class AffineScheme:
    """How one tensor becomes integers (arXiv 1806.08342, section 2).

    Args:
        bits: 2 to 8.
        symmetric: the zero point is 0.
        narrow: one code less (weights).
        signed: of a symmetric scheme, codes around zero; unsigned ones hold tensors without negative values.
        per_channel: a scale and a zero point for each index of the first dimension (output channels).
        stochastic: round up or down by chance, in training only.

    Raises:
        UsageError: other bits.
    """

    bits: int = 8
    symmetric: bool = False
    narrow: bool = False
    signed: bool = True
    per_channel: bool = False
    stochastic: bool = False

    def __post_init__(self) -> None:
        check("AffineScheme bits", self.bits, whole(2, 8), "integer quantisers have 2 to 8 bits")

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code."""
        levels = 2**self.bits
        if self.symmetric and self.signed:
            return -levels // 2 + self.narrow, levels // 2 - 1
        return 0, levels - 1 - self.narrow

    def parameters(self, low: Tensor, high: Tensor, name: str = "") -> tuple[Tensor, Tensor]:
        """Scale and zero point of ranges.

        Args:
            low, high: float, both 0-dimensional or [channels].
            name: of the tensor, for the error.

        Returns:
            (scale float32, zero point int32), shaped as `low`.

        Raises:
            FormatError: a range that holds NaN or infinity or is upside down.
        """
        low, high = low.detach().float(), high.detach().float()
        if not bool((torch.isfinite(low) & torch.isfinite(high) & (low <= high)).all()):
            where = f" of {name}" if name else ""
            raise FormatError(
                f"the range {low.min():g}..{high.max():g}{where} is no range: bounds must be finite and in order"
            )
        low, high = low.clamp(max=0), high.clamp(min=0)
        lowest, highest = self.code_range
        if self.symmetric:
            scale = torch.maximum(-low, high) / highest
            return scale.clamp(min=SMALLEST_SCALE), torch.zeros_like(scale, dtype=torch.int32)
        scale = ((high - low) / (highest - lowest)).clamp(min=SMALLEST_SCALE)
        zero = (lowest - torch.round(low / scale)).clamp(lowest, highest)
        return scale, zero.to(torch.int32)

    def weight_parameters(
        self, weight: Tensor, name: str = "", least_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `parameters`, from the true extremes of each output channel or of the layer.

        Args:
            weight: float [out, ...].
            name: of the weight, for the error.
            least_scale: [out], scales are widened to it.

        Returns:
            (scale float32, zero point int32), [out] or 0-dimensional.
        """
        rows = weight.detach().reshape(weight.shape[0], -1) if self.per_channel else weight.detach().reshape(1, -1)
        low, high = rows.amin(1), rows.amax(1)
        if least_scale is not None:
            highest = self.code_range[1]
            high = torch.maximum(high, highest * (least_scale if self.per_channel else least_scale.max()))
        scale, zero = self.parameters(low, high, name)
        return (scale, zero) if self.per_channel else (scale[0], zero[0])


def quantize(x: Tensor, scale: Tensor, zero: Tensor, scheme: AffineScheme) -> Tensor:
    """Integer codes; halves round to even, as torch's kernels do.

    Args:
        x: float, any shape.
        scale, zero: 0-dimensional, or [x.shape[0]] when the scheme is per channel.
        scheme: range of codes.

    Returns:
        int32, shaped as `x`.
    """
    return _codes(x, scale, zero, scheme).clamp_(*scheme.code_range).to(torch.int32)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, scheme: AffineScheme) -> Tensor:
    """The values scale * (code - zero).

    Args:
        codes: int32, any shape.
        scale, zero: 0-dimensional, or [codes.shape[0]] when the scheme is per channel.
        scheme: that gave the codes.

    Returns:
        float32, shaped as `codes`.
    """
    scale, zero = _broadcast(codes, scale, zero, scheme)
    return (codes - zero).to(torch.float32) * scale


def ste_mask(x: Tensor, scale: Tensor, zero: Tensor, scheme: AffineScheme) -> Tensor:
    """Where the straight-through gradient passes (bool, shape of x): where rounding gives a code that exists.

    deviation: the paper stops the gradient at low and high; torch's kernels pass half a scale further, as here.
    """
    lowest, highest = scheme.code_range
    codes = _codes(x, scale, zero, scheme)
    return (codes >= lowest) & (codes <= highest)


def fake_quantize(
    x: Tensor, scale: Tensor, zero: Tensor, scheme: AffineScheme, generator: torch.Generator | None = None
) -> Tensor:
    """dequantize(quantize(x)) with straight-through gradients for x, by torch's native kernels.

    Args:
        x: float32, any shape.
        scale, zero: 0-dimensional, or [x.shape[0]] when the scheme is per channel.
        scheme: range of codes. A stochastic one is the only one that needs a kernel of ours.
        generator: of the noise of a stochastic scheme.

    Returns:
        float32, shaped as `x`.
    """
    lowest, highest = scheme.code_range
    if scheme.stochastic:
        noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 0.5
        return _Stochastic.apply(x, noise, scale, zero, scheme)
    if scheme.per_channel:
        return torch.fake_quantize_per_channel_affine(x, scale, zero, 0, lowest, highest)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, lowest, highest)


class _Stochastic(torch.autograd.Function):
    """code = clamp(round((x + noise * scale) / scale) + zero).

    deviation: the paper adds eps to x unscaled; a noise of one code's width has to be in units of the scale.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, noise: Tensor, scale: Tensor, zero: Tensor, scheme: AffineScheme) -> Tensor:
        ctx.save_for_backward(ste_mask(x, scale, zero, scheme))
        wide_scale, _ = _broadcast(x, scale, zero, scheme)
        return dequantize(quantize(x + noise * wide_scale, scale, zero, scheme), scale, zero, scheme)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        return upstream * mask, None, None, None, None


def _codes(x: Tensor, scale: Tensor, zero: Tensor, scheme: AffineScheme) -> Tensor:
    """Codes before clamping, as floats. The product with 1 / scale decides ties as torch's kernels do."""
    scale, zero = _broadcast(x, scale, zero, scheme)
    return (x.detach().float() * scale.reciprocal()).round_().add_(zero)


def _broadcast(x: Tensor, scale: Tensor, zero: Tensor, scheme: AffineScheme) -> tuple[Tensor, Tensor]:
    if not scheme.per_channel:
        return scale, zero
    shape = (-1,) + (1,) * (x.ndim - 1)
    return scale.reshape(shape), zero.reshape(shape)

"""Affine and symmetric quantisers of integer arithmetic: a range becomes a step and an integer zero point.

Source: "Quantizing deep convolutional networks for efficient inference: A whitepaper", arXiv 1806.08342, section 2.
With N = 2^bits levels and a range [low, high] that is first widened to include 0:
    step = (high - low) / (N - 1),  zero = round(-low / step),  code = clamp(round(x / step) + zero)
    value = step * (code - zero), so 0.0 is a code and padding with zeros costs nothing.
Symmetric: zero = 0 and step = max|x| / (N/2 - 1). Weights use the narrow range, one code less, so that -127..127.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgewright.errors import FormatError, UsageError

SMALLEST_STEP = torch.finfo(torch.float32).eps  # a range of width zero still needs a step to divide by
BITS = range(2, 9)


@dataclass(frozen=True)
class AffineScheme:
    """How one tensor becomes integers.

    bits: 2 to 8. symmetric: the zero point is 0. narrow: one code less (weights). signed: of a symmetric scheme, codes
    around zero; unsigned ones hold tensors without negative values. per_channel: a step and a zero point for each
    index of the first dimension (output channels). stochastic: round up or down by chance, in training only.
    """

    bits: int = 8
    symmetric: bool = False
    narrow: bool = False
    signed: bool = True
    per_channel: bool = False
    stochastic: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in BITS:
            raise UsageError(f"bits={self.bits!r}: integer quantisers have 2 to 8 bits, for example bits=8")

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code."""
        levels = 2**self.bits
        if self.symmetric and self.signed:
            return -levels // 2 + self.narrow, levels // 2 - 1
        return 0, levels - 1 - self.narrow

    def parameters(self, low: Tensor, high: Tensor, name: str = "") -> tuple[Tensor, Tensor]:
        """(step float32, zero point int32) for ranges low..high of any shape, 0-dimensional or [channels].

        Raises FormatError naming `name` when a range holds NaN or infinity or is upside down.
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
            step = torch.maximum(-low, high) / highest
            return step.clamp(min=SMALLEST_STEP), torch.zeros_like(step, dtype=torch.int32)
        step = ((high - low) / (highest - lowest)).clamp(min=SMALLEST_STEP)
        zero = (lowest - torch.round(low / step)).clamp(lowest, highest)
        return step, zero.to(torch.int32)

    def weight_parameters(
        self, weight: Tensor, name: str = "", least_step: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `parameters`, from the true extremes of a weight [out, ...]: of each output channel or of the layer.

        least_step: [out], steps are widened to it.
        """
        rows = weight.detach().reshape(weight.shape[0], -1) if self.per_channel else weight.detach().reshape(1, -1)
        low, high = rows.amin(1), rows.amax(1)
        if least_step is not None:
            highest = self.code_range[1]
            high = torch.maximum(high, highest * (least_step if self.per_channel else least_step.max()))
        step, zero = self.parameters(low, high, name)
        return (step, zero) if self.per_channel else (step[0], zero[0])


def quantize(x: Tensor, step: Tensor, zero: Tensor, scheme: AffineScheme) -> Tensor:
    """Integer codes (int32) of x in its own shape; halves round to even, as torch's kernels do."""
    return _codes(x, step, zero, scheme).clamp_(*scheme.code_range).to(torch.int32)


def dequantize(codes: Tensor, step: Tensor, zero: Tensor, scheme: AffineScheme) -> Tensor:
    """float32 values step * (code - zero) in the shape of `codes`."""
    step, zero = _broadcast(codes, step, zero, scheme)
    return (codes - zero).to(torch.float32) * step


def ste_mask(x: Tensor, step: Tensor, zero: Tensor, scheme: AffineScheme) -> Tensor:
    """Where the straight-through gradient passes (bool, shape of x): where rounding gives a code that exists.

    deviation: the paper stops the gradient at low and high; torch's kernels pass half a step further, as here.
    """
    lowest, highest = scheme.code_range
    codes = _codes(x, step, zero, scheme)
    return (codes >= lowest) & (codes <= highest)


def fake_quantize(
    x: Tensor, step: Tensor, zero: Tensor, scheme: AffineScheme, generator: torch.Generator | None = None
) -> Tensor:
    """dequantize(quantize(x)) with straight-through gradients for x, by torch's native kernels.

    x: float32. step, zero: 0-dimensional, or [x.shape[0]] when the scheme is per channel. A stochastic scheme draws
    its noise from `generator` and is the only one that needs a kernel of ours.
    """
    lowest, highest = scheme.code_range
    if scheme.stochastic:
        noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 0.5
        return _Stochastic.apply(x, noise, step, zero, scheme)
    if scheme.per_channel:
        return torch.fake_quantize_per_channel_affine(x, step, zero, 0, lowest, highest)
    return torch.fake_quantize_per_tensor_affine(x, step, zero, lowest, highest)


class _Stochastic(torch.autograd.Function):
    """code = clamp(round((x + noise * step) / step) + zero).

    deviation: the paper adds eps to x unscaled; a noise of one code's width has to be in units of the step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, noise: Tensor, step: Tensor, zero: Tensor, scheme: AffineScheme) -> Tensor:
        ctx.save_for_backward(ste_mask(x, step, zero, scheme))
        wide_step, _ = _broadcast(x, step, zero, scheme)
        return dequantize(quantize(x + noise * wide_step, step, zero, scheme), step, zero, scheme)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        return upstream * mask, None, None, None, None


def _codes(x: Tensor, step: Tensor, zero: Tensor, scheme: AffineScheme) -> Tensor:
    """Codes before clamping, as floats. The product with 1 / step decides ties as torch's kernels do."""
    step, zero = _broadcast(x, step, zero, scheme)
    return (x.detach().float() * step.reciprocal()).round_().add_(zero)


def _broadcast(x: Tensor, step: Tensor, zero: Tensor, scheme: AffineScheme) -> tuple[Tensor, Tensor]:
    if not scheme.per_channel:
        return step, zero
    shape = (-1,) + (1,) * (x.ndim - 1)
    return step.reshape(shape), zero.reshape(shape)

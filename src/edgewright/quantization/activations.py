"""Fake quantisation of activations: min-max per token or per tensor, recomputed at every forward, straight-through.

Symmetric, b bits over a set S (LLM-QAT, arXiv 2305.17888): s = (2^(b-1) - 1) / max_S|x|, Q(x) = round(s * x) / s; the
codes are -(2^(b-1)-1) .. 2^(b-1)-1. Nothing is clipped: outliers define the range, because clipping them breaks
language models at the start of training.
Asymmetric: 2^b codes over [min(x, 0), max(x, 0)] with an integer zero point, as runtimes with int8 inputs compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgewright.checks import check_fields, one_of, whole
from edgewright.errors import FormatError

SMALLEST_PEAK = 1e-30  # guards a token of zeros (padding); small enough that no real activation reaches it
UNTOUCHED_BITS = 16  # a width of 16 means: not quantised, the tensor passes bit for bit


@dataclass(frozen=True)
class ActivationConfig:
    """Quantisation of a layer's input: min-max, recomputed at every forward (LLM-QAT, arXiv 2305.17888, section 2.3).

    Args:
        bits: 2 to 16; 16 switches it off.
        granularity: one scale per "token" or for the "tensor".
        symmetric: codes around zero; False: an integer zero point.
        official_clip_grad: 2.0 zeroes the gradient where |x| >= 2, as the official code does; None: the plain identity.
        check_finite: refuse NaN and infinity by the layer's name, at the price of one more pass over the input.

    Raises:
        UsageError: a setting out of its range.
    """

    bits: int = 8
    granularity: Literal["token", "tensor"] = "token"
    symmetric: bool = True
    official_clip_grad: float | None = None
    check_finite: bool = False

    def __post_init__(self) -> None:
        check_fields(self, {"bits": whole(2, 16), "granularity": one_of("token", "tensor")})

    def build(self, layer: str, features: int) -> nn.Module:
        """The module in front of a layer, without state.

        Args:
            layer: name of the layer, for errors.
            features: of its input.
        """
        return DynamicActivation(self, layer)


def _symmetric(x: Tensor, bits: int, per_token: bool) -> Tensor:
    peak = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True) if per_token else x.abs().amax()
    # deviation: the official code adds 1e-6 to the scale and to its inverse, so that not even the maximum stays.
    peak = peak.clamp(min=SMALLEST_PEAK)
    top = 2 ** (bits - 1) - 1
    # The product, not a quotient, decides ties as the formula does: 0.5 * 7 is a tie, 0.5 / (1 / 7) is not.
    return (x * (top / peak)).round_().mul_(peak / top)


def _asymmetric(x: Tensor, bits: int, per_token: bool) -> Tensor:
    """Codes 0 .. 2^b - 1 with an integer zero point.

    deviation: the official code maps [min, max] itself and lets zero fall between two codes; here the range includes
    zero and zero is a code, as in XNNPACK and torchao. Equal whenever min <= 0 <= max and min is on the grid.
    """
    low, high = (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)) if per_token else (x.amin(), x.amax())
    low, high = low.clamp(max=0), high.clamp(min=0)
    top = 2**bits - 1
    scale = ((high - low) / top).clamp(min=torch.finfo(x.dtype).eps)
    zero_point = (-(low / scale).round()).clamp(0, top)
    return (x * (1.0 / scale)).round_().add_(zero_point).clamp_(0, top).sub_(zero_point).mul_(scale)


class _StraightThrough(torch.autograd.Function):
    """Forward: the quantised tensor. Backward: the gradient unchanged, or zero where |x| >= clip if a clip is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, config: ActivationConfig, clip: float | None) -> Tensor:
        ctx.has_clip = clip is not None
        if clip is not None:
            ctx.save_for_backward(x.abs() < clip)
        quantize = _symmetric if config.symmetric else _asymmetric
        values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return quantize(values, config.bits, config.granularity == "token").to(x.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.has_clip:
            (inside,) = ctx.saved_tensors
            return upstream * inside, None, None
        return upstream, None, None


def fake_quantize_activation(
    x: Tensor, config: ActivationConfig, official_clip_grad: float | None = None, *, layer: str = ""
) -> Tensor:
    """Quantised activations with straight-through gradients; nothing but the result is kept in memory.

    Args:
        x: [..., features], any float dtype; a token is one vector along the last dimension. Half types compute in
            float32.
        config: bits and ranges.
        official_clip_grad: zero the gradient where |x| is at least this; 2.0 is the official code's behaviour, which
            blocks learning on outliers. None: `config.official_clip_grad`.
        layer: name of the module, for the error.

    Returns:
        [..., features] in the dtype of `x`.

    Raises:
        FormatError: NaN or infinity where `config.check_finite` is set.
    """
    if config.check_finite and not torch.isfinite(x).all():
        raise FormatError(f"the input of layer {layer or '(unnamed)'} holds NaN or infinity; it cannot be quantised")
    if config.bits >= UNTOUCHED_BITS:
        return x
    clip = config.official_clip_grad if official_clip_grad is None else official_clip_grad
    return _StraightThrough.apply(x, config, clip)


class DynamicActivation(nn.Module):
    """`fake_quantize_activation` as a module without state, in front of a layer. [..., features] -> the same."""

    def __init__(self, config: ActivationConfig, layer: str = "") -> None:
        super().__init__()
        self.config = config
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize_activation(x, self.config, layer=self.layer)

    def extra_repr(self) -> str:
        kind = "symmetric" if self.config.symmetric else "asymmetric"
        return f"bits={self.config.bits}, per {self.config.granularity}, {kind}"

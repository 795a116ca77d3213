"""Elastic activations: a learned scale, and where wanted a learned shift, for inputs of 1 bit, three levels or b bits.

BiT (arXiv 2205.13016, section 3.3) with X the input, alpha > 0 the scale, beta the shift, y = (X - beta) / alpha:
    signed binary    alpha * sign(X - beta)                  for tensors of both signs
    unsigned binary  alpha * round(clip(y, 0, 1))            for tensors that are never negative
The sign of a non-negative tensor would be all ones, which is why both sets are needed. With more levels (TBT, arXiv
2306.01841, and BiT's teachers) y is rounded and clipped to low..high; unsigned inputs then lose their minimum first.
The published minimum is that of the whole tensor, so that the other tokens of a batch change the result; what
generates token by token needs one of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgewright.checks import check, check_fields, one_of, whole
from edgewright.errors import CheckFailed, FormatError, UsageError

SMALLEST_ALPHA = 1e-5


@dataclass(frozen=True)
class ElasticConfig:
    """An `InputConfig` with a learned scale (BiT, arXiv 2205.13016, section 3.3).

    Args:
        levels: "binary", "ternary" or an integer width of 2 to 8 bits.
        signed: which of the two sets.
        shift: learn beta, one value per input feature.
        check: refuse negative inputs of the unsigned binary set by name instead of clipping them.
        learn_scale: train alpha; False keeps the value of the first batch.
        floor: the minimum that unsigned inputs of more than two levels lose: of the "tensor" as published, of each
            "token" (the last dimension), or "zero", which is that of probabilities whether or not a mask put a zero
            among them. deviation: "token" and "zero" make the result for a token independent of all others; training
            uses them too.

    Raises:
        UsageError: other levels or another floor.
    """

    levels: Literal["binary", "ternary"] | int = "binary"
    signed: bool = True
    shift: bool = True
    check: bool = False
    learn_scale: bool = True
    floor: Literal["tensor", "token", "zero"] = "tensor"

    def __post_init__(self) -> None:
        check_fields(self, {"floor": one_of("tensor", "token", "zero")})
        if self.levels not in ("binary", "ternary"):
            check("elastic levels", self.levels, whole(2, 8), "or 'binary' or 'ternary'")

    def build(self, layer: str, features: int) -> nn.Module:
        return ElasticQuantizer(self, layer, features)

    @property
    def bounds(self) -> tuple[int, int]:
        """Lowest and highest code; a signed binary tensor has only these two."""
        if self.levels == "binary":
            return (-1, 1) if self.signed else (0, 1)
        if self.levels == "ternary":
            return (-1, 1) if self.signed else (0, 2)
        assert isinstance(self.levels, int)
        return (-(2 ** (self.levels - 1)), 2 ** (self.levels - 1) - 1) if self.signed else (0, 2**self.levels - 1)

    def initial_alpha(self, x: Tensor) -> Tensor:
        """Scale from a first batch: 2 mean|X| / sqrt(Qp) for both signs, 4 mean|X| / sqrt(Qp) for one."""
        bits = {"binary": 1, "ternary": 2}.get(str(self.levels)) or int(self.levels)
        top = max(2 ** (bits - 1) - 1, 1) if self.signed else 2**bits - 1
        return (x.detach().float().abs().mean() * (2.0 if self.signed else 4.0) / math.sqrt(top)).clamp(
            min=SMALLEST_ALPHA
        )


def elastic_codes(x: Tensor, alpha: Tensor, low: int, high: int, binary: bool) -> Tensor:
    """Codes of x / alpha, in x's shape and dtype: the sign where `binary`, else rounded and clipped to low..high."""
    y = x / alpha
    # deviation: torch.sign(0) = 0 is not among the two values, so zero counts as +1.
    return torch.where(y >= 0, 1.0, -1.0).to(x.dtype) if binary else y.round_().clamp_(low, high)


class _Elastic(torch.autograd.Function):
    """x, alpha (scalar) -> quantised x; gradients of LSQ with g = 1 / sqrt(numel * Qp)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, low: int, high: int, binary: bool) -> Tensor:
        alpha = alpha.clamp(min=SMALLEST_ALPHA)  # in here, so that a clamped alpha receives a gradient and recovers
        ctx.save_for_backward(x, alpha)
        ctx.bounds, ctx.binary = (low, high), binary
        return elastic_codes(x, alpha, low, high, binary).mul_(alpha)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, alpha = ctx.saved_tensors
        low, high = ctx.bounds
        y = x / alpha
        inside = (y >= low) & (y <= high)
        if ctx.binary:
            slope = torch.where(y >= 0, 1.0, -1.0).to(y.dtype)
        else:
            slope = torch.where(inside, y.round() - y, y.clamp(low, high))
        g = 1.0 / math.sqrt(x.numel() * high)
        return upstream * inside, (upstream * slope).sum().mul(g).to(alpha.dtype), None, None, None


class ElasticQuantizer(nn.Module):
    """A tensor in front of a layer on its two sets, with trained scale and shift. [..., features] -> the same.

    The scale starts from the first batch that comes through (give it 16 sentences or more), or from `calibrate`.
    `alpha` takes its own learning rate and no weight decay, `shift` (which is -beta) no weight decay.

    Args:
        config: levels and what is learned.
        layer: its name, for errors.
        features: of the input, where a shift is learned.

    Raises:
        UsageError: a shift without the number of features.
        FormatError: in a call, NaN on an unsigned set.
        CheckFailed: in a call, negative inputs where `config.check` refuses them.
    """

    calibrated: Tensor

    def __init__(self, config: ElasticConfig, layer: str = "", features: int = 0) -> None:
        super().__init__()
        if config.shift and features < 1:
            raise UsageError(f"layer {layer}: a learned shift needs the number of features; give it, or shift=False")
        self.config = config
        self.layer = layer
        self.alpha = nn.Parameter(torch.ones(()), requires_grad=config.learn_scale)
        self.shift = nn.Parameter(torch.zeros(features)) if config.shift else None
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))
        self._ready = False  # what the buffer says, without reading it from a device in every forward

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the scale from x, any shape."""
        self.alpha.copy_(self.config.initial_alpha(x))
        self.calibrated.fill_(True)
        self._ready = True

    def is_calibrated(self) -> bool:
        """The scale was set by data or by a loaded state."""
        self._ready = self._ready or bool(self.calibrated)
        return self._ready

    def forward(self, x: Tensor) -> Tensor:
        if not self.config.signed:
            refuse_nan(x, self.layer)
        if self.config.check and self.zero_or_one and bool((x < 0).any()):
            raise CheckFailed(f"the input of {self.layer or 'an unsigned quantiser'} has negative values")
        if self.shift is not None:
            x = x + self.shift
        if not self.is_calibrated():
            self.calibrate(x)
        if self.config.signed or self.zero_or_one or self.config.floor == "zero":
            return self._quantized(x)
        floor = x.detach().amin() if self.config.floor == "tensor" else x.detach().amin(-1, keepdim=True)
        return self._quantized(x - floor) + floor

    @property
    def zero_or_one(self) -> bool:
        """The unsigned binary set, which needs inputs without a sign."""
        return self.config.levels == "binary" and not self.config.signed

    def _quantized(self, x: Tensor) -> Tensor:
        low, high = self.config.bounds
        binary = self.config.levels == "binary" and self.config.signed
        if torch.is_grad_enabled():
            return _Elastic.apply(x, self.alpha, low, high, binary)
        alpha = self.alpha.clamp(min=SMALLEST_ALPHA)  # plain operators, which exporters can follow
        return elastic_codes(x, alpha, low, high, binary) * alpha

    def extra_repr(self) -> str:
        return (
            f"levels={self.config.levels}, {'signed' if self.config.signed else f'unsigned, floor={self.config.floor}'}"
        )


def refuse_nan(x: Tensor, layer: str) -> None:
    """Raises FormatError naming the layer when x holds NaN: the floor of an unsigned set would spread it everywhere."""
    if not torch.compiler.is_compiling() and bool(torch.isnan(x.detach()).any()):  # a traced graph cannot ask
        raise FormatError(f"the input of layer {layer or '(unnamed)'} holds NaN; the unsigned set cannot take it")

"""Fake quantisation with exact straight-through gradients, alone and fused into a linear layer.

Backward rules of ParetoQ (arXiv 2502.02631) with G = dL/dW_q and u = W / scale:
    dL/dW     = G where u lies in the grid's clip range, else 0
    dL/dalpha = g * sum over the group of G * phi,  g = 1 / sqrt(numel(W) * Qp)
Scales recomputed from the weight at each forward (absmax, absmean; LLM-QAT) pass G through unchanged.
Under noise (WinQ, arXiv 2605.17471) W and alpha are the perturbed ones in forward and in these rules, and the gradient
goes to the unperturbed ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgewright.quantization.grids import Grid
from edgewright.quantization.noise import Noise
from edgewright.quantization.scales import clamp_alpha, grouped, snap


@dataclass(frozen=True)
class Quantizer:
    """How one weight is quantised: its grid, how scales are stored, which gradient rule applies.

    Args:
        grid: of codes.
        scale_dtype: that scales are rounded to; None: float32.
        identity_gradient: dL/dW = G everywhere and no gradient for alpha (scales recomputed from the weight itself).
        official_ternary_grad: see `Grid.straight_through`.
    """

    grid: Grid
    scale_dtype: torch.dtype | None = torch.bfloat16
    identity_gradient: bool = False
    official_ternary_grad: bool = False

    def scale(self, alpha: Tensor) -> Tensor:
        """Scale as stored: alpha / scales_per_alpha, clamped away from zero, rounded to `scale_dtype`.

        Args:
            alpha: clip scales, any shape.

        Returns:
            float32, shaped as `alpha`.
        """
        return snap(clamp_alpha(alpha.float()) / self.grid.scales_per_alpha, self.scale_dtype)

    def encode(self, weight: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of a matrix.

        Args:
            weight: [rows, columns].
            alpha: [rows, groups].

        Returns:
            (codes [rows, columns], scales [rows, groups]), float32
        """
        scale = self.scale(alpha)
        codes = self.grid.encode_(grouped(weight.float(), scale.shape[1]) / scale.unsqueeze(-1))
        return codes.reshape(weight.shape), scale

    def values(self, weight: Tensor, alpha: Tensor) -> Tensor:
        """The quantised matrix: exactly what the packed form decodes to.

        Args:
            weight: [rows, columns].
            alpha: [rows, groups].

        Returns:
            float32 [rows, columns]
        """
        scale = self.scale(alpha).unsqueeze(-1)
        u = grouped(weight.float(), scale.shape[1]) / scale
        self.grid.encode_(u)
        if self.grid.offset:
            u.add_(self.grid.offset)
        return u.mul_(scale).reshape(weight.shape)

    def gradients(
        self, weight: Tensor, alpha: Tensor, upstream: Tensor, elements: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Straight-through gradients (ParetoQ, arXiv 2502.02631).

        Args:
            weight: [rows, columns].
            alpha: [rows, groups].
            upstream: dL/dW_q [rows, columns], which is consumed (masked in place).
            elements: size of the whole matrix where `weight` is a part of it, such as the looked-up rows of an
                embedding.

        Returns:
            (dL/dW [rows, columns], dL/dalpha [rows, groups])
        """
        scale = self.scale(alpha).unsqueeze(-1)
        slope, mask = self.grid.straight_through(
            grouped(weight.float(), scale.shape[1]) / scale, self.official_ternary_grad
        )
        upstream = upstream.reshape(mask.shape)
        factor = 1.0 / math.sqrt((elements or weight.numel()) * self.grid.positive_limit)
        alpha_gradient = slope.mul_(upstream).sum(-1).mul_(factor)
        return upstream.mul_(mask).reshape(weight.shape), alpha_gradient


class _FakeQuantize(torch.autograd.Function):
    """weight [rows, columns], alpha [rows, groups] -> quantised weight, recomputing everything in backward."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, alpha: Tensor, quantizer: Quantizer, elements: int | None, noise: Noise | None
    ) -> Tensor:
        ctx.save_for_backward(weight, alpha)
        ctx.quantizer, ctx.elements, ctx.noise = quantizer, elements, noise
        return quantizer.values(*_perturbed(weight, alpha, noise)).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.quantizer.identity_gradient:
            return upstream, None, None, None, None
        weight, alpha = ctx.saved_tensors
        operands = _perturbed(weight, alpha, ctx.noise)
        weight_gradient, alpha_gradient = ctx.quantizer.gradients(*operands, upstream.float().clone(), ctx.elements)
        return weight_gradient.to(weight.dtype), alpha_gradient.to(alpha.dtype), None, None, None


class _FakeQuantizedLinear(torch.autograd.Function):
    """inputs [..., in], weight [out, in], alpha [out, groups], bias [out] | None -> [..., out].

    The quantised weight lives only inside forward and inside backward, so training under quantisation needs no second
    copy of the model: what is saved for backward are the inputs and the parameters themselves.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        alpha: Tensor,
        bias: Tensor | None,
        quantizer: Quantizer,
        noise: Noise | None,
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight, alpha)
        ctx.quantizer, ctx.noise = quantizer, noise
        ctx.has_bias = bias is not None
        values = quantizer.values(*_perturbed(weight, alpha, noise))
        return torch.nn.functional.linear(inputs, values.to(inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs, weight, alpha = ctx.saved_tensors
        quantizer: Quantizer = ctx.quantizer
        operands = _perturbed(weight, alpha, ctx.noise)
        input_gradient = weight_gradient = alpha_gradient = bias_gradient = None
        flat = upstream.reshape(-1, upstream.shape[-1])  # [tokens, out]
        if ctx.needs_input_grad[0]:
            input_gradient = upstream @ quantizer.values(*operands).to(upstream.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            product = flat.t() @ inputs.reshape(-1, inputs.shape[-1])  # dL/dW_q [out, in]
            if quantizer.identity_gradient:
                weight_gradient = product.to(weight.dtype)
            else:
                weight_gradient, alpha_gradient = quantizer.gradients(*operands, product.float())
                weight_gradient = weight_gradient.to(weight.dtype)
                alpha_gradient = alpha_gradient.to(alpha.dtype)
        if ctx.has_bias and ctx.needs_input_grad[3]:
            bias_gradient = flat.sum(0)
        return input_gradient, weight_gradient, alpha_gradient, bias_gradient, None, None


def _perturbed(weight: Tensor, alpha: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
    return (weight, alpha) if noise is None else noise.perturb(weight, alpha)


def fake_quantize(
    weight: Tensor,
    alpha: Tensor,
    quantizer: Quantizer,
    elements: int | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Quantised matrix with straight-through gradients.

    Args:
        weight: [rows, columns], any float dtype.
        alpha: [rows, groups]; groups divides columns.
        quantizer: grid and gradient rule.
        elements: size of the whole matrix where `weight` is a part of it (it sets the gradient factor g).
        noise: added to both operands.

    Returns:
        As `weight`.
    """
    return _FakeQuantize.apply(weight, alpha, quantizer, elements, noise)


def fake_quantized_linear(
    inputs: Tensor,
    weight: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    quantizer: Quantizer,
    noise: Noise | None = None,
) -> Tensor:
    """`linear(inputs, fake_quantize(weight, alpha), bias)` without keeping the quantised weight for backward.

    Args:
        inputs: [..., in].
        weight: [out, in].
        alpha: [out, groups].
        bias: [out], or None.
        quantizer: grid and gradient rule.
        noise: added to weight and alpha.

    Returns:
        [..., out]
    """
    return _FakeQuantizedLinear.apply(inputs, weight, alpha, bias, quantizer, noise)

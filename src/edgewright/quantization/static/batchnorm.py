"""Convolution and batch norm folded into one quantised layer, with the correction that keeps its weights still.

Source: arXiv 1806.08342, section 3.2.2. Folding with the statistics of each batch makes the folded weights jump from
batch to batch, and with them their codes. Here they are always gamma * W / sigma with the running sigma:
    phase 1   y = conv(x, Q(gamma W / sigma)) / c + beta - gamma mu_B / sigma_B,   c = sigma_B / sigma
    phase 2   y = conv(x, Q(gamma W / sigma)) + beta - gamma mu / sigma            (statistics frozen)
mu_B and sigma_B are those of the float convolution conv(x, W). With Q the identity phase 1 is batch norm exactly.
Phase 2 in training, evaluation and the converted layer are the same arithmetic, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.errors import FormatError, UsageError
from edgewright.quantization.affine import AffineScheme, dequantize, fake_quantize, quantize
from edgewright.quantization.static.freezing import FreezeClock
from edgewright.quantization.static.observers import ActivationQuantizer

# "correct": the paper's scheme. "quantised": one convolution with quantised weights, whose output is normalised (as
# PyTorch's own ConvBn modules do). "naive": fold with the statistics of the batch; the baseline that jumps.
STATISTICS = ("correct", "quantised", "naive")
BIAS_LIMIT = 2.0**30  # largest bias in units of scale * scale of the input: half of what an int32 holds
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


class Operation:
    """The convolution or product of a layer without its weight: [N, in, H, W] -> [N, out, H', W'], or [..., in]."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        self.linear = isinstance(layer, nn.Linear)
        self.stride: tuple[int, ...] = (1, 1)
        self.padding: str | tuple[int, ...] = (0, 0)
        self.dilation: tuple[int, ...] = (1, 1)
        self.groups = 1
        if isinstance(layer, nn.Conv2d):
            if layer.padding_mode != "zeros":
                raise UsageError(f"padding_mode={layer.padding_mode!r} cannot be quantised; only 'zeros' can")
            self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
            self.groups = layer.groups

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.linear:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def margins(self, kernel: Sequence[int]) -> tuple[int, int, int, int]:
        """Zeros that are added (left, right, top, bottom) for a kernel of (height, width)."""
        if self.padding == "valid":
            return (0, 0, 0, 0)
        if self.padding == "same":  # torch puts the odd one behind
            height, width = (d * (k - 1) for d, k in zip(self.dilation, kernel, strict=True))
            return (width // 2, width - width // 2, height // 2, height - height // 2)
        rows, columns = (int(p) for p in self.padding)
        return (columns, columns, rows, rows)


class ConvBNQuant2d(nn.Module):
    """Convolution (or linear layer) with its batch norm, if it has one, under weight quantisation.

    Takes nn.Conv2d of any stride, dilation and groups with nn.BatchNorm2d, or nn.Linear with nn.BatchNorm1d. The
    parameters are those of the layers given: `weight`, `bias`, `gamma`, `beta`; so are `running_mean`, `running_var`.
    scheme None: the weight stays float. statistics: one of STATISTICS.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear,
        bn: nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm | None = None,
        scheme: AffineScheme | None = None,
        statistics: str = "correct",
        name: str = "",
    ) -> None:
        super().__init__()
        if statistics not in STATISTICS:
            raise UsageError(f"statistics={statistics!r} is unknown; choose one of {', '.join(STATISTICS)}")
        self.operation, self.scheme, self.statistics, self.name = Operation(layer), scheme, statistics, name
        self.weight, self.bias = layer.weight, layer.bias
        self.clock = FreezeClock()
        self.inputs: list[ActivationQuantizer] = []  # who quantises the input: not a part of this layer, only asked
        self.has_bn = bn is not None
        self.train(layer.training)
        if bn is None:
            return
        if bn.running_mean is None or bn.running_var is None or bn.num_batches_tracked is None:
            raise UsageError(
                f"the batch norm of {name or 'the layer'} keeps no running statistics and cannot be folded"
            )
        if bn.num_features != layer.weight.shape[0]:
            raise UsageError(f"{layer.weight.shape[0]} channels do not fit a batch norm of {bn.num_features}")
        self.gamma, self.beta = bn.weight, bn.bias
        self.eps, self.momentum, self.synchronised = bn.eps, bn.momentum, isinstance(bn, nn.SyncBatchNorm)
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(key, getattr(bn, key))

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of the layer that stands for both at inference, in float."""
        if not self.has_bn:
            return self.weight, self.bias
        scale = self._scale()
        shift = -self.running_mean if self.bias is None else self.bias - self.running_mean
        bias = shift * scale
        return self.weight * self._wide(scale), bias if self.beta is None else bias + self.beta

    def forward(self, x: Tensor) -> Tensor:
        if not (self.has_bn and self.training and self.clock.tick()):
            weight, bias = self.folded()
            if self.scheme is None:
                return self.operation(x, weight, bias)
            scale, zero, bias = self._integers(weight, bias)
            return self.operation(x, fake_quantize(weight, scale, zero, self.scheme), bias)
        if self.statistics == "quantised":
            return self._normalised_after(x)
        mean, variance = self._batch_statistics(self.operation(x, self.weight))
        sigma = (variance + self.eps).sqrt()
        gamma = torch.ones_like(sigma) if self.gamma is None else self.gamma
        shift = -gamma * mean / sigma if self.beta is None else self.beta - gamma * mean / sigma
        running = (self.running_var + self.eps).sqrt()  # before this batch is counted
        if self.statistics == "naive":
            y = self.operation(x, self._quantised(self.weight * self._wide(gamma / sigma)))
        else:
            y = self.operation(x, self._quantised(self.weight * self._wide(gamma / running)))
            y = y * _channels(running / sigma, y)
        self._count_batch(mean, variance, y)
        return y + _channels(shift, y)

    def static(self) -> StaticLayer:
        """The converted layer: constants only. Raises FormatError when a weight is not finite."""
        with torch.no_grad():
            weight, bias = self.folded()
            if self.scheme is None:
                return StaticLayer(self.operation, weight.clone(), bias, None, name=self.name)
            scale, zero, bias = self._integers(weight, bias)
            codes = quantize(weight, scale, zero, self.scheme)
            weight = dequantize(codes, scale, zero, self.scheme)
            return StaticLayer(self.operation, weight, bias, self.scheme, scale, zero, self.name)

    def _integers(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(scale, zero point, bias) of the folded layer, the bias rounded as the int32 that it will be at run time.

        Its unit is scale * scale of the input. A channel of next to no weight gets one at which its bias still fits:
        batch norm leaves such channels, and an int32 cannot hold a bias of 1 in units of 1e-10.
        """
        assert self.scheme is not None
        if bias is None or not self.inputs:
            return *self.scheme.weight_parameters(weight, self.name), bias
        entry, _ = self.inputs[0].parameters_of_codes()
        scale, zero = self.scheme.weight_parameters(weight, self.name, bias.detach().abs() / (BIAS_LIMIT * entry))
        unit = (scale * entry).expand(bias.shape)
        zeros = torch.zeros_like(unit, dtype=torch.int32)
        return scale, zero, torch.fake_quantize_per_channel_affine(bias, unit, zeros, 0, -(2**31), 2**31 - 1)

    def _scale(self) -> Tensor:
        sigma = (self.running_var + self.eps).sqrt()
        return sigma.reciprocal() if self.gamma is None else self.gamma / sigma

    def _quantised(self, weight: Tensor) -> Tensor:
        if self.scheme is None:
            return weight
        scale, zero = self.scheme.weight_parameters(weight, self.name)
        return fake_quantize(weight, scale, zero, self.scheme)

    def _normalised_after(self, x: Tensor) -> Tensor:
        scale = self._scale()
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)  # gamma = 0: nothing to divide, beta comes out
        y = self.operation(x, self._quantised(self.weight * self._wide(scale)))
        y = y / _channels(safe, y)
        mean, variance = self._batch_statistics(y)
        self._count_batch(mean, variance, y)
        y = (y - _channels(mean, y)) / _channels((variance + self.eps).sqrt(), y)
        if self.gamma is not None:
            y = y * _channels(self.gamma, y) + _channels(self.beta, y)
        return y

    def _batch_statistics(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance a channel of [N, C, ...], over all processes for a SyncBatchNorm."""
        values = y.numel() // y.shape[1]
        dims = [0, *range(2, y.ndim)]
        if self.synchronised and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            from torch.distributed.nn.functional import all_reduce

            count = torch.full((1,), float(values), device=y.device)
            total = all_reduce(torch.cat((y.sum(dims), count)))
            mean = total[:-1] / total[-1]
            return mean, all_reduce((y - _channels(mean, y)).square().sum(dims)) / total[-1]
        if values <= 1:  # PyTorch's own words
            raise UsageError(f"Expected more than 1 value per channel when training, got input size {list(y.shape)}")
        variance, mean = torch.var_mean(y, dims, correction=0)
        return mean, variance

    @torch.no_grad()
    def _count_batch(self, mean: Tensor, variance: Tensor, y: Tensor) -> None:
        self.num_batches_tracked += 1
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        values = y.numel() // y.shape[1]
        if self.synchronised and dist.is_available() and dist.is_initialized():
            values *= dist.get_world_size()
        if self.bias is not None:  # the convolution above runs without it
            mean = mean + self.bias
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * (values / (values - 1)), weight)

    def _wide(self, scale: Tensor) -> Tensor:
        return scale.reshape(-1, *(1,) * (self.weight.ndim - 1))

    def extra_repr(self) -> str:
        shape = "x".join(map(str, self.weight.shape))
        return f"{shape}, groups={self.operation.groups}, bn={self.has_bn}, scheme={self.scheme}"


class StaticLayer(nn.Module):
    """A converted layer: weights that lie on their grid, scale [out] and zero point [out], a float bias.

    `forward` passes the weight through its fake quantiser, which changes no bit of it: exporters find the codes there.
    scheme None: the layer's weight stayed float.
    """

    scale: Tensor
    zero: Tensor

    def __init__(
        self,
        operation: Operation,
        weight: Tensor,
        bias: Tensor | None,
        scheme: AffineScheme | None,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self.operation, self.scheme, self.name = operation, scheme, name
        if not torch.isfinite(weight).all() or (bias is not None and not torch.isfinite(bias).all()):
            raise FormatError(f"layer {name} holds NaN or infinity after folding; it cannot be converted")
        if scheme is not None:
            assert scale is not None and zero is not None
            self.register_buffer("scale", scale.expand(len(weight)).clone())
            self.register_buffer("zero", zero.expand(len(weight)).clone())
            self.lowest, self.highest = scheme.code_range
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @property
    def codes(self) -> Tensor:
        """int32 codes in the weight's shape."""
        if self.scheme is None:
            raise UsageError(f"the weight of {self.name} is float and has no codes")
        wide = (-1, *(1,) * (self.weight.ndim - 1))
        codes = torch.round(self.weight / self.scale.reshape(wide)).to(torch.int32) + self.zero.reshape(wide)
        return codes.clamp_(self.lowest, self.highest)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if self.scheme is not None:
            weight = torch.fake_quantize_per_channel_affine(weight, self.scale, self.zero, 0, self.lowest, self.highest)
        return self.operation(x, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.weight.shape))}, groups={self.operation.groups}, scheme={self.scheme}"


def _channels(values: Tensor, y: Tensor) -> Tensor:
    """[C] shaped to stand against [N, C, ...]."""
    return values.reshape(1, -1, *(1,) * (y.ndim - 2))


def fold(layer: nn.Conv2d | nn.Linear, bn: Any) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the one layer that equals layer + batch norm at inference, in float."""
    with torch.no_grad():
        weight, bias = ConvBNQuant2d(layer, bn).folded()
    assert bias is not None
    return weight, bias

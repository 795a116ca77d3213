"""Small models that `export_onnx` takes, and what a written file holds."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from torch import nn

from edgewright.io.packed import CODE_RANGES

GRIDS = tuple(CODE_RANGES)


def mlp(inputs: int = 48, hidden: int = 72, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, 7, bias=False)).eval()


class SmallCnn(nn.Module):
    """Convolution, batch norm, depthwise convolution, pooling, classifier; static: with torch's fake quantisation."""

    def __init__(self, static: bool = False, high: int = 127) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=8)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.norm.running_mean.uniform_(-0.1, 0.1)
        self.norm.running_var.uniform_(0.5, 1.5)
        self.static, self.high = static, high
        for name, conv in (("first", self.first), ("depthwise", self.depthwise)):
            self.register_buffer(f"{name}_scale", conv.weight.detach().abs().amax((1, 2, 3)) / high)
        self.register_buffer("zeros", torch.zeros(8, dtype=torch.int32))

    def weight(self, conv: nn.Conv2d, scale: torch.Tensor) -> torch.Tensor:
        if not self.static:
            return conv.weight
        return torch.fake_quantize_per_channel_affine(conv.weight, scale, self.zeros, 0, -self.high, self.high)

    def rounded(self, x: torch.Tensor, scale: float, zero: int, low: int, high: int) -> torch.Tensor:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, low, high) if self.static else x

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.rounded(image, 0.03, 128, 0, 255)
        bias = self.first.bias
        if self.static:  # 32 bits at the product of the scales of input and weight
            bias = torch.fake_quantize_per_channel_affine(
                bias, 0.03 * self.first_scale, self.zeros, 0, -(2**31), 2**31 - 1
            )
        x = nn.functional.conv2d(x, self.weight(self.first, self.first_scale), bias, padding=1)
        x = x.clamp(0, 6) if self.static else self.norm(x).relu()
        x = self.rounded(x, 0.02, -128, -128, 127)
        weight = self.weight(self.depthwise, self.depthwise_scale)
        x = nn.functional.conv2d(x, weight, self.depthwise.bias, padding=1, stride=2, groups=8).relu()
        few = self.high < 127
        return self.head(self.rounded(x, 0.2 if few else 0.02, 0, 0, 15 if few else 255).mean((2, 3)))


def small_cnn(**options) -> SmallCnn:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return SmallCnn(**options).eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def initializers(path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}


def operators(path) -> list[str]:
    return [node.op_type for node in onnx.load(str(path)).graph.node]

"""A small network with every rule of the whitepaper's section 4 in it, and its images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ToyNet(nn.Module):
    """Depthwise layer, residual addition with ReLU behind, concatenation, both poolings, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.stem, self.stem_bn, self.act = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.back = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.side = nn.Sequential(nn.Conv2d(8, 4, 3, padding=2, dilation=2), nn.BatchNorm2d(4), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem_bn(self.stem(self.pad(x))))
        x = F.relu(x + self.back(self.deep(x)))
        x = self.pool(torch.cat((x, self.side(x)), 1))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def toy_net(seed: int = 0) -> ToyNet:
    """Random weights, batch norms whose statistics are those of the images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ToyNet()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.uniform_(0.3, 2.0)
                module.bias.data.uniform_(-0.5, 1.0)
    model.train()
    with torch.no_grad():
        for batch in images(64).split(8):
            model(batch)
    return model.eval()


def images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 16, 16, generator=generator) * 2 - 0.7  # not centred: the zero point is not a half

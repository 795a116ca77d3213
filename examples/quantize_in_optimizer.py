"""Quantisation inside the optimizer (PARQ) on any module: python examples/quantize_in_optimizer.py [STEPS]"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn import functional as F

from edgewright import BlockBatches, TrainConfig, fit
from edgewright.systems.parq import LSBQ, ProxPARQ, QuantOptimizer, convert_parq_, quantized_groups


def main(steps: int = 300) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 16, generator=generator)
    y = (x[:, :8].sum(1) > x[:, 8:].sum(1)).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2))
    groups = quantized_groups(model, {"0": LSBQ(1)})
    optimizer = QuantOptimizer(
        torch.optim.AdamW(groups, lr=1e-2), ProxPARQ(anneal_start=steps // 10, anneal_end=steps * 9 // 10)
    )
    batches = BlockBatches({"x": x, "y": y}, 32)
    config = TrainConfig(steps, learning_rate=1e-2)
    fit(model, lambda m, batch: F.cross_entropy(m(batch["x"]), batch["y"]), batches, config, optimizer=optimizer)
    convert_parq_(model, optimizer)
    accuracy = float((model(x).argmax(1) == y).float().mean())
    print(f"accuracy with 1-bit weights in the first layer: {accuracy:.1%}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

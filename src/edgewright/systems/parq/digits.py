"""The task of the recipe: a small residual network that reads handwritten digits, and its training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.io.images import digits
from edgewright.systems.parq.model import on_target, weight_histogram
from edgewright.systems.parq.optimizer import QuantOptimizer
from edgewright.training.batches import BlockBatches
from edgewright.training.loop import TrainConfig, fit

LOOKS = 6  # times that a training is judged on held-out digits


class Block(nn.Module):
    """Two convolutions and a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norms[1](self.second(self.norms[0](self.first(x)).relu()))
        return (hidden + self.skip(x)).relu()


def network(width: int, seed: int) -> nn.Module:
    """A residual network on [N, 1, 8, 8]: stem, two blocks (the second at half size), mean over pixels, ten classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Block(width, width, 1),
            Block(width, 2 * width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 10),
        )


def train_digits(model: nn.Module, optimizer: Any, steps: int, batch: int, rate: float, seed: int) -> dict[str, Any]:
    """Train in place.

    Args:
        optimizer: of the model's parameters, a QuantOptimizer or a plain one.
        rate: learning rate that its schedule starts from.

    Returns:
        JSON values: held-out "accuracy", training "losses"; of a QuantOptimizer also, by step, the share of weights
        "on_target" and their "histograms".
    """
    images, labels = digits("calibration")
    held_out, answers = digits("evaluation")
    shares: dict[int, float] = {}
    histograms: dict[int, list[float]] = {}

    def look(trained: nn.Module) -> dict[str, float]:
        if isinstance(optimizer, QuantOptimizer):
            shares[optimizer.steps] = on_target(optimizer)
            histograms[optimizer.steps] = weight_histogram(optimizer).tolist()
        return {"accuracy": float((trained(held_out).argmax(1) == answers).float().mean())}

    result = fit(
        model,
        lambda trained, batch: F.cross_entropy(trained(batch["x"]), batch["y"]),
        BlockBatches({"x": images, "y": labels}, batch, seed=seed),
        TrainConfig(steps, rate, schedule="cosine", seed=seed),
        optimizer=optimizer,
        evaluate=look,
        evaluate_every=max(1, steps // LOOKS),
        progress=False,
    )
    losses = [float(row["loss"]) for row in result.history]
    assert torch.isfinite(torch.tensor(losses)).all()
    return {
        "accuracy": result.metrics["eval_accuracy"],
        "losses": losses,
        "on_target": shares,
        "histograms": histograms,
    }

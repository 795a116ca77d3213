"""A small convolutional network for handwritten digits of 8 x 8 pixels, built like the large mobile ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.training.batches import BlockBatches
from edgewright.training.config import TrainConfig
from edgewright.training.loop import TrainResult, fit

LARGEST_SHIFT = 1  # pixels by which a training image is moved


def digits_network(seed: int = 0) -> nn.Sequential:
    """Images [N, 1, 8, 8] in 0..1 to logits [N, 10]: depthwise and pointwise layers, batch norms, ReLU6."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        deep = nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)
        wide = nn.Conv2d(inputs, outputs, 1, bias=False)
        return [deep, nn.BatchNorm2d(inputs), nn.ReLU6(), wide, nn.BatchNorm2d(outputs), nn.ReLU6()]

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
        body = [*block(16, 24, 1), *block(24, 32, 2), *block(32, 48, 1)]
        return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel in both directions, zeros moved in. [N, 1, 8, 8] -> the same."""
    size = images.shape[-1]
    moves = torch.randint(0, 2 * LARGEST_SHIFT + 1, (2,), generator=generator).tolist()
    return F.pad(images, [LARGEST_SHIFT] * 4)[..., moves[0] : moves[0] + size, moves[1] : moves[1] + size]


def train_digits(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    steps: int,
    learning_rate: float,
    seed: int,
    evaluate_every: int = 0,
    schedule: str = "cosine",
    batch: int = 64,
) -> TrainResult:
    """Cross-entropy on digits (and their shifts), AdamW; history has eval_loss and eval_accuracy."""
    generator = torch.Generator().manual_seed(seed)

    def loss(network: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(network(shifted(batch["images"], generator)), batch["labels"])

    evaluate: Callable[[nn.Module], Mapping[str, float]] = lambda network: score(network, *held_out)  # noqa: E731
    return fit(
        model,
        loss,
        BlockBatches({"images": data[0], "labels": data[1]}, batch, seed=seed),
        TrainConfig(steps=steps, learning_rate=learning_rate, schedule=schedule, seed=seed),
        evaluate=evaluate if evaluate_every else None,
        evaluate_every=evaluate_every,
        generator=generator,
        progress=False,
    )


@torch.no_grad()
def score(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean cross-entropy (nats) and accuracy (%) in evaluation mode."""
    training = model.training
    logits = model.eval()(images)
    model.train(training)
    hits = (logits.argmax(1) == labels).double().mean()
    return {"loss": float(F.cross_entropy(logits.double(), labels)), "accuracy": 100 * float(hits)}

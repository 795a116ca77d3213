"""Training a prepared network to answer as its float self, with no label: distillation of its logits.

Source: arXiv 1806.08342, section 3.2 and 6: start from the trained float weights, deterministic rounding, a small
constant learning rate, batch-norm statistics frozen for the last part of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from edgewright.distillation.logits import distillation_loss
from edgewright.errors import UsageError
from edgewright.quantization.static.freezing import freeze_after_
from edgewright.training.batches import BlockBatches
from edgewright.training.config import TrainConfig
from edgewright.training.loop import TrainResult, fit


@dataclass(frozen=True)
class StaticTraining:
    """learning_rate: of AdamW, constant. freeze_at: share of the steps with moving statistics.

    deviation: the paper trains millions of images with SGD at 1e-5; a short run needs the scale-free steps of Adam, and
    on few pictures the statistics of a batch are no measure of the network's, so they stay as trained (0).
    """

    steps: int = 100
    batch: int = 16
    learning_rate: float = 1e-4
    freeze_at: float = 0.0
    checkpoint_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise UsageError(f"steps={self.steps}, batch={self.batch}: both must be at least 1")


def train_static(
    prepared: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    config: StaticTraining | None = None,
    output: str | Path | None = None,
    normalise: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> TrainResult:
    """Train a calibrated, prepared network in place on the teacher's logits for `images`.

    images: [N, ...], as the network takes them, or as `normalise` does (uint8 takes a quarter of the memory). The
    teacher runs once over them, in evaluation mode. With an `output` folder the run resumes there.
    """
    config = config or StaticTraining()
    prepare = normalise or (lambda batch: batch)
    teacher.eval()
    with torch.no_grad():
        logits = torch.cat([teacher(prepare(part)) for part in images.split(config.batch)])
    freeze_after_(prepared, config.steps, config.freeze_at)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return distillation_loss(model(prepare(batch["images"])), batch["logits"])

    return fit(
        prepared,
        loss,
        BlockBatches({"images": images, "logits": logits}, config.batch, seed=config.seed),
        TrainConfig(
            steps=config.steps,
            learning_rate=config.learning_rate,
            schedule="constant",
            seed=config.seed,
            checkpoint_every=config.checkpoint_every,
        ),
        output=output,
        progress=progress,
        label="training under quantisation",
    )

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

from edgewright.checks import check_fields, whole
from edgewright.distillation.logits import distillation_loss
from edgewright.quantization.static.freezing import freeze_after_
from edgewright.training.batches import BlockBatches
from edgewright.training.config import TrainConfig
from edgewright.training.loop import TrainResult, fit


@dataclass(frozen=True)
class StaticTraining:
    """Settings of a short training under quantisation.

    deviation: the paper trains millions of images with SGD at 1e-5; a short run needs the scale-free steps of Adam, and
    on few pictures the statistics of a batch are no measure of the network's, so they stay as trained (0).

    Args:
        steps: updates.
        batch: images of an update.
        learning_rate: of AdamW, constant.
        freeze_at: share of the steps with moving statistics.
        checkpoint_every: steps between two checkpoints; 0 writes none before the end.
        seed: of the order.

    Raises:
        UsageError: a field breaks its rule.
    """

    steps: int = 100
    batch: int = 16
    learning_rate: float = 1e-4
    freeze_at: float = 0.0
    checkpoint_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, {"steps": whole(1), "batch": whole(1)})


def train_static(
    prepared: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    config: StaticTraining | None = None,
    output: str | Path | None = None,
    normalise: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> TrainResult:
    """Train a calibrated, prepared network in place on the teacher's logits for some images, without labels.

    Args:
        prepared: of `quantize_static`, calibrated.
        teacher: the float network; it runs once over the images, in evaluation mode.
        images: [N, ...], as the network takes them, or as `normalise` does (uint8 takes a quarter of the memory).
        config: steps, batch, rate; by default 100 steps of 16.
        output: folder in which the run resumes.
        normalise: images -> what the network takes.
        progress: show a bar.

    Returns:
        What `fit` returns.
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

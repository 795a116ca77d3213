"""One training loop for everything that trains: batches, schedules, checkpoints, resume to the same bits."""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.training.batches import BlockBatches as BlockBatches, ResumableBatches as ResumableBatches
    from edgewright.training.config import TrainConfig as TrainConfig
    from edgewright.training.loop import (
        TrainingInterrupted as TrainingInterrupted,
        TrainResult as TrainResult,
        fit as fit,
    )
    from edgewright.training.optimizer import (
        default_optimizer as default_optimizer,
        parameter_groups as parameter_groups,
    )
    from edgewright.training.schedules import learning_rate_scale as learning_rate_scale

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "BlockBatches": "edgewright.training.batches",
        "ResumableBatches": "edgewright.training.batches",
        "TrainConfig": "edgewright.training.config",
        "TrainResult": "edgewright.training.loop",
        "TrainingInterrupted": "edgewright.training.loop",
        "default_optimizer": "edgewright.training.optimizer",
        "fit": "edgewright.training.loop",
        "learning_rate_scale": "edgewright.training.schedules",
        "parameter_groups": "edgewright.training.optimizer",
    },
)

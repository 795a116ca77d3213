"""One training loop for everything that trains: batches, schedules, checkpoints, resume to the same bits."""

from edgewright.training.batches import BlockBatches, ResumableBatches
from edgewright.training.loop import TrainConfig, TrainingInterrupted, TrainResult, fit
from edgewright.training.optimizer import default_optimizer, parameter_groups
from edgewright.training.schedules import learning_rate_scale

__all__ = [
    "BlockBatches",
    "ResumableBatches",
    "TrainConfig",
    "TrainResult",
    "TrainingInterrupted",
    "default_optimizer",
    "fit",
    "learning_rate_scale",
    "parameter_groups",
]

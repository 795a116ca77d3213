"""Check-N-Run: checkpoints of the rows that changed, at few bits, written behind the training (arXiv 2010.08679)."""

from edgewright.training.checkpointing.checkpointer import DiffCheckpointer
from edgewright.training.checkpointing.config import CheckpointConfig, RestoreInfo, Saved
from edgewright.training.checkpointing.listing import inspect_dir
from edgewright.training.checkpointing.prefetch import Prefetched
from edgewright.training.checkpointing.restore import restore
from edgewright.training.checkpointing.tables import RowShard
from edgewright.training.checkpointing.update import apply_delta, diff, merge

__all__ = [
    "CheckpointConfig",
    "DiffCheckpointer",
    "Prefetched",
    "RestoreInfo",
    "RowShard",
    "Saved",
    "apply_delta",
    "diff",
    "inspect_dir",
    "merge",
    "restore",
]

"""Check-N-Run (arXiv 2010.08679): checkpoints of the rows that changed, at few bits, written behind the training."""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.systems.check_n_run.checkpointer import (
        DiffCheckpointer as DiffCheckpointer,
        Prefetched as Prefetched,
    )
    from edgewright.systems.check_n_run.config import (
        CheckpointConfig as CheckpointConfig,
        RestoreInfo as RestoreInfo,
    )
    from edgewright.systems.check_n_run.recovery import inspect_dir as inspect_dir, restore as restore
    from edgewright.systems.check_n_run.update import apply_delta as apply_delta, diff as diff, merge as merge
    from edgewright.training.checkpoint.capture import RowShard as RowShard
    from edgewright.training.checkpoint.writer import Saved as Saved

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "CheckpointConfig": "edgewright.systems.check_n_run.config",
        "DiffCheckpointer": "edgewright.systems.check_n_run.checkpointer",
        "Prefetched": "edgewright.systems.check_n_run.checkpointer",
        "RestoreInfo": "edgewright.systems.check_n_run.config",
        "RowShard": "edgewright.training.checkpoint.capture",
        "Saved": "edgewright.training.checkpoint.writer",
        "apply_delta": "edgewright.systems.check_n_run.update",
        "diff": "edgewright.systems.check_n_run.update",
        "inspect_dir": "edgewright.systems.check_n_run.recovery",
        "merge": "edgewright.systems.check_n_run.update",
        "restore": "edgewright.systems.check_n_run.recovery",
    },
)

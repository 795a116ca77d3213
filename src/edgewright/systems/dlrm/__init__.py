"""DLRM (arXiv 1906.00091): the deep learning recommendation model on logs of clicks."""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.systems.dlrm.clicks import predict as predict
    from edgewright.systems.dlrm.metrics import evaluate as evaluate
    from edgewright.systems.dlrm.model import DLRM as DLRM, DLRMConfig as DLRMConfig, synthetic_ctr as synthetic_ctr
    from edgewright.systems.dlrm.movielens import movielens_100k as movielens_100k
    from edgewright.systems.dlrm.optimizers import (
        ClickTraining as ClickTraining,
        RowwiseAdagrad as RowwiseAdagrad,
        train_clicks as train_clicks,
    )
    from edgewright.systems.dlrm.serving import export_dlrm as export_dlrm, requests as requests
    from edgewright.systems.dlrm.sharded import ShardedDLRM as ShardedDLRM, mean_loss as mean_loss

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "ClickTraining": "edgewright.systems.dlrm.optimizers",
        "DLRM": "edgewright.systems.dlrm.model",
        "DLRMConfig": "edgewright.systems.dlrm.model",
        "RowwiseAdagrad": "edgewright.systems.dlrm.optimizers",
        "ShardedDLRM": "edgewright.systems.dlrm.sharded",
        "evaluate": "edgewright.systems.dlrm.metrics",
        "export_dlrm": "edgewright.systems.dlrm.serving",
        "mean_loss": "edgewright.systems.dlrm.sharded",
        "movielens_100k": "edgewright.systems.dlrm.movielens",
        "predict": "edgewright.systems.dlrm.clicks",
        "requests": "edgewright.systems.dlrm.serving",
        "synthetic_ctr": "edgewright.systems.dlrm.model",
        "train_clicks": "edgewright.systems.dlrm.optimizers",
    },
)

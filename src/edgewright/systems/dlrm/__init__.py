"""DLRM (arXiv 1906.00091): the deep learning recommendation model on logs of clicks."""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.systems.dlrm.clicks import predict as predict
    from edgewright.systems.dlrm.metrics import evaluate as evaluate
    from edgewright.systems.dlrm.model import DLRM as DLRM, DLRMConfig as DLRMConfig
    from edgewright.systems.dlrm.movielens import movielens_100k as movielens_100k
    from edgewright.systems.dlrm.serving import export_dlrm as export_dlrm, requests as requests
    from edgewright.systems.dlrm.synthetic import synthetic_ctr as synthetic_ctr
    from edgewright.systems.dlrm.training import ClickTraining as ClickTraining, train_clicks as train_clicks

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "ClickTraining": "edgewright.systems.dlrm.training",
        "DLRM": "edgewright.systems.dlrm.model",
        "DLRMConfig": "edgewright.systems.dlrm.model",
        "evaluate": "edgewright.systems.dlrm.metrics",
        "export_dlrm": "edgewright.systems.dlrm.serving",
        "movielens_100k": "edgewright.systems.dlrm.movielens",
        "predict": "edgewright.systems.dlrm.clicks",
        "requests": "edgewright.systems.dlrm.serving",
        "synthetic_ctr": "edgewright.systems.dlrm.synthetic",
        "train_clicks": "edgewright.systems.dlrm.training",
    },
)

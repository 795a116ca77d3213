"""R-Sparse (arXiv 2504.19449): small inputs skip their weights while decoding, a low-rank path stands in."""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.systems.r_sparse.allocation import SearchConfig as SearchConfig, search_rho as search_rho
    from edgewright.systems.r_sparse.folder import load_rsparse as load_rsparse, save_rsparse as save_rsparse
    from edgewright.systems.r_sparse.model import (
        apply_rsparse as apply_rsparse,
        evaluate as evaluate,
        remove_rsparse as remove_rsparse,
    )
    from edgewright.systems.r_sparse.plan import RSparseConfig as RSparseConfig, calibrate as calibrate

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "RSparseConfig": "edgewright.systems.r_sparse.plan",
        "SearchConfig": "edgewright.systems.r_sparse.allocation",
        "apply_rsparse": "edgewright.systems.r_sparse.model",
        "calibrate": "edgewright.systems.r_sparse.plan",
        "evaluate": "edgewright.systems.r_sparse.model",
        "load_rsparse": "edgewright.systems.r_sparse.folder",
        "remove_rsparse": "edgewright.systems.r_sparse.model",
        "save_rsparse": "edgewright.systems.r_sparse.folder",
        "search_rho": "edgewright.systems.r_sparse.allocation",
    },
)

"""Longhorn (arXiv 2407.14207): a state-space layer whose recurrence solves an online regression."""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.systems.longhorn.export import (
        LonghornSession as LonghornSession,
        export_longhorn as export_longhorn,
    )
    from edgewright.systems.longhorn.layer import (
        Longhorn as Longhorn,
        LonghornConfig as LonghornConfig,
        longhorn_config as longhorn_config,
    )
    from edgewright.systems.longhorn.scan import longhorn_scan as longhorn_scan, longhorn_step as longhorn_step

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "Longhorn": "edgewright.systems.longhorn.layer",
        "LonghornConfig": "edgewright.systems.longhorn.layer",
        "LonghornSession": "edgewright.systems.longhorn.export",
        "export_longhorn": "edgewright.systems.longhorn.export",
        "longhorn_config": "edgewright.systems.longhorn.layer",
        "longhorn_scan": "edgewright.systems.longhorn.scan",
        "longhorn_step": "edgewright.systems.longhorn.scan",
    },
)

"""APOLLO (arXiv 2412.05270): AdamW's learning rates from a low-rank copy of the gradient, in little memory."""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.systems.apollo.groups import apollo_param_groups as apollo_param_groups
    from edgewright.systems.apollo.optimizer import (
        APOLLO as APOLLO,
        APOLLOMini as APOLLOMini,
        apollo_layerwise as apollo_layerwise,
    )
    from edgewright.systems.apollo.state import (
        optimizer_memory as optimizer_memory,
        state_bytes as state_bytes,
        state_floats as state_floats,
    )

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "APOLLO": "edgewright.systems.apollo.optimizer",
        "APOLLOMini": "edgewright.systems.apollo.optimizer",
        "apollo_layerwise": "edgewright.systems.apollo.optimizer",
        "apollo_param_groups": "edgewright.systems.apollo.groups",
        "optimizer_memory": "edgewright.systems.apollo.state",
        "state_bytes": "edgewright.systems.apollo.state",
        "state_floats": "edgewright.systems.apollo.state",
    },
)

"""Distributed Lion (arXiv 2404.00438): workers exchange the signs of their updates, one bit a parameter."""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.systems.distributed_lion.distributed import (
        DistributedLion as DistributedLion,
        LocalGradients as LocalGradients,
        disable_gradient_allreduce as disable_gradient_allreduce,
        lion_groups as lion_groups,
        register_distributed_lion_hook as register_distributed_lion_hook,
    )
    from edgewright.systems.distributed_lion.lion import Lion as Lion
    from edgewright.systems.distributed_lion.simulated import (
        SimulatedLion as SimulatedLion,
        SimulatedWorkers as SimulatedWorkers,
    )

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "DistributedLion": "edgewright.systems.distributed_lion.distributed",
        "LocalGradients": "edgewright.systems.distributed_lion.distributed",
        "SimulatedLion": "edgewright.systems.distributed_lion.simulated",
        "SimulatedWorkers": "edgewright.systems.distributed_lion.simulated",
        "Lion": "edgewright.systems.distributed_lion.lion",
        "disable_gradient_allreduce": "edgewright.systems.distributed_lion.distributed",
        "lion_groups": "edgewright.systems.distributed_lion.distributed",
        "register_distributed_lion_hook": "edgewright.systems.distributed_lion.distributed",
    },
)

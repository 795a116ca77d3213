"""MobileMoE (arXiv 2605.27358): fine-grained mixtures of experts that fit into the memory of a phone."""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.systems.mobilemoe.design import (
        MoEPlan as MoEPlan,
        design_under_budget as design_under_budget,
        mobilemoe as mobilemoe,
    )
    from edgewright.systems.mobilemoe.layer import MoEConfig as MoEConfig, SparseMoE as SparseMoE
    from edgewright.systems.mobilemoe.training import (
        LoadBalancer as LoadBalancer,
        MoELoss as MoELoss,
        expert_usage as expert_usage,
        parallelize_experts as parallelize_experts,
    )
    from edgewright.systems.mobilemoe.upcycle import moe_from_dense as moe_from_dense

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "LoadBalancer": "edgewright.systems.mobilemoe.training",
        "MoEConfig": "edgewright.systems.mobilemoe.layer",
        "MoELoss": "edgewright.systems.mobilemoe.training",
        "MoEPlan": "edgewright.systems.mobilemoe.design",
        "SparseMoE": "edgewright.systems.mobilemoe.layer",
        "design_under_budget": "edgewright.systems.mobilemoe.design",
        "expert_usage": "edgewright.systems.mobilemoe.training",
        "mobilemoe": "edgewright.systems.mobilemoe.design",
        "moe_from_dense": "edgewright.systems.mobilemoe.upcycle",
        "parallelize_experts": "edgewright.systems.mobilemoe.training",
    },
)

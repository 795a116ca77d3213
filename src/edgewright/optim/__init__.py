"""Optimizers that need less: memory for their state (APOLLO), bytes on the wire (Distributed Lion)."""

from edgewright.optim.apollo import APOLLO, APOLLOMini
from edgewright.optim.apollo_groups import apollo_param_groups
from edgewright.optim.apollo_layerwise import apollo_layerwise
from edgewright.optim.apollo_memory import optimizer_memory, state_bytes, state_floats

__all__ = [
    "APOLLO",
    "APOLLOMini",
    "apollo_layerwise",
    "apollo_param_groups",
    "optimizer_memory",
    "state_bytes",
    "state_floats",
]

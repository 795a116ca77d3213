"""APOLLO inside backward: each weight is updated when its gradient is ready, and the gradient is freed at once.

At most a few layers' gradients exist at a time. What needs all gradients together cannot work: clipping by the global
norm, gradient accumulation, gradient scaling.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from edgewright.errors import Unsupported, UsageError
from edgewright.systems.apollo.optimizer import APOLLO
from edgewright.training.sharded import is_split


def apollo_layerwise(
    model: nn.Module, groups: Any = None, *, clip_norm: float | None = None, accumulation: int = 1, **options: Any
) -> APOLLO:
    """An APOLLO over `groups` (default: all parameters of `model`) that works during `loss.backward()`.

    Use it as any optimizer: its `step()` marks the end of a batch and updates nothing, schedulers act on its groups.
    options: those of APOLLO. Raises UsageError for clip_norm, accumulation > 1 and, in backward, for a second gradient
    before step(); Unsupported for weights split over processes. A gradient that is not finite is found when later
    layers are updated already.
    """
    if clip_norm is not None:
        raise UsageError(f"clip_norm={clip_norm}: the norm of all gradients is never known here; APOLLO limits updates")
    if accumulation != 1:
        raise UsageError(f"accumulation={accumulation}: gradients are used at once; use larger batches, or APOLLO")
    optimizer = APOLLO(model.parameters() if groups is None else groups, **options)
    optimizer.hooked = set()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(is_split(p) for p in parameters):
        raise Unsupported("the weights are split over processes: use APOLLO, whose gradients are split too")

    def ready(parameter: nn.Parameter) -> None:
        assert optimizer.hooked is not None
        if parameter in optimizer.hooked:
            raise UsageError(
                "a second gradient before step(): layer-wise updates cannot accumulate gradients; call step() after "
                "every backward(), or use APOLLO"
            )
        optimizer.hooked.add(parameter)
        optimizer.update([parameter])
        parameter.grad = None

    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(ready)
    return optimizer

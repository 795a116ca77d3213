"""The moment at which statistics stop moving: counted in training forwards and saved with the model.

It is a flag of its own and not train or eval mode, which any later call of `train()` would undo.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from edgewright.checks import check, number, whole
from edgewright.errors import UsageError


class FreezeClock(nn.Module):
    """Counts training forwards (`forwards`) and says when statistics are `frozen`; both are saved buffers.

    after: number of training forwards with moving statistics, None for no end.
    """

    frozen: Tensor
    forwards: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.after: int | None = None
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def tick(self) -> bool:
        """Count one training forward; True while statistics still move."""
        if self.after is not None and int(self.forwards) >= self.after:
            self.frozen.fill_(True)
        if bool(self.frozen):
            return False
        self.forwards += 1
        return True

    def extra_repr(self) -> str:
        return f"frozen={bool(self.frozen)}, forwards={int(self.forwards)}, after={self.after}"


def freeze_(model: nn.Module, frozen: bool = True) -> nn.Module:
    """Freeze (or release) batch-norm statistics and activation ranges of the whole model, in place.

    Args:
        model: of `quantize_static`.
        frozen: False releases them, and takes back `freeze_after_`.

    Returns:
        The model.

    Raises:
        UsageError: the model has no such statistics.
    """
    for clock in _clocks(model):
        clock.frozen.fill_(frozen)
        if not frozen:
            clock.after = None
    return model


def freeze_after_(model: nn.Module, steps: int, at: float = 2 / 3) -> nn.Module:
    """Freeze statistics by themselves during the coming training.

    Args:
        model: of `quantize_static`.
        steps: training forwards to come; with gradient accumulation these are micro steps.
        at: a share of them up to 1, or a number of steps. A number beyond `steps` never comes and is warned about.

    Returns:
        The model.

    Raises:
        UsageError: an argument breaks its rule, or the model has no such statistics.
    """
    check("at", at, number(0))
    check("steps", steps, whole(1))
    after = round(at * steps) if at <= 1 else int(at)
    if after > steps:
        warnings.warn(f"statistics would freeze at step {after}, but the run has {steps}: they never do", stacklevel=2)
    for clock in _clocks(model):
        clock.after = after
    return model


def _clocks(model: nn.Module) -> list[FreezeClock]:
    clocks = [module for module in model.modules() if isinstance(module, FreezeClock)]
    if not clocks:
        raise UsageError("the model has no statistics to freeze; prepare it with quantize_static first")
    return clocks

"""Faults to plant in a DLRM: what a float model does not notice and a blanket precision breaks on.

Tests and recipes plant them to see that the debugger points at them and that a search keeps off them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from edgewright.systems.dlrm.model import DLRM

LAYER = "bottom.2"  # behind bottom.0 and a ReLU


def spoil_layer(model: DLRM, factor: float) -> DLRM:
    """The same function, with one input channel of a layer `factor` times larger and what feeds it smaller."""
    made = copy.deepcopy(model)
    before: Any = made.get_submodule("bottom.0")
    layer: Any = made.get_submodule(LAYER)
    with torch.no_grad():
        channel = int((before.weight.abs().sum(1) * layer.weight.abs().sum(0)).argmax())
        # ReLU passes a positive factor on, so that the layer's larger weights meet smaller inputs
        scale = factor * float(layer.weight.abs().max() / layer.weight[:, channel].abs().max())
        before.weight[channel] /= scale
        before.bias[channel] /= scale
        layer.weight[:, channel] *= scale
    return made


def spoil_table(model: DLRM, table: int, factor: float) -> DLRM:
    """One value of every row `factor` times the row's largest, in a dimension that no other vector uses any more."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for place, each in enumerate(made.tables):
            weight: Any = each.weight
            if place == table:
                weight[:, -1] = factor * weight.abs().amax(1)
            else:
                weight[:, -1] = 0.0
                low, high = weight.aminmax(dim=1, keepdim=True)
                # ends such that 0 is one of 15 (and of 255) even steps: what is 0 here must stay 0 at 8 bits, or the
                # products with the large values would put the blame on this table
                step = (high - low) / 15
                places = torch.where(step > 0, -low / step, 0.0).round()
                ends = torch.where(weight == high, (15 - places) * step, weight)
                weight.copy_(torch.where(weight == low, -places * step, ends))
        last: Any = [m for m in made.bottom if isinstance(m, nn.Linear)][-1]
        last.weight[-1] = 0.0
        last.bias[-1] = 0.0
    return made

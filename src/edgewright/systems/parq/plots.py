"""Pictures of a run under PARQ: the inverse slope over its steps, and where the weights lie between their targets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from edgewright.measure.plot import plot
from edgewright.systems.parq.model import placed_weights
from edgewright.systems.parq.optimizer import QuantOptimizer
from edgewright.systems.parq.proximal import ProxMap

BINS = 81
REACH = 1.5  # of the outermost target


def plot_inverse_slope(maps: Mapping[str, ProxMap], steps: int, path: str | Path) -> None:
    """Inverse slope of each map over `steps` steps: 1 leaves weights alone, 0 puts all of them on targets."""
    with plot(path, (6.5, 3.5)) as axes:
        for name, prox in maps.items():
            axes.plot(range(steps), [prox.inverse_slope(step) for step in range(steps)], label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("inverse slope")
        axes.grid(alpha=0.25)
        axes.legend()


def weight_histogram(optimizer: QuantOptimizer) -> tuple[Tensor, Tensor]:
    """(shares [BINS], edges [BINS + 1]) of all quantised weights, each in units of the outermost target of its row."""
    counts = torch.zeros(BINS)
    for weights, levels in placed_weights(optimizer):
        outermost = levels.abs().amax(1, keepdim=True)
        counts += torch.histc((weights / outermost).clamp(-REACH, REACH).float().cpu(), BINS, -REACH, REACH)
    return counts / counts.sum().clamp_min(1), torch.linspace(-REACH, REACH, BINS + 1)


def plot_weights(histograms: Mapping[str, tuple[Tensor, Tensor]], path: str | Path) -> None:
    """Histograms taken at several moments of a run, by name; on a grid at the end, a wide heap in the beginning."""
    with plot(path, (6.5, 4)) as axes:
        for name, (shares, edges) in histograms.items():
            axes.stairs(shares.tolist(), edges.tolist(), label=name)
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_xlabel("weight / outermost target of its row")
        axes.set_ylabel("share of the weights")
        axes.legend()


def plot_on_target(shares: Mapping[str, Mapping[int, float]], path: str | Path) -> None:
    """Share of the weights exactly on a target (`on_target`) over steps, one line a run."""
    with plot(path, (6.5, 3.5)) as axes:
        for name, points in shares.items():
            axes.plot(list(points), list(points.values()), marker=".", label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("share of weights on a target")
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.25)
        axes.legend()

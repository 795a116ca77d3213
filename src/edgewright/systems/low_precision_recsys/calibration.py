"""What flows into linear layers, watched over batches: histograms, ranges of least squared error, drift, corrections.

A histogram has 2048 even bins between the least and the greatest value, which a first pass finds. The range of an
8-bit code is cut at both ends where that lowers the expected squared error: the values beyond it become its ends, and
all others get a finer step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.systems.low_precision_recsys.linear import LEVELS, HalfLinear, Int8Linear, range_parameters
from edgewright.systems.low_precision_recsys.units import Range, Unit

BINS = 2048
CUTS = 64  # candidates at each end
PSI_BINS = 10
_FLOOR = 1e-4  # share of an empty bin, so that one value in a new place does not make the index infinite


@dataclass(frozen=True)
class Histogram:
    """counts: float64 [2048] of even bins from low to high."""

    low: float
    high: float
    counts: Tensor

    @property
    def centres(self) -> Tensor:
        """Middle of every bin, float64."""
        bins = len(self.counts)
        return self.low + (self.high - self.low) * (torch.arange(bins, dtype=torch.float64) + 0.5) / bins

    def range(self) -> tuple[float, float]:
        """(low, high) with the least expected squared error of 8-bit codes, 0 included, among 64 x 64 cuts."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if low == high:
            return low, high
        there = self.counts > 0
        values, shares = self.centres[there], self.counts[there] / self.counts.sum()
        kept = 1 - torch.arange(CUTS, dtype=torch.float64) / CUTS
        lows = low * kept if low < 0 else torch.zeros(1, dtype=torch.float64)
        highs = high * kept if high > 0 else torch.zeros(1, dtype=torch.float64)
        best = (float("inf"), low, high)
        for candidate in lows.tolist():
            step, zero = range_parameters(torch.full_like(highs, candidate), highs)
            codes = ((values / step[:, None]).round_() + zero[:, None]).clamp_(0, LEVELS)
            errors = ((codes - zero[:, None]) * step[:, None] - values).square_() @ shares
            place = int(errors.argmin())
            best = min(best, (float(errors[place]), candidate, float(highs[place])))
        return best[1], best[2]

    def parameters(self) -> Range:
        """(step, zero point) of the range, as an int8 layer takes them."""
        low, high = self.range()
        step, zero = range_parameters(torch.tensor(low), torch.tensor(high))
        return float(step), int(zero)

    def edges(self, bins: int = PSI_BINS) -> list[float]:
        """Inner edges of bins with near equal shares; fewer where one value takes several of them."""
        shares = self.counts.cumsum(0) / self.counts.sum()
        wanted = torch.arange(1, bins, dtype=torch.float64) / bins
        places = torch.searchsorted(shares, wanted).clamp_max(len(shares) - 1).unique()
        width = (self.high - self.low) / len(self.counts)
        return (self.low + (places.double() + 1) * width).tolist()

    def shares(self, edges: Sequence[float]) -> list[float]:
        """Share of the values between the edges, and beyond both ends."""
        places = torch.searchsorted(torch.tensor(edges, dtype=torch.float64), self.centres)
        found = torch.zeros(len(edges) + 1, dtype=torch.float64).index_add_(0, places, self.counts)
        return (found / found.sum()).tolist()


def population_stability(before: Sequence[float], after: Sequence[float]) -> float:
    """PSI = sum (after - before) ln(after / before) over the shares of bins; above 0.2 is a changed population."""
    old = torch.tensor(before, dtype=torch.float64).clamp_min(_FLOOR)
    new = torch.tensor(after, dtype=torch.float64).clamp_min(_FLOOR)
    return float(((new - old) * (new / old).log()).sum())


def histograms(model: nn.Module, units: Mapping[str, Unit], batches: Iterable[tuple[Any, ...]]) -> dict[str, Histogram]:
    """The inputs of every linear unit over the batches, which are run twice. Raises UsageError when there is none."""
    batches = list(batches)
    if not batches:
        raise UsageError("the calibration data is empty: give at least one batch of the model's arguments")
    watched = {path: unit.name for unit in units.values() if unit.kind == "linear" for path in unit.paths}
    ends: dict[str, tuple[float, float]] = {}
    for name, x in _inputs(model, watched, batches):
        low, high = (float(end) for end in x.aminmax())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise UsageError(f"the input of {name} holds NaN or infinity during calibration")
        before = ends.get(name, (low, high))
        ends[name] = min(before[0], low), max(before[1], high)
    counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in ends}
    for name, x in _inputs(model, watched, batches):
        low, high = ends[name]
        width = max(high - low, torch.finfo(torch.float32).tiny)
        places = ((x.double() - low) * (BINS / width)).long().clamp_(0, BINS - 1)
        counts[name] += torch.bincount(places, minlength=BINS).double()
    return {name: Histogram(*ends[name], counts[name]) for name in ends}


@torch.no_grad()
def correct_biases(reference: nn.Module, targets: Mapping[str, nn.Module], batches: Iterable[tuple[Any, ...]]) -> int:
    """Add the mean of (y - y_q) to the bias of low-precision linear layers, in place; how many were corrected.

    targets: path in the reference model -> the layer that takes its place; others than Int8Linear and HalfLinear are
    left alone. y and y_q are both outputs on the reference's inputs. A layer without a bias gets one.
    """
    chosen = {id(m): (path, m) for path, m in targets.items() if isinstance(m, Int8Linear | HalfLinear)}
    layers = dict(chosen.values())
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str, _: nn.Module, x: Tensor, y: Tensor) -> None:
        gap = (y - layers[name](x)).reshape(-1, y.shape[-1]).double()
        sums[name] = gap.sum(0) + sums[name] if name in sums else gap.sum(0)
        counts[name] = counts.get(name, 0) + len(gap)

    with hooked(reference, layers, watch):
        _run(reference, list(batches))
    for name, total in sums.items():
        module, shift = layers[name], (total / max(counts[name], 1)).float()
        module.bias = shift if module.bias is None else module.bias + shift
    return len(sums)


@contextmanager
def hooked(model: nn.Module, names: Iterable[str], watch: Any) -> Iterator[None]:
    """Call watch(name, module, first input, output) whenever one of the named modules has run."""
    handles = []
    try:
        for name in names:

            def hook(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                watch(name, module, inputs[0], output)

            handles.append(model.get_submodule(name).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inputs(model: nn.Module, watched: Mapping[str, str], batches: list[tuple[Any, ...]]) -> list[tuple[str, Tensor]]:
    """(unit, flat input) of every run of a watched module."""
    seen: list[tuple[str, Tensor]] = []
    with hooked(model, watched, lambda path, _, x, y: seen.append((watched[path], x.detach().float().reshape(-1)))):
        _run(model, batches)
    return [(name, x) for name, x in seen if x.numel()]


@torch.no_grad()
def _run(model: nn.Module, batches: list[tuple[Any, ...]]) -> None:
    training = model.training
    model.eval()
    try:
        for batch in batches:
            model(*batch)
    finally:
        model.train(training)

"""Times with their spread: median and quartiles, and cases that take turns to meet the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgewright.errors import UsageError


@dataclass(frozen=True)
class Measurement:
    """Median and quartiles (`low`, `high`) of `n` samples in `unit`; the samples themselves in the order taken."""

    median: float
    low: float
    high: float
    n: int
    unit: str = ""
    samples: tuple[float, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, samples: Iterable[float], unit: str = "") -> Measurement:
        """Summarise samples; the quartiles interpolate linearly between order statistics (NumPy's default)."""
        values = tuple(float(x) for x in samples)
        if not values:
            raise UsageError("a measurement needs at least one sample")
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1, unit, values)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values), unit, values)

    @property
    def spread(self) -> float:
        """Half the interquartile range: what reports show behind the ±."""
        return (self.high - self.low) / 2

    def map(self, function: Callable[[float], float], unit: str = "") -> Measurement:
        """The measurement of `function(sample)`, e.g. seconds to tokens/s."""
        return Measurement.of((function(x) for x in self.samples), unit)


def alternate(
    cases: Mapping[str, Callable[[], Any]],
    repeats: int = 5,
    warmup: int = 1,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Measurement]:
    """Seconds of every case, run in turn (A B A B ...) so that drift of the machine falls on all of them alike.

    `warmup` whole rounds are run first and not counted. Sample i of one case was taken beside sample i of every other,
    so `paired_ratio` of two results is meaningful.
    """
    if not cases or repeats < 1 or warmup < 0:
        raise UsageError(
            f"alternate needs cases, repeats >= 1 and warmup >= 0, got {len(cases)} cases, repeats={repeats}, "
            f"warmup={warmup}; e.g. alternate({{'a': f, 'b': g}}, repeats=5)"
        )
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + repeats):
        for name, case in cases.items():
            start = clock()
            case()
            seconds = clock() - start
            if turn >= warmup:
                samples[name].append(seconds)
    return {name: Measurement.of(values, "s") for name, values in samples.items()}


def paired_ratio(a: Measurement, b: Measurement) -> Measurement:
    """A / b, sample by sample: the spread of the ratio, which is narrower than the spreads of both sides suggest."""
    if len(a.samples) != len(b.samples) or not a.samples:
        raise UsageError(
            f"a paired ratio needs as many samples on both sides, got {len(a.samples)} and {len(b.samples)}; "
            "take both from one call of alternate()"
        )
    return Measurement.of((x / y for x, y in zip(a.samples, b.samples, strict=True)), "x")

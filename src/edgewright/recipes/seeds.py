"""One figure from several seeds: the mean and its standard error."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """{"value": mean, "se": its standard error, None for a single seed, "n": seeds}, as `Report.add` takes them."""
    se = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"value": mean(values), "se": se, "n": len(values)}


def row_over_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same row of several seeds as one; a single seed's row stays as it is, with its own standard error."""
    return rows[0] if len(rows) == 1 else {**rows[0], **over_seeds([row["value"] for row in rows])}

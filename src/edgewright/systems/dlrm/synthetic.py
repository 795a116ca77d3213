"""Clicks of a planted DLRM: ids that follow Zipf's law, labels drawn from the teacher's own probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from edgewright.errors import UsageError
from edgewright.systems.dlrm.clicks import ClickData, Schema, predict
from edgewright.systems.dlrm.model import DLRM, DLRMConfig


def zipf_ids(count: int, rows: int, exponent: float, generator: torch.Generator) -> Tensor:
    """Row numbers [count], row r with a probability proportional to 1 / (r + 1)^exponent, int64."""
    weights = torch.arange(1, rows + 1, dtype=torch.float64).pow(-exponent).cumsum(0)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64) * weights[-1]
    return torch.searchsorted(weights, drawn).clamp_max(rows - 1)


def synthetic_ctr(
    samples: int,
    sizes: tuple[int, ...] = (1000, 500, 100),
    num_dense: int = 4,
    dim: int = 8,
    most_ids: int = 1,
    exponent: float = 1.05,
    seed: int = 0,
) -> tuple[ClickData, DLRM]:
    """(samples, the teacher that drew their labels). most_ids: longest bag, of 0 to that many ids where above 1."""
    if samples < 1 or most_ids < 1:
        raise UsageError(f"samples={samples}, most_ids={most_ids}: both are at least 1")
    generator = torch.Generator().manual_seed(seed)
    teacher = DLRM(DLRMConfig(num_dense, sizes, dim, (16, dim), (16, 1)), seed=seed)
    with torch.no_grad():
        for parameter in teacher.sparse_parameters():
            parameter.normal_(0.0, 0.7, generator=generator)  # rows that matter: fresh ones are close to zero
    columns = []
    for rows in sizes:
        ids = zipf_ids(samples * most_ids, rows, exponent, generator).view(samples, most_ids)
        if most_ids > 1:
            lengths = torch.randint(0, most_ids + 1, (samples, 1), generator=generator)
            ids = torch.where(torch.arange(most_ids) < lengths, ids, -1)
        columns.append(ids.to(torch.int32))
    names = tuple(f"table{k}" for k in range(len(sizes)))
    schema = Schema(tuple(f"dense{i}" for i in range(num_dense)), names, tuple(sizes), (most_ids,) * len(sizes))
    dense = torch.randn(samples, num_dense, generator=generator)
    data = ClickData(schema, dense, torch.cat(columns, 1), torch.zeros(samples))
    chance = predict(teacher, data).sigmoid()
    labels = (torch.rand(samples, generator=generator) < chance).float()
    return ClickData(schema, dense, data.ids, labels), teacher

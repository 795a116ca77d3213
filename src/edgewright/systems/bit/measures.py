"""What is measured of a student of the sentence encoder: likeness of its embeddings, zeros of its attention, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.quantization.attention import AttentionQuantizers
from edgewright.systems.bit.folder import load_binary
from edgewright.systems.bit.linear import size_rows


def embedding_distance(student: Any, teacher: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean of 1 - cosine between the sentence embeddings, which are what this encoder is for."""
    mask = batch["attention_mask"].unsqueeze(-1).float()  # [B, T, 1]
    ours, target = ((out.last_hidden_state * mask).sum(1) for out in (student, teacher))
    return (1 - F.cosine_similarity(ours, target, dim=-1)).mean()


def agreement(embeddings: Tensor, reference: Tensor) -> dict[str, float]:
    """Spearman correlation over all pairs of rows of the two similarity matrices, and overlap of the 5 nearest rows.

    embeddings, reference: unit embeddings [N, hidden] of the same N sentences.
    """
    similar = [x @ x.t() for x in (embeddings, reference)]  # [N, N]
    above = torch.triu_indices(len(embeddings), len(embeddings), 1)
    spearman = torch.corrcoef(torch.stack([ranks(s[above[0], above[1]]) for s in similar]))[0, 1].nan_to_num()
    nearest = [s.fill_diagonal_(-2).topk(min(5, len(s) - 1)).indices for s in similar]
    overlap = (nearest[0].unsqueeze(2) == nearest[1].unsqueeze(1)).any(2).double().mean()
    return {"spearman": float(spearman), "top5_overlap": float(overlap)}


def ranks(values: Tensor) -> Tensor:
    """Ranks from 0, equal values at the mean of their places, float64."""
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() + 1) / 2)[place]


def probability_zeros(student: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """Share of attention probabilities between real tokens that are 0."""
    mask = batch["attention_mask"].bool()
    real = mask[:, None, :, None] & mask[:, None, None, :]  # [B, 1, T, S]
    shares: list[Tensor] = []
    hooks = [
        module.probabilities.register_forward_hook(
            lambda _, __, out: shares.append((out == 0)[real.expand_as(out)].float().mean())
        )
        for module in student.modules()
        if isinstance(module, AttentionQuantizers) and module.probabilities is not None
    ]
    with torch.no_grad():
        student(**batch)
    for hook in hooks:
        hook.remove()
    return float(torch.stack(shares).mean())


def byte_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of a report: bytes of the binary linear layers and of the whole file of a saved student, beside float32."""
    rows = size_rows(load_binary(folder))
    layers = [row for row in rows if row.kind == "bits" and "embeddings" not in row.name]
    figures = {
        ("layer_bytes", "float32"): sum(row.float_bytes for row in layers),
        ("layer_bytes", "packed"): sum(row.bytes for row in layers),
        ("model_bytes", "float32"): sum(row.float_bytes for row in rows),
        ("model_bytes", "packed"): (folder / "model.safetensors").stat().st_size,
    }
    return [{"metric": m, "value": float(v), "subject": s, "unit": "bytes"} for (m, s), v in figures.items()]

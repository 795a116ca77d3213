"""Distilling a transformer encoder, and what is measured of a student: embeddings, zeros of its attention, bytes.

Loss of BiT (arXiv 2205.13016, section 3.4): CE(student, teacher) + sum over layers 0..L of MSE(H_student, H_teacher),
over the hidden states of every layer, and the class logits where the model has a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.distillation.features import hidden_loss, layer_errors
from edgewright.errors import UsageError
from edgewright.quantization.attention import AttentionQuantizers
from edgewright.systems.bit.folder import load_binary
from edgewright.systems.bit.linear import size_rows

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
Term = Callable[[Any, Any, Mapping[str, Tensor]], Tensor]


def class_soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over batch AND classes of -p_teacher log p_student, temperature 1: 1 / C of the usual. Logits [B, C]."""
    if student.shape != teacher.shape:
        raise UsageError(f"logits differ in shape: student {list(student.shape)}, teacher {list(teacher.shape)}")
    return -(F.softmax(teacher.detach(), dim=-1) * F.log_softmax(student, dim=-1)).mean()


class EncoderDistillation:
    """Loss (student, teacher, batch) -> (scalar, {"hidden": ..., "mse_0": ..., ...}), for `distill_in_stages`.

    batch is a dict with what the encoder takes (input_ids, attention_mask, token_type_ids). The teacher runs as it is
    given, which should be in eval mode, without gradients; mse_l is the error of layer l, 0 being the embedding.

    Args:
        hidden: weight of the hidden states' errors.
        logits: weight of the logits' cross-entropy.
        masked: count the hidden states of real tokens only; the published loss counts padding too.
        term: a further loss (student's output, teacher's output, batch) -> scalar, such as a distance of sentence
            embeddings.
    """

    def __init__(
        self, *, hidden: float = 1.0, logits: float = 1.0, masked: bool = True, term: Term | None = None
    ) -> None:
        self.hidden, self.logits, self.masked, self.term = hidden, logits, masked, term

    def __call__(self, student: nn.Module, teacher: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """The loss of one batch.

        Args:
            student: in training.
            teacher: whose hidden states and logits are the target.
            batch: int64 [B, T] tensors by name.

        Returns:
            (scalar loss, its parts by name).
        """
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        with torch.no_grad():
            wanted = teacher(**inputs, output_hidden_states=True)
        found = student(**inputs, output_hidden_states=True)
        mask = batch.get("attention_mask") if self.masked else None
        same_depth = len(found.hidden_states) == len(wanted.hidden_states)
        every = tuple(range(len(found.hidden_states) - 1)) if same_depth else None
        hidden = hidden_loss(found.hidden_states, wanted.hidden_states, mask=mask, layer_map=every)
        loss, metrics = self.hidden * hidden, {"hidden": hidden.detach()}
        if getattr(found, "logits", None) is not None and getattr(wanted, "logits", None) is not None:
            cross = class_soft_cross_entropy(found.logits, wanted.logits)
            loss, metrics["logits"] = loss + self.logits * cross, cross.detach()
        if self.term is not None:
            further = self.term(found, wanted, batch)
            loss, metrics["term"] = loss + further, further.detach()
        if every is not None:
            errors = layer_errors(found.hidden_states, wanted.hidden_states, mask)
            metrics |= {f"mse_{i}": torch.tensor(error) for i, error in enumerate(errors)}
        return loss, metrics


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

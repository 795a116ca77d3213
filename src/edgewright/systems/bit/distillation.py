"""Distilling a transformer encoder: hidden states of every layer, and the class logits where the model has a head.

Loss of BiT (arXiv 2205.13016, section 3.4): CE(student, teacher) + sum over layers 0..L of MSE(H_student, H_teacher).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.distillation.features import hidden_loss, layer_errors
from edgewright.errors import UsageError

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
Term = Callable[[Any, Any, Mapping[str, Tensor]], Tensor]


def class_soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over batch AND classes of -p_teacher log p_student, temperature 1: 1 / C of the usual. Logits [B, C]."""
    if student.shape != teacher.shape:
        raise UsageError(f"logits differ in shape: student {list(student.shape)}, teacher {list(teacher.shape)}")
    return -(F.softmax(teacher.detach(), dim=-1) * F.log_softmax(student, dim=-1)).mean()


class EncoderDistillation:
    """Loss (student, teacher, batch) -> (scalar, {"hidden": ..., "mse_0": ..., ...}), for `distill_in_stages`.

    batch: a dict with what the encoder takes (input_ids, attention_mask, token_type_ids). hidden, logits: weights of
    the two parts. masked: count the hidden states of real tokens only; the published loss counts padding too. term:
    a further loss of both models' outputs, such as a distance of sentence embeddings. The teacher runs as it is given
    (in eval mode, please), without gradients; mse_l is the error of layer l, 0 being the embedding.
    """

    def __init__(
        self, *, hidden: float = 1.0, logits: float = 1.0, masked: bool = True, term: Term | None = None
    ) -> None:
        self.hidden, self.logits, self.masked, self.term = hidden, logits, masked, term

    def __call__(self, student: nn.Module, teacher: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        with torch.no_grad():
            wanted = teacher(**inputs, output_hidden_states=True)
        found = student(**inputs, output_hidden_states=True)
        mask = batch.get("attention_mask") if self.masked else None
        every = tuple(range(len(found.hidden_states) - 1)) if _same_depth(found, wanted) else None
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


def _same_depth(student: Any, teacher: Any) -> bool:
    return len(student.hidden_states) == len(teacher.hidden_states)

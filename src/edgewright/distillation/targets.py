"""What a student's next-token distribution is compared with: a teacher's logits, or the top k of its probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from edgewright.errors import UsageError


class Target(Protocol):
    """What the student is compared with: the teacher's answer for every token, as dense logits or as its top k."""

    tokens: int

    def cross_entropy_(self, logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Compare logits with the teacher's answer.

        Args:
            logits: the student's, float32 [n, V], which become their own gradient in place.
            part: which tokens they are for.

        Returns:
            (loss, entropy of the teacher), [n] each.
        """
        ...


class DenseTarget:
    """Teacher logits, given or made chunk by chunk from hidden states.

    Args:
        source: logits [..., V], or hidden states [..., H] where there is a head.
        temperature: divides the logits of both sides.
        head: hidden states -> logits; None: `source` are logits.
    """

    def __init__(self, source: Tensor, temperature: float, head: Callable[[Tensor], Tensor] | None = None) -> None:
        self.source, self.head, self.temperature = source.detach().flatten(0, -2), head, temperature
        self.tokens = self.source.shape[0]

    def cross_entropy_(self, logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        teacher = self.source[part] if self.head is None else self.head(self.source[part])
        if teacher.shape[-1] != logits.shape[-1]:
            raise UsageError(f"the teacher has {teacher.shape[-1]} logits per token but the student {logits.shape[-1]}")
        with torch.autocast(logits.device.type, enabled=False):  # it would take the inner products in half precision
            # Three chunk-sized tensors at most live at a time: each is dropped as soon as its last use is over.
            log_p = torch.log_softmax(self._softened(teacher.float()), dim=-1)
            del teacher
            p = log_p.exp()
            entropy = -torch.linalg.vecdot(p, log_p)
            del log_p
            log_q = torch.log_softmax(self._softened(logits), dim=-1)
            loss = -torch.linalg.vecdot(p, log_q)
            torch.exp(log_q, out=logits).sub_(p)
            if self.temperature != 1:
                logits.mul_(self.temperature)
        scale = self.temperature**2
        return loss * scale, entropy * scale

    def _softened(self, logits: Tensor) -> Tensor:
        return logits if self.temperature == 1 else logits / self.temperature


class TopKTarget:
    """The teacher's k largest probabilities, their token ids, and the mass of all others in one bucket.

    Cross-entropy: -sum_k p_k log q_k - p_tail log(1 - sum_k q_k), with probabilities that sum to one.

    Args:
        values: probabilities, [..., k].
        indices: their tokens, [..., k].
        tail: mass of all others, [...].
    """

    def __init__(self, values: Tensor, indices: Tensor, tail: Tensor) -> None:
        self.values, self.indices, self.tail = values.flatten(0, -2), indices.flatten(0, -2), tail.flatten()
        self.tokens = self.values.shape[0]

    def cross_entropy_(self, logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        p, rest, index = self.values[part].float(), self.tail[part].float().clamp(min=0), self.indices[part].long()
        total = p.sum(-1) + rest
        p, rest = p / total.unsqueeze(-1), rest / total
        q = torch.softmax(logits, dim=-1, out=logits)
        q_top = q.gather(-1, index)
        q.scatter_(-1, index, 0.0)  # what remains is summed directly: 1 - sum(q_top) would cancel
        q_rest = q.sum(-1).clamp_(min=torch.finfo(q.dtype).tiny)
        loss = -(torch.xlogy(p, q_top.clamp(min=torch.finfo(q.dtype).tiny)).sum(-1) + torch.xlogy(rest, q_rest))
        entropy = -(torch.xlogy(p, p).sum(-1) + torch.xlogy(rest, rest))
        q.mul_((1 - rest / q_rest).unsqueeze(-1))
        q.scatter_(-1, index, q_top - p)
        return loss, entropy

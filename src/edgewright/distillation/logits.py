"""Losses between the next-token distributions of a teacher and a student, in chunks of tokens.

Soft cross-entropy  L = -mean over tokens of sum_v p_T(v) log p_S(v)   (LLM-QAT, arXiv 2305.17888, section 2.2)
It differs from KL(p_T || p_S) by the teacher's entropy only, so both have the gradient softmax(s) - softmax(t).
deviation: the official code divides by the batch size alone; here the mean is over the tokens that count.

The gradient is known in closed form, so the forward pass computes it chunk by chunk and keeps only what backward needs:
with `chunked_distillation_loss` that is the gradient of the hidden states and of the head, never logits [B, T, V].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgewright.distillation.targets import DenseTarget, Target, TopKTarget
from edgewright.errors import UsageError

# 128 tokens x 49152 logits in float32 are 25 MB. Smaller chunks pass the head's gradient through memory more often (64
# tokens: 1.4 times slower on a busy CPU), larger ones gain no time.
DEFAULT_CHUNK = 128


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = DEFAULT_CHUNK,
) -> Tensor:
    """Soft cross-entropy to a teacher (LLM-QAT, arXiv 2305.17888, section 2.2), the mean over tokens that count.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V]; they get no gradient.
        mask: [...], true where a token counts; None: all count.
        temperature: divides both logits; the loss is multiplied by its square so that gradients keep their size.
        chunk: tokens worked on at a time.

    Returns:
        A float32 scalar.

    Raises:
        UsageError: shapes or vocabularies that differ, no token that counts.
    """
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        shapes = f"{list(student_logits.shape)} and {list(teacher_logits.shape)}"
        raise UsageError(f"student and teacher logits are for different tokens: {shapes}")
    return target_loss(student_logits, DenseTarget(teacher_logits, temperature), mask=mask, chunk=chunk)[0]


def topk_distillation_loss(
    student_logits: Tensor,
    values: Tensor,
    indices: Tensor,
    tail: Tensor,
    *,
    mask: Tensor | None = None,
    chunk: int = DEFAULT_CHUNK,
) -> Tensor:
    """Soft cross-entropy against the teacher's k largest probabilities and the mass of the others as one bucket.

    Args:
        student_logits: [..., V].
        values: the k probabilities, [..., k].
        indices: their tokens, [..., k].
        tail: the mass of the others, [...].
        mask: [...], true where a token counts; None: all count.
        chunk: tokens worked on at a time.

    Returns:
        A float32 scalar.

    Raises:
        UsageError: numbers of tokens that differ, none that counts.
    """
    return target_loss(student_logits, TopKTarget(values, indices, tail), mask=mask, chunk=chunk)[0]


def target_loss(
    student_logits: Tensor, target: Target, *, mask: Tensor | None = None, chunk: int = DEFAULT_CHUNK
) -> tuple[Tensor, Tensor]:
    """Soft cross-entropy against any target.

    Args:
        student_logits: [..., V].
        target: for as many tokens.
        mask: [...], true where a token counts; None: all count.
        chunk: tokens worked on at a time.

    Returns:
        (loss, KL to the teacher), float32 scalars; the KL carries no gradient.

    Raises:
        UsageError: numbers of tokens that differ, none that counts.
    """
    _check_tokens(student_logits, target)
    return _LogitsLoss.apply(student_logits, target, _weights(target, mask), chunk)


def chunked_distillation_loss(
    student_hidden: Tensor,
    student_head: nn.Module,
    target: Target,
    *,
    mask: Tensor | None = None,
    chunk: int = DEFAULT_CHUNK,
) -> tuple[Tensor, Tensor]:
    """Soft cross-entropy without the student's logits [B, T, V] ever existing.

    Args:
        student_hidden: the input of the head, [..., H].
        student_head: hidden -> logits, any module; a plain nn.Linear (also one tied to the embedding) takes a path of
            three matmuls per chunk, other heads (quantised ones) are differentiated by autograd chunk by chunk.
        target: `DenseTarget(teacher_logits, 1.0)`, `DenseTarget(teacher_hidden, 1.0, teacher_head)` or
            `TopKTarget(values, indices, tail)`.
        mask: [...], true where a token counts; None: all count.
        chunk: tokens whose logits exist at a time.

    Returns:
        (loss, KL to the teacher), float32 scalars. Gradients of the loss reach the hidden states and the head's
        parameters; the KL carries none.

    Raises:
        UsageError: numbers of tokens that differ, none that counts.
    """
    _check_tokens(student_hidden, target)
    weights = _weights(target, mask)
    if type(student_head) is nn.Linear:
        head = (student_head.weight, student_head.bias)
        return _LinearHeadLoss.apply(student_hidden, *head, target, weights, chunk)
    parameters = [parameter for parameter in student_head.parameters() if parameter.requires_grad]
    return _ModuleHeadLoss.apply(student_hidden, student_head, target, weights, chunk, *parameters)


def _check_tokens(student: Tensor, target: Target) -> None:
    if student.shape[:-1].numel() != target.tokens:
        raise UsageError(f"the student has {student.shape[:-1].numel()} tokens, its target {target.tokens}")


def _weights(target: Target, mask: Tensor | None) -> Tensor | None:
    """Weight of each token [tokens], float32, summing to one; None means all equal."""
    if mask is None:
        return None
    weights = mask.flatten().float()
    if len(weights) != target.tokens:
        raise UsageError(f"the mask has {len(weights)} entries for {target.tokens} tokens")
    if weights.sum() == 0:
        raise UsageError("the mask leaves no token; at least one must count")
    return weights / weights.sum()


class _Accumulator:
    """Runs a target over chunks: adds up loss and KL, hands back each chunk's weighted gradient of the logits."""

    def __init__(self, target: Target, weights: Tensor | None, chunk: int) -> None:
        self.target, self.weights, self.chunk = target, weights, chunk
        self.loss: Tensor | float = 0.0
        self.kl: Tensor | float = 0.0

    def parts(self) -> list[slice]:
        return [slice(start, start + self.chunk) for start in range(0, self.target.tokens, self.chunk)]

    def gradient_(self, logits: Tensor, part: slice) -> Tensor:
        """Overwrites float32 logits [n, V] by the gradient of the loss."""
        loss, entropy = self.target.cross_entropy_(logits, part)
        if self.weights is None:
            self.loss, self.kl = self.loss + loss.sum(), self.kl + (loss - entropy).sum()
            return logits.div_(self.target.tokens)
        weight = self.weights[part]
        self.loss, self.kl = self.loss + (loss * weight).sum(), self.kl + ((loss - entropy) * weight).sum()
        return logits.mul_(weight.unsqueeze(-1))

    def result(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self.loss, Tensor) and isinstance(self.kl, Tensor)
        count = self.target.tokens if self.weights is None else 1
        return self.loss / count, self.kl / count


def _scaled(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """The gradients kept by forward times the upstream scalar, in place: they are handed out once."""
    if ctx.gradients is None:
        raise RuntimeError("the gradients of this loss were used already; compute the loss again before backward")
    gradients, ctx.gradients = ctx.gradients, None
    return [None if gradient is None else gradient.mul_(upstream.to(gradient.dtype)) for gradient in gradients]


class _LogitsLoss(torch.autograd.Function):
    """Student logits that exist already: [..., V] -> loss, KL."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Target, weights: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
        flat = logits.flatten(0, -2)
        gradient = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        total = _Accumulator(target, weights, chunk)
        for part in total.parts():
            chunk_gradient = total.gradient_(flat[part].to(torch.float32, copy=True), part)
            if gradient is not None:
                gradient[part] = chunk_gradient
        ctx.gradients = (None if gradient is None else gradient.view(logits.shape),)
        loss, kl = total.result()
        ctx.mark_non_differentiable(kl)
        return loss, kl

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _kl: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*_scaled(ctx, upstream), None, None, None)


class _LinearHeadLoss(torch.autograd.Function):
    """Hidden states [..., H], weight [V, H], bias [V] | None -> loss, KL; logits live one chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Target,
        weights: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        flat, dtype = hidden.flatten(0, -2), _compute_dtype(hidden)
        matrix = weight.to(dtype)
        d_hidden = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        total = _Accumulator(target, weights, chunk)
        for part in total.parts():
            rows = flat[part].to(dtype)
            logits = nn.functional.linear(rows, matrix, None if bias is None else bias.to(dtype))
            gradient = total.gradient_(logits.float(), part)
            if d_bias is not None:
                d_bias += gradient.sum(0)
            gradient = gradient.to(dtype)
            if d_hidden is not None:
                d_hidden[part] = gradient @ matrix
            if d_weight is not None and d_weight.dtype == dtype:
                d_weight.addmm_(gradient.t(), rows)
            elif d_weight is not None:
                d_weight += gradient.t() @ rows
        ctx.gradients = (None if d_hidden is None else d_hidden.view(hidden.shape), d_weight, d_bias)
        loss, kl = total.result()
        ctx.mark_non_differentiable(kl)
        return loss, kl

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _kl: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*_scaled(ctx, upstream), None, None, None)


class _ModuleHeadLoss(torch.autograd.Function):
    """Hidden states and any head module; its trained parameters are inputs so that their gradients flow out."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: nn.Module,
        target: Target,
        weights: Tensor | None,
        chunk: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        flat = hidden.detach().flatten(0, -2)
        d_hidden = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        wanted = zip(parameters, ctx.needs_input_grad[5:], strict=True)
        d_parameters = [torch.zeros_like(parameter) if needed else None for parameter, needed in wanted]
        needed = [p for p, d in zip(parameters, d_parameters, strict=True) if d is not None]
        total = _Accumulator(target, weights, chunk)
        for part in total.parts():
            with torch.enable_grad():
                rows = flat[part].requires_grad_(d_hidden is not None)
                logits = head(rows)
            gradient = total.gradient_(logits.detach().to(torch.float32, copy=True), part).to(logits.dtype)
            inputs = ([rows] if d_hidden is not None else []) + needed
            if not inputs:
                continue
            found = list(torch.autograd.grad(logits, inputs, gradient, allow_unused=True))
            if d_hidden is not None:
                d_hidden[part] = found.pop(0)
            for d, new in zip([d for d in d_parameters if d is not None], found, strict=True):
                if new is not None:
                    d.add_(new)
        d_hidden = None if d_hidden is None else d_hidden.view(hidden.shape)
        ctx.gradients = (d_hidden, None, None, None, None, *d_parameters)
        loss, kl = total.result()
        ctx.mark_non_differentiable(kl)
        return loss, kl

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _kl: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return tuple(_scaled(ctx, upstream))


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """The type in which the head would run: autocast's where it is on, else the hidden states' own."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype

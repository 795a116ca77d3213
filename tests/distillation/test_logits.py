"""Distillation losses: against the formula written out in float64, with gradients, in every chunking."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.distillation.logits import (
    chunked_distillation_loss,
    distillation_loss,
    target_loss,
    topk_distillation_loss,
)
from edgewright.distillation.targets import DenseTarget, TopKTarget
from edgewright.errors import UsageError
from edgewright.quantization.config import WeightConfig
from edgewright.quantization.layers import QuantLinear, WeightQuantizer

B, T, H, V = 2, 7, 12, 50
# float32 softmax over 50 entries and sums of 14 tokens against float64.
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def reference(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float = 1.0) -> Tensor:
    """Soft cross-entropy in float64; weights sum to one."""
    p = torch.softmax(teacher.double() / temperature, -1)
    log_q = torch.log_softmax(student.double() / temperature, -1)
    return -(p * log_q).sum(-1).mul(weights).sum() * temperature**2


def reference_topk(student: Tensor, values: Tensor, indices: Tensor, tail: Tensor) -> Tensor:
    p = torch.cat((values, tail.unsqueeze(-1)), -1).double()
    p = p / p.sum(-1, keepdim=True)
    q = torch.softmax(student.double(), -1)
    inside = q.gather(-1, indices)
    keep = torch.ones_like(q).scatter(-1, indices, 0.0)
    q = torch.cat((inside, (q * keep).sum(-1, keepdim=True)), -1)
    return -torch.xlogy(p, q.clamp(min=1e-300)).sum(-1).mean()


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("chunk", [1, 5, 14, 1000])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_and_gradient_equal_the_formula(chunk, temperature):
    student, teacher = random(B, T, V).requires_grad_(), random(B, T, V, seed=1)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) > 0.4
    for weights, chosen in ((torch.full((B, T), 1 / (B * T)), None), (mask / mask.sum(), mask)):
        expected = reference(student, teacher, weights, temperature)
        found = distillation_loss(student, teacher, mask=chosen, temperature=temperature, chunk=chunk)
        torch.testing.assert_close(found, expected.float(), **CLOSE)
        torch.testing.assert_close(gradients(found * 3, student), gradients(expected * 3, student), **CLOSE)


def test_cross_entropy_and_kl_have_equal_gradients():
    student, teacher = random(B, T, V).requires_grad_(), random(B, T, V, seed=1)
    loss, kl = target_loss(student, DenseTarget(teacher, 1.0))
    inputs = (student.log_softmax(-1).flatten(0, 1), teacher.log_softmax(-1).flatten(0, 1))
    divergence = F.kl_div(*inputs, log_target=True, reduction="batchmean")
    torch.testing.assert_close(kl, divergence, **CLOSE)
    torch.testing.assert_close(gradients(loss, student), gradients(divergence, student), **CLOSE)


def test_identical_models_have_no_gradient_and_no_kl():
    logits = random(B, T, V).requires_grad_()
    loss, kl = target_loss(logits, DenseTarget(logits, 1.0))
    assert kl == 0 and not gradients(loss, logits)[0].any()


@pytest.mark.parametrize("k", [1, 8, V])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_top_k_with_tail_equals_the_formula(k, chunk):
    student = random(B, T, V).requires_grad_()
    values, indices = torch.softmax(random(B, T, V, seed=1), -1).topk(k)
    tail = (1 - values.sum(-1)).clamp(min=0)
    expected = reference_topk(student, values, indices, tail)
    found = topk_distillation_loss(student, values, indices.int(), tail, chunk=chunk)
    torch.testing.assert_close(found, expected.float(), **CLOSE)
    torch.testing.assert_close(gradients(found, student), gradients(expected, student), **CLOSE)
    if k == V:  # nothing is left for the tail: the whole distribution
        weights = torch.full((B, T), 1 / (B * T))
        torch.testing.assert_close(found, reference(student, random(B, T, V, seed=1), weights).float(), **CLOSE)


class Head(nn.Module):
    """Any module may be a head: here a linear layer behind a norm."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(H), linear

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(self.norm(hidden))


def heads(kind: str) -> nn.Module:
    linear = nn.Linear(H, V, bias=kind == "bias")
    linear.weight.data.copy_(random(V, H, seed=3))
    if kind == "quantised":
        return QuantLinear(linear, WeightQuantizer(linear.weight, WeightConfig("int4", 4), "lm_head"))
    return Head(linear) if kind == "module" else linear


@pytest.mark.parametrize("kind", ["plain", "bias", "module", "quantised"])
@pytest.mark.parametrize("chunk", [5, 1000])
def test_hidden_states_and_head_get_the_gradients_of_the_plain_loss(kind, chunk):
    head, hidden, teacher = heads(kind), random(B, T, H, seed=4).requires_grad_(), random(B, T, V, seed=1)
    mask = torch.arange(T).expand(B, T) > 1
    inputs = (hidden, *head.parameters())
    expected = reference(head(hidden), teacher, mask / mask.sum())
    found, kl = chunked_distillation_loss(hidden, head, DenseTarget(teacher, 1.0), mask=mask, chunk=chunk)
    torch.testing.assert_close(found, expected.float(), **CLOSE)
    assert not kl.requires_grad and 0 < kl < found
    # Gradients here are sums over 12 tokens and 50 logits in another order.
    for ours, theirs in zip(gradients(found, *inputs), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def test_teacher_hidden_states_are_turned_into_logits_chunk_by_chunk():
    head, hidden, teacher_hidden = heads("plain"), random(B, T, H, seed=4), random(B, T, H, seed=5)
    teacher_head = heads("bias")
    with torch.no_grad():
        whole = DenseTarget(teacher_head(teacher_hidden), 1.0)
    expected, _ = chunked_distillation_loss(hidden, head, whole)
    found, _ = chunked_distillation_loss(hidden, head, DenseTarget(teacher_hidden, 1.0, teacher_head), chunk=4)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_tied_head_adds_to_the_embedding_gradient():
    embedding, head = nn.Embedding(V, H), heads("plain")
    head.weight = embedding.weight
    ids, teacher = torch.arange(B * T).view(B, T), random(B, T, V, seed=1)
    found, _ = chunked_distillation_loss(embedding(ids), head, DenseTarget(teacher, 1.0), chunk=3)
    expected = reference(head(embedding(ids)), teacher, torch.full((B, T), 1 / (B * T)))
    ours, theirs = gradients(found, embedding.weight), gradients(expected, embedding.weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)  # sums in another order


def test_a_frozen_head_gets_no_gradient_and_top_k_targets_fit():
    head, hidden = heads("plain").requires_grad_(False), random(B, T, H, seed=4).requires_grad_()
    values, indices = torch.softmax(random(B, T, V, seed=1), -1).topk(5)
    target = TopKTarget(values, indices, 1 - values.sum(-1))
    loss, _ = chunked_distillation_loss(hidden, head, target, chunk=3)
    loss.backward()
    expected = reference_topk(head(hidden), values, indices, 1 - values.sum(-1))
    torch.testing.assert_close(loss, expected.float(), **CLOSE)
    assert head.weight.grad is None and hidden.grad is not None


@pytest.mark.parametrize("kind", ["plain", "module"])
def test_autocast_computes_the_head_in_bfloat16(kind):
    head, hidden, teacher = heads(kind), random(B, T, H, seed=4).requires_grad_(), random(B, T, V, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = chunked_distillation_loss(hidden, head, DenseTarget(teacher, 1.0), chunk=5)
    loss.backward()
    expected = reference(head(hidden), teacher, torch.full((B, T), 1 / (B * T)))
    assert loss.dtype == torch.float32 and hidden.grad.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float(), rtol=1e-2, atol=0)  # bfloat16


def test_gradients_are_handed_out_once():
    student = random(B, T, V).requires_grad_()
    loss = distillation_loss(student, random(B, T, V, seed=1))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used already"):
        loss.backward()


def test_bad_input_is_named():
    student = random(B, T, V)
    with pytest.raises(UsageError, match=r"\[2, 7, 50\] and \[2, 6, 50\]"):
        distillation_loss(student, random(B, T - 1, V))
    with pytest.raises(UsageError, match="60 logits.*student 50"):
        distillation_loss(student, random(B, T, 60))
    with pytest.raises(UsageError, match="no token"):
        distillation_loss(student, student, mask=torch.zeros(B, T))
    with pytest.raises(UsageError, match="3 entries for 14 tokens"):
        distillation_loss(student, student, mask=torch.ones(3))
    with pytest.raises(UsageError, match="12 tokens, its target 14"):
        chunked_distillation_loss(random(2, 6, H), heads("plain"), DenseTarget(student, 1.0))

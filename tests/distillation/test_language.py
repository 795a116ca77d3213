"""The loss function for training language models: equal on every path, and strict about its teacher."""

from __future__ import annotations

import copy

import pytest
import torch

from edgewright.distillation.language import LanguageDistillation
from edgewright.distillation.logits import distillation_loss
from edgewright.errors import UsageError
from edgewright.quantization.api import quantize_
from edgewright.quantization.config import KVConfig, QuantConfig


def tokens() -> torch.Tensor:
    return torch.randint(3, 256, (3, 16), generator=torch.Generator().manual_seed(0))


def parameter_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


class Whole(torch.nn.Module):
    """A model whose structure is not known, as under distributed wrappers."""

    def __init__(self, model) -> None:
        super().__init__()
        self.module = model

    def forward(self, **inputs):
        return self.module(**inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_both_paths_equal_the_plain_loss(tiny_llama, student_of, masked):
    student = student_of(tiny_llama)
    mask = torch.arange(16).expand(3, 16) < 11 if masked else None
    batch = {"tokens": tokens(), "mask": mask} if masked else tokens()
    plain = distillation_loss(student(tokens()).logits, tiny_llama(tokens()).logits, mask=mask)
    expected = parameter_gradients(student, plain)
    loss_function = LanguageDistillation(tiny_llama, chunk=20)
    kls = []
    for model in (student, Whole(student)):
        loss, metrics = loss_function(model, batch)
        kls.append(metrics["kl"])
        # The same sums in float32, in another order.
        torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
        torch.testing.assert_close(parameter_gradients(student, loss), expected, rtol=1e-4, atol=1e-7)
    assert kls[0] == pytest.approx(kls[1], rel=1e-4) and kls[0] > 0


def test_the_teacher_itself_has_no_kl_and_gets_no_gradient(tiny_llama):
    loss, metrics = LanguageDistillation(tiny_llama)(copy.deepcopy(tiny_llama), tokens())
    loss.backward()
    assert abs(metrics["kl"]) < 1e-6  # the student's and the teacher's head may sum in another order
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())


def test_training_under_quantisation_lowers_the_kl(tiny_llama):
    tiny_llama.model.norm.weight.data *= 6  # a random model is nearly uniform: give it opinions
    config = QuantConfig.weights("seq2", 16)
    student = quantize_(copy.deepcopy(tiny_llama), QuantConfig(config.rules, config.skip, kv=KVConfig(4)))
    loss_function = LanguageDistillation(tiny_llama)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0)
    kls = []
    for _ in range(25):
        loss, metrics = loss_function(student, tokens())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kls.append(metrics["kl"])
    assert kls[-1] < 0.5 * kls[0]


def test_teachers_that_cannot_work(tiny_llama, student_of):
    student = student_of(tiny_llama)
    with pytest.raises(UsageError, match=r"teacher.eval\(\)"):
        LanguageDistillation(copy.deepcopy(tiny_llama).train())(student, tokens())
    with pytest.raises(UsageError, match="share the storage of model.embed_tokens.weight"):
        LanguageDistillation(tiny_llama)(tiny_llama, tokens())
    partly = student_of(tiny_llama)
    partly.model.norm.weight = tiny_llama.model.norm.weight
    with pytest.raises(UsageError, match="share the storage of model.norm.weight"):
        LanguageDistillation(tiny_llama)(partly, tokens())
    with pytest.raises(UsageError, match="no teacher"):
        LanguageDistillation()(student, tokens())
    with pytest.raises(UsageError, match="'tokens'; it has ids"):
        LanguageDistillation(tiny_llama)(student, {"ids": tokens()})
    with pytest.raises(UsageError, match="temperature=0"):
        LanguageDistillation(tiny_llama, temperature=0)


def test_other_vocabulary_is_refused_with_both_sizes(tiny_llama):
    student = copy.deepcopy(tiny_llama)
    student.resize_token_embeddings(320)
    with pytest.raises(UsageError, match="256 tokens and the student's 320"):
        LanguageDistillation(tiny_llama)(student, tokens())

"""Losses on hidden states and attention maps against float64 NumPy, masks, layer maps, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgewright.distillation.features import attention_loss, even_layer_map, hidden_loss, layer_errors
from edgewright.errors import UsageError
from edgewright.systems.bit.distillation import EncoderDistillation, class_soft_cross_entropy


def tensors(count: int, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def mask(*lengths: int, width: int = 7) -> torch.Tensor:
    return torch.tensor([[position < length for position in range(width)] for length in lengths])


@pytest.mark.parametrize(
    ("students", "teachers", "wanted"),
    [(3, 3, (0, 1, 2)), (2, 6, (2, 5)), (3, 12, (3, 7, 11)), (1, 5, (4,)), (4, 6, (1, 2, 3, 5))],
)
def test_even_map_ends_on_the_last_layer(students, teachers, wanted):
    assert even_layer_map(students, teachers) == wanted


def test_hidden_loss_equals_numpy():
    student, teacher = tensors(4, 2, 7, 5), tensors(4, 2, 7, 5, seed=1)
    real = mask(7, 3)
    plain = sum(np.mean((s.numpy() - t.numpy()) ** 2) for s, t in zip(student, teacher, strict=True))
    masked = sum(np.mean((s.numpy() - t.numpy())[real.numpy()] ** 2) for s, t in zip(student, teacher, strict=True))
    np.testing.assert_allclose(hidden_loss(student, teacher).item(), plain, rtol=1e-12)
    np.testing.assert_allclose(hidden_loss(student, teacher, mask=real).item(), masked, rtol=1e-12)
    np.testing.assert_allclose(sum(layer_errors(student, teacher, real)), masked, rtol=1e-12)


def test_attention_loss_equals_numpy_over_real_queries():
    student, teacher = tensors(2, 2, 3, 7, 6), tensors(2, 2, 3, 7, 6, seed=1)
    real = mask(7, 3).numpy()
    square = [(s.numpy() - t.numpy()) ** 2 for s, t in zip(student, teacher, strict=True)]
    np.testing.assert_allclose(attention_loss(student, teacher).item(), sum(q.mean() for q in square), rtol=1e-12)
    wanted = sum(q.transpose(0, 2, 1, 3)[real].mean() for q in square)
    found = attention_loss(student, teacher, mask=torch.from_numpy(real))
    np.testing.assert_allclose(found.item(), wanted, rtol=1e-12)


def test_padding_has_no_gradient_and_the_teacher_none_at_all():
    student, teacher = tensors(2, 2, 7, 5), tensors(2, 2, 7, 5, seed=1)
    for state in (*student, *teacher):
        state.requires_grad_()
    real = mask(7, 3)
    hidden_loss(student, teacher, mask=real).backward()
    assert all(bool((s.grad[~real] == 0).all()) and bool((s.grad[real] != 0).all()) for s in student)
    assert all(t.grad is None for t in teacher)


def test_a_layer_map_chooses_the_teachers_layers():
    teacher = tensors(5, 2, 7, 5)
    student = [teacher[0], teacher[1], teacher[4]]
    assert hidden_loss(student, teacher, layer_map=(0, 3)).item() == 0.0
    assert hidden_loss(student, teacher).item() > 0.0  # the even map takes layers 1 and 3


def test_what_is_refused():
    states = tensors(3, 2, 7, 5)
    for wrong in ((0, 2), (0,), (-1, 1)):
        with pytest.raises(UsageError, match="layer_map="):
            hidden_loss(states, states, layer_map=wrong)
    with pytest.raises(UsageError, match="4 student layers cannot be spread over 2"):
        even_layer_map(4, 2)
    with pytest.raises(UsageError, match="differ in shape"):
        hidden_loss(states, tensors(3, 2, 7, 6))
    with pytest.raises(UsageError, match="leaves no token"):
        hidden_loss(states, states, mask=torch.zeros(2, 7, dtype=torch.bool))
    with pytest.raises(ValueError):
        layer_errors(states, states[:2])


# -- the encoder's loss ------------------------------------------------------------------------------------------------


def test_soft_cross_entropy_is_the_mean_over_batch_and_classes():
    (student,), (teacher,) = tensors(1, 4, 3), tensors(1, 4, 3, seed=1)
    p = np.exp(teacher.numpy()) / np.exp(teacher.numpy()).sum(1, keepdims=True)
    log_q = student.numpy() - np.log(np.exp(student.numpy()).sum(1, keepdims=True))
    np.testing.assert_allclose(class_soft_cross_entropy(student, teacher).item(), -(p * log_q).mean(), rtol=1e-12)
    with pytest.raises(UsageError, match="logits differ"):
        class_soft_cross_entropy(student, teacher[:, :2])


def test_a_classifier_learns_from_hidden_states_and_logits(tiny_classifier):
    batch = {
        "input_ids": torch.randint(5, 99, (4, 8), generator=torch.Generator().manual_seed(0)),
        "attention_mask": mask(8, 8, 3, 5, width=8).long(),
        "target": torch.zeros(4),  # columns that no encoder takes are left alone
    }
    loss, numbers = EncoderDistillation()(tiny_classifier, tiny_classifier, batch)
    assert numbers["hidden"] == 0.0 and all(numbers[f"mse_{i}"] == 0.0 for i in range(3))
    assert torch.equal(loss, numbers["logits"]) and numbers["logits"] > 0  # the teacher's own entropy
    term = EncoderDistillation(logits=0.0, term=lambda found, wanted, batch: found.logits.sum() * 0 + 2.0)
    loss, numbers = term(tiny_classifier, tiny_classifier, batch)
    assert loss == 2.0 and numbers["term"] == 2.0


@pytest.fixture
def tiny_classifier():
    from transformers import BertConfig, BertForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = BertConfig(
            vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        return BertForSequenceClassification(settings).eval()

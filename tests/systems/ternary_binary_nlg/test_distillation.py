"""The encoder-decoder loss: against a slow sum over single terms, masks, layer maps, presets, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from edgewright.errors import UsageError
from edgewright.systems.ternary_binary_nlg.distillation import (
    PUBLISHED_MAPS,
    PUBLISHED_TEACHER_LAYERS,
    SequenceLossConfig,
    SequenceToSequenceDistillation,
    layer_map,
)
from tests.toy_encoder_decoders import tiny_batch, tiny_encoder_decoder


def pair(family: str = "bart") -> tuple[Any, Any]:
    """A student and a teacher of other weights."""
    return tiny_encoder_decoder(family, seed=0), tiny_encoder_decoder(family, seed=1)


def value(config: SequenceLossConfig, student: Any, teacher: Any, batch: Any = None) -> float:
    loss, _ = SequenceToSequenceDistillation(teacher, config)(student, batch or tiny_batch())
    return float(loss.detach())


def by_hand(student: Any, teacher: Any, task: float, soft: float, features: float) -> float:
    """The formula of the module's head, term by term in float64, over the tokens that count, one after another."""
    batch = tiny_batch()
    with torch.no_grad():
        wanted = {**batch, "output_hidden_states": True, "output_attentions": True}
        s, t = student(**wanted), teacher(**wanted)
    source = [(b, i) for b in range(2) for i in range(7) if batch["attention_mask"][b, i]]
    target = [(b, i) for b in range(2) for i in range(6) if batch["labels"][b, i] != -100]

    def states(ours: Tensor, theirs: Tensor, places: list[tuple[int, int]]) -> float:
        return sum(float((ours[b, i] - theirs[b, i]).double().square().mean()) for b, i in places) / len(places)

    def maps(ours: Tensor, theirs: Tensor, places: list[tuple[int, int]]) -> float:
        return sum(float((ours[b, :, i] - theirs[b, :, i]).double().square().mean()) for b, i in places) / len(places)

    log_p, log_q = t.logits.double().log_softmax(-1), s.logits.double().log_softmax(-1)
    total = task * sum(-float(log_q[b, i, batch["labels"][b, i]]) for b, i in target) / len(target)
    total += soft * sum(-float((log_p[b, i].exp() * log_q[b, i]).sum()) for b, i in target) / len(target)
    parts = sum(states(a, b, source) for a, b in zip(s.encoder_hidden_states, t.encoder_hidden_states, strict=True))
    parts += states(s.encoder_last_hidden_state, t.encoder_last_hidden_state, source)
    parts += sum(states(a, b, target) for a, b in zip(s.decoder_hidden_states, t.decoder_hidden_states, strict=True))
    parts += sum(maps(a, b, source) for a, b in zip(s.encoder_attentions, t.encoder_attentions, strict=True))
    parts += sum(maps(a, b, target) for a, b in zip(s.decoder_attentions, t.decoder_attentions, strict=True))
    parts += sum(maps(a, b, target) for a, b in zip(s.cross_attentions, t.cross_attentions, strict=True))
    return total + features * parts


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (SequenceLossConfig(), (1, 1, 1)),
        (SequenceLossConfig.weighted(), (1, 0.8, 3)),
        (SequenceLossConfig.labels_only(), (1, 0, 0)),
    ],
)
def test_the_whole_loss(family: str, config: SequenceLossConfig, weights: tuple[float, float, float]) -> None:
    student, teacher = pair(family)
    # float32 sums over a few thousand squares against float64
    assert value(config, student, teacher) == pytest.approx(by_hand(student, teacher, *weights), rel=1e-5)


def test_padding_does_not_count() -> None:
    student, teacher = pair()
    batch, other = tiny_batch(), tiny_batch()
    other["input_ids"][1, 5:] = 9
    for config in (SequenceLossConfig(), SequenceLossConfig(task=0, logits=0, attention=())):
        assert value(config, student, teacher, batch) == value(config, student, teacher, other)
    longer = {
        name: torch.nn.functional.pad(x, (0, 2), value=-100 if name == "labels" else 0) for name, x in batch.items()
    }
    states = SequenceLossConfig(attention=())  # a longer map has a smaller mean
    # other shapes, other order of summation
    assert value(states, student, teacher, longer) == pytest.approx(value(states, student, teacher, batch), rel=1e-5)


def test_a_teacher_of_the_same_weights_leaves_no_feature_loss() -> None:
    student = tiny_encoder_decoder()
    config = SequenceLossConfig(task=0.0, logits=0.0)
    assert value(config, student, copy.deepcopy(student)) == 0.0


@pytest.mark.parametrize("part", ["encoder", "decoder", "cross"])
def test_each_kind_of_attention_is_a_term_of_its_own(part: str) -> None:
    student, teacher = pair()
    none = SequenceLossConfig(task=0, logits=0, attention=())
    one = SequenceLossConfig(task=0, logits=0, attention=(part,))
    every = SequenceLossConfig(task=0, logits=0)
    assert value(none, student, teacher) < value(one, student, teacher) < value(every, student, teacher)


def test_gradients_reach_the_student_alone() -> None:
    student, teacher = pair()
    loss, metrics = SequenceToSequenceDistillation(teacher)(student, tiny_batch())
    loss.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert metrics.keys() == {"task", "logits", "features"} and not any(m.requires_grad for m in metrics.values())


def test_decoder_only_models_have_no_cross_terms(tiny_llama: Any) -> None:
    teacher = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        teacher.lm_head.weight.add_(0.01)
    ids = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    for model in (tiny_llama, teacher):
        model.set_attn_implementation("eager")
    loss = SequenceToSequenceDistillation(teacher)
    total, parts = loss(tiny_llama, {"input_ids": ids, "labels": labels})
    expected = tiny_llama(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(parts["task"], expected.detach(), rtol=1e-6, atol=0)
    assert parts["features"] > 0 and not loss.notes
    total.backward()


def test_other_attention_is_noted_once_and_left_out(recwarn: pytest.WarningsRecorder) -> None:
    student, teacher = pair()
    expected = value(SequenceLossConfig(attention=()), student, teacher)
    teacher.set_attn_implementation("sdpa")
    loss = SequenceToSequenceDistillation(teacher)
    found = [float(loss(student, tiny_batch())[0].detach()) for _ in range(2)]
    assert len(loss.notes) == 1 and "call teacher.set_attn_implementation('eager')" in loss.notes[0]
    assert len([w for w in recwarn if "gives no maps" in str(w.message)]) == 1
    # sdpa sums in another order than eager attention
    assert found[0] == found[1] == pytest.approx(expected, rel=1e-5)


# -- maps --------------------------------------------------------------------------------------------------------------


def test_the_published_maps_are_for_a_teacher_of_six() -> None:
    assert sorted(PUBLISHED_MAPS) == [1, 2, 3, 4, 5, 6]
    for students, chosen in PUBLISHED_MAPS.items():
        assert len(chosen) == students and chosen[-1] == PUBLISHED_TEACHER_LAYERS - 1 and list(chosen) == sorted(chosen)
    assert layer_map("published", 3) == (0, 2, 5) and layer_map((1, 0), 2) == (1, 0) and layer_map("even", 2) is None


def test_a_map_pairs_layers() -> None:
    """Entry 0 of the hidden states meets entry 0; layer i meets entry map[i] + 1."""
    teacher = tiny_encoder_decoder(encoder_layers=6)
    student = tiny_encoder_decoder(seed=1)
    config = SequenceLossConfig(task=0, logits=0, attention=(), encoder_map="published")
    batch = tiny_batch()
    with torch.no_grad():
        s, t = (m(**batch, output_hidden_states=True) for m in (student, teacher))
    mask = batch["attention_mask"].bool()
    pairs = [(0, 0), (1, 1), (2, 6)]
    expected = sum((s.encoder_hidden_states[i] - t.encoder_hidden_states[j])[mask].square().mean() for i, j in pairs)
    expected += (s.encoder_last_hidden_state - t.encoder_last_hidden_state)[mask].square().mean()
    counted = batch["labels"] != -100
    for ours, theirs in zip(s.decoder_hidden_states, t.decoder_hidden_states, strict=True):
        expected += (ours - theirs)[counted].square().mean()
    assert value(config, student, teacher) == pytest.approx(float(expected), rel=1e-5)  # sums in another order


@pytest.mark.parametrize("chosen", [(0, 6), (0, -1), (1,)])
def test_a_map_to_a_missing_layer_is_refused(chosen: tuple[int, ...]) -> None:
    student, teacher = pair()
    with pytest.raises(ValueError, match="does not give each of 2 student layers one of the teacher's layers 0 to 1"):
        value(SequenceLossConfig(encoder_map=chosen), student, teacher)


def test_the_table_has_no_seventh_row() -> None:
    with pytest.raises(UsageError, match="layers of the student=7; it must be one of 1, 2, 3, 4, 5, 6"):
        layer_map("published", 7)


# -- refused -----------------------------------------------------------------------------------------------------------


def test_another_vocabulary_is_refused() -> None:
    student, teacher = pair()
    student.resize_token_embeddings(70)
    with pytest.raises(ValueError, match="vocabulary has 64 tokens and the student's 70"):
        value(SequenceLossConfig(), student, teacher)


def test_a_teacher_that_would_learn_or_be_noisy_is_refused() -> None:
    student, teacher = pair()
    with pytest.raises(UsageError, match="share the storage"):
        value(SequenceLossConfig(), student, student)
    with pytest.raises(UsageError, match="teacher.eval"):
        value(SequenceLossConfig(), student, teacher.train())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SequenceLossConfig(task=-1.0), "task=-1.0; it must be a number at least 0"),
        (lambda: SequenceLossConfig(0.0, 0.0, 0.0), "one or more must be above 0"),
        (
            lambda: SequenceLossConfig(attention=("self",)),
            "attention='self'; it must be one of encoder, decoder, cross",
        ),
        (lambda: SequenceToSequenceDistillation(None), "SequenceLossConfig.labels_only"),
    ],
)
def test_senseless_settings_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        make()


def test_batches_without_labels_are_refused() -> None:
    student, teacher = pair()
    batch = tiny_batch()
    with pytest.raises(UsageError, match="needs 'input_ids' and 'labels'"):
        value(SequenceLossConfig(), student, teacher, {"input_ids": batch["input_ids"]})
    with pytest.raises(UsageError, match="every label is -100"):
        value(SequenceLossConfig(), student, teacher, {**batch, "labels": torch.full((2, 6), -100)})

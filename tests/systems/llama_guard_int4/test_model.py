"""Policies, constrained answers, scores from one forward pass, training rows, folders, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgewright
from edgewright.compression.stages import int4_config
from edgewright.errors import FormatError, UsageError
from edgewright.pruning.unembedding import prune_unembedding_
from edgewright.quantization.config import ActivationConfig
from edgewright.systems.llama_guard_int4.answers import (
    IGNORED,
    AnswerLoss,
    answer_logits,
    answer_rows,
    answer_scores,
    teacher_answers,
)
from edgewright.systems.llama_guard_int4.model import GuardModel, ModelPredictor, Verdict, save_guard
from edgewright.systems.llama_guard_int4.policy import AnswerAutomaton, GuardPolicy, GuardSettings, read_settings
from tests.toy_llama import make_tiny_llama

POLICY = GuardPolicy({"S1": "cards", "S2": "secrets", "S12": "doses"})
HELLO = [{"role": "user", "content": "Hello there."}]


@pytest.fixture(scope="module")
def tokenizer(smollm2) -> Any:
    return smollm2[1]


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """A random model with the real vocabulary, of one layer."""
    return make_tiny_llama(vocab_size=49152, num_hidden_layers=1, initializer_range=0.2, max_position_embeddings=128)


class Scripted:
    """A predictor that prefers given tokens, and counts its forward passes."""

    columns: Sequence[int] | None = None
    context = 200

    def __init__(self, wishes: list[dict[int, float]]) -> None:
        self.wishes, self.calls = wishes, []

    def start(self, ids: Sequence[int]) -> Tensor:
        self.calls = []
        return self.follow(ids)

    def follow(self, ids: Sequence[int]) -> Tensor:
        logits = torch.zeros(49152)
        for token, value in self.wishes[len(self.calls)].items():
            logits[token] = value
        self.calls.append(list(ids))
        return logits


def token(tokenizer: Any, text: str) -> int:
    (one,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    return one


def test_the_prompt_and_the_answers() -> None:
    prompt = POLICY.prompt([*HELLO, {"role": "assistant", "content": " Hi! "}])
    assert prompt.splitlines()[1:] == [
        "S1: cards",
        "S2: secrets",
        "S12: doses",
        "User: Hello there.",
        "Agent: Hi!",
        "Verdict:",
    ]
    answers = POLICY.answers()
    assert len(answers) == 8 and answers[" safe"] == () and answers[" unsafe\nS1,S12"] == ("S1", "S12")
    assert POLICY.answer(("S12", "S1")) == " unsafe\nS1,S12"
    assert len(GuardPolicy(POLICY.categories, most=1).answers()) == 4
    big = {f"S{i}": "x" for i in range(1, 31)}
    assert len(GuardPolicy(big, most=2).answers()) == 1 + 30 + 435


def test_the_automaton_writes_legal_answers_only(tokenizer: Any) -> None:
    automaton = POLICY.automaton(tokenizer)
    written = set()

    def walk(state: tuple[int, ...]) -> None:
        if not automaton.legal(state):
            written.add(state)
        for following in automaton.legal(state):
            walk((*state, following))

    walk(())
    assert written == set(automaton.answers)
    texts = {tokenizer.decode(list(ids)).removesuffix(tokenizer.eos_token) for ids in written}
    assert texts == set(POLICY.answers())
    with pytest.raises(UsageError, match="same token"):
        AnswerAutomaton({(1, 2): (), (1, 3): ("S1",)})


def test_the_score_needs_one_forward_pass(tokenizer: Any) -> None:
    unsafe, safe = token(tokenizer, " unsafe"), token(tokenizer, " safe")
    model = Scripted([{unsafe: 2.0, safe: 3.0}])
    verdict = GuardModel(model, tokenizer, POLICY).moderate(HELLO)
    p = math.exp(2) / (math.exp(2) + math.exp(3))
    assert verdict == Verdict(True, pytest.approx(p, abs=1e-6)) and len(model.calls) == 1
    strict = GuardModel(Scripted([{unsafe: 2.0, safe: 3.0}]), tokenizer, POLICY, threshold=0.2)
    assert not strict.moderate(HELLO, categories=False).safe


def test_categories_are_decoded_among_the_legal_ones(tokenizer: Any) -> None:
    """ " unsafe\\nS" has no alternative; then "1" or "2"; after "1": "2", a comma or the end."""
    one, two, comma = (token(tokenizer, text) for text in ("1", "2", ","))
    unsafe, nonsense = token(tokenizer, " unsafe"), token(tokenizer, " potato")
    wishes = [
        {unsafe: 5.0, nonsense: 9.0},
        {one: 1.0, nonsense: 9.0},
        {comma: 1.0},
        {two: 1.0, one: 0.5},
        {comma: 1.0},
        {},
    ]
    model = Scripted(wishes)
    verdict = GuardModel(model, tokenizer, POLICY).moderate(HELLO)
    assert verdict.categories == ("S1", "S2", "S12") and not verdict.safe
    assert [tokenizer.decode(ids) for ids in model.calls[1:]] == [" unsafe\nS", "1", ",S", "2"]


def test_a_model_with_its_cache_says_what_it_says_without(tokenizer: Any, small: nn.Module) -> None:
    predictor = ModelPredictor(small)
    ids = tokenizer(POLICY.prompt(HELLO))["input_ids"]
    predictor.start(ids[:-3])
    with torch.no_grad():
        whole = small(torch.tensor([ids])).logits[0, -1]
    # attention over a cache runs other kernels
    torch.testing.assert_close(predictor.follow(ids[-3:]), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_cut_and_saved_guards_agree_with_the_whole_one(tokenizer: Any, packed: bool, tmp_path: Path) -> None:
    model = make_tiny_llama(vocab_size=49152, num_hidden_layers=1, initializer_range=0.2)
    activation = ActivationConfig(8, symmetric=False) if packed else None
    if packed:
        edgewright.convert_(edgewright.quantize_(model, int4_config(32)))
    texts = [[{"role": "user", "content": f"Number {i}, please."}] for i in range(12)]
    whole = [GuardModel.from_model(model, tokenizer, POLICY).moderate(text) for text in texts]
    prune_unembedding_(model, POLICY.output_vocabulary(tokenizer))
    cut = [GuardModel.from_model(model, tokenizer, POLICY).moderate(text) for text in texts]
    assert [(v.safe, v.categories) for v in cut] == [(v.safe, v.categories) for v in whole]
    assert [v.score for v in cut] == pytest.approx([v.score for v in whole], abs=1e-5)
    save_guard(model, tokenizer, tmp_path / "guard", GuardSettings(POLICY, 0.4, activation))
    guard = GuardModel.from_pretrained(tmp_path / "guard", threshold=0.5)
    assert [guard.moderate(text) for text in texts] == cut
    assert GuardModel.from_pretrained(tmp_path / "guard").threshold == 0.4
    assert read_settings(tmp_path / "guard").policy == POLICY


def test_long_conversations_are_refused_or_shortened_in_the_open(tokenizer: Any, small: nn.Module) -> None:
    old = [{"role": "user", "content": "word " * 40}, {"role": "assistant", "content": "word " * 40}]
    guard = GuardModel.from_model(small, tokenizer, POLICY)
    with pytest.raises(UsageError, match=r"takes \d+ tokens, \d+ fit beside the answer; .*truncation='oldest'"):
        guard.moderate([*old, *HELLO])
    oldest = GuardModel.from_model(small, tokenizer, POLICY, truncation="oldest")
    verdict = oldest.moderate([*old, *HELLO])
    assert verdict.dropped_messages == 1
    assert verdict.score == oldest.moderate([old[1], *HELLO]).score
    with pytest.raises(UsageError, match="shorten it$"):
        oldest.moderate([{"role": "user", "content": "word " * 200}])


def test_wrong_arguments(tokenizer: Any, small: nn.Module, tmp_path: Path) -> None:
    guard = GuardModel.from_model(small, tokenizer, POLICY)
    for messages in ([], [{"role": "user", "content": "  "}]):
        with pytest.raises(ValueError, match="nothing to moderate"):
            guard.moderate(messages)
    with pytest.raises(UsageError, match="role='system'; it must be one of user, assistant"):
        guard.moderate([{"role": "system", "content": "x"}])
    for settings in ({"truncation": "middle"}, {"threshold": 1.0}):
        with pytest.raises(UsageError):
            GuardModel.from_model(small, tokenizer, POLICY, **settings)
    for categories, most in (
        ({}, None),
        ({"S 1": "x"}, None),
        ({"S1": "x"}, 2),
        ({f"S{i}": "x" for i in range(14)}, None),
    ):
        with pytest.raises(UsageError):
            GuardPolicy(categories, most=most)
    with pytest.raises(UsageError, match="category='S9'; it must be one of"):
        POLICY.answer(("S9",))
    cut = make_tiny_llama(vocab_size=49152, num_hidden_layers=1)
    prune_unembedding_(cut, GuardPolicy({"S1": "cards"}).output_vocabulary(tokenizer))
    with pytest.raises(UsageError, match="cannot write .*'2'"):
        GuardModel.from_model(cut, tokenizer, POLICY)
    with pytest.raises(UsageError, match="holds no guard"):
        GuardModel.from_pretrained(tmp_path)
    (tmp_path / "guard.json").write_text(json.dumps({"policy": {"categories": []}}))
    with pytest.raises(FormatError, match="does not describe a guard"):
        read_settings(tmp_path)


def pairs() -> list[tuple[str, str]]:
    return [(POLICY.prompt(HELLO), " safe"), (POLICY.prompt([{"role": "user", "content": "4 + 4"}]), " unsafe\nS1,S12")]


def test_rows_point_at_the_answer(tokenizer: Any) -> None:
    rows = answer_rows(tokenizer, pairs())
    for row, (_, answer) in enumerate(pairs()):
        real = rows["labels"][row] != IGNORED
        labels, places = rows["labels"][row][real], rows["places"][row][real]
        assert tokenizer.decode(labels) == answer + tokenizer.eos_token
        assert torch.equal(rows["tokens"][row][places + 1], labels)  # each place predicts the next token
    with pytest.raises(UsageError, match="number of examples=0; it must be"):
        answer_rows(tokenizer, [])


def test_the_loss_is_that_of_the_formula(tokenizer: Any, small: nn.Module) -> None:
    """CE + KL over answer tokens, the teacher reduced to kept tokens and one bucket for the rest."""
    rows = answer_rows(tokenizer, pairs())
    kept = POLICY.output_vocabulary(tokenizer)
    teacher = make_tiny_llama(1, vocab_size=49152, num_hidden_layers=1, initializer_range=0.1)
    data = teacher_answers(teacher, small, rows, kept)
    with torch.no_grad():
        _, numbers = AnswerLoss(kl=1.0, kept=kept)(small, data)
    ce, kl, count = 0.0, 0.0, 0
    for row in range(2):
        for place, label in zip(rows["places"][row], rows["labels"][row], strict=True):
            if label == IGNORED:
                continue
            with torch.no_grad():
                ids = rows["tokens"][row : row + 1, : place + 1]
                q, p = (m(ids).logits[0, -1].double().softmax(-1) for m in (small, teacher))
            coarse = [torch.cat([x[list(kept)], 1 - x[list(kept)].sum().view(1)]) for x in (p, q)]
            ce, kl, count = (
                ce - float(q[label].log()),
                kl + float((coarse[0] * (coarse[0] / coarse[1]).log()).sum()),
                count + 1,
            )
    assert float(numbers["nll"]) == pytest.approx(ce / count, rel=1e-5)
    assert float(numbers["kl"]) == pytest.approx(kl / count, rel=1e-4, abs=1e-6)  # float32 probabilities near one
    own = teacher_answers(small, make_tiny_llama(vocab_size=49152), rows, kept)
    with torch.no_grad():
        assert float(AnswerLoss(kl=1.0, kept=kept)(small, own)[1]["kl"]) == pytest.approx(0, abs=1e-6)


def test_prompts_carry_no_loss(tokenizer: Any, small: nn.Module) -> None:
    """Changing what is predicted inside the prompt changes nothing; padding changes nothing."""
    rows = answer_rows(tokenizer, pairs())
    alone = answer_rows(tokenizer, pairs()[:1])
    with torch.no_grad():
        both, one = answer_logits(small, rows)[0, :2], answer_logits(small, alone)[0, :2]
    torch.testing.assert_close(both, one, rtol=1e-4, atol=1e-4)  # matrices of other sizes


def test_scores_in_batches_are_those_of_the_guard(tokenizer: Any, small: nn.Module) -> None:
    rows = answer_rows(tokenizer, pairs())
    kept = POLICY.output_vocabulary(tokenizer)
    automaton = POLICY.automaton(tokenizer)
    nll, scores = answer_scores(small, rows, kept, sorted(automaton.unsafe), sorted(automaton.safe))
    guard = GuardModel.from_model(small, tokenizer, POLICY)
    for row, messages in enumerate((HELLO, [{"role": "user", "content": "4 + 4"}])):
        assert float(scores[row]) == pytest.approx(guard.moderate(messages).score, abs=1e-4)
    again, _ = answer_scores(small, rows, kept, sorted(automaton.unsafe), sorted(automaton.safe))
    assert torch.equal(again, nll)
    with torch.no_grad():
        logits = answer_logits(small, rows)[..., list(kept)].log_softmax(-1)
    for row in range(2):
        labels = [kept.index(label) for label in rows["labels"][row].tolist() if label != IGNORED]
        assert float(nll[row]) == pytest.approx(
            -sum(float(logits[row, i, k]) for i, k in enumerate(labels)) / len(labels)
        )


def test_another_vocabulary_cannot_teach(tokenizer: Any, small: nn.Module) -> None:
    rows = answer_rows(tokenizer, pairs())
    with pytest.raises(ValueError, match="only be distilled .*; train with the labels alone, kl=0"):
        teacher_answers(small, make_tiny_llama(), rows, [1])
    for settings in ({"ce": 0.0}, {"ce": -1.0, "kl": 2.0}, {"kl": 1.0}):
        with pytest.raises(UsageError):
            AnswerLoss(**settings)

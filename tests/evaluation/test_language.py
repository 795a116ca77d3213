"""Language metrics against straight loops in numpy float64, and what must hold exactly."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from edgewright.errors import CheckFailed, UsageError
from edgewright.evaluation import language
from edgewright.evaluation.language import (
    KL_QUANTILES,
    LanguageMetrics,
    LogitsFunction,
    add_rows,
    engine_logits,
    evaluate_language,
    model_logits,
)
from edgewright.evaluation.statistics import paired_difference

VOCABULARY = 50


def hashed(seed: int, vocabulary: int = VOCABULARY, scale: float = 2.0) -> LogitsFunction:
    """Logits that depend on the token, its position and the seed only: the same bits however blocks are batched."""
    generator = torch.Generator().manual_seed(seed)
    tokens = scale * torch.randn(vocabulary, vocabulary, generator=generator)
    places = torch.randn(64, vocabulary, generator=generator)
    return lambda ids: tokens[ids] + places[: ids.shape[1]]


def near(base: LogitsFunction, seed: int, amount: float) -> LogitsFunction:
    noise = hashed(seed)
    return lambda ids: base(ids) + amount * noise(ids)


def random_blocks(n: int = 12, length: int = 9, vocabulary: int = VOCABULARY, seed: int = 0) -> Tensor:
    return torch.randint(0, vocabulary, (n, length), generator=torch.Generator().manual_seed(seed))


def evaluate(function: LogitsFunction, blocks: Tensor, **options: object) -> LanguageMetrics:
    return evaluate_language({"x": function}, blocks, progress=False, **options)["x"]  # type: ignore[arg-type]


def oracle(q: np.ndarray, p: np.ndarray, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """nll, KL and agreement of every scored token, [N, T - 1], one number at a time."""
    n, length = blocks.shape
    nll, kl, agree = (np.zeros((n, length - 1)) for _ in range(3))
    for b in range(n):
        for t in range(length - 1):
            log_q = q[b, t] - q[b, t].max()
            log_q -= math.log(sum(math.exp(x) for x in log_q))
            log_p = p[b, t] - p[b, t].max()
            log_p -= math.log(sum(math.exp(x) for x in log_p))
            nll[b, t] = -log_q[blocks[b, t + 1]]
            kl[b, t] = sum(math.exp(x) * (x - y) for x, y in zip(log_p, log_q, strict=True))
            agree[b, t] = float(p[b, t].argmax() == q[b, t].argmax())
    return nll, kl, agree


def cluster_se(values: np.ndarray) -> float:
    return float(values.mean(1).std(ddof=1) / math.sqrt(len(values)))  # equal block lengths


def test_equals_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "SLICE_ELEMENTS", 3 * VOCABULARY)  # 8 positions in slices of 3, 3 and 2
    blocks, p = random_blocks(), hashed(0)
    q = near(p, 1, 0.3)
    found = evaluate(q, blocks, reference=p)
    nll, kl, agree = oracle(q(blocks).double().numpy(), p(blocks).double().numpy(), blocks.numpy())
    # rtol 1e-6: single terms of the sums over the vocabulary are float32
    for ours, theirs in [
        (found.nll, nll.mean()),
        (found.nll_se, cluster_se(nll)),
        (found.kl, kl.mean()),
        (found.kl_se, cluster_se(kl)),
        (found.perplexity, math.exp(nll.mean())),
        (found.perplexity_se, math.exp(nll.mean()) * cluster_se(nll)),
    ]:
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert found.top1_agreement == agree.mean() and 0.5 < agree.mean() < 1.0
    assert found.top1_agreement_se == pytest.approx(cluster_se(agree), rel=1e-12)
    assert (found.tokens, found.blocks) == (12 * 8, 12)
    np.testing.assert_allclose(found.kl_values, kl.ravel(), rtol=1e-5, atol=1e-7)
    assert tuple(found.kl_quantiles) == KL_QUANTILES
    for probability, value in found.kl_quantiles.items():
        assert value == np.sort(found.kl_values)[math.ceil(probability * kl.size) - 1]


def test_nll_is_torch_cross_entropy() -> None:
    blocks, q = random_blocks(), hashed(2)
    theirs = torch.nn.functional.cross_entropy(
        q(blocks)[:, :-1].double().reshape(-1, VOCABULARY), blocks[:, 1:].reshape(-1)
    )
    assert evaluate(q, blocks).nll == pytest.approx(theirs.item(), rel=1e-6)  # float32 terms


def test_a_model_agrees_with_itself_exactly() -> None:
    p, blocks = hashed(3), random_blocks()

    def copied(ids: Tensor) -> Tensor:
        return p(ids)

    for q in (p, copied):  # the same function object, and another one with the same bits
        found = evaluate(q, blocks, reference=p)
        assert found.kl == found.kl_se == found.kl_quantiles[1.0] == 0.0
        assert found.top1_agreement == 1.0 and found.top1_agreement_se == 0.0


def test_kl_ignores_a_constant_shift_and_is_never_negative() -> None:
    p, blocks = hashed(4), random_blocks()
    shifted = evaluate(lambda ids: p(ids) + 37.25, blocks, reference=p)
    assert 0.0 <= shifted.kl < 1e-7  # rounding of the shifted float32 logits
    tiny = evaluate(near(p, 5, 1e-4), blocks, reference=p)
    assert tiny.kl_values.min() >= 0.0
    # a small step is quadratic: half the step, a quarter of the KL; 5 % for the float32 terms at KL ~ 1e-8
    ratio = evaluate(near(p, 5, 2e-3), blocks, reference=p).kl / evaluate(near(p, 5, 1e-3), blocks, reference=p).kl
    assert ratio == pytest.approx(4.0, rel=0.05)


def test_a_reference_in_use_is_computed_once() -> None:
    calls = []
    p = hashed(6)

    def counted(ids: Tensor) -> Tensor:
        calls.append(len(ids))
        return p(ids)

    found = evaluate_language(
        {"a": counted, "b": hashed(7)}, random_blocks(5), reference=counted, batch_size=2, progress=False
    )
    assert calls == [2, 2, 1]
    assert list(found) == ["a", "b"] and found["a"].kl == 0.0 < found["b"].kl


def test_batch_size_does_not_change_a_bit() -> None:
    p, blocks = hashed(8), random_blocks(7)
    q = near(p, 9, 0.5)
    first, *others = (evaluate(q, blocks, reference=p, batch_size=size) for size in (1, 2, 3, 7, 100))
    for other in others:
        assert other == first
        assert np.array_equal(other.kl_values, first.kl_values)
        assert other.nll_blocks.totals == first.nll_blocks.totals


def test_batch_size_with_a_real_model(tiny_llama: torch.nn.Module) -> None:
    blocks = random_blocks(6, 20, vocabulary=256)
    base = model_logits(tiny_llama)
    results = [evaluate(lambda ids: base(ids) * 1.1, blocks, reference=base, batch_size=size) for size in (1, 2, 3)]
    for found in results[1:]:
        # matrix products may sum in another order at another batch size
        assert found.nll == pytest.approx(results[0].nll, rel=1e-5)
        assert found.kl == pytest.approx(results[0].kl, rel=1e-5, abs=1e-9)


def test_order_of_blocks_does_not_change_a_bit() -> None:
    p, blocks = hashed(10), random_blocks(20)
    q = near(p, 11, 0.5)
    shuffled = blocks[torch.randperm(20, generator=torch.Generator().manual_seed(1))]
    assert evaluate(q, shuffled, reference=p, batch_size=3) == evaluate(q, blocks, reference=p)


def test_first_token_of_a_block_is_context_only() -> None:
    p, blocks = hashed(12), random_blocks()

    def blind(ids: Tensor) -> Tensor:  # the last position predicts nothing that is there
        logits = p(ids).clone()
        logits[:, -1] = math.nan
        return logits

    assert evaluate(blind, blocks, reference=p) == evaluate(p, blocks, reference=blind)


def test_standard_errors_agree_with_the_bootstrap() -> None:
    p, blocks = hashed(13), random_blocks(150, 12)
    found = evaluate(near(p, 14, 0.6), blocks, reference=p)
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, 150, (2000, 150))
    kl = found.kl_values.reshape(150, 11).astype(np.float64).mean(1)[chosen].mean(1)
    nll = (np.array(found.nll_blocks.totals) / 11)[chosen].mean(1)
    assert found.kl_se == pytest.approx(kl.std(), rel=0.15)
    assert found.nll_se == pytest.approx(nll.std(), rel=0.15)
    assert found.perplexity_se == pytest.approx(np.exp(nll).std(), rel=0.15)


def test_paired_difference_between_two_candidates() -> None:
    p, blocks = hashed(15), random_blocks(60)
    found = evaluate_language({"a": p, "b": near(p, 16, 0.1)}, blocks, progress=False)
    difference = paired_difference(found["b"].nll_blocks, found["a"].nll_blocks)
    assert difference.value == pytest.approx(found["b"].nll - found["a"].nll, abs=1e-12)
    assert difference.se < found["a"].nll_se / 3


def test_words_ruled_out_by_the_reference() -> None:
    p, blocks = hashed(17), random_blocks(vocabulary=VOCABULARY - 2)

    def masked(ids: Tensor) -> Tensor:
        logits = p(ids).clone()
        logits[..., -2:] = -math.inf
        return logits

    both = evaluate(masked, blocks, reference=masked)
    assert both.kl == 0.0 and math.isfinite(both.nll)
    wide = evaluate(p, blocks, reference=masked)
    p_mass = p(blocks)[:, :-1].double().softmax(-1)[..., :-2].sum(-1)
    # KL(p restricted || p) = -log of the mass that p gives to what is left
    assert wide.kl == pytest.approx(float(-p_mass.log().mean()), rel=1e-5)
    narrow = evaluate(masked, blocks, reference=p)
    assert narrow.kl == math.inf and math.isnan(narrow.kl_se) and narrow.kl_quantiles[0.5] == math.inf


def test_low_precision_logits() -> None:
    p, blocks = hashed(18), random_blocks()
    found = evaluate(lambda ids: p(ids).bfloat16(), blocks, reference=p)
    exact = evaluate(lambda ids: p(ids).bfloat16().float(), blocks, reference=p)
    assert found == exact


def test_without_a_reference_there_is_no_kl() -> None:
    found = evaluate(hashed(19), random_blocks(1))
    assert all(map(math.isnan, (found.kl, found.kl_se, found.top1_agreement, found.nll_se, found.perplexity_se)))
    assert found.kl_quantiles == {} and found.kl_values.size == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["candidate", "reference"])
def test_logits_that_are_not_finite_name_their_model(bad: float, place: str) -> None:
    p = hashed(20)

    def broken(ids: Tensor) -> Tensor:
        logits = p(ids).clone()
        logits[-1, 3, 7] = bad
        return logits

    candidates = {"good": p, "rotten-q4": broken} if place == "candidate" else {"good": hashed(21)}
    with pytest.raises(CheckFailed, match="rotten-q4" if place == "candidate" else "reference"):
        evaluate_language(
            candidates, random_blocks(), reference=p if place == "candidate" else broken, batch_size=3, progress=False
        )


def test_bad_arguments_say_what_would_work() -> None:
    p, blocks = hashed(22), random_blocks()
    with pytest.raises(UsageError, match=r"small has a vocabulary of 50 tokens but large has 60"):
        evaluate_language({"small": p, "large": hashed(0, 60)}, blocks, progress=False)
    with pytest.raises(UsageError, match=r"reference has a vocabulary of 60 .* x has 50"):
        evaluate(p, blocks, reference=hashed(0, 60))
    with pytest.raises(UsageError, match="outside the vocabulary of x"):
        evaluate(lambda ids: p(ids)[..., :10], blocks)
    for wrong in (blocks[0], blocks[:0], blocks[:, :1], blocks.float()):
        with pytest.raises(UsageError, match="block_length=256"):
            evaluate(p, wrong)
    with pytest.raises(UsageError, match="batch_size 0"):
        evaluate(p, blocks, batch_size=0)
    with pytest.raises(UsageError, match="at least one candidate"):
        evaluate_language({}, blocks)
    with pytest.raises(UsageError, match="x gave logits of shape"):
        evaluate(lambda ids: p(ids)[0], blocks)


def test_model_logits_leaves_training_flags_alone(tiny_llama: torch.nn.Module) -> None:
    tiny_llama.train()
    frozen = next(m for m in tiny_llama.modules() if isinstance(m, torch.nn.Embedding))
    frozen.eval()
    seen = []
    handle = tiny_llama.register_forward_pre_hook(lambda *_: seen.append(any(m.training for m in tiny_llama.modules())))
    logits = model_logits(tiny_llama)(random_blocks(2, 5))
    handle.remove()
    assert seen == [False] and not logits.requires_grad
    assert tiny_llama.training and not frozen.training
    assert all(m.training for m in tiny_llama.modules() if m is not frozen)
    tiny_llama.eval()


def test_engine_logits_copies_each_row() -> None:
    p, blocks = hashed(23), random_blocks(5)
    buffer = np.empty((blocks.shape[1], VOCABULARY), np.float32)

    class Engine:
        def logits(self, ids: list[int]) -> np.ndarray:  # one buffer for all calls, as a C library has
            buffer[:] = p(torch.tensor([ids]))[0].numpy()
            return buffer

    for size in (1, 3):
        found = evaluate(engine_logits(Engine()), blocks, reference=p, batch_size=size)
        assert found.kl == 0.0 and found.top1_agreement == 1.0


def test_report_rows() -> None:
    from edgewright.measure import report as measure

    p = hashed(24)
    report = measure.Report("test")
    add_rows(report, evaluate_language({"q": near(p, 25, 0.3)}, random_blocks(), reference=p, progress=False))
    assert {"perplexity", "nll", "kl", "kl_p50", "kl_p99", "kl_p99.9", "kl_max", "top1_agreement"} <= {
        row.metric for row in report.rows
    }
    assert report.row("kl", "q").se > 0 and report.row("kl_p99", "q").se is None
    assert 1.0 < report.value("top1_agreement", "q") < 100.0 and report.row("kl", "q").n == 96
    alone = measure.Report("test")
    add_rows(alone, {"q": evaluate(p, random_blocks(1))})
    assert {row.metric for row in alone.rows} == {"perplexity", "nll", "tokens"} and alone.row("nll", "q").se is None


def test_results_compare_by_value() -> None:
    found = evaluate(hashed(26), random_blocks(), reference=hashed(27))
    assert dataclasses.replace(found) == found
    assert "kl_values" not in repr(found)


MEMORY = """
import torch
from edgewright.evaluation.language import evaluate_language
torch.set_num_threads(1)
V, T = 49152, 129
generator = torch.Generator().manual_seed(0)
def peak():  # VmHWM starts anew at exec; ru_maxrss would begin with the size of the parent
    return 1024 * int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])
def function(ids):
    return torch.rand(len(ids), ids.shape[1], V, generator=generator)
def other(ids):
    return function(ids)
blocks = torch.randint(0, V, (5, T))
one = 4 * T * V
evaluate_language({"q": other}, blocks[:1, :9], reference=function, progress=False)
before = peak()
found = evaluate_language({"q": other, "r": function}, blocks, reference=function, progress=False)
print(found["q"].tokens, (peak() - before) / one)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_the_logits_of_one_batch_and_slices() -> None:
    """The logits of one block, 129 x 49152, are 25 MB: peak growth is counted in those."""
    # a fixed threshold makes glibc give freed blocks back at once, so that the resident size is what is alive
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, env=environment)
    tokens, blocks_alive = done.stdout.split()
    assert int(tokens) == 5 * 128
    # reference and candidate of one batch, and slices of 2 MB; ten such blocks of logits passed through
    assert 1.0 < float(blocks_alive) < 3.0

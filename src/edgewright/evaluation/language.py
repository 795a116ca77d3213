"""How a language model does on held-out text, and how far it strayed from a reference: perplexity, KL, top-1 agreement.

Shapes: N blocks, B blocks in a batch, T tokens in a block, V vocabulary. The first token of a block is context only,
so each block scores T - 1 tokens. All numbers are in nats. With p the reference and q the candidate, both softmax of
logits z over V, and a = z - max(z), s = sum(exp(a)):

    nll       = log s_q - a_q[next token]
    KL(p||q)  = sum_v exp(a_p) (a_p - a_q) / s_p - (log s_p - log s_q)
    agreement = [argmax z_p == argmax z_q]

Elementwise terms are float32, every sum over V is float64: the normalisers, which shift a whole token, do not round,
and the rounding of single terms is independent and averages out. Work runs over slices of positions inside one block:
nothing of size [T, V] is made beside the logits themselves, and equal logits give equal bits at any batch size and in
any order of the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from edgewright.errors import CheckFailed, UsageError
from edgewright.evaluation.statistics import ClusterMean, ExactQuantiles
from edgewright.measure.progress import ProgressBar

LogitsFunction = Callable[[Tensor], Tensor]
"""Token ids, int64 [B, T] -> logits, float [B, T, V]."""

KL_QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
SLICE_ELEMENTS = 2**19  # positions x V at work at once: temporaries of 2 MB stay in the cache (2x faster than 8 MB)


@dataclass(frozen=True)
class LanguageMetrics:
    """Results of one candidate, in nats per token; `top1_agreement` is a share in [0, 1].

    Standard errors take blocks as clusters and are nan with a single block. KL and agreement are nan without a
    reference. `kl_quantiles` maps a probability to the KL that this share of tokens does not exceed (1.0: maximum).
    """

    perplexity: float
    perplexity_se: float
    nll: float
    nll_se: float
    kl: float
    kl_se: float
    kl_quantiles: dict[float, float]
    top1_agreement: float
    top1_agreement_se: float
    tokens: int
    blocks: int
    nll_blocks: ClusterMean = field(repr=False, compare=False)  # for paired_difference between two candidates
    kl_blocks: ClusterMean = field(repr=False, compare=False)
    kl_values: np.ndarray = field(repr=False, compare=False)  # float32 [tokens], empty without a reference


class LogitsEngine(Protocol):
    """The part of a runtime engine that evaluation needs."""

    def logits(self, ids: list[int]) -> np.ndarray: ...  # float32 [T, V]


def model_logits(model: nn.Module) -> LogitsFunction:
    """Logits of a transformers causal language model, in evaluation mode and without gradients.

    The training flags of all its modules are as before after each call.
    """

    def logits(ids: Tensor) -> Tensor:
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with torch.no_grad():
                return model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits
        finally:
            for module in training:
                module.training = True

    return logits


def trained_positions(model: nn.Module) -> int | None:
    """The longest text in tokens that a language model was trained for; None where its configuration does not say."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_positions(model: nn.Module, block_length: int, name: str = "the model") -> None:
    """Raise UsageError for blocks beyond the positions that the model was trained for: figures would mean nothing."""
    limit = trained_positions(model)
    if limit is not None and block_length > limit:
        raise UsageError(
            f"blocks of {block_length} tokens are longer than the {limit} positions that {name} was trained for; "
            f"block_length={limit} is the most"
        )


def engine_logits(engine: LogitsEngine) -> LogitsFunction:
    """Logits of an exported file, run block by block in its own runtime."""

    def logits(ids: Tensor) -> Tensor:
        out = None
        for row, tokens in enumerate(ids.tolist()):
            one = torch.from_numpy(np.asarray(engine.logits(tokens), dtype=np.float32))
            if len(ids) == 1:
                return one.unsqueeze(0)
            if out is None:
                out = torch.empty(len(ids), *one.shape)
            out[row] = one  # copied at once: an engine may reuse its buffer
        assert out is not None
        return out

    return logits


def evaluate_language(
    candidates: Mapping[str, LogitsFunction],
    blocks: Tensor,
    *,
    reference: LogitsFunction | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> dict[str, LanguageMetrics]:
    """Score every candidate on the same blocks, beside the reference if there is one.

    The reference is computed once a batch; a candidate that is the same function object reuses its logits. Alive at any
    time: the logits of one batch of the reference and of one candidate, and slices of SLICE_ELEMENTS.

    Args:
        candidates: name -> function from ids int64 [B, T] to logits [B, T, V]; see `model_logits`, `engine_logits`.
        blocks: int64 [N, T].
        reference: the same of the model that the others are compared with; None gives no divergence.
        batch_size: blocks computed at once.
        progress: show a progress bar.

    Returns:
        Name -> perplexity, divergence in nats a token and agreement, each with its standard error over blocks.

    Raises:
        UsageError: blocks of the wrong shape, or two vocabulary sizes.
        CheckFailed: logits that are not finite.
    """
    _check_arguments(candidates, blocks, batch_size)
    reference_name = next((name for name, function in candidates.items() if function is reference), "reference")
    tallies = {name: _Tally() for name in candidates}
    known: dict[str, int] = {}  # vocabulary size by name: all must agree
    with ProgressBar("evaluating", blocks.shape[0] * len(candidates), shown=progress) as bar:
        for ids in blocks.split(batch_size):
            base = None if reference is None else _run(reference, reference_name, ids, known)
            for name, function in candidates.items():
                scored = base if base is not None and function is reference else _run(function, name, ids, known)
                for row, block in enumerate(scored):
                    tallies[name].add(block, ids[row], None if base is None else base[row])
                del scored, block  # free one model's logits before the next makes its own
                bar.advance(len(ids))
            del base
    return {name: tally.metrics() for name, tally in tallies.items()}


def add_rows(report: Any, results: Mapping[str, LanguageMetrics]) -> None:
    """Add the results to a `measure.Report`, one subject a candidate; agreement in per cent, what is nan left out."""
    for subject, m in results.items():
        rows = [("perplexity", m.perplexity, m.perplexity_se, ""), ("nll", m.nll, m.nll_se, "nats/token")]
        if m.kl_quantiles:
            rows.append(("kl", m.kl, m.kl_se, "nats/token"))
            rows += [(f"kl_{_label(p)}", q, math.nan, "nats/token") for p, q in m.kl_quantiles.items()]
            rows.append(("top1_agreement", 100 * m.top1_agreement, 100 * m.top1_agreement_se, "%"))
        for metric, value, se, unit in rows:
            report.add(metric, value, subject=subject, se=None if math.isnan(se) else se, n=m.tokens, unit=unit)
        report.add("tokens", m.tokens, subject=subject)


def _label(probability: float) -> str:
    return "max" if probability == 1.0 else f"p{100 * probability:g}"  # kl_p50, kl_p99.9, kl_max


class _Tally:
    """Running results of one candidate: two numbers a block and metric, and every token's KL."""

    def __init__(self) -> None:
        self.nll, self.kl, self.agree, self.kl_values = ClusterMean(), ClusterMean(), ClusterMean(), ExactQuantiles()

    def add(self, block: _Block, ids: Tensor, base: _Block | None) -> None:
        self.nll.add(_nll(block.logits, block.peaks, ids[1:]).cpu().numpy())
        if base is not None:
            kl = _kl(base.logits, base.peaks, block.logits, block.peaks).cpu().numpy()
            self.kl.add(kl)
            self.kl_values.add(kl)
            self.agree.add((base.peaks.index.cpu() == block.peaks.index.cpu()).numpy())

    def metrics(self) -> LanguageMetrics:
        nll = self.nll.estimate()
        perplexity = math.exp(nll.value) if nll.value < 700 else math.inf
        compared = bool(self.kl.counts)
        kl, agree = (self.kl.estimate(), self.agree.estimate()) if compared else (None, None)
        return LanguageMetrics(
            perplexity=perplexity,
            perplexity_se=perplexity * nll.se,  # delta method: d exp(x) = exp(x) dx
            nll=nll.value,
            nll_se=nll.se,
            kl=kl.value if kl else math.nan,
            kl_se=kl.se if kl else math.nan,
            kl_quantiles=self.kl_values.quantile(KL_QUANTILES) if compared else {},
            top1_agreement=agree.value if agree else math.nan,
            top1_agreement_se=agree.se if agree else math.nan,
            tokens=nll.n,
            blocks=nll.clusters,
            nll_blocks=self.nll,
            kl_blocks=self.kl,
            kl_values=self.kl_values.values(),
        )


@dataclass(frozen=True)
class _Peaks:
    """What turns the logits of S positions into log-probabilities, each [S]: max z, log sum exp(z - max z), argmax."""

    top: Tensor  # float32
    log_sum: Tensor  # float64
    index: Tensor  # int64


@dataclass(frozen=True)
class _Block:
    """One block run through one model."""

    logits: Tensor  # [T - 1, V]: the last position predicts a token that is not there
    peaks: _Peaks


def _run(function: LogitsFunction, name: str, ids: Tensor, known: dict[str, int]) -> list[_Block]:
    """The blocks ids [B, T] through one model, checked: shape, vocabulary, finite values."""
    logits = function(ids).detach()
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise UsageError(
            f"{name} gave logits of shape {tuple(logits.shape)} for token ids of shape {tuple(ids.shape)}: "
            f"evaluate_language needs ({ids.shape[0]}, {ids.shape[1]}, vocabulary)"
        )
    vocabulary = known.setdefault(name, logits.shape[-1])
    other = next(iter(known))
    if known[other] != vocabulary:
        raise UsageError(
            f"{other} has a vocabulary of {known[other]} tokens but {name} has {vocabulary}: "
            "only models with one tokeniser can be compared token by token"
        )
    if int(ids.max()) >= vocabulary:
        raise UsageError(f"token id {int(ids.max())} is outside the vocabulary of {name} ({vocabulary} tokens)")
    if logits.device.type == "mps":
        logits = logits.cpu()  # no float64 there
    return [_Block(row[:-1], _peaks(row[:-1], name)) for row in logits]


def _slices(positions: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, SLICE_ELEMENTS // vocabulary)
    return (slice(start, min(start + step, positions)) for start in range(0, positions, step))


def _peaks(logits: Tensor, name: str) -> _Peaks:
    """Logits [S, V] of one block; -inf marks a word that the model rules out."""
    tops, log_sums, indices = [], [], []
    for part in _slices(*logits.shape):
        top, index = logits[part].max(-1, keepdim=True)
        if not torch.isfinite(top).all():
            raise CheckFailed(
                f"{name} gave logits that are not finite (NaN or infinite), so no number measured on it would mean "
                "anything: look for NaN in its weights and for overflow in its activations"
            )
        exponentials = (logits[part].float() - top.float()).exp_()
        tops.append(top.float().squeeze(-1))
        log_sums.append(exponentials.sum(-1, dtype=torch.float64).log())
        indices.append(index.squeeze(-1))
    return _Peaks(torch.cat(tops), torch.cat(log_sums), torch.cat(indices))


def _nll(logits: Tensor, peaks: _Peaks, targets: Tensor) -> Tensor:
    """Negative log-likelihood of targets [S] under logits [S, V], float64 [S]."""
    chosen = logits.gather(-1, targets.to(logits.device).unsqueeze(-1)).squeeze(-1)
    return peaks.log_sum - (chosen.float() - peaks.top).double()


def _kl(base: Tensor, base_peaks: _Peaks, logits: Tensor, peaks: _Peaks) -> Tensor:
    """KL(softmax base || softmax logits) of [S, V] logits, float64 [S]."""
    found = []
    for part in _slices(*logits.shape):
        a_p = base[part].float() - base_peaks.top[part, None]
        weight = a_p.exp()
        difference = a_p.to(logits.device) - (logits[part].float() - peaks.top[part, None])
        weight = weight.to(logits.device)
        if not torch.isfinite(difference).all():  # a word that the reference rules out adds nothing, whatever q says
            difference.masked_fill_(weight == 0, 0.0)
        log_sum = base_peaks.log_sum[part].to(logits.device)
        cross = difference.mul_(weight).sum(-1, dtype=torch.float64) / log_sum.exp()
        found.append(cross - (log_sum - peaks.log_sum[part]))
    return torch.cat(found).clamp_min_(0.0)  # rounding of single terms can leave -1e-8 where p and q are all but equal


def _check_arguments(candidates: Mapping[str, LogitsFunction], blocks: Tensor, batch_size: int) -> None:
    if not candidates:
        raise UsageError("evaluate_language needs at least one candidate: evaluate_language({'model': ...}, blocks)")
    if blocks.ndim != 2 or blocks.shape[0] < 1 or blocks.shape[1] < 2 or blocks.is_floating_point():
        raise UsageError(
            f"blocks must be token ids of shape [blocks >= 1, length >= 2], got {blocks.dtype} {tuple(blocks.shape)}; "
            "block_length=256 is usual"
        )
    if batch_size < 1:
        raise UsageError(f"batch_size {batch_size} is not positive: 1 uses the least memory")

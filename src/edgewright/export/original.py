"""How far a written file is from the model as it was before anything was quantised.

The other checks of an exporter ask whether the file is the quantised model. This one asks what quantising has cost, so
that a model broken before its export cannot pass by agreeing with itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import CheckFailed

Original = nn.Module | Callable[[Tensor], Tensor]
NEGLIGIBLE = 1e-3  # nats: no warning below, where a model's answers hardly depend on the text
FEWEST = 16  # positions: the mean of fewer distributions is too close to each of them


def original_logits(original: Original, ids: Sequence[int]) -> Tensor:
    """float32 [T, V] of a causal language model of transformers, or of a function from ids [1, T] to [1, T, V]."""
    if isinstance(original, nn.Module):
        from edgewright.evaluation.language import model_logits

        original = model_logits(original)
    with torch.no_grad():
        return original(torch.tensor([list(ids)]))[0].float().cpu()


def language_distance(original: Original, ids: Sequence[int], logits: Tensor, name: str) -> dict[str, Any]:
    """What `checks["original"]` holds: divergence and top-1 agreement of a file's logits [T, V] with the original's.

    kl_without_context: divergence of the best fixed distribution, the mean of the original's own, which looks at no
    text. A file that is further away has lost all that the original knows about this text; that is a UserWarning and
    the entry "warning", not an error: at one or two bits it may be the honest truth.

    Args:
        original: the float model, or its logits as a function of ids [1, T].
        ids: the tokens.
        logits: the file's, [T, V].
        name: of the file, for the warning.
    """
    theirs = original_logits(original, ids)[:, : logits.shape[1]].double().log_softmax(-1)
    ours = logits.double().log_softmax(-1)
    mean = theirs.exp().mean(0).clamp_min(torch.finfo(torch.float64).tiny).log()
    kl, blind = (_divergence(theirs, other) for other in (ours, mean.expand_as(theirs)))
    agreement = float((theirs.argmax(-1) == ours.argmax(-1)).double().mean())
    found: dict[str, Any] = {
        "kl": float(f"{kl:.4g}"),
        "top1_agreement": round(agreement, 4),
        "kl_without_context": float(f"{blind:.4g}"),
    }
    if not kl < max(blind, NEGLIGIBLE) and len(theirs) >= FEWEST:
        found["warning"] = (
            f"{name} is further from the original float model (KL {kl:.3g}) than a guess without looking at the text "
            f"({blind:.3g}); it chooses the original's token at {agreement:.0%} of {len(theirs)} places"
        )
        warnings.warn(found["warning"], stacklevel=3)
    return found


def comparison(original: Original, name: str, plain: bool) -> Callable[[list[int], Tensor], dict[str, Any]]:
    """`language_distance` of the file `name`. plain: no weight was quantised, so a file that far off is CheckFailed."""

    def compare(ids: list[int], logits: Tensor) -> dict[str, Any]:
        with warnings.catch_warnings(record=plain):
            found = language_distance(original, ids, logits, name)
        if plain and "warning" in found:
            raise CheckFailed(f"{found['warning']}. No weight was quantised, so the file should equal it: not kept")
        return found

    return compare


def output_distance(original: Sequence[Tensor], outputs: Sequence[Tensor], name: str) -> dict[str, Any]:
    """The same for a program of any outputs: root mean square of the difference over the spread of the original's.

    A value of 1 or more is no better than answering the mean of the original's outputs.
    """
    worst = 0.0
    for theirs, ours in zip(original, outputs, strict=True):
        theirs, ours = theirs.double(), ours.double()
        finite = torch.isfinite(theirs)
        if not finite.any():
            continue
        spread = (theirs - theirs[finite].mean())[finite].square().mean().sqrt().clamp_min(1e-12)
        worst = max(worst, float((ours - theirs)[finite].square().mean().sqrt() / spread))
    found: dict[str, Any] = {"relative_error": float(f"{worst:.3g}")}
    if not worst < 1:
        found["warning"] = f"{name} is further from the original model ({worst:.3g}) than its outputs' mean is (1)"
        warnings.warn(found["warning"], stacklevel=3)
    return found


def _divergence(p: Tensor, q: Tensor) -> float:
    """Mean Kullback-Leibler divergence in nats of log-probabilities [T, V]; -inf on both sides counts nothing."""
    terms = torch.where(p.isneginf(), torch.zeros_like(p), p.exp() * (p - q))
    return float(terms.sum(-1).mean())

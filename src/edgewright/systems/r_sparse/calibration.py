"""Thresholds for R-Sparse: histograms of every layer's scores over calibration text, and their quantiles.

A bin is the exponent and the first five bits of the mantissa of a float32: 32 bins an octave from 2^-40 to 2^24, so one
pass serves every sparsity. The first token of a sequence is left out: its activations are outliers, and it stays dense.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import CheckFailed, UsageError
from edgewright.io.packed import PackedLinear
from edgewright.measure.progress import ProgressBar
from edgewright.systems.r_sparse.plan import RSparseConfig, score_scales, target_layers

BINS = 2048
SHIFT = 18  # mantissa bits left out of a bin's number
LOWEST = (127 - 40) << (23 - SHIFT)  # the bin of 2^-40
LEAST_TOKENS = 64
KEEP_ALL = -1.0  # below every score, of zero inputs too


@dataclass(frozen=True)
class Calibration:
    """Histograms, int64 [BINS] by layer, of `tokens` tokens whose ids hash to `text`; scores as `score` says."""

    histograms: Mapping[str, Tensor]
    tokens: int
    text: str
    score: str

    def threshold(self, name: str, quantile: float) -> float:
        """The score that this share of a layer's inputs does not exceed: -1 at 0, infinity at 1.

        Linear between the edges of a bin. Raises UsageError for a layer that was not measured.
        """
        if name not in self.histograms:
            raise UsageError(f"{name} was not calibrated; calibrate(model, batches, config) with the same targets")
        if quantile <= 0.0:
            return KEEP_ALL
        if quantile >= 1.0:
            return math.inf
        counts = self.histograms[name].double()
        total = counts.cumsum(0)
        wanted = quantile * total[-1]
        index = int(torch.searchsorted(total, wanted))
        inside = float((wanted - (total[index] - counts[index])) / counts[index])
        low, high = _edges()[index : index + 2].tolist()
        return float(low + inside * (high - low))


def histogram(scores: Tensor) -> Tensor:
    """int64 [BINS] of scores >= 0 of any shape."""
    bits = scores.detach().float().contiguous().view(torch.int32).flatten()
    return torch.bincount((bits >> SHIFT).sub_(LOWEST).clamp_(0, BINS - 1), minlength=BINS).cpu()


def calibrate(
    model: nn.Module, batches: Iterable[Tensor], config: RSparseConfig, *, progress: bool = False
) -> Calibration:
    """Scores of all target layers over token ids [B, T], from one dense pass of the model.

    Raises UsageError for text of fewer than 64 tokens, CheckFailed for activations that are not finite and for a layer
    that never ran.
    """
    layers = target_layers(model, config)
    tally = Tally(score_scales(layers, config))
    batches = list(batches)
    check_text(batches)
    device = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), watched(layers, tally), ProgressBar("calibrating", len(batches), shown=progress) as bar:
            for batch in batches:
                # The decoder without its head where there is one: logits are not needed.
                getattr(model, "model", model)(input_ids=batch.to(device), use_cache=False)
                bar.advance()
    finally:
        for module in training:
            module.training = True
    return tally.result(batches, config)


def check_text(batches: list[Tensor]) -> None:
    """Raise UsageError for what is no calibration text."""
    if any(batch.ndim != 2 or batch.shape[1] < 2 or batch.is_floating_point() for batch in batches):
        raise UsageError("calibration batches are token ids of shape [sequences, length >= 2]; token_blocks makes them")
    tokens = sum(batch.numel() for batch in batches)
    if tokens < LEAST_TOKENS:
        raise UsageError(
            f"{tokens} tokens of calibration text are too few for a threshold; pass at least {LEAST_TOKENS}"
        )


def text_hash(batches: Iterable[Tensor]) -> str:
    """SHA-256 of the token ids in order."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch.to(torch.int64).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Tally:
    """Running histograms."""

    def __init__(self, scales: Mapping[str, Tensor]) -> None:
        self.scales = scales
        self.histograms: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Inputs [B, T, n] of a layer."""
        scores = x[..., 1:, :].float().abs() * self.scales[name]
        if not torch.isfinite(scores).all():
            raise CheckFailed(f"the input of {name} holds NaN or infinity; no threshold can be taken from it")
        counts = histogram(scores)
        self.histograms[name] = self.histograms[name] + counts if name in self.histograms else counts

    def result(self, batches: list[Tensor], config: RSparseConfig) -> Calibration:
        if silent := [name for name in self.scales if name not in self.histograms]:
            raise CheckFailed(f"{silent[0]} never ran during calibration; leave it out of targets={config.targets!r}")
        tokens = sum(batch.numel() - len(batch) for batch in batches)
        ordered = {name: self.histograms[name] for name in self.scales}
        return Calibration(ordered, tokens, text_hash(batches), config.score)


@contextmanager
def watched(layers: Mapping[str, Any], tally: Tally) -> Iterator[None]:
    """Hooks on the layers that feed the tally, gone afterwards."""

    def hook(name: str) -> Any:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if isinstance(layer, PackedLinear) and layer.input_quantizer is not None:
                x = layer.input_quantizer(x)
            tally.add(name, x)

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _edges() -> Tensor:
    """Lower edges of the bins and the upper edge of the last, float32 [BINS + 1]; the first bin reaches down to 0."""
    numbers = torch.arange(LOWEST, LOWEST + BINS + 1, dtype=torch.int32) << SHIFT
    edges = numbers.view(torch.float32).clone()
    edges[0] = 0.0
    return edges

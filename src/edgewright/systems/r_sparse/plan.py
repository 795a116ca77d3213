"""What R-Sparse leaves out: its configuration, which layers it takes, plans of (sparsity, rho) by name, thresholds.

Thresholds are quantiles of histograms of every layer's scores over calibration text. A bin is the exponent and the
first five bits of the mantissa of a float32: 32 bins an octave from 2^-40 to 2^24, so one pass serves every sparsity.
The first token of a sequence is left out: its activations are outliers, and it stays dense.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.checks import check, number, one_of
from edgewright.errors import CheckFailed, Unsupported, UsageError
from edgewright.io.hashing import sha256
from edgewright.io.packed import PackedLinear
from edgewright.measure.progress import ProgressBar
from edgewright.systems.r_sparse.layer import LAYER_PATHS, RSparseLinear, column_norms
from edgewright.training.snapshot import preserved_modes

TARGETS = r"(q|k|v|o|gate|up|down)_proj"
BINS = 2048
SHIFT = 18  # mantissa bits left out of a bin's number
LOWEST = (127 - 40) << (23 - SHIFT)  # the bin of 2^-40
LEAST_TOKENS = 64
KEEP_ALL = -1.0  # below every score, of zero inputs too
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class RSparseConfig:
    """What is left out, and of which layers.

    Args:
        sparsity: share of weight reads left out, in [0, 1); half, as in most of the paper's tables.
        rho: in [0, 1], the part of what is read that goes to kept channels; the rest goes to the low-rank path, so 1 is
            pure activation sparsity and 0 pure low rank.
        score: "weighted" (|x| times the column norm, as in the official code) or "magnitude" (|x|, as in
            the paper).
        targets: regular expression searched in the last part of the layers' names.
        dense_prefill: prompts of several tokens stay dense, single tokens are sparse.
        share_mask: layers with the same input use one score, its scale the root of their summed squared norms.
        path: of `RSparseLinear`.

    Raises:
        UsageError: a value outside these.
    """

    sparsity: float = 0.5
    rho: float = 1.0
    score: str = "weighted"
    targets: str = TARGETS
    dense_prefill: bool = True
    share_mask: bool = False
    path: str = "auto"

    def __post_init__(self) -> None:
        LayerPlan(self.sparsity, self.rho)
        check("score", self.score, one_of("weighted", "magnitude"))
        check("path", self.path, one_of(*LAYER_PATHS))
        try:
            re.compile(self.targets)
        except re.error as error:
            raise UsageError(f"targets={self.targets!r} is no regular expression ({error}); e.g. {TARGETS!r}") from None


@dataclass(frozen=True)
class LayerPlan:
    """One layer's share of reads left out, and how what is read divides between channels (rho) and low rank."""

    sparsity: float
    rho: float = 1.0

    def __post_init__(self) -> None:
        check("sparsity", self.sparsity, number(0, below=1), "0.5 reads half of the weights")
        check("rho", self.rho, number(0, 1), "1 keeps channels only, 0.9 gives a tenth to low rank")

    @property
    def quantile(self) -> float:
        """The share of channels that is left out."""
        return 1.0 - (1.0 - self.sparsity) * self.rho


Plan = Mapping[str, LayerPlan]


def target_layers(model: nn.Module, config: RSparseConfig) -> dict[str, Any]:
    """Linear and packed layers whose name matches, in the model's order.

    Raises UsageError for a model that is sparse already or has none, Unsupported for layers that cannot be taken.
    """
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, RSparseLinear):
            raise UsageError(f"{name} is an R-Sparse layer already; call remove_rsparse(model) first")
        if not re.search(config.targets, name.rpartition(".")[2]):
            continue
        if type(module) in (PackedLinear, nn.Linear):
            if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
                raise Unsupported(f"{name} is on the meta device, without weights; load the model first")
            layers[name] = module
        elif isinstance(getattr(module, "weight", None), Tensor):
            raise Unsupported(
                f"{name} is a {type(module).__name__}; R-Sparse takes nn.Linear and packed layers: call "
                "convert_(model) after quantisation-aware training, or merge adapters first"
            )
    if not layers:
        raise UsageError(f"no linear layer's name matches targets={config.targets!r}; e.g. {TARGETS!r}")
    return layers


def uniform_plan(names: Iterable[str], config: RSparseConfig) -> dict[str, LayerPlan]:
    """The configuration's sparsity and rho for every layer."""
    return {name: LayerPlan(config.sparsity, config.rho) for name in names}


def default_plan(names: Iterable[str], config: RSparseConfig) -> dict[str, LayerPlan]:
    """Low rank where the published searched recipe has most of it: the attention of the first block.

    Our choice: rho 0.2 for q and k, 0.85 for v and o of block 0, 1 elsewhere.
    """
    special = {"q_proj": 0.2, "k_proj": 0.2, "v_proj": 0.85, "o_proj": 0.85}
    first = re.compile(r"(^|\.)layers\.0\.")
    return {
        name: LayerPlan(config.sparsity, special.get(name.rpartition(".")[2], 1.0) if first.search(name) else 1.0)
        for name in names
    }


def mean_sparsity(plan: Plan, sizes: Mapping[str, int]) -> float:
    """Parameter-weighted mean over the layers of the plan; embeddings and head are not part of it."""
    return sum(plan[name].sparsity * sizes[name] for name in plan) / sum(sizes[name] for name in plan)


def layer_sizes(layers: Mapping[str, Any]) -> dict[str, int]:
    """Weights of each layer."""
    return {name: layer.in_features * layer.out_features for name, layer in layers.items()}


def score_scales(layers: Mapping[str, Any], config: RSparseConfig) -> dict[str, Tensor]:
    """What |x| is multiplied with, float32 [n] by layer."""
    if config.score == "magnitude":
        return {name: torch.ones(layer.in_features, device=layer.weight.device) for name, layer in layers.items()}
    norms = {name: column_norms(layer) for name, layer in layers.items()}
    if not config.share_mask:
        return norms
    shared = dict(norms)
    for name in norms:
        parent, _, child = name.rpartition(".")
        kin = next((group for group in SAME_INPUT if child in group), (child,))
        members = [norms[key] for part in kin if (key := f"{parent}.{part}" if parent else part) in norms]
        shared[name] = torch.stack(members).square().sum(0).sqrt()
    return shared


# -- calibration -------------------------------------------------------------------------------------------------------


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
        rank = quantile * total[-1]
        index = int(torch.searchsorted(total, rank))
        inside = float((rank - (total[index] - counts[index])) / counts[index])
        low, high = _edges()[index : index + 2].tolist()
        return float(low + inside * (high - low))


def histogram(scores: Tensor) -> Tensor:
    """int64 [BINS] of scores >= 0 of any shape."""
    bits = scores.detach().float().contiguous().view(torch.int32).flatten()
    return torch.bincount((bits >> SHIFT).sub_(LOWEST).clamp_(0, BINS - 1), minlength=BINS).cpu()


def calibrate(
    model: nn.Module, batches: Iterable[Tensor], config: RSparseConfig, *, progress: bool = False
) -> Calibration:
    """Scores of all target layers, from one dense pass of the model.

    Args:
        model: dense.
        batches: token ids, int64 [B, T] each; the first of every row is left out.
        config: layers and score.
        progress: show a bar.

    Returns:
        Histograms, from which the threshold of any sparsity can be read.

    Raises:
        UsageError: fewer than 64 tokens, or no layer that fits.
        CheckFailed: activations that are not finite, or a layer that never ran.
    """
    layers = target_layers(model, config)
    tally = Tally(score_scales(layers, config))
    batches = list(batches)
    check_text(batches)
    device = next(model.parameters()).device
    bar = ProgressBar("calibrating", len(batches), shown=progress)
    with torch.no_grad(), preserved_modes(model, False), watched(layers, tally), bar:
        for batch in batches:
            # The decoder without its head where there is one: logits are not needed.
            getattr(model, "model", model)(input_ids=batch.to(device), use_cache=False)
            bar.advance()
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
    return sha256(*(batch.to(torch.int64) for batch in batches))


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

"""What R-Sparse does to each layer: its configuration, which layers it takes, and plans of (sparsity, rho) by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import Unsupported, UsageError
from edgewright.io.packed import PackedLinear
from edgewright.systems.r_sparse.layer import LAYER_PATHS, RSparseLinear, column_norms

SCORES = ("weighted", "magnitude")
TARGETS = r"(q|k|v|o|gate|up|down)_proj"
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class RSparseConfig:
    """sparsity: share of weight reads left out, in [0, 1). rho in [0, 1]: the part of what is read that goes to kept
    channels; the rest goes to the low-rank path, so 1 is pure activation sparsity and 0 pure low rank.

    score: "weighted" (|x| times the column norm) or "magnitude" (|x|, the paper's formula). targets: regular expression
    searched in the layers' names. dense_prefill: prompts of several tokens stay dense, single tokens are sparse.
    share_mask: layers with the same input use one score, its scale the root of their summed squared norms.
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
        if self.score not in SCORES:
            raise UsageError(f"score={self.score!r} is unknown; choose one of {', '.join(SCORES)}")
        if self.path not in LAYER_PATHS:
            raise UsageError(f"path={self.path!r} is unknown; choose one of {', '.join(LAYER_PATHS)}")
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
        if not 0.0 <= self.sparsity < 1.0:
            raise UsageError(f"sparsity={self.sparsity} is outside [0, 1); 0.5 reads half of the weights")
        if not 0.0 <= self.rho <= 1.0:
            raise UsageError(f"rho={self.rho} is outside [0, 1]; 1 keeps channels only, 0.9 gives a tenth to low rank")

    @property
    def quantile(self) -> float:
        """The share of channels that is left out."""
        return 1.0 - (1.0 - self.sparsity) * self.rho


Plan = Mapping[str, LayerPlan]


def target_layers(model: nn.Module, config: RSparseConfig) -> dict[str, Any]:
    """Linear and packed layers whose name matches, in the model's order.

    Raises UsageError for a model that is sparse already or has none, Unsupported for layers that cannot be taken.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, RSparseLinear):
            raise UsageError(f"{name} is an R-Sparse layer already; call remove_rsparse(model) first")
        if not re.search(config.targets, name.rpartition(".")[2]):
            continue
        if type(module) in (PackedLinear, nn.Linear):
            if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
                raise Unsupported(f"{name} is on the meta device, without weights; load the model first")
            found[name] = module
        elif isinstance(getattr(module, "weight", None), Tensor):
            raise Unsupported(
                f"{name} is a {type(module).__name__}; R-Sparse takes nn.Linear and packed layers: call "
                "convert_(model) after quantisation-aware training, or merge adapters first"
            )
    if not found:
        raise UsageError(f"no linear layer's name matches targets={config.targets!r}; e.g. {TARGETS!r}")
    return found


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

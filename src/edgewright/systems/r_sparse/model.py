"""R-Sparse (arXiv 2504.19449): linear layers that read half of their weights, chosen by the size of each input.

    config = RSparseConfig(sparsity=0.5)
    stats = calibrate(model, batches, config)       # thresholds, from one dense pass over text
    apply_rsparse(model, config, stats)             # in place; prompts stay dense, single tokens take the kernel
    evaluate(model, blocks).perplexity, model_traffic(model).ratio

Embeddings and the output head are left alone and are not part of any sparsity named here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from edgewright.checks import check, number
from edgewright.errors import UsageError
from edgewright.evaluation.language import evaluate_language, model_logits
from edgewright.io.packed import PackedEmbedding, PackedLinear
from edgewright.measure.progress import ProgressBar
from edgewright.systems.r_sparse.layer import Factors, RSparseLinear, budget, by_output_
from edgewright.systems.r_sparse.plan import (
    Calibration,
    LayerPlan,
    Plan,
    RSparseConfig,
    score_scales,
    target_layers,
    uniform_plan,
)

if TYPE_CHECKING:
    from edgewright.evaluation.language import LanguageMetrics, LogitsFunction


def apply_rsparse(
    model: nn.Module,
    config: RSparseConfig,
    stats: Calibration,
    plan: Plan | None = None,
    *,
    factors: Factors | None = None,
    progress: bool = False,
) -> nn.Module:
    """Replace the target layers in place by `RSparseLinear`.

    Args:
        model: dense, float or packed.
        config: layers, score and how prompts are read.
        stats: of `calibrate`, for the thresholds.
        plan: sparsity and rho of each layer; without it every layer has the configuration's.
        factors: where singular value decompositions are kept.
        progress: show a bar.

    Returns:
        The model.

    Raises:
        UsageError: a model that is sparse already, a plan that does not fit, or a layer that would read nothing.
        Unsupported: layers that cannot be taken.
    """
    layers = target_layers(model, config)
    if stats.score != config.score:
        raise UsageError(f"the calibration has {stats.score} scores, the configuration asks for {config.score}")
    plan = uniform_plan(layers, config) if plan is None else plan
    if set(plan) != set(layers):
        odd = sorted(set(plan) ^ set(layers))
        raise UsageError(f"the plan does not fit the model: {odd[0]} is in one of them only")
    scales = score_scales(layers, config)
    for name in layers:  # everything that can fail comes before the first layer is replaced
        stats.threshold(name, plan[name].quantile)
        _budget(name, layers[name], plan[name])
    factors = factors or Factors()
    with ProgressBar("decomposing", len(layers), shown=progress) as bar:
        for name, layer in layers.items():
            factors.get(layer, _budget(name, layer, plan[name]))
            bar.advance()
    for name, layer in layers.items():
        sparse = RSparseLinear(
            layer,
            threshold=0.0,
            scale=scales[name],
            dense_tokens=None if config.dense_prefill else 1,
            path=config.path,
        )
        sparse.training = layer.training
        model.set_submodule(name, sparse)
    apply_plan(model, stats, plan, factors)
    return model


def apply_plan(model: nn.Module, stats: Calibration, plan: Plan, factors: Factors) -> None:
    """Give the sparse layers of a model another sparsity and rho."""
    layers = sparse_layers(model)
    for name, chosen in plan.items():
        layer = layers[name]
        rank = _budget(name, layer, chosen)
        layer.set(stats.threshold(name, chosen.quantile), *factors.get(layer.inner, rank))


def remove_rsparse(model: nn.Module) -> nn.Module:
    """Put the dense layers back in place.

    Args:
        model: sparse, or dense, which is left as it is.

    Returns:
        The model, its weights in their ordinary layout.
    """
    for name, layer in sparse_layers(model).items():
        by_output_(layer.inner)
        model.set_submodule(name, layer.inner)
    return model


def sparse_layers(model: nn.Module) -> dict[str, RSparseLinear]:
    """The R-Sparse layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RSparseLinear)}


def some_sparse_layers(model: nn.Module) -> dict[str, RSparseLinear]:
    """The same. Raises UsageError where there are none."""
    if not (layers := sparse_layers(model)):
        raise UsageError("the model has no R-Sparse layer; call apply_rsparse(model, config, stats) first")
    return layers


def _budget(name: str, layer: Any, chosen: LayerPlan) -> int:
    kept, rank = budget(layer.out_features, layer.in_features, chosen.sparsity, chosen.rho)
    if rank == 0 and kept * layer.in_features < 1:
        raise UsageError(
            f"{name} ({layer.in_features} inputs) would read nothing at sparsity {chosen.sparsity:g}, rho "
            f"{chosen.rho:g}; take a lower sparsity or a larger rho"
        )
    return rank


# -- measuring ---------------------------------------------------------------------------------------------------------


@contextmanager
def setting(model: nn.Module, **values: Any) -> Iterator[dict[str, RSparseLinear]]:
    """Attributes of all R-Sparse layers (active, counting, dense_tokens, path) changed for a while."""
    layers = some_sparse_layers(model)
    before = [{key: getattr(layer, key) for key in values} for layer in layers.values()]
    try:
        for layer in layers.values():
            vars(layer).update(values)
        yield layers
    finally:
        for layer, old in zip(layers.values(), before, strict=True):
            vars(layer).update(old)


def sparse_logits(model: nn.Module, dense_tokens: int = 1) -> LogitsFunction:
    """Logits with every token sparse but the first `dense_tokens` of a sequence, for `evaluate_language`."""
    inner = model_logits(model)

    def logits(ids: Tensor) -> Tensor:
        with setting(model, dense_tokens=dense_tokens, path="reference"):
            return inner(ids)

    return logits


def dense_logits(model: nn.Module) -> LogitsFunction:
    """Logits of the same model with its sparsity switched off."""
    inner = model_logits(model)

    def logits(ids: Tensor) -> Tensor:
        with setting(model, active=False):
            return inner(ids)

    return logits


def evaluate(
    model: nn.Module, blocks: Tensor, *, dense_prefix: float = 0.0, reference: bool = True, progress: bool = False
) -> LanguageMetrics:
    """Perplexity, and KL to the dense model; every token but the first is sparse.

    Args:
        model: sparse.
        blocks: token ids, int64 [N, T].
        dense_prefix: share of each block that stays dense at its beginning; the official evaluation has 0.9.
            deviation: the default is the harder test, in which no token is spared.
        reference: measure the KL as well, which runs the dense model too.
        progress: show a bar.

    Returns:
        The metrics, with their standard errors.

    Raises:
        UsageError: a dense model, or a prefix outside [0, 1).
    """
    check("dense_prefix", dense_prefix, number(0, below=1))
    dense = dense_logits(model) if reference else None
    function = sparse_logits(model, max(1, int(dense_prefix * blocks.shape[1])))
    return evaluate_language({"sparse": function}, blocks, reference=dense, progress=progress)["sparse"]


def achieved_sparsity(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """Share of input channels that each layer left out on token ids [B, T], the first token of each not counted."""
    layers = sparse_layers(model)
    for layer in layers.values():
        layer.kept = layer.offered = 0
    function = sparse_logits(model)
    with setting(model, counting=True):
        for batch in batches:
            function(batch)
    return {name: 1.0 - layer.kept / max(layer.offered, 1) for name, layer in layers.items()}


@dataclass(frozen=True)
class Traffic:
    """Bytes of weights that one decoded token reads: sparsified layers dense and sparse (their factors included), and
    the rest (head and norms; one row of an embedding that is not also the head).
    """

    dense: float
    sparse: float
    rest: float
    factors: int  # bytes that the factors add to storage

    @property
    def ratio(self) -> float:
        """Sparse over dense, of the sparsified layers alone."""
        return self.sparse / self.dense

    @property
    def whole(self) -> float:
        """The same of all weights."""
        return (self.sparse + self.rest) / (self.dense + self.rest)


def model_traffic(model: nn.Module, achieved: dict[str, float] | None = None) -> Traffic:
    """Bytes a decoded token reads. achieved: measured sparsity by layer; without it, what the counters hold.

    Codes count with what they take in memory here, one byte each. Raises UsageError where nothing was counted.
    """
    layers = sparse_layers(model)
    dense = sparse = 0.0
    factor_bytes = 0
    inside: set[int] = set()
    for name, layer in layers.items():
        stored = _bytes(layer.inner)
        inside |= {id(module) for module in layer.modules()}
        if achieved is None and not layer.offered:
            raise UsageError(f"nothing was counted in {name}; pass achieved=achieved_sparsity(model, batches)")
        left_out = achieved[name] if achieved is not None else 1.0 - layer.kept / layer.offered
        factors = sum(f.numel() * f.element_size() for f in (layer.down, layer.up) if f is not None)
        dense += stored
        # down's rows of kept channels are not read either
        down = 0 if layer.down is None else layer.down.numel() * layer.down.element_size()
        sparse += stored * (1.0 - left_out) + factors - down * (1.0 - left_out)
        factor_bytes += factors
    rest, seen = 0.0, set()
    find: Any = getattr(model, "get_output_embeddings", None)
    head: Any = find() if find is not None else None
    for module in model.modules():
        if id(module) in inside:
            continue
        tensors: list[Tensor] = list(module.parameters(recurse=False))
        if isinstance(module, PackedLinear | PackedEmbedding):
            tensors += [module.codes, module.step]
        is_table = isinstance(module, nn.Embedding | PackedEmbedding)
        for tensor in tensors:
            if tensor.data_ptr() not in seen and not (is_table and module is not head and not _is_head(tensor, head)):
                seen.add(tensor.data_ptr())
                rest += tensor.numel() * tensor.element_size()
    return Traffic(dense, sparse, rest, factor_bytes)


def _is_head(tensor: Tensor, head: Any) -> bool:
    own = [] if head is None else [*head.parameters(), *head.buffers()]
    return any(tensor.data_ptr() == other.data_ptr() for other in own)


def _bytes(layer: Any) -> int:
    tensors = (layer.codes, layer.step) if isinstance(layer, PackedLinear) else (layer.weight,)
    return sum(t.numel() * t.element_size() for t in tensors)

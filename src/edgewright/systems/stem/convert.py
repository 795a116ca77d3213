"""A dense decoder with some up-projections replaced by tables, what they gave on average for each token; what it costs.

The paper trains on from such a model without printing how its tables begin. Our choices: "calibrated" rows are means of
Wu u over the occurrences of the token in a text, which no other function of the token comes nearer to in the least
squares. "weighted" rows come nearest behind the gate, SiLU(Wg u) * Wu u, and lean on the mean of all tokens where a
token is rare: without training they cost SmolLM2 far less. Only sums of the tokens that occur are kept, never the
activations.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgewright.checks import check, one_of, optional, whole
from edgewright.errors import UsageError
from edgewright.models.decoder.from_native import from_native
from edgewright.models.decoder.model import EdgeDecoderForCausalLM, FeedForward
from edgewright.systems.stem.layer import StemConfig, StemFeedForward, stem_blocks, with_stem
from edgewright.systems.stem.store import AT_ONCE, FLOATS, EmbeddingStore

STARTS = ("calibrated", "weighted", "mean", "zero")
PRIOR = 4.0  # occurrences that the mean over all tokens counts for in "weighted"


class TokenMeans:
    """Means of vectors by token, plain and weighted entry by entry, kept for the tokens that occur."""

    def __init__(self, vocabulary: int, width: int) -> None:
        self.place = torch.full((vocabulary,), -1, dtype=torch.int64)
        self.sums, self.weighted, self.weights = (torch.zeros(0, width) for _ in range(3))
        self.counts, self.used = torch.zeros(0), 0

    def add(self, ids: Tensor, values: Tensor, weights: Tensor) -> None:
        """ids: int64 [N]; values, weights: float32 [N, width]."""
        new = torch.unique(ids[self.place[ids] < 0])
        self.place[new] = torch.arange(self.used, self.used + len(new))
        self.used += len(new)
        if (more := max(self.used, 2 * len(self.sums), 64) - len(self.sums)) and self.used > len(self.sums):
            kept = (self.sums, self.weighted, self.weights)
            self.sums, self.weighted, self.weights = (torch.cat([x, x.new_zeros(more, x.shape[1])]) for x in kept)
            self.counts = torch.cat([self.counts, self.counts.new_zeros(more)])
        places = self.place[ids]
        self.sums.index_add_(0, places, values)
        self.weighted.index_add_(0, places, values * weights)
        self.weights.index_add_(0, places, weights)
        self.counts.index_add_(0, places, torch.ones(len(ids)))

    @property
    def ids(self) -> Tensor:
        """The tokens that occurred, ascending."""
        return (self.place >= 0).nonzero().squeeze(1)

    def means(self, ids: Tensor) -> Tensor:
        """[n, width] of tokens that occurred."""
        places = self.place[ids]
        return self.sums[places] / self.counts[places].unsqueeze(1)

    def mean(self) -> Tensor:
        """Over all occurrences, [width]."""
        return self.sums.sum(0) / self.counts.sum()

    def weighted_mean(self) -> Tensor:
        """The same, weighted."""
        return self.weighted.sum(0) / self.weights.sum(0).clamp_min(1e-12)

    def weighted_means(self, ids: Tensor, prior: float = PRIOR) -> Tensor:
        """[n, width] of tokens that occurred, drawn to the mean of all as by `prior` occurrences of mean weight."""
        places, share = self.place[ids], prior * self.weights.sum(0) / self.counts.sum()
        total = (self.weights[places] + share).clamp_min(1e-12)
        return (self.weighted[places] + share * self.weighted_mean()) / total


@torch.no_grad()
def stemify(
    dense: PreTrainedModel,
    layers: str | float | Sequence[int] = "1/3",
    calib: Iterable[Any] | Mapping[int, TokenMeans] | None = None,
    init: str = "weighted",
    *,
    stem: StemConfig | None = None,
    dtype: str | None = None,
) -> EdgeDecoderForCausalLM:
    """A STEM decoder with the weights of a dense one, which is left as it was.

    Args:
        dense: an edge decoder, or a model of a class that `from_native` takes.
        layers: as `stem_layers` takes them; a third is the paper's default.
        calib: token batches, int64 [B, T] or dicts with "input_ids" (and "attention_mask"), or what `token_means` made
            of them.
        init: "calibrated" (means of Wu u by token; tokens that never occur get Wu times the layer's norm of their
            embedding), "weighted" (means weighted by the squared gate, drawn towards that of all tokens, which unseen
            tokens get; the default, since it costs SmolLM2 least), "mean" (one row for all) or "zero"; all but the last
            need `calib`.
        stem: replace="up", or "add", which keeps the up-projection and starts at rows of zero.
        dtype: of the tables, one of FLOATS; the model's own where None.

    Returns:
        An edge decoder in the mode, training or not, of `dense`.

    Raises:
        UsageError: an option outside these, no calibration tokens where they are needed, or a dense model whose
            feed-forwards STEM cannot replace.
    """
    stem = stem or StemConfig()
    check("init", init, one_of(*STARTS))
    check("dtype", dtype, optional(one_of(*FLOATS)))
    if stem.replace == "gate":
        raise UsageError(
            "stemify replaces the up-projection (replace='up') or adds to it ('add'); a gate needs context"
        )
    needs = init != "zero" and stem.replace == "up"
    if needs and calib is None:
        raise UsageError(f"init={init!r} needs calib=BATCHES of tokens; init='zero' needs none")
    model = copy.deepcopy(dense) if isinstance(dense, EdgeDecoderForCausalLM) else from_native(dense)
    config = with_stem(model.config, layers, stem)
    check("hidden_act", config.hidden_act, one_of("silu"))
    before, after = model.config.ffn_types, config.ffn_types
    assert isinstance(before, list) and isinstance(after, list) and config.share_map is not None
    blocks = sorted({config.share_map[i] for i, kind in enumerate(after) if kind == "stem" and before[i] != "stem"})
    seen: Mapping[int, TokenMeans] = {}
    if needs and calib is not None:
        seen = calib if isinstance(calib, Mapping) else token_means(model, blocks, calib)
        if lacking := [block for block in blocks if block not in seen]:
            raise UsageError(f"calib holds no means of block {lacking[0]}; name it in token_means")
    table_type = FLOATS[dtype] if dtype else model.dtype
    for block in blocks:
        layer: Any = model.model.layers[block]
        layer.mlp = _replaced(model, layer, stem, init, seen.get(block), table_type)
        layer.kind = "stem"
    model.config.ffn_types, model.config.stem = after, config.stem  # the one object that all modules share
    return model.train(dense.training)


def _replaced(
    model: EdgeDecoderForCausalLM, layer: Any, stem: StemConfig, init: str, seen: TokenMeans | None, dtype: torch.dtype
) -> StemFeedForward:
    """The STEM form of the feed-forward of one block; its other matrices are the same objects."""
    mlp = layer.mlp
    width, hidden = mlp.up_proj.weight.shape
    vocabulary = model.config.vocab_size
    with torch.device("meta"):
        new = StemFeedForward(hidden, width, vocabulary, stem)
    new.gate_proj, new.down_proj = mlp.gate_proj, mlp.down_proj
    device = mlp.up_proj.weight.device
    table = torch.zeros(vocabulary, width, dtype=dtype, device=device)
    if stem.replace == "add":
        new.up_proj = mlp.up_proj
    elif init == "mean" and seen is not None:
        table[:] = seen.mean().to(device, dtype)
    elif init == "weighted" and seen is not None:
        table[:] = seen.weighted_mean().to(device, dtype)
        table[seen.ids.to(device)] = seen.weighted_means(seen.ids).to(device, dtype)
    elif seen is not None:
        for first in range(0, vocabulary, AT_ONCE):
            part = slice(first, first + AT_ONCE)
            vectors = layer.post_attention_layernorm(model.model.embed_tokens.weight[part])
            table[part] = mlp.up_proj(vectors).to(dtype)
        table[seen.ids.to(device)] = seen.means(seen.ids).to(device, dtype)
    new.table = nn.Embedding.from_pretrained(table, freeze=False)
    return new


@torch.no_grad()
def token_means(model: EdgeDecoderForCausalLM, blocks: Sequence[int], calib: Iterable[Any]) -> dict[int, TokenMeans]:
    """Means of the up-projections of stored blocks by token, in one pass of a dense decoder over the text."""
    means: dict[int, TokenMeans] = {}
    ids: Tensor = torch.empty(0)
    real: Tensor | None = None
    gates: dict[int, Tensor] = {}  # of the block that is computing

    def keep(block: int, gate: bool, output: Tensor) -> None:
        values = output.flatten(0, -2).float().cpu()
        if gate:
            gates[block] = values
            return
        squares, tokens = F.silu(gates.pop(block)).square_(), ids.flatten()
        if real is not None:
            values, squares, tokens = values[real], squares[real], tokens[real]
        means[block].add(tokens, values, squares)

    training = model.training
    model.eval()
    with ExitStack() as stack:
        stack.callback(model.train, training)
        for block in blocks:
            mlp: Any = model.model.layers[block].mlp
            if type(mlp) is not FeedForward or type(mlp.up_proj) is not nn.Linear:
                raise UsageError(
                    f"block {block} has a {type(mlp).__name__} with quantised matrices; convert it while it is float"
                )
            means[block] = TokenMeans(model.config.vocab_size, mlp.up_proj.out_features)
            for gate, linear in ((True, mlp.gate_proj), (False, mlp.up_proj)):
                hook = linear.register_forward_hook(lambda *a, block=block, gate=gate: keep(block, gate, a[2]))
                stack.callback(hook.remove)
        for batch in calib:
            inputs = batch if isinstance(batch, Mapping) else {"input_ids": batch}
            ids, mask = inputs["input_ids"].cpu(), inputs.get("attention_mask")
            real = None if mask is None else mask.cpu().flatten().bool()
            extra = {} if mask is None else {"attention_mask": mask.to(model.device)}
            model.model(input_ids=ids.to(model.device), use_cache=False, **extra)
    check("calibration tokens", next(iter(means.values())).used, whole(1))
    return means


@dataclass(frozen=True)
class CapacityReport:
    """What the tables of a STEM model cost and save on a text.

    stem_layers: executed ones. stored: weights of the tables; active: those of the rows that this text uses, which
    grow with it. fetched_bytes: a token, without a cache. hit_rate: of the store so far, None without one. saved_flops:
    a token, against the dense feed-forward of the same width; a multiplication and an addition are two.
    """

    stem_layers: int
    stored: int
    active: int
    unique_tokens: int
    table_bytes: int
    fetched_bytes: float
    hit_rate: float | None
    saved_flops: int


def capacity_report(model: nn.Module, ids: Tensor, store: EmbeddingStore | None = None) -> CapacityReport:
    """What the tables of a model cost and save on a text.

    Args:
        model: an edge decoder with STEM layers.
        ids: tokens, int64 [B, T] or [T]; unique tokens are counted over all of them.
        store: of an offloaded model, for the bytes of its rows and its share of cache hits.

    Returns:
        The report.

    Raises:
        UsageError: the model has no STEM layers.
    """
    layers = stem_blocks(model)
    config: Any = model.config
    order = [block for block in config.share_map if block in layers]
    unique = len(torch.unique(ids))
    sizes = {block: _row_bytes(layer, block, store) for block, layer in layers.items()}
    hits, misses = (store.stats()[name] for name in ("hits", "misses")) if store is not None else (0, 0)
    changed = [layers[block].intermediate for block in order if layers[block].config.replace != "add"]
    return CapacityReport(
        stem_layers=len(order),
        stored=sum(layer.vocabulary * layer.intermediate for layer in layers.values()),
        active=sum(unique * layer.intermediate for layer in layers.values()),
        unique_tokens=unique,
        table_bytes=sum(sizes[block] * layer.vocabulary for block, layer in layers.items()),
        fetched_bytes=float(sum(sizes[block] for block in order)),
        hit_rate=hits / (hits + misses) if hits + misses else None,
        saved_flops=sum(2 * config.hidden_size * width for width in changed),
    )


def saved_share(hidden: int, intermediate: int, length: int) -> float:
    """Share of a dense layer's multiplications in a prompt that STEM leaves out: f / (4 d + 2 T + 3 f)."""
    return intermediate / (4 * hidden + 2 * length + 3 * intermediate)


def _row_bytes(layer: StemFeedForward, block: int, store: EmbeddingStore | None) -> int:
    if store is not None:
        return store.tables[block].format.row_bytes
    table: Any = layer.table
    if hasattr(table, "codes"):
        return table.codes.shape[1] * (4 if table.grid == "int4" else 8) // 8 + 4 * table.step.shape[1]
    return layer.intermediate * table.weight.element_size()

"""A dense decoder with some up-projections replaced by tables: what they gave, on average, for each token.

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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgewright.errors import UsageError
from edgewright.models.decoder.from_native import from_native
from edgewright.models.decoder.model import EdgeDecoderForCausalLM, FeedForward
from edgewright.systems.stem.layer import StemConfig, StemFeedForward, with_stem
from edgewright.systems.stem.rows import FLOATS

STARTS = ("calibrated", "weighted", "embedding", "mean", "zero")
PRIOR = 4.0  # occurrences that the mean over all tokens counts for in "weighted"
AT_ONCE = 4096


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

    dense: an edge decoder, or a model of a class that `from_native` takes. calib: token batches, int64 [B, T] or dicts
    with "input_ids" (and "attention_mask"), or what `token_means` made of them. init: "calibrated" (needs calib),
    "weighted" (needs calib: means weighted by the squared gate, which is least squares behind the gate, drawn towards
    that of all tokens, which unseen tokens get), "embedding" (the rule for unseen tokens for all), "mean" (one row for
    all, needs calib) or "zero". stem:
    replace="up", or "add", which keeps the up-projection and starts at rows of zero. dtype: of the tables, one of
    FLOATS; the model's own where None.
    Raises UsageError.
    """
    stem = stem or StemConfig()
    if init not in STARTS or (dtype is not None and dtype not in FLOATS):
        raise UsageError(
            f"init={init!r}, dtype={dtype!r}; choose init from {', '.join(STARTS)}, dtype from {', '.join(FLOATS)}"
        )
    if stem.replace == "gate":
        raise UsageError(
            "stemify replaces the up-projection (replace='up') or adds to it ('add'); a gate needs context"
        )
    needs = init in ("calibrated", "weighted", "mean") and stem.replace == "up"
    if needs and calib is None:
        raise UsageError(f"init={init!r} needs calib=BATCHES of tokens; init='embedding' needs none")
    model = _edge_copy(dense)
    config = with_stem(model.config, layers, stem)
    if config.hidden_act != "silu":
        raise UsageError(f"hidden_act={config.hidden_act!r}; STEM layers compute with silu")
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


def _edge_copy(dense: PreTrainedModel) -> EdgeDecoderForCausalLM:
    return copy.deepcopy(dense) if isinstance(dense, EdgeDecoderForCausalLM) else from_native(dense)


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
    elif init == "mean":
        assert seen is not None
        table[:] = seen.mean().to(device, dtype)
    elif init == "weighted":
        assert seen is not None
        table[:] = seen.weighted_mean().to(device, dtype)
        for ids in seen.ids.split(AT_ONCE):
            table[ids.to(device)] = seen.weighted_means(ids).to(device, dtype)
    elif init != "zero":
        for first in range(0, vocabulary, AT_ONCE):
            part = slice(first, first + AT_ONCE)
            vectors = layer.post_attention_layernorm(model.model.embed_tokens.weight[part])
            table[part] = mlp.up_proj(vectors).to(dtype)
        if seen is not None:
            for ids in seen.ids.split(AT_ONCE):
                table[ids.to(device)] = seen.means(ids).to(device, dtype)
    new.table = nn.Embedding.from_pretrained(table, freeze=False, sparse=stem.sparse_grad)
    return new


@torch.no_grad()
def token_means(model: EdgeDecoderForCausalLM, blocks: Sequence[int], calib: Iterable[Any]) -> dict[int, TokenMeans]:
    """Means of the up-projections of stored blocks by token, in one pass of a dense decoder over the text."""
    found: dict[int, TokenMeans] = {}
    ids: Tensor = torch.empty(0)
    real: Tensor | None = None
    gates: dict[int, Tensor] = {}  # of the block that is computing

    def keep(block: int) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            values, tokens = output.flatten(0, -2).float().cpu(), ids.flatten()
            squares = F.silu(gates.pop(block)).square_()
            if real is not None:
                values, squares, tokens = values[real], squares[real], tokens[real]
            found[block].add(tokens, values, squares)

        return hook

    def keep_gate(block: int) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            gates[block] = output.flatten(0, -2).float().cpu()

        return hook

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
            found[block] = TokenMeans(model.config.vocab_size, mlp.up_proj.out_features)
            stack.callback(mlp.gate_proj.register_forward_hook(keep_gate(block)).remove)
            stack.callback(mlp.up_proj.register_forward_hook(keep(block)).remove)
        for batch in calib:
            whole = batch if isinstance(batch, Mapping) else {"input_ids": batch}
            ids, mask = whole["input_ids"].cpu(), whole.get("attention_mask")
            real = None if mask is None else mask.cpu().flatten().bool()
            extra = {} if mask is None else {"attention_mask": mask.to(model.device)}
            model.model(input_ids=ids.to(model.device), use_cache=False, **extra)
    if not next(iter(found.values())).used:
        raise UsageError("the calibration batches hold no tokens")
    return found

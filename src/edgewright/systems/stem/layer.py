"""STEM: a feed-forward whose up-projection is a table, one row for each token of the vocabulary.

With the token t at a position and the normalised state u there,
    y = Wd (SiLU(Wg u) * U[t])
so that knowledge grows with the table while arithmetic shrinks, and the rows can lie in host memory or on disk
(see `store`): the token alone says which is needed. t is the input token of the position, never the one to predict.

Source: "STEM: Scaling Transformers with Embedding Modules", arXiv 2601.10639; initialisation as in the official code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from edgewright.checks import check_fields, one_of
from edgewright.errors import UsageError
from edgewright.models.decoder.config import EdgeDecoderConfig

CUT = 3.0  # standard deviations at which the normal distribution of the matrices ends


@dataclass(frozen=True)
class StemConfig:
    """One kind of STEM layer.

    Args:
        replace: what the table stands for: "up" as published; "gate", which loses the context that a gate must see;
            "add", which keeps the up-projection and adds the row to it.
        init: "xavier", std sqrt(2 / (V + f)) as in the official code, or "match", std 1, that of the dense
            up-projection: our choice for runs under some 5000 steps.
        allow_first: let the first layer be one; it stays dense in the paper.

    Raises:
        UsageError: a value outside these.
    """

    replace: str = "up"
    init: str = "xavier"
    allow_first: bool = False

    def __post_init__(self) -> None:
        rules = {"replace": one_of("up", "gate", "add"), "init": one_of("xavier", "match")}
        check_fields(self, {**rules, "allow_first": one_of(True, False)})


class Override(Protocol):
    """Stands between the lookup of a layer and its result (see `stem_edit`)."""

    def __call__(self, lookup: Callable[[Tensor], Tensor], input_ids: Tensor) -> Tensor: ...


class StemFeedForward(nn.Module):
    """y = Wd (SiLU(Wg u) * U[t]) with t the input token of the position (arXiv 2601.10639).

    `table` holds the rows, an nn.Embedding or what quantisation makes of it, None once they live elsewhere; `lookup`
    then gives the rows of ids, [B, T] -> [B, T, intermediate]. `override` exchanges rows at some positions, for
    editing.

    Args:
        hidden: width of the state u.
        intermediate: width of a row.
        vocabulary: rows of the table.
        config: which projection the table stands for, and its initial values.
    """

    def __init__(self, hidden: int, intermediate: int, vocabulary: int, config: StemConfig) -> None:
        super().__init__()
        self.config, self.vocabulary, self.intermediate = config, vocabulary, intermediate
        if config.replace != "gate":
            self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        if config.replace != "up":
            self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.table: nn.Module | None = nn.Embedding(vocabulary, intermediate)
        self.lookup: Callable[[Tensor], Tensor] | None = None
        self.override: Override | None = None
        # transformers calls `init_weights` only on modules that hold a tensor of their own; this one takes no memory.
        self.register_buffer("own", torch.empty(0), persistent=False)

    def init_weights(self, config: Any) -> None:
        """Initial values as in the official code; config: of the decoder, for its number of layers.

        deviation: the depth factor is sqrt(2 layers), one of the official code's choices (its default is 1).
        """
        for name in ("gate_proj", "up_proj", "down_proj"):
            if (linear := getattr(self, name, None)) is not None:
                std = linear.in_features**-0.5
                if name == "down_proj":
                    std /= math.sqrt(2 * config.num_hidden_layers)
                init.trunc_normal_(linear.weight, mean=0.0, std=std, a=-CUT * std, b=CUT * std)
        if isinstance(self.table, nn.Embedding):
            if self.config.init == "xavier":
                init.xavier_normal_(self.table.weight)
            else:
                init.normal_(self.table.weight, mean=0.0, std=1.0)

    def rows(self, input_ids: Tensor) -> Tensor:
        """Rows of the tokens, int64 [B, T] -> [B, T, intermediate], edits included."""
        lookup = self.lookup or self.table
        assert lookup is not None
        return lookup(input_ids) if self.override is None else self.override(lookup, input_ids)

    def forward(self, u: Tensor, input_ids: Tensor | None) -> Tensor:
        """U [B, T, hidden], input_ids int64 [B, T] -> [B, T, hidden]. Raises UsageError without fitting ids."""
        if input_ids is None:
            raise UsageError("STEM layers look rows up by token: give input_ids, not inputs_embeds")
        if input_ids.shape != u.shape[:-1]:
            raise UsageError(f"input_ids {list(input_ids.shape)} are not those of the positions {list(u.shape[:-1])}")
        if self.config.replace == "gate":
            context = self.up_proj(u)
            return self.down_proj(context * F.silu(self.rows(input_ids).to(context.dtype)))
        context = F.silu(self.gate_proj(u))  # first: rows that are still on their way are not needed before the product
        rows = self.rows(input_ids).to(context.dtype)
        return self.down_proj(context * (rows if self.config.replace == "up" else self.up_proj(u) + rows))

    def extra_repr(self) -> str:
        return f"vocabulary={self.vocabulary}, replace={self.config.replace}"


def stem_layers(count: int, share: str | float | Sequence[int]) -> list[int]:
    """Which of `count` layers are STEM layers.

    share: a part such as "1/3" or 0.5, evenly spaced without the first, "all" but the first, or the layers themselves.
    """
    if not isinstance(share, str | float | int):
        layers = sorted(set(share))
        if not layers or not all(isinstance(layer, int) and 0 <= layer < count for layer in layers):
            raise UsageError(f"layers={list(share)}; name one or more of the layers 0 to {count - 1}")
        return layers
    try:
        part = Fraction(1) if share == "all" else Fraction(share)
    except (ValueError, ZeroDivisionError, OverflowError):
        part = Fraction(-1)
    if not 0 < part <= 1 or count < 2:
        raise UsageError(f"layers={share!r} of {count}; give a part such as '1/3' or 0.5, 'all', or layer numbers")
    places = max(1, round(part * count))
    spacing = torch.linspace(1, count - 1, places, dtype=torch.float64)
    return sorted({round(place) for place in spacing.tolist()})


def with_stem(
    config: EdgeDecoderConfig, layers: str | float | Sequence[int] = "1/3", stem: StemConfig | None = None
) -> EdgeDecoderConfig:
    """The configuration with STEM in place of the plain feed-forward of some layers.

    Where blocks are shared, the layers that run the same block change together. Raises UsageError for layers whose
    feed-forward is no plain one, and for the first layer unless the configuration allows it.
    """
    stem = stem or StemConfig()
    assert isinstance(config.ffn_types, list) and config.share_map is not None
    blocks = {config.share_map[layer] for layer in stem_layers(len(config.share_map), layers)}
    chosen = [layer for layer, block in enumerate(config.share_map) if block in blocks]
    check_first(chosen, stem)
    kinds = list(config.ffn_types)
    for layer in chosen:
        if kinds[layer] != "mlp":
            raise UsageError(f"layer {layer} has the feed-forward {kinds[layer]!r}; STEM takes the place of 'mlp'")
        kinds[layer] = "stem"
    return EdgeDecoderConfig(**(config.to_dict() | {"ffn_types": kinds, "stem": asdict(stem)}))


def check_first(layers: Sequence[int], stem: StemConfig) -> None:
    """Raise UsageError for STEM in layer 0, where no context has been mixed in yet."""
    if 0 in layers and not stem.allow_first:
        raise UsageError(
            "layer 0 would be a STEM layer; it stays dense in the paper. Choose others, or StemConfig(allow_first=True)"
        )


def stem_blocks(model: nn.Module) -> dict[int, StemFeedForward]:
    """The STEM feed-forwards of an edge decoder by stored block. Raises UsageError where there are none."""
    body = getattr(model, "model", None)
    blocks = enumerate(getattr(body, "layers", ()))
    layers = {i: block.mlp for i, block in blocks if isinstance(getattr(block, "mlp", None), StemFeedForward)}
    if not layers:
        raise UsageError(
            f"{type(model).__name__} has no STEM layers; make some with stemify or `edgewright stem convert`"
        )
    return layers


def table_weights(model: nn.Module) -> Iterator[tuple[int, Tensor]]:
    """(stored block, rows [V, f]) of every table that lies in the model."""
    for block, layer in stem_blocks(model).items():
        if layer.table is not None:
            yield block, layer.table.weight  # type: ignore[misc]

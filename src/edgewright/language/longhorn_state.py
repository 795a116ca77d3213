"""What a Longhorn layer keeps between calls: its state in float32 or int8, and copies of a whole cache to go back to.

An int8 state has one scale a channel, the largest magnitude / 127. It is rounded again at every call, so that its
error does not only come from one rounding: decays forget old errors, new ones come with each token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from edgewright.errors import UsageError
from edgewright.io.transformers_names import cache_name

STATE_TYPES = ("float32", "int8")
SCALE_BYTES = 4


def pack_state(S: Tensor, state_dtype: str) -> Tensor:
    """S [B, d, m] as a cache keeps it: itself in float32, or int8 [B, d, m + 4] of codes and the bytes of the scale.

    One tensor holds both, so that what re-orders, repeats or moves a cache keeps them together.
    """
    if state_dtype == "float32":
        return S.float()
    scale = S.float().abs().amax(-1, keepdim=True) / 127  # [B, d, 1]
    codes = (S / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([codes, scale.contiguous().view(torch.int8)], dim=-1)


def unpack_state(state: Tensor | None) -> Tensor | None:
    """The float32 S [B, d, m] of what `pack_state` made."""
    if state is None or state.dtype != torch.int8:
        return state
    scale = state[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return state[..., :-SCALE_BYTES].float() * scale


class LonghornCache(DynamicCache):
    """A DynamicCache that knows how many tokens it has seen, also where no layer of attention counts them.

    It cannot be cropped; `snapshot` and `restore` below go back.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.tokens = 0

    @classmethod
    def around(cls, cache: Cache) -> LonghornCache:
        """A counting cache with the very layers of another, which must be new. Raises UsageError for a used one."""
        if isinstance(cache, cls):
            return cache
        if any(layer.has_previous_state[0] for layer in cache.layers if hasattr(layer, "has_previous_state")):
            raise UsageError(
                f"the {type(cache).__name__} has seen tokens but not counted them; go on from a LonghornCache: "
                f"model.generate(..., {cache_name()}=LonghornCache(model.config))"
            )
        made = cls.__new__(cls)
        vars(made).update(vars(cache))
        made.tokens = 0
        return made

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **options: Any) -> Tensor:
        if layer_idx == next(i for i, layer in enumerate(self.layers) if hasattr(layer, "conv_states")):
            self.tokens += conv_states.shape[-1]
        return super().update_conv_state(conv_states, layer_idx, state_idx, **options)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def reset(self) -> None:
        super().reset()
        self.tokens = 0


@dataclass(frozen=True)
class Snapshot:
    """A copy of every layer of a cache at one moment."""

    layers: tuple[dict[str, Any], ...]
    tokens: int | None = None

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers for t in _tensors(layer))


def snapshot(cache: Any) -> Snapshot:
    """Copy a transformers cache, of Longhorn layers or mixed with attention. The next tokens leave the copy alone."""
    return Snapshot(tuple(_copy(vars(layer)) for layer in cache.layers), getattr(cache, "tokens", None))


def restore(cache: Any, kept: Snapshot) -> None:
    """Put a cache back as it was; the snapshot can be used again. Raises UsageError for another kind of cache."""
    if len(cache.layers) != len(kept.layers):
        raise UsageError(
            f"the snapshot has {len(kept.layers)} layers and the cache {len(cache.layers)}; "
            "restore(cache, snapshot(cache)) takes the cache it was made from"
        )
    for layer, values in zip(cache.layers, kept.layers, strict=True):
        vars(layer).clear()
        vars(layer).update(_copy(values))
    if kept.tokens is not None:
        cache.tokens = kept.tokens


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return {key: _copy(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return [tensor for inner in value.values() for tensor in _tensors(inner)]
    return [value] if isinstance(value, Tensor) else []

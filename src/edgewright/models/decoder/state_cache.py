"""What a Longhorn layer keeps between calls: its state in float32 or int8, and copies of a whole cache to go back to.

An int8 state has one scale a channel, the largest magnitude / 127. It is rounded again at every call, so that its
error does not only come from one rounding: decays forget old errors, new ones come with each token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

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


# Before 5.21 transformers' caches keep no states that can be read back: `StateCache` brings slots of its own.
HAS_STATES = hasattr(Cache, "get_recurrent_state")


class _Slot(DynamicLayer):
    """The two states of one Longhorn layer in a cache of an older transformers."""

    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, Tensor] = {}
        self.tokens = 0  # seen by the cache, for the masks of attention layers that it is asked about

    def get_seq_length(self, *_: Any) -> int:
        return self.tokens

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        return self.tokens + (query if isinstance(query, int) else query.shape[0]), 0

    def reset(self) -> None:
        self.states, self.tokens = {}, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.states = {k: v.index_select(0, beam_idx.to(v.device)) for k, v in self.states.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.states = {k: v.repeat_interleave(repeats, 0) for k, v in self.states.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        self.states = {k: v[indices] for k, v in self.states.items()}


class StateCache(DynamicCache):
    """A DynamicCache that knows how many tokens it has seen, also where no layer of attention counts them.

    It cannot be cropped; `snapshot` and `restore` below go back.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        if not HAS_STATES:
            kinds = config.layer_types
            self.layers = [_Slot() if k == "linear_attention" else x for k, x in zip(kinds, self.layers, strict=True)]
        self.tokens = 0

    @classmethod
    def around(cls, cache: Cache, config: Any) -> StateCache:
        """A counting cache with the very layers of another, which must be new. Raises UsageError for a used one."""
        if isinstance(cache, cls):
            return cache
        if any(map(_used, cache.layers)):
            raise UsageError(
                f"the {type(cache).__name__} has seen tokens but not counted them; go on from a StateCache: "
                f"model.generate(..., {cache_name()}=StateCache(model.config))"
            )
        if not HAS_STATES:
            return cls(config)
        made = cls.__new__(cls)
        vars(made).update(vars(cache))
        made.tokens = 0
        return made

    def _slot(self, layer_idx: int) -> _Slot:
        slot = self.layers[layer_idx]
        assert isinstance(slot, _Slot)
        return slot

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **options: Any) -> Tensor:
        if layer_idx == next(i for i, x in enumerate(self.layers) if hasattr(x, "conv_states") or isinstance(x, _Slot)):
            self.tokens += conv_states.shape[-1]
        if not HAS_STATES:
            for slot in (x for x in self.layers if isinstance(x, _Slot)):
                slot.tokens = self.tokens
            width, states = options["conv_kernel_size"], self._slot(layer_idx).states
            before = states.get("conv", conv_states.new_zeros(*conv_states.shape[:-1], width))
            states["conv"] = torch.cat([before, conv_states], dim=-1)[..., -width:]
            return states["conv"]
        return super().update_conv_state(conv_states, layer_idx, state_idx, **options)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **options: Any) -> Tensor:
        if HAS_STATES:
            return super().update_recurrent_state(recurrent_states, layer_idx, *args, **options)
        self._slot(layer_idx).states["recurrent"] = recurrent_states
        return recurrent_states

    def get_conv_state(self, layer_idx: int, *args: Any) -> Tensor | None:
        if HAS_STATES:
            return super().get_conv_state(layer_idx, *args)
        return self._slot(layer_idx).states.get("conv")

    def get_recurrent_state(self, layer_idx: int, *args: Any) -> Tensor | None:
        if HAS_STATES:
            return super().get_recurrent_state(layer_idx, *args)
        return self._slot(layer_idx).states.get("recurrent")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def reset(self) -> None:
        super().reset()
        self.tokens = 0


def _used(layer: Any) -> bool:
    """Whether a layer of a cache holds states (several by number, or one) or keys."""
    before = getattr(layer, "has_previous_state", None)
    if before is None:
        return getattr(layer, "keys", None) is not None
    return any(before.values()) if isinstance(before, dict) else bool(before)


@dataclass(frozen=True)
class CacheSnapshot:
    """A copy of every layer of a cache at one moment."""

    layers: tuple[dict[str, Any], ...]
    tokens: int | None = None

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers for t in _tensors(layer))


def snapshot(cache: Any) -> CacheSnapshot:
    """Copy a transformers cache, of Longhorn layers or mixed with attention. The next tokens leave the copy alone."""
    return CacheSnapshot(tuple(_copy(vars(layer)) for layer in cache.layers), getattr(cache, "tokens", None))


def restore(cache: Any, kept: CacheSnapshot) -> None:
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

"""A key-value cache for generation that really stores integer codes and scales, and counts its own bytes.

    cache = QuantCache(model.config, KVConfig.llama_cpp(4))
    model.generate(**inputs, cache=cache)      # past_key_values=cache before transformers 5.24
    cache.bytes_per_token()

It returns to attention exactly what a model under `attach_kv_quantization` with the same configuration sees.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from edgewright.checks import check, number, one_of, whole
from edgewright.errors import UsageError
from edgewright.quantization.codecs import STORED_BITS, pack_nibbles, unpack_nibbles
from edgewright.quantization.config import KVConfig
from edgewright.quantization.kv_cache import RowQuantizer, heads_of, row_quantizer, rows_of


class _Store:
    """Quantised rows of one layer's keys or values: codes uint8 or int8 [B, T, bytes], scales [B, T, per token]."""

    def __init__(self, quantizer: RowQuantizer) -> None:
        self.quantizer = quantizer
        self.packed = quantizer.codec.bits <= 4
        self.codes: Tensor | None = None
        self.scales: Tensor | None = None

    def append(self, rows: Tensor) -> None:
        codes, scales = self.quantizer.encode(rows)
        if self.packed:
            codes = pack_nibbles(codes)
        self.codes = codes if self.codes is None else torch.cat((self.codes, codes), dim=1)
        self.scales = scales if self.scales is None else torch.cat((self.scales, scales), dim=1)

    def decode(self) -> Tensor:
        assert self.codes is not None and self.scales is not None
        return self.quantizer.decode(unpack_nibbles(self.codes) if self.packed else self.codes, self.scales)

    def select(self, change: Any) -> None:
        if self.codes is not None and self.scales is not None:
            self.codes, self.scales = change(self.codes).contiguous(), change(self.scales).contiguous()

    def nbytes(self) -> int:
        parts = [part for part in (self.codes, self.scales) if part is not None]
        return sum(part.untyped_storage().nbytes() for part in parts)


class QuantLayer(DynamicLayer):
    """One layer of a QuantCache. Keys and values come and go as [B, heads, T, head_dim]."""

    is_compileable = False

    def __init__(self, family: str, config: KVConfig) -> None:
        super().__init__()
        self.family, self.kv_config = family, config
        self.stores: tuple[_Store, _Store] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.head_dim = key_states.shape[-1]
        shape = (self.family, key_states.shape[1], self.head_dim)
        self.stores = (
            _Store(row_quantizer(self.kv_config, *shape, values=False)),
            _Store(row_quantizer(self.kv_config, *shape, values=True)),
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens' codes; return keys and values of all tokens, decoded."""
        if self.stores is None:
            self.lazy_initialization(key_states, value_states)
        assert self.stores is not None
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store.append(rows_of(states))
        keys, values = (heads_of(store.decode().to(self.dtype), self.head_dim) for store in self.stores)
        return keys, values

    def get_seq_length(self) -> int:
        codes = None if self.stores is None else self.stores[0].codes
        return 0 if codes is None else codes.shape[1]

    def nbytes(self) -> int:
        return 0 if self.stores is None else sum(store.nbytes() for store in self.stores)

    def reset(self) -> None:
        self.stores, self.is_initialized = None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; the number is negative, as in transformers' own layers."""
        check("tokens_to_remove", tokens_to_remove, number(most=0), "minus the number of tokens to remove")
        if tokens_to_remove:
            self._change(lambda part: part[:, :tokens_to_remove])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda part: part[indices])

    def _change(self, change: Any) -> None:
        for store in self.stores or ():
            store.select(change)


class QuantCache(Cache):
    """Cache of integer codes: packed nibbles up to 4 bits, bytes up to 8, with the scales beside them.

    Pass the cache to the model or to `generate`.

    Args:
        model_config: the model's `config`.
        config: of 8 bits or fewer, with when="post_rope": attention hands its cache the keys after rotation, so those
            are what a cache can store.

    Raises:
        UsageError: another configuration.
    """

    def __init__(self, model_config: PreTrainedConfig, config: KVConfig) -> None:
        check("QuantCache bits", config.bits, whole(2, STORED_BITS), "use DynamicCache for more")
        check("QuantCache when", config.when, one_of("post_rope"), "a cache stores keys after the rotary embedding")
        super().__init__(layer_class_to_replicate=partial(QuantLayer, model_config.model_type, config))  # type: ignore[arg-type]
        self.kv_config = config

    def nbytes(self) -> int:
        """Bytes that codes and scales occupy, read from their storage."""
        return sum(layer.nbytes() for layer in self.layers)  # type: ignore[union-attr]

    def bytes_per_token(self) -> float:
        """Bytes per token of one sequence over all layers, keys and values together. Raises UsageError when empty."""
        tokens = self.get_seq_length()
        if tokens == 0:
            raise UsageError("the cache is empty; run the model with it before asking for its size")
        batch = self.layers[0].stores[0].codes.shape[0]  # type: ignore[union-attr]
        return self.nbytes() / (tokens * batch)

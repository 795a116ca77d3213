"""Training and running a Hugging Face decoder as if its key-value cache were quantised.

`attach_kv_quantization(model, KVConfig(bits=4))` works on the attention modules of Llama (SmolLM2), Qwen2, Qwen3 and
Mistral with full-sequence training and with cached generation alike, and gives the same logits in both, because scales
never reach across tokens. LLM-QAT (arXiv 2305.17888) quantises the outputs of the key and value projections, before the
rotary embedding; llama.cpp's cache holds keys after it.

Mechanism: a forward pre-hook hands each attention module a stand-in for its cache that quantises what passes through
`update`, whether a real cache stands behind it or not. The argument is found in the signature of the attention's
forward, and a forward that never called `update` is an error: another version of transformers cannot bypass the
quantiser in silence. Keys before rotation are quantised by a hook on the module that makes them. All state lives in
hooks of the model itself: copies carry it, `detach_kv_quantization` removes it.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import CheckFailed, Unsupported, UsageError
from edgewright.io.transformers_names import CACHE_NAMES, named_cache, version
from edgewright.quantization.codecs import Codec
from edgewright.quantization.config import SCALE_DTYPES, KVConfig

# Classes whose forward is known to hand (keys after rotation, values) to `update` of its cache and nothing else.
KNOWN_ATTENTION = tuple(
    f"transformers.models.{family.lower()}.modeling_{family.lower()}.{family}Attention"
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3")
)
# Families whose GGUF files keep the two halves of each query and key head interleaved (pairs of the rotary embedding
# side by side), so that a block of a quantised cache there holds other entries than 32 neighbours here.
INTERLEAVED = ("llama", "mistral")
ROTATION_BLOCK = 64  # llama.cpp rotates heads whose size is a multiple of this
UNTOUCHED_BITS = 16


@dataclass(frozen=True)
class RowQuantizer:
    """Quantises rows [B, T, heads * head_dim], one token each.

    Args:
        codec: of the blocks.
        interleave: size of the heads whose halves are interleaved first, 0 for none.
        rotation: size of the Hadamard blocks after that, 0 for none. Both are undone in what comes back.
        clip: |x| from which on there is no gradient; None: nowhere.
    """

    codec: Codec
    interleave: int = 0
    rotation: int = 0
    clip: float | None = None

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(codes int8 [B, T, n], scales [B, T, n / block])."""
        return self.codec.encode(self._arranged(rows))

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """float32 [B, T, n]."""
        return self._restored(self.codec.decode(codes, scales))

    def values(self, rows: Tensor) -> Tensor:
        """decode(encode(rows)), float32, for any width."""
        return self._restored(self.codec.values(self._arranged(rows)))

    def _arranged(self, rows: Tensor) -> Tensor:
        rows = rows.float()
        if self.interleave:
            rows = rows.unflatten(-1, (-1, 2, self.interleave // 2)).transpose(-1, -2).flatten(-3)
        return rotated(rows, self.rotation)

    def _restored(self, rows: Tensor) -> Tensor:
        rows = rotated(rows, self.rotation)
        if self.interleave:
            rows = rows.unflatten(-1, (-1, self.interleave // 2, 2)).transpose(-1, -2).flatten(-3)
        return rows


def row_quantizer(config: KVConfig, family: str, heads: int, head_dim: int, *, values: bool) -> RowQuantizer:
    """The quantiser of one attention layer's keys or values.

    Args:
        config: bits, groups and codec.
        family: transformers' model type; it decides in which order llama.cpp's codecs meet the entries of a key.
        heads: of keys and values.
        head_dim: entries of a head.
        values: of the values, else of the keys.

    Raises:
        UsageError: blocks that do not divide a head.
    """
    block = {"token": heads * head_dim, "head": head_dim}.get(str(config.granularity), config.granularity)
    assert isinstance(block, int)
    if isinstance(config.granularity, int) and head_dim % block:
        raise UsageError(f"head_dim={head_dim} does not divide into groups of {block}; use a divisor, head or token")
    rotation = 0
    if config.rotate and head_dim % ROTATION_BLOCK == 0:
        # llama.cpp: keys by the largest power of two that divides the head, values always in blocks of 64.
        rotation = ROTATION_BLOCK if values else head_dim & -head_dim
    dtype = SCALE_DTYPES[config.scale_dtype] or torch.float32
    interleave = head_dim if config.codec != "symmetric" and family in INTERLEAVED and not values else 0
    codec = Codec(config.codec, config.bits, block, dtype)
    return RowQuantizer(codec, interleave, rotation, config.official_clip_grad)


def rotated(rows: Tensor, size: int) -> Tensor:
    """Rows with each run of `size` entries multiplied by the orthonormal Hadamard matrix, which is its own inverse."""
    if size == 0:
        return rows
    return (rows.unflatten(-1, (-1, size)) @ hadamard(size).to(rows)).flatten(-2)


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix over sqrt(size), which is orthogonal.

    Args:
        size: a power of two.

    Returns:
        float32 [size, size]
    """
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


class _StraightThrough(torch.autograd.Function):
    """Quantised rows forward; backward the gradient unchanged, or zero where |x| >= clip if a clip is given."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, quantizer: RowQuantizer) -> Tensor:
        ctx.has_clip = quantizer.clip is not None
        if quantizer.clip is not None:
            ctx.save_for_backward(rows.abs() < quantizer.clip)
        return quantizer.values(rows).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (upstream * ctx.saved_tensors[0] if ctx.has_clip else upstream), None


def fake_quantize_rows(rows: Tensor, quantizer: RowQuantizer) -> Tensor:
    """Rows as the cache would return them, with straight-through gradients.

    Args:
        rows: [B, T, heads * head_dim].
        quantizer: of keys or values.

    Returns:
        As `rows`.
    """
    if quantizer.codec.bits >= UNTOUCHED_BITS:
        return rows
    return _StraightThrough.apply(rows, quantizer)


def rows_of(heads: Tensor) -> Tensor:
    """[B, heads, T, head_dim] to [B, T, heads * head_dim]."""
    return heads.transpose(1, 2).flatten(2)


def heads_of(rows: Tensor, head_dim: int) -> Tensor:
    """[B, T, heads * head_dim] to [B, heads, T, head_dim]."""
    return rows.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class _QuantizingCache:
    """Stands in for an attention module's cache: quantises, then stores in the real cache if there is one."""

    def __init__(self, cache: Any, config: KVConfig, keys: RowQuantizer, values: RowQuantizer) -> None:
        self.cache, self.config, self.quantizers = cache, config, (keys, values)
        self.updates = 0

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys after rotation and values, both [B, heads, T, head_dim]; returns all that attention is to see."""
        self.updates += 1
        stored = getattr(self.cache, "kv_config", None)
        if stored is None:
            head_dim = keys.shape[-1]
            if self.config.when == "post_rope":
                keys = heads_of(fake_quantize_rows(rows_of(keys), self.quantizers[0]), head_dim)
            values = heads_of(fake_quantize_rows(rows_of(values), self.quantizers[1]), head_dim)
        elif stored != self.config:  # a QuantCache quantises by itself, so it must agree with the model
            raise UsageError(f"the cache is under {stored}, the model under {self.config}; give both one KVConfig")
        return (keys, values) if self.cache is None else self.cache.update(keys, values, *args, **kwargs)


class _KeyHook:
    """Forward hook of the module that makes the keys: [B, T, heads * head_dim] or [B, T, heads, head_dim]."""

    def __init__(self, quantizer: RowQuantizer) -> None:
        self.quantizer = quantizer

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return fake_quantize_rows(output.flatten(2), self.quantizer).reshape(output.shape)


class _AttentionHook:
    """Forward pre-hook of an attention module: hands it a `_QuantizingCache` and keeps the key hook in place."""

    def __init__(self, config: KVConfig, attention: Any) -> None:
        heads = attention.config.num_key_value_heads
        shape = (attention.config.model_type, heads, attention.head_dim)
        self.config = config
        self.position, self.argument = _cache_argument(attention)
        self.keys = row_quantizer(config, *shape, values=False)
        self.values = row_quantizer(config, *shape, values=True)
        self.key_hook = _KeyHook(self.keys) if config.when == "pre_rope" else None

    def __call__(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.key_hook is not None:
            # Looked up at every call: quantize_ and convert_ replace the projection, and a hook left on the old one
            # would silently leave the keys unquantised.
            source = _key_source(attention)
            if not any(hook is self.key_hook for hook in source._forward_hooks.values()):
                source.register_forward_hook(self.key_hook)
        given = [kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None]
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        if len(args) > self.position:
            stand_in = _QuantizingCache(args[self.position], self.config, self.keys, self.values)
            return (*args[: self.position], stand_in, *args[self.position + 1 :]), kwargs
        stand_in = _QuantizingCache(given[0] if given else None, self.config, self.keys, self.values)
        return args, {**kwargs, self.argument: stand_in}


class _UseHook:
    """Forward hook of an attention module: its forward must have sent keys and values through the stand-in, once."""

    def __call__(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        updates = [x.updates for x in (*args, *kwargs.values()) if isinstance(x, _QuantizingCache)]
        if updates != [1]:
            raise CheckFailed(
                f"{type(attention).__name__} of transformers {version()} used its cache {sum(updates)} times in one "
                "forward instead of once, so its keys and values are not quantised; "
                "detach_kv_quantization(model) runs it without"
            )


def _cache_argument(attention: nn.Module) -> tuple[int, str]:
    """(position, name) of the cache among the arguments of the attention's forward. Raises Unsupported."""
    names = list(inspect.signature(attention.forward).parameters)
    if (name := named_cache(attention.forward)) is None:
        raise Unsupported(
            f"{type(attention).__name__} of transformers {version()} takes {', '.join(names)}; quantised key-value "
            f"caches need an argument named {' or '.join(CACHE_NAMES)}"
        )
    return names.index(name), name


def attach_kv_quantization(model: nn.Module, config: KVConfig) -> nn.Module:
    """Put the keys and values of every attention module under a configuration, in place.

    Nothing is changed unless all modules fit.

    Args:
        model: a decoder of transformers (Llama, Mistral, Qwen2, Qwen3).
        config: of keys and values.

    Returns:
        The model.

    Raises:
        Unsupported: an attention class that is not known or takes no cache by a known name.
        UsageError: quantised keys and values already, or a group that does not divide a head.
    """
    if attached_kv_config(model) is not None:
        raise UsageError("the model's key-value cache is quantised already; call detach_kv_quantization(model) first")
    hooks = []
    for name, module in model.named_modules():
        if not type(module).__name__.endswith("Attention"):
            continue
        qualified = f"{type(module).__module__}.{type(module).__name__}"
        if qualified not in KNOWN_ATTENTION:
            known = ", ".join(path.rsplit(".", 1)[1] for path in KNOWN_ATTENTION)
            raise Unsupported(f"{name or 'the model'} is a {qualified}; quantised key-value caches know {known}")
        hooks.append((module, _AttentionHook(config, module)))
    if not hooks:
        raise Unsupported(f"{type(model).__name__} has no attention module whose key-value cache could be quantised")
    for module, hook in hooks:
        module.register_forward_pre_hook(hook, with_kwargs=True)
        module.register_forward_hook(_UseHook(), with_kwargs=True)
        if hook.key_hook is not None:
            _key_source(module).register_forward_hook(hook.key_hook)
    return model


def detach_kv_quantization(model: nn.Module) -> nn.Module:
    """Undo `attach_kv_quantization`, in place.

    Args:
        model: that it changed.

    Returns:
        The model.

    Raises:
        UsageError: there is nothing to undo.
    """
    if attached_kv_config(model) is None:
        raise UsageError("the model's key-value cache is not quantised; attach_kv_quantization(model, config) does it")
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _AttentionHook)]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, _KeyHook | _UseHook)]:
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
    return model


def attached_kv_config(model: nn.Module) -> KVConfig | None:
    """The configuration under which a model's keys and values are, or None.

    Args:
        model: any module.
    """
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _AttentionHook):
                return hook.config
    return None


def _key_source(attention: nn.Module) -> nn.Module:
    """The module whose output is the keys just before rotation: Qwen3 normalises them after the projection."""
    return attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj  # type: ignore[return-value]

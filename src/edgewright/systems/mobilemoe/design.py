"""Mixture-of-experts shapes for a device: memory and compute of every candidate, ranked by the predicted loss.

Source: MobileMoE, arXiv 2605.27358. Minimise Loss(N_active, D, E) subject to
    inference 2 N_active FLOPs a token,  training 6 N_active D FLOPs,
    memory = b_w / 8 * N_total + b_kv / 8 * 2 T L G h     (T context, L layers, G key heads of width h)
Active parameters are everything that a token touches: attention, router, norms, chosen and shared experts, and the
tied table once, as the head (the looked-up row is not counted again).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from edgewright.errors import UsageError
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.systems.mobilemoe.layer import MoEConfig
from edgewright.systems.mobilemoe.presets import decoder_fields
from edgewright.systems.mobilemoe.scaling_law import ScalingLaw

WIDTHS = range(256, 2049, 64)
ASPECTS = (32, 40, 48)  # width over layers; the paper's three models lie near 40
SPARSITIES = (1, 2, 4, 8, 16, 32)
GRANULARITY = 8
HEAD = 64


@dataclass(frozen=True)
class MoEPlan:
    """One candidate. n_total, n_active: parameters; memory_bytes: weights and cache at the context; E = 1: dense."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    E: int
    vocab: int
    n_total: int
    n_active: int
    memory_bytes: int
    flops_per_token: int
    loss: float

    @property
    def moe(self) -> MoEConfig | None:
        return MoEConfig.split(4 * self.hidden, self.E, GRANULARITY) if self.E > 1 else None

    def config(self) -> EdgeDecoderConfig:
        """The candidate as a model that can be built."""
        fields = decoder_fields(self.hidden, self.layers, self.heads, self.key_heads, self.moe, self.vocab)
        return EdgeDecoderConfig(**fields)

    def text(self) -> str:
        return (
            f"d={self.hidden} L={self.layers} E={self.E}: {self.n_total / 1e6:.0f}M parameters, "
            f"{self.n_active / 1e6:.0f}M active, {self.memory_bytes / 1e9:.2f} GB, "
            f"{self.flops_per_token / 1e6:.0f} MFLOPs a token, predicted loss {self.loss:.4f}"
        )


def moe_parameters(config: EdgeDecoderConfig) -> tuple[int, int]:
    """(total, active) parameters of a decoder of attention with plain or sparse feed-forwards, all layers stored."""
    hidden, head = config.hidden_size, config.head_dim
    assert isinstance(config.ffn_types, list) and head is not None
    total = active = config.vocab_size * hidden + hidden
    if not config.tie_word_embeddings:
        total += config.vocab_size * hidden
    moe = MoEConfig(**config.moe or {}) if "moe" in config.ffn_types else None
    for layer, kind in enumerate(config.ffn_types):
        if kind not in ("mlp", "moe"):
            raise UsageError(f"layer {layer} has ffn_types={kind!r}; only 'mlp' and 'moe' are counted here")
        heads, groups = (config.of_layer(name, layer) for name in ("num_attention_heads", "num_key_value_heads"))
        width = config.of_layer("intermediate_size", layer)
        both = _layer(hidden, head, heads, groups, moe if kind == "moe" else None, width)
        extra = 2 * head if config.qk_norm == "rms" else 0
        if config.qkv_bias:
            extra += head * (heads + 2 * groups)
        total, active = total + both[0] + extra, active + both[1] + extra
    return total, active


def _layer(hidden: int, head: int, heads: int, groups: int, moe: MoEConfig | None, width: int) -> tuple[int, int]:
    """(total, active) parameters of one layer: attention, two norms, feed-forward."""
    common = 2 * hidden * head * (heads + groups) + 2 * hidden
    if moe is None:
        common += 3 * hidden * width
        return common, common
    common += 3 * hidden * moe.shared_size + moe.num_experts * hidden
    one = 3 * hidden * moe.expert_size
    return common + moe.num_experts * one, common + moe.top_k * one


def moe_memory(
    config: EdgeDecoderConfig, context: int, weight_bits: float = 4.5, kv_bits: float = 8.0
) -> tuple[float, float]:
    """(bytes of weights, bytes of key-value cache). weight_bits 4.5: codes of 4 with a 16-bit scale for 32 of them."""
    keys = sum(config.of_layer("num_key_value_heads", layer) for layer in range(config.num_hidden_layers or 0))
    cache = kv_bits / 8 * 2 * context * keys * (config.head_dim or 0)
    return weight_bits / 8 * moe_parameters(config)[0], cache


def design_under_budget(
    memory_gb: float,
    flops_per_token: float,
    context: int = 8192,
    vocab: int = 128_256,
    weight_bits: float = 4.5,
    kv_bits: float = 8.0,
    tokens: float = 500e9,
    train_flops: float | None = None,
    law: ScalingLaw | None = None,
    count: int = 10,
) -> list[MoEPlan]:
    """The `count` best shapes within memory_gb (1e9 bytes, weights and cache) and flops_per_token (2 * active).

    tokens: training tokens; with train_flops each candidate gets as many as that pays for. law: the published one by
    default, which was fitted at 0.3 to 0.9 billion active parameters; smaller ones are an extrapolation. Raises
    UsageError when nothing fits; the message names the closest candidates.
    """
    numbers = {"memory_gb": memory_gb, "flops_per_token": flops_per_token, "context": context, "vocab": vocab}
    numbers |= {"weight_bits": weight_bits, "kv_bits": kv_bits, "tokens": tokens, "count": count}
    numbers |= {} if train_flops is None else {"train_flops": train_flops}
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise UsageError(f"{name}={value}; it must be positive and finite")
    law = law or ScalingLaw.published()
    plans = [_plan(*shape, context, vocab, weight_bits, kv_bits, tokens, train_flops, law) for shape in _shapes()]
    fitting = [p for p in plans if p.memory_bytes <= memory_gb * 1e9 and p.flops_per_token <= flops_per_token]
    if not fitting:
        excess = {id(p): max(p.memory_bytes / memory_gb / 1e9, p.flops_per_token / flops_per_token) for p in plans}
        closest = sorted(plans, key=lambda p: (excess[id(p)], p.loss))[:3]
        names = "; ".join(p.text() for p in closest)
        raise UsageError(
            f"no shape fits {memory_gb:g} GB and {flops_per_token / 1e6:g} MFLOPs a token at a context of {context} "
            f"and a vocabulary of {vocab}; the closest: {names}"
        )
    return sorted(fitting, key=lambda p: (p.loss, p.memory_bytes))[:count]


def _shapes() -> Iterator[tuple[int, int, int]]:
    """(width, layers, E), each once."""
    for hidden in WIDTHS:
        for layers in dict.fromkeys(max(4, round(hidden / aspect)) for aspect in ASPECTS):
            for sparsity in SPARSITIES:
                yield hidden, layers, sparsity


def _plan(
    hidden: int,
    layers: int,
    E: int,
    context: int,
    vocab: int,
    weight_bits: float,
    kv_bits: float,
    tokens: float,
    train_flops: float | None,
    law: ScalingLaw,
) -> MoEPlan:
    heads = hidden // HEAD
    groups = math.gcd(heads, 4)
    moe = MoEConfig.split(4 * hidden, E, GRANULARITY) if E > 1 else None
    once = int(vocab) * hidden + hidden
    total, active = (once + layers * part for part in _layer(hidden, HEAD, heads, groups, moe, 4 * hidden))
    memory = weight_bits / 8 * total + kv_bits / 8 * 2 * context * layers * groups * HEAD
    billions = (tokens if train_flops is None else train_flops / (6 * active)) / 1e9
    loss = law.loss(active / 1e9, billions, min(E, law.E_max))
    return MoEPlan(
        hidden, layers, heads, groups, E, int(vocab), total, active, math.ceil(memory), 2 * active, float(loss)
    )

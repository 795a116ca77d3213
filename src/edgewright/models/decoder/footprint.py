"""What a decoder costs before it exists: weights, bytes, cache, arithmetic, and bytes read for each decoded token.

Counted on a model without memory (torch's meta device), so that no formula can disagree with the classes. A block that
runs twice is stored once and counts twice in arithmetic and traffic; of experts only those in use are read; a lookup
table gives one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from edgewright.errors import UsageError
from edgewright.models.decoder.config import ATTENTION, EdgeDecoderConfig
from edgewright.models.decoder.model import EdgeDecoderForCausalLM

VECTOR_BITS = 32  # norms and biases stay as they are in every file
STATE_BITS = 32  # of a recurrent layer


@dataclass(frozen=True)
class Footprint:
    """Numbers of weights; bytes; operations (a multiplication and an addition are two).

    stored, executed, active: weights in the file, of all runs of all blocks, and those that one token meets (table
    once, as the head). embedding_share: of stored. kv_bytes_per_token: while no window is full. cache_bytes: at
    `context`, recurrent states included. prefill_flops, decode_flops: for one token, in a prompt of `context` and
    behind one. read_bytes: weights and cache that decoding one token at `context` reads.
    """

    stored: int
    executed: int
    active: int
    embedding_share: float
    weight_bytes: int
    kv_bytes_per_token: float
    cache_bytes: int
    prefill_flops: float
    decode_flops: float
    read_bytes: int
    context: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def tokens_per_second(self, bytes_per_second: float) -> float:
        """The most that decoding can reach where memory gives `bytes_per_second`."""
        return bytes_per_second / self.read_bytes


def footprint(
    model: EdgeDecoderForCausalLM | EdgeDecoderConfig,
    weight_bits: float = 16,
    kv_bits: float = 16,
    context: int = 2048,
    embedding_bits: float | None = None,
) -> Footprint:
    """Cost of a model or of a configuration.

    weight_bits: of each weight of a matrix, steps included (Q4_0: 4.5, Q8_0: 8.5); embedding_bits: of table and head,
    the same where None. Raises UsageError for bits or a context that are not positive.
    """
    embedding_bits = weight_bits if embedding_bits is None else embedding_bits
    for name, value in (("weight_bits", weight_bits), ("kv_bits", kv_bits), ("embedding_bits", embedding_bits)):
        if not 0 < value <= 64:
            raise UsageError(f"{name}={value}; give the bits of one number, from 1 to 64")
    if context < 1:
        raise UsageError(f"context={context}; give a number of tokens from 1 up")
    config = model if isinstance(model, EdgeDecoderConfig) else model.config
    with torch.device("meta"):
        empty = EdgeDecoderForCausalLM(config)
    assert config.share_map is not None
    blocks = [_block(block, config) for block in empty.model.layers]
    table, head = config.vocab_size * config.hidden_size, 0 if config.tie_word_embeddings else config.vocab_size
    tables = table + head * config.hidden_size
    stored = sum(block.matrix + block.vector for block in blocks) + tables + config.hidden_size
    runs = [blocks[block] for block in config.share_map]
    matrix_bytes = weight_bits / 8 * sum(block.matrix for block in blocks) + embedding_bits / 8 * tables
    vectors = sum(block.vector for block in blocks) + config.hidden_size
    read = weight_bits / 8 * sum(run.read for run in runs) + embedding_bits / 8 * table
    read += VECTOR_BITS / 8 * (sum(run.vector for run in runs) + config.hidden_size)
    cache = _cache(config, kv_bits, context)
    flops = 2.0 * (sum(run.multiplied for run in runs) + table)
    return Footprint(
        stored=stored,
        executed=sum(run.matrix + run.vector for run in runs) + tables + config.hidden_size,
        active=sum(run.read + run.vector for run in runs) + table + config.hidden_size,
        embedding_share=tables / stored,
        weight_bytes=round(matrix_bytes + VECTOR_BITS / 8 * vectors),
        kv_bytes_per_token=_cache(config, kv_bits, 1, states=False),
        cache_bytes=round(cache),
        prefill_flops=flops + _attention_flops(config, lambda mixer: _mean_seen(config, mixer, context)),
        decode_flops=flops + _attention_flops(config, lambda mixer: _seen(config, mixer, context)),
        read_bytes=round(read + cache),
        context=context,
    )


@dataclass(frozen=True)
class _Block:
    """Weights of a stored block: in matrices, in vectors, read for one token, multiplied for one token."""

    matrix: int
    vector: int
    read: int
    multiplied: int


def _block(block: nn.Module, config: EdgeDecoderConfig) -> _Block:
    matrix = vector = read = multiplied = 0
    lookups = {id(m.weight) for m in block.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in block.named_parameters():
        size = parameter.numel()
        if parameter.ndim < 2:
            vector += size
            continue
        matrix += size
        if id(parameter) in lookups:
            read += parameter.shape[1]
        elif ".experts." in name:
            used = size * (config.moe or {})["top_k"] // (config.moe or {})["num_experts"]
            read, multiplied = read + used, multiplied + used
        else:
            read, multiplied = read + size, multiplied + size
    return _Block(matrix, vector, read, multiplied)


def _cache(config: EdgeDecoderConfig, bits: float, context: int, states: bool = True) -> float:
    """Bytes kept for one sequence of `context` tokens."""
    total = 0.0
    assert isinstance(config.mixers, list) and config.head_dim is not None
    for layer, mixer in enumerate(config.mixers):
        if mixer in ATTENTION:
            kept = _seen(config, mixer, context)
            total += 2 * config.of_layer("num_key_value_heads", layer) * config.head_dim * kept * bits / 8
        elif mixer == "longhorn" and states:
            shape = {"expand": 2, "d_state": 16, "d_conv": 4, **(config.longhorn or {})}
            total += shape["expand"] * config.hidden_size * (shape["d_state"] + shape["d_conv"]) * STATE_BITS / 8
    return total


def _attention_flops(config: EdgeDecoderConfig, seen: Callable[[str], float]) -> float:
    """Operations of all scores and mixtures of one token that sees `seen(mixer)` positions."""
    assert isinstance(config.mixers, list) and config.head_dim is not None
    return sum(
        4 * config.of_layer("num_attention_heads", layer) * config.head_dim * seen(mixer)
        for layer, mixer in enumerate(config.mixers)
        if mixer in ATTENTION
    )


def _seen(config: EdgeDecoderConfig, mixer: str, position: int) -> int:
    """Positions that the token at `position`, counted from 1, attends to."""
    window = config.sliding_window if mixer == "sliding_attention" else None
    return position if window is None else min(position, window)


def _mean_seen(config: EdgeDecoderConfig, mixer: str, context: int) -> float:
    """The mean of `_seen` over a prompt of `context` tokens."""
    full = _seen(config, mixer, context)
    return (full * (full + 1) / 2 + (context - full) * full) / context

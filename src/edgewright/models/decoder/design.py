"""Decoders of a given size: for each depth the width that spends the same number of weights.

MobileLLM (arXiv 2402.14905, section 2.2) compares depths at equal parameters; this solves for the shapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from edgewright.errors import UsageError
from edgewright.models.decoder.config import EdgeDecoderConfig

GOLDEN = 8 / 3  # feed-forward over hidden width at which SwiGLU has as many weights as a plain layer of 4
TOLERANCE = 0.01
NARROW = 0.1  # what a head of 32 counts against a head of 64, in parts of those ratios
STEPS = (32, 8, 2, 1)  # widths of feed-forwards are multiples of the first that hits the size: 32 is a block of codes
LEAST_RATIO, MOST_RATIO = 1.0, 6.0  # of feed-forward over hidden width


def design_sweep(
    target: float,
    depths: Iterable[int],
    vocab_size: int,
    kv_ratio: int = 3,
    head_dim: int | None = None,
    layer_sharing: bool = False,
    **settings: Any,
) -> list[EdgeDecoderConfig]:
    """One configuration a depth, each of `target` stored weights within 1 %.

    kv_ratio: query heads for each key head (1: as many). head_dim: by default 64, or 32 and 16 for models too narrow
    for it. layer_sharing: each stored block runs twice, and `depths` counts stored blocks. settings: other fields of
    the configuration. Feed-forwards come as near to 8/3 of the hidden width as the size allows. Depths at which no
    width fits are left out; UsageError when that is all of them.
    """
    if target < 1 or kv_ratio < 1:
        raise UsageError(f"target={target:g}, kv_ratio={kv_ratio}; both are positive")
    depths = list(depths)
    if not depths or min(depths) < 1:
        raise UsageError(f"depths={depths}; give numbers of blocks from 1 up")
    found = [solve(target, depth, vocab_size, kv_ratio, head_dim, layer_sharing, **settings) for depth in depths]
    kept = [config for config in found if config is not None]
    if not kept:
        smallest = vocab_size * (head_dim or 16)
        raise UsageError(
            f"no decoder of {target:,.0f} weights with a vocabulary of {vocab_size:,} and {depths} blocks: the "
            f"smallest table alone has {smallest:,}; take fewer tokens, fewer blocks, or more weights"
        )
    return kept


def solve(
    target: float,
    depth: int,
    vocab_size: int,
    kv_ratio: int = 3,
    head_dim: int | None = None,
    layer_sharing: bool = False,
    **settings: Any,
) -> EdgeDecoderConfig | None:
    """The configuration of one depth, or None where no width comes within 1 %."""
    for step in STEPS:
        found = _solve(target, depth, vocab_size, kv_ratio, head_dim, layer_sharing, step, settings)
        if found is not None:
            return found
    return None


def _solve(
    target: float,
    depth: int,
    vocab_size: int,
    kv_ratio: int,
    head_dim: int | None,
    layer_sharing: bool,
    step: int,
    settings: dict[str, Any],
) -> EdgeDecoderConfig | None:
    best: tuple[float, EdgeDecoderConfig] | None = None
    tables = 1 if settings.get("tie_word_embeddings", True) else 2
    for width in (head_dim,) if head_dim else (64, 32, 16):
        for heads in range(1, 1 + int(target / (tables * vocab_size * width))):
            hidden, groups = heads * width, _groups(heads, kv_ratio)
            attention = 2 * hidden * hidden + 2 * hidden * groups * width
            fixed = tables * vocab_size * hidden + hidden + depth * (attention + 2 * hidden)
            feed_forward = round((target - fixed) / (3 * hidden * depth) / step) * step
            if not LEAST_RATIO <= feed_forward / hidden <= MOST_RATIO:
                continue
            total = fixed + depth * 3 * hidden * feed_forward
            distance = abs(feed_forward / hidden / GOLDEN - 1) + abs(groups * kv_ratio / heads - 1)
            distance += NARROW * (64 / width - 1)
            if abs(total / target - 1) <= TOLERANCE and (best is None or distance < best[0]):
                shape: dict[str, Any] = {
                    "vocab_size": vocab_size,
                    "hidden_size": hidden,
                    "intermediate_size": feed_forward,
                    "num_attention_heads": heads,
                    "num_key_value_heads": groups,
                    "head_dim": width,
                    "num_hidden_layers": depth * (1 + layer_sharing),
                    "share_map": [block for block in range(depth) for _ in range(2)] if layer_sharing else None,
                }
                best = distance, EdgeDecoderConfig(**{**shape, **settings})
    return None if best is None else best[1]


def _groups(heads: int, kv_ratio: int) -> int:
    """The divisor of `heads` that comes nearest to heads / kv_ratio."""
    divisors = [g for g in range(1, heads + 1) if heads % g == 0]
    return min(divisors, key=lambda g: (abs(g - heads / kv_ratio), -g))

"""The three published shapes of MobileMoE as configurations (arXiv 2605.27358, their architecture table)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

from edgewright.errors import UsageError
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.systems.mobilemoe.layer import MoEConfig


class Shape(NamedTuple):
    """hidden, executed layers, query heads; the rest follows: heads of 64, 4 key heads, feed-forward 4 * hidden."""

    hidden: int
    layers: int
    heads: int
    total: int  # parameters at the published vocabulary, head and table shared
    active: int  # parameters that a token touches: router and table included


VOCABULARY = 128_256
SHAPES = {
    "s": Shape(768, 20, 12, 1_263_373_056, 272_468_736),
    "m": Shape(1024, 26, 16, 2_818_388_992, 528_299_008),
    "l": Shape(1280, 32, 20, 5_325_702_400, 921_683_200),
}


def mobilemoe(size: str = "s", vocab_size: int = VOCABULARY, **changes: Any) -> EdgeDecoderConfig:
    """The configuration of MobileMoE S, M or L: E = 8, granularity 8, one shared expert in every layer.

    changes: further fields of EdgeDecoderConfig. Raises UsageError for another size.
    """
    shape = SHAPES.get(size.lower())
    if shape is None:
        raise UsageError(f"size={size!r}; MobileMoE has the sizes {', '.join(SHAPES)}")
    moe = MoEConfig.split(4 * shape.hidden, experts=8, granularity=8)
    return EdgeDecoderConfig(
        **{**decoder_fields(shape.hidden, shape.layers, shape.heads, 4, moe, vocab_size), **changes}
    )


def mobilemoe_config(name: str, layer_sharing: bool = False, **changes: Any) -> EdgeDecoderConfig:
    """The configuration of "moe-S", "moe-M" or "moe-L". Raises UsageError for another name, or for shared layers."""
    if layer_sharing:
        raise UsageError(f"{name} shares no layers; leave --share out, or take one of MobileLLM's shapes")
    return mobilemoe(name.partition("-")[2], **changes)


def decoder_fields(
    hidden: int, layers: int, heads: int, key_heads: int, moe: MoEConfig | None, vocab_size: int
) -> dict[str, Any]:
    """Fields of an EdgeDecoderConfig in MobileMoE's manner: queries and keys normalised, base 5e5, 8192 positions.

    moe None is the dense model of the same block.
    """
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": 64,
        "ffn_types": "mlp" if moe is None else "moe",
        "moe": None if moe is None else asdict(moe),
        "qk_norm": "l2",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "max_position_embeddings": 8192,
    }

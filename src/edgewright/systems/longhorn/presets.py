"""Longhorn language models by name: 24 blocks of width 768 are the paper's 120M; the others follow Mamba's ladder."""

from __future__ import annotations

from typing import Any

from edgewright.errors import UsageError
from edgewright.models.decoder.config import EdgeDecoderConfig

# name: (hidden_size, blocks). A block is a mixer alone, so that N layers of a transformer are 2 N blocks.
LONGHORN_SIZES = {"120M": (768, 24), "350M": (1024, 48), "1.3B": (2048, 48)}
VOCABULARY = 50257  # GPT-2's
CONTEXT = 1024
HEAD_DIM = 64  # only for attention layers that are mixed in


def longhorn_config(name: str, **changes: Any) -> EdgeDecoderConfig:
    """The configuration of a pure Longhorn model: no feed-forwards, head tied to the table, vocabulary padded to 8.

    changes: fields of EdgeDecoderConfig; `mixers` with "full_attention" among them gives a hybrid, `longhorn` the
    fields of LonghornConfig. Raises UsageError for an unknown name.
    """
    if name not in LONGHORN_SIZES:
        raise UsageError(f"no Longhorn model is called {name!r}; choose from {', '.join(LONGHORN_SIZES)}")
    width, blocks = LONGHORN_SIZES[name]
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": max(1, width // HEAD_DIM),
        "mixers": "longhorn",
        "ffn_types": "none",
        "max_position_embeddings": CONTEXT,
        **changes,
    }
    return EdgeDecoderConfig(**{**fields, "vocab_size": padded_vocabulary(fields["vocab_size"])})


def padded_vocabulary(size: int) -> int:
    """The next multiple of 8."""
    return -(-size // 8) * 8

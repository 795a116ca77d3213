"""Small STEM decoders for the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import EdgeDecoderForCausalLM, new_decoder
from edgewright.systems.stem.layer import StemConfig, with_stem

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
}


def config(**changes: Any) -> EdgeDecoderConfig:
    return EdgeDecoderConfig(**{**SHAPE, **changes})


def dense(seed: int = 0, **changes: Any) -> EdgeDecoderForCausalLM:
    return new_decoder(config(**changes), seed).eval()


def stem(seed: int = 0, layers: Any = (1, 3), replace: str = "up", **changes: Any) -> Any:
    kind = StemConfig(replace, init="match")
    return new_decoder(with_stem(config(**changes), layers, kind), seed).eval()


def tokens(batch: int = 2, length: int = 12, seed: int = 0, vocabulary: int = 64) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits

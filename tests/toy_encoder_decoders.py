"""Tiny random encoder-decoders of four families, for tests."""

from __future__ import annotations

from typing import Any

import torch


def fixed_attention(family: str) -> bool:
    """Whether the family's attention cannot be chosen in this version of transformers, and so not be quantised."""
    from transformers.models.t5 import modeling_t5

    return family.startswith("t5") and not hasattr(modeling_t5, "ALL_ATTENTION_FUNCTIONS")


# Those whose attention can be quantised.
FAMILIES = tuple(family for family in ("bart", "mbart", "marian", "t5", "t5-gated") if not fixed_attention(family))


def tiny_encoder_decoder(family: str = "bart", seed: int = 0, **overrides: Any) -> Any:
    """2 + 2 layers, width 32, 4 heads, vocabulary 64, eager attention; mbart and marian scale their embeddings."""
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        MarianConfig,
        MarianMTModel,
        MBartConfig,
        MBartForConditionalGeneration,
        T5Config,
        T5ForConditionalGeneration,
    )

    common = {"vocab_size": 64, "d_model": 32, "pad_token_id": 0, "eos_token_id": 2, "attn_implementation": "eager"}
    bart = {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
        "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
        "init_std": 0.5,  # spread logits: near ties would hide what is compared
    }
    t5 = {"d_kv": 8, "num_heads": 4, "num_layers": 2, "d_ff": 64, "decoder_start_token_id": 0}
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "bart": (BartForConditionalGeneration, BartConfig, bart),
        "mbart": (MBartForConditionalGeneration, MBartConfig, {**bart, "scale_embedding": True}),
        "marian": (MarianMTModel, MarianConfig, {**bart, "scale_embedding": True}),
        "t5": (T5ForConditionalGeneration, T5Config, t5),
        "t5-gated": (T5ForConditionalGeneration, T5Config, {**t5, "feed_forward_proj": "gated-gelu"}),
    }
    model, config, settings = kinds[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model(config(**{**common, **settings, **overrides})).eval()


def tiny_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two sentences of seven and five tokens, with labels of which the last two of the second do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (2, 7), generator=generator)
    labels = torch.randint(3, 64, (2, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:], ids[1, 5:], labels[1, 4:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}

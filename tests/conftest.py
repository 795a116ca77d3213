"""Shared fixtures: a tiny random Llama for exactness, the real SmolLM2-135M for behaviour."""

from __future__ import annotations

import os
import signal

# A shell that starts the tests in the background has them ignore Ctrl-C; the tests of interrupts need it back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


def make_tiny_llama(seed: int = 0, **overrides):
    """A random float32 LlamaForCausalLM: 2 layers, hidden 64, 4 query and 2 key heads, vocabulary 256, tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    settings.update(overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**settings))
    return model.eval()


@pytest.fixture
def tiny_llama():
    return make_tiny_llama()


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of the bundled SmolLM2-135M-Instruct, shared: tests must not modify it."""
    import edgewright

    return edgewright.load("smollm2-135m")

"""A small random Llama for tests that need a language model but not its sense."""

from __future__ import annotations

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


def make_byte_tokenizer():
    """A tokenizer whose 256 tokens are the bytes, for a tiny Llama's vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=alphabet[1], eos_token=alphabet[2])

"""Small GGUF files written by the reference writer, from random transformers models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<user>"]
MERGES = ["t h", "th e", "Ġ the", "1 2", "12 3", "Ġ Ġ", "o n", "i n", "in g", "Ġ c", "' t"]


def tiny_vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, token types and merges: four specials, the 256 bytes, and the results of the merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*SPECIALS, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    return tokens, [3, 3, 3, 4] + [1] * (len(tokens) - 4), MERGES


def tiny_model(architecture: str = "llama", **overrides):
    """A random two-layer model of the family with the vocabulary above."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": len(tiny_vocabulary()[0]),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    settings.update(overrides)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings)).eval()
        for name, parameter in model.named_parameters():  # norms of 1 and biases of 0 would hide a mix-up
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
            else:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def gguf_state(model) -> dict[str, np.ndarray]:
    """The model's tensors under their GGUF names, query and key rows of Llama models in pair order."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    state = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if config.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            halves = values.reshape(heads, 2, -1, *values.shape[1:])
            values = np.ascontiguousarray(np.moveaxis(halves, 1, 2)).reshape(values.shape)
        state[names.get_name(name, (".weight", ".bias")) or name] = values
    return state


@pytest.fixture
def write_gguf(tmp_path) -> Callable[..., Path]:
    """write(model, name=..., pre=..., quantize={tensor: type}, extra={key: value}, tensors={...}) -> path."""

    def write(model, name="tiny.gguf", pre="gpt-2", quantize=None, extra=None, tensors=None, vocabulary=None) -> Path:
        config, path = model.config, tmp_path / name
        writer = gguf.GGUFWriter(path, config.model_type)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        tokens, types, merges = vocabulary or tiny_vocabulary()
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(0)
        writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
        for key, value in (extra or {}).items():
            {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[
                type(value)
            ](key, value)
        for key, values in {**gguf_state(model), **(tensors or {})}.items():
            kind = (quantize or {}).get(key, gguf.GGMLQuantizationType.F32)
            writer.add_tensor(key, gguf.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    from edgewright.io.bundled import bundled_path

    return bundled_path("smollm2-135m")


@pytest.fixture
def tiny():
    """The factory of random models, as a fixture because test folders are not packages."""
    return tiny_model

"""A random Llama of a few kilobytes as a GGUF file that llama.cpp runs, for tests of everything that reads files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgewright.runtime.child_check import GGUF_RUN, vouch

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH, HIDDEN, HEADS, LAYERS = 64, 128, 2, 2


def byte_tokens() -> list[str]:
    """The 256 tokens of a byte-level vocabulary, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def write_toy(path: Path, *, tied: bool = True, seed: int = 0, **overrides: Any) -> Path:
    """Write the toy; `overrides` replace metadata by key, with __ for a dot (None leaves a key out)."""
    rng = np.random.default_rng(seed)
    tokens = [*byte_tokens(), "he", "<|im_start|>", "<|im_end|>"]
    count = len(tokens)
    writer = gguf.GGUFWriter(str(path), "llama")
    values: dict[str, Any] = {
        "llama.block_count": LAYERS,
        "llama.context_length": 4096,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": HIDDEN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": WIDTH // HEADS,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (count - 2) + [3, 3],
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.bos_token_id": count - 2,
        "tokenizer.ggml.eos_token_id": count - 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    values.update({key.replace("__", "."): value for key, value in overrides.items()})
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)

    def weights(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(0, 0.3, shape).astype(np.float32))

    weights("token_embd.weight", count, WIDTH)
    if not tied:
        weights("output.weight", count, WIDTH)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for i in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(WIDTH, np.float32))
        for name, rows in (("attn_q", WIDTH), ("attn_k", WIDTH // HEADS), ("attn_v", WIDTH // HEADS)):
            weights(f"blk.{i}.{name}.weight", rows, WIDTH)
        weights(f"blk.{i}.attn_output.weight", WIDTH, WIDTH)
        weights(f"blk.{i}.ffn_gate.weight", HIDDEN, WIDTH)
        weights(f"blk.{i}.ffn_up.weight", HIDDEN, WIDTH)
        weights(f"blk.{i}.ffn_down.weight", WIDTH, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    vouch(*GGUF_RUN, path)
    return path


def write_toy_gpt2(path: Path, positions: int = 64) -> Path:
    """A random GPT-2 of one layer, whose positions are rows of a table; not vouched for."""
    rng = np.random.default_rng(0)
    tokens = [*byte_tokens(), "he"]
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_context_length(positions)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["h e"])
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(tokens), WIDTH),
        "position_embd.weight": (positions, WIDTH),
    }
    for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        shapes |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}
    layers = {"attn_qkv": (3 * WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH)}
    layers |= {"ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)}
    for name, shape in layers.items():
        shapes |= {f"blk.0.{name}.weight": shape, f"blk.0.{name}.bias": shape[:1]}
    for name, size in shapes.items():
        writer.add_tensor(name, rng.normal(0, 0.1, size).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

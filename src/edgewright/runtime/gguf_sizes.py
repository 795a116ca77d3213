"""Sizes in a GGUF header that a runtime divides by or allocates: checked before native code sees the file."""

from __future__ import annotations

from typing import Any

from edgewright.errors import FormatError
from edgewright.io.gguf.reader import GGUFFile

# Largest value that any published model comes near, by key under the architecture's name. All must be at least 1.
LIMITS = {
    "block_count": 1024,
    "embedding_length": 1 << 17,
    "feed_forward_length": 1 << 20,
    "context_length": 1 << 30,
    "vocab_size": 1 << 22,
    "attention.head_count": 4096,
    "attention.head_count_kv": 4096,
    "attention.key_length": 1 << 14,
    "attention.value_length": 1 << 14,
    "rope.dimension_count": 1 << 14,
    "expert_count": 4096,
    "expert_used_count": 4096,
}
REQUIRED = ("block_count", "embedding_length", "attention.head_count")
MAY_BE_ZERO = ("expert_count", "expert_used_count", "feed_forward_length", "attention.head_count_kv")


def check_sizes(file: GGUFFile) -> None:
    """Raise FormatError unless the sizes in the header are whole, within limits, and fit each other and the tensors."""
    data = file.metadata
    architecture = data.get("general.architecture")
    if not isinstance(architecture, str):
        raise FormatError(f"{file.path} does not say which architecture it holds (general.architecture)")
    sizes: dict[str, Any] = {}
    for key, limit in LIMITS.items():
        name = f"{architecture}.{key}"
        value = data.get(name)
        if value is None:
            if key in REQUIRED:
                raise FormatError(f"{file.path} lacks {name}")
            continue
        least = 0 if key in MAY_BE_ZERO or isinstance(value, list) else 1
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bool) or not isinstance(one, int) or not least <= one <= limit:
                raise FormatError(f"{file.path}: {name} is {one!r}, allowed are {least} to {limit}")
        sizes[key] = value
    _check_heads(file, sizes)
    _check_vocabulary(file, sizes)


def learned_positions(file: GGUFFile) -> int | None:
    """How many positions have a row in a table; None for models that compute them. llama.cpp aborts on any further."""
    table = file.tensors.get("position_embd.weight")
    return table.shape[0] if table is not None else None


def cache_bytes(file: GGUFFile, context: int) -> int:
    """At most so many bytes of keys and values llama.cpp keeps for a context, of a file that `check_sizes` passed."""

    def most(key: str, otherwise: int) -> int:
        value = file.metadata.get(f"{file.metadata['general.architecture']}.{key}", otherwise)
        return max(value, default=otherwise) if isinstance(value, list) else int(value)

    width, heads = most("embedding_length", 1), most("attention.head_count", 1)
    groups = most("attention.head_count_kv", heads) or heads
    sizes = sum(most(f"attention.{kind}_length", -(-width // heads)) for kind in ("key", "value"))
    return 2 * most("block_count", 1) * groups * sizes * (context + 256)


def _check_heads(file: GGUFFile, sizes: dict[str, Any]) -> None:
    heads, groups, width = (
        sizes["attention.head_count"],
        sizes.get("attention.head_count_kv"),
        sizes["embedding_length"],
    )
    if isinstance(heads, int) and isinstance(groups, int) and groups and heads % groups:
        raise FormatError(f"{file.path}: {heads} attention heads do not divide by {groups} key-value heads")
    if isinstance(heads, int) and isinstance(width, int) and "attention.key_length" not in sizes and width % heads:
        raise FormatError(f"{file.path}: a width of {width} does not divide by {heads} attention heads")
    if sizes.get("expert_used_count", 0) > sizes.get("expert_count", 0):
        raise FormatError(f"{file.path} uses {sizes['expert_used_count']} experts of {sizes.get('expert_count', 0)}")


def _check_vocabulary(file: GGUFFile, sizes: dict[str, Any]) -> None:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    embedding = file.tensors.get("token_embd.weight")
    if not isinstance(tokens, list) or not tokens:
        raise FormatError(f"{file.path} has no vocabulary (tokenizer.ggml.tokens): a text model cannot run without")
    if not all(isinstance(token, str) for token in tokens):
        raise FormatError(f"{file.path}: tokenizer.ggml.tokens holds other things than texts")
    written = [token for token in tokens if token]  # llama.cpp names the empty ones itself
    if len(set(written)) < len(written) or any("\0" in token for token in written):
        raise FormatError(f"{file.path}: tokenizer.ggml.tokens holds the same text twice, or one with a zero byte")
    if embedding is None:
        raise FormatError(f"{file.path} has no tensor token_embd.weight")
    if embedding.shape != (len(tokens), sizes["embedding_length"]):
        raise FormatError(
            f"{file.path}: token_embd.weight has shape {embedding.shape}, "
            f"the header says {(len(tokens), sizes['embedding_length'])}"
        )
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        values = file.metadata.get(key)
        if values is not None and (not isinstance(values, list) or len(values) != len(tokens)):
            raise FormatError(f"{file.path}: {key} does not have one entry for each of {len(tokens)} tokens")
    for key, value in file.metadata.items():
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
            if not isinstance(value, int) or not (0 <= value < len(tokens) or value == 2**32 - 1):  # -1: none
                raise FormatError(f"{file.path}: {key} is {value!r}, the vocabulary has {len(tokens)} tokens")

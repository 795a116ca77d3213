"""The tokens at which an answer ends: of a model and its tokenizer, and as a GGUF file names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The keys of a GGUF file with one end token each, in the order in which they are filled.
GGUF_ENDS = ("eos", "eot", "eom")
# Ours, a list: all end tokens, where they are more than one. llama.cpp itself does not read it.
ALL_ENDS = "edgewright.end-token-ids"


def end_tokens(model: Any, tokenizer: Any = None) -> list[int]:
    """Ids at which `generate` of transformers stops, and the tokenizer's own end token; each once, in this order."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = getattr(model.config, "eos_token_id", None) if ends is None else ends
    listed = list(ends) if isinstance(ends, list | tuple) else [ends]
    listed.append(getattr(tokenizer, "eos_token_id", None))
    return list(dict.fromkeys(int(token) for token in listed if token is not None))


def gguf_end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """Ids of the end tokens that the header of a GGUF file names, each once."""
    more = metadata.get(ALL_ENDS)
    listed = [
        *(more if isinstance(more, list) else []),
        *(metadata.get(f"tokenizer.ggml.{r}_token_id") for r in GGUF_ENDS),
    ]
    return list(dict.fromkeys(token for token in listed if type(token) is int and 0 <= token < 2**31))

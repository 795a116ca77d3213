"""Where the bytes are: parameters and bytes by part, for a torch model and for a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from edgewright.io.gguf.reader import GGUFFile

PARTS = ("embedding", "attention", "mlp", "norm", "head", "other", "metadata")

# First match wins, so "norm" stands before the part that the norm belongs to (attn_norm, ffn_norm).
_PATTERNS = tuple(
    (part, re.compile(pattern, re.IGNORECASE))
    for part, pattern in (
        ("norm", r"norm|(^|\.)ln_?\d*(\.|$)"),
        ("head", r"(^|\.)(lm_head|output|cls|score)\.(weight|bias|codes|step|base|inner|original)"),
        ("embedding", r"embed|embd|(^|\.)wte|(^|\.)wpe"),
        ("attention", r"attn|attention|(^|\.)[qkvo]_proj"),
        ("mlp", r"mlp|ffn|feed_forward|(^|\.)(intermediate|fc\d|(gate|up|down)_proj)|\.output\.dense"),
    )
)


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of weights; weights that two modules share (tied embeddings) count once."""

    total: int
    trainable: int
    embedding: int

    @property
    def without_embedding(self) -> int:
        return self.total - self.embedding


def parameter_counts(model: torch.nn.Module) -> ParameterCounts:
    """Count the weights of `model`: plain parameters, and the integer codes of packed layers as one weight each."""
    total = trainable = embedding = 0
    for name, tensor, is_parameter in _unique_tensors(model):
        if is_parameter or name.rsplit(".", 1)[-1] == "codes":
            total += tensor.numel()
            trainable += tensor.numel() if tensor.requires_grad else 0
            embedding += tensor.numel() if part_of(name) == "embedding" else 0
    return ParameterCounts(total, trainable, embedding)


def bytes_by_part(source: torch.nn.Module | GGUFFile | str | Path) -> dict[str, int]:
    """Bytes of every part (`PARTS`): of a model in memory (parameters and saved buffers, shared storage once), or of a
    GGUF file, whose parts add up to the file's size (headers and padding are "metadata").
    """
    parts = dict.fromkeys(PARTS, 0)
    if hasattr(source, "named_parameters"):
        for name, tensor, _ in _unique_tensors(source):
            parts[part_of(name)] += tensor.numel() * tensor.element_size()
        return parts
    file = _gguf(source)
    for name, entry in file.tensors.items():
        parts[part_of(name)] += entry.nbytes
    parts["metadata"] = file.size - sum(parts.values())
    return parts


def gguf_parameters(source: GGUFFile | str | Path) -> int:
    """Number of weights stored in a GGUF file."""
    file = _gguf(source)
    return sum(_elements(tensor.shape) for tensor in file.tensors.values())


def bits_per_weight(source: GGUFFile | str | Path) -> float:
    """Bits of tensor data per stored weight; the file's metadata (tokenizer and so on) does not count."""
    file = _gguf(source)
    return sum(tensor.nbytes for tensor in file.tensors.values()) * 8 / max(gguf_parameters(file), 1)


def bytes_per_decoded_token(source: GGUFFile | str | Path) -> int:
    """Bytes of weights that decoding one token must read: every tensor once, with two exceptions.

    A token embedding that is not also the output head gives one row only, and of a mixture of experts only the experts
    in use are read. The key-value cache is not counted: it is small at the short contexts of a benchmark.
    """
    file = _gguf(source)
    architecture = file.metadata.get("general.architecture", "")
    experts = file.metadata.get(f"{architecture}.expert_count") or 0
    used = file.metadata.get(f"{architecture}.expert_used_count") or experts
    total = 0
    for name, tensor in file.tensors.items():
        if name == "token_embd.weight" and "output.weight" in file.tensors:
            total += tensor.nbytes // max(tensor.shape[0], 1)
        elif "_exps." in name and experts:
            total += tensor.nbytes * used // experts
        else:
            total += tensor.nbytes
    return total


def part_of(name: str) -> str:
    """The part of `PARTS` that a parameter or tensor belongs to, by the names that Hugging Face and GGUF use."""
    return next((part for part, pattern in _PATTERNS if pattern.search(name)), "other")


def _unique_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(name, tensor, is it a parameter) of all that the model stores; a storage that two names share comes once."""
    seen: set[object] = set()
    saved = set(model.state_dict(keep_vars=True))
    named = [(name, tensor, True) for name, tensor in model.named_parameters()]
    named += [(name, tensor, False) for name, tensor in model.named_buffers() if name in saved]
    for name, tensor, is_parameter in named:
        # a meta tensor has no address: only the object itself can be shared
        key = (tensor.device, tensor.data_ptr(), tensor.numel()) if tensor.device.type != "meta" else id(tensor)
        if tensor.numel() and key not in seen:
            seen.add(key)
            yield name, tensor, is_parameter


def _gguf(source: Any) -> GGUFFile:
    from edgewright.io.gguf.reader import GGUFFile

    return source if isinstance(source, GGUFFile) else GGUFFile(source)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count

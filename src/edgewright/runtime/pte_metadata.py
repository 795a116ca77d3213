"""What travels inside our .pte files beside the weights: names and shapes, or tokenizer, chat template and end tokens.

It is the result of a method of the program, `edgewright`: a uint8 tensor holding zlib-compressed JSON. One file is all
there is to copy, and ExecuTorch's other runners ignore a method that they do not call.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.errors import FormatError, UsageError
from edgewright.io.end_tokens import end_tokens

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "edgewright"
FORMAT = 1
LARGEST = 1 << 28  # bytes of JSON that are unpacked


def pack(metadata: dict[str, Any]) -> Tensor:
    """Metadata as the uint8 tensor that the method returns."""
    import numpy as np
    import torch

    data = zlib.compress(json.dumps(metadata, ensure_ascii=False).encode("utf-8"), 9)
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def unpack(data: bytes, path: object) -> dict[str, Any]:
    """The metadata of that tensor. Raises FormatError for anything that `pack` did not write."""
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(data, LARGEST)
        if unpacker.unconsumed_tail or not unpacker.eof:
            raise ValueError("too long or cut off")
        value = json.loads(text.decode("utf-8"))
    except (zlib.error, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the description inside the file is damaged: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise FormatError(f"{path}: the description inside the file is none of format {FORMAT}")
    return value


MAX_VOCABULARY, MAX_CONTEXT = 1 << 22, 1 << 20


@dataclass(frozen=True)
class StoredWeights:
    """Weights of a file and their bytes, codes with their steps; token_bytes: those that decoding one token reads."""

    count: int
    bytes: int
    token_bytes: int | None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.count


def weights_in(metadata: Mapping[str, Any], path: object) -> StoredWeights | None:
    """What the metadata say about the weights; None in files that say nothing. Raises FormatError for nonsense."""
    told = metadata.get("weights")
    if told is None:
        return None
    try:
        count, size, read = int(told["count"]), int(told["bytes"]), told.get("token_bytes")
        found = StoredWeights(count, size, None if read is None else int(read))
        if not (0 < count < 1 << 60 and 0 < size < 1 << 60 and 0 < (found.token_bytes or 1) <= size):
            raise ValueError(f"{count} weights in {size} bytes")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FormatError(f"{path}: the description of its weights is damaged: {error}") from error
    return found


def language_metadata(model: Any, tokenizer: Any, context: int) -> dict[str, Any]:
    """Of a causal language model of transformers; tokenizer None leaves the file without text."""
    config = model.config
    head = model.get_output_embeddings()
    kept = getattr(head, "kept_ids", None)
    expanded = bool(getattr(head, "expand", False))
    metadata: dict[str, Any] = {
        "format": FORMAT,
        "kind": "language",
        "model_type": config.model_type,
        "vocabulary": int(config.vocab_size),
        "context": context,
        "kept_ids": None if kept is None or expanded else [int(token) for token in kept],
        "ends": sorted(end_tokens(model, tokenizer)),
        "tokenizer": None,
    }
    if tokenizer is None:
        return metadata
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise UsageError(
            f"{type(tokenizer).__name__} is not a fast tokenizer and cannot travel inside the file; load the model's "
            "tokenizer with AutoTokenizer, or give None to export without text"
        )
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    start = tokenizer.bos_token_id
    return metadata | {
        "tokenizer": fast.to_str(),
        "chat_template": template,
        "start": None if start is None else int(start),
        "start_text": tokenizer.bos_token or "",
        "end_text": tokenizer.eos_token or "",
        "special_ids": sorted(int(token) for token in tokenizer.all_special_ids),
    }


def program_metadata(inputs: Sequence[Tensor], dynamic_batch: bool) -> dict[str, Any]:
    """Of any other program: shapes (None for a free axis) and types of its inputs."""
    specs = [
        {
            "name": f"input_{i}",
            "shape": [None if dynamic_batch and axis == 0 else size for axis, size in enumerate(value.shape)],
            "dtype": str(value.dtype).removeprefix("torch."),
        }
        for i, value in enumerate(inputs)
    ]
    return {"format": FORMAT, "kind": "program", "inputs": specs}


@dataclass(frozen=True)
class LanguageSettings:
    """What the file says about itself. kept_ids: token of each output where the head was cut, else None."""

    vocabulary: int
    context: int
    kept_ids: tuple[int, ...] | None
    ends: frozenset[int]
    specials: frozenset[int]
    start: int | None
    template: str | None
    start_text: str
    end_text: str


def language_settings(metadata: Mapping[str, Any], path: Path) -> LanguageSettings:
    """The settings in a file's metadata. Raises FormatError where they are missing or out of reason."""
    try:
        vocabulary, context = int(metadata["vocabulary"]), int(metadata["context"])
        kept = metadata.get("kept_ids")
        kept_ids = None if kept is None else tuple(int(token) for token in kept)
        if not (1 <= vocabulary <= MAX_VOCABULARY and 2 <= context <= MAX_CONTEXT):
            raise ValueError(f"vocabulary {vocabulary}, context {context}")
        if kept_ids is not None and not all(0 <= token < vocabulary for token in kept_ids):
            raise ValueError("kept tokens outside the vocabulary")
        template, start = metadata.get("chat_template"), metadata.get("start")
        return LanguageSettings(
            vocabulary=vocabulary,
            context=context,
            kept_ids=kept_ids,
            ends=frozenset(int(token) for token in metadata.get("ends", ())),
            specials=frozenset(int(token) for token in metadata.get("special_ids", ())),
            start=None if start is None else int(start),
            template=None if template is None else str(template),
            start_text=str(metadata.get("start_text", "")),
            end_text=str(metadata.get("end_text", "")),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{path}: the description of its language model is damaged: {error}") from error

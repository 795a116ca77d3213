"""Key/values of a GGUF file from a transformers model and tokenizer: what llama.cpp needs to run it and to chat.

The architectures are those of `gguf_families` (`edgewright.io` reads llama, qwen2 and qwen3 back), the tokenizers
byte-level BPE with a word splitter that llama.cpp knows by name. Everything else is refused by name: a file that loads
and speaks wrongly is worse than none.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewright.errors import FormatError, Unsupported, UsageError
from edgewright.export.gguf_families import Metadata, writer
from edgewright.io.gguf_tokenizer import CONTROL, SPLITTERS, USER_DEFINED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NORMAL, UNUSED = 1, 5
QUANTIZATION_VERSION = 2

# Names under which splitters are written; SPLITTERS has more names for the same four.
PRE_NAMES = ("smollm", "gpt-2", "llama-bpe", "qwen2")

# general.file_type by the type that most weights have. 40 is the newest number published; Q2_0 has none ("guessed").
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q8_0": 7,
    "Q2_K": 10,
    "Q3_K": 11,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "Q1_0": 40,
}
FILE_TYPE_GUESSED = 1024


def model_metadata(model: PreTrainedModel, name: str) -> Metadata:
    """Architecture keys: sizes, heads, rotary embedding, norms. `name` is the title of the model."""
    config, family = model.config, writer(model)
    prefix = family.architecture
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    metadata: Metadata = {
        "general.architecture": ("str", prefix),
        "general.type": ("str", "model"),
        "general.name": ("str", name),
        "general.quantization_version": ("u32", QUANTIZATION_VERSION),
        f"{prefix}.block_count": ("u32", config.num_hidden_layers),
        f"{prefix}.context_length": ("u32", config.max_position_embeddings),
        f"{prefix}.embedding_length": ("u32", config.hidden_size),
        f"{prefix}.feed_forward_length": ("u32", config.intermediate_size),
        f"{prefix}.attention.head_count": ("u32", config.num_attention_heads),
        f"{prefix}.attention.head_count_kv": ("u32", config.num_key_value_heads),
        f"{prefix}.attention.key_length": ("u32", head_width),
        f"{prefix}.attention.value_length": ("u32", head_width),
        f"{prefix}.attention.layer_norm_rms_epsilon": ("f32", config.rms_norm_eps),
        f"{prefix}.rope.dimension_count": ("u32", head_width),
        f"{prefix}.vocab_size": ("u32", config.vocab_size),
    }
    rope = rope_parameters(config)
    metadata[f"{prefix}.rope.freq_base"] = ("f32", rope["rope_theta"])
    if rope["rope_type"] == "linear":
        metadata[f"{prefix}.rope.scaling.type"] = ("str", "linear")
        metadata[f"{prefix}.rope.scaling.factor"] = ("f32", rope["factor"])
    return metadata | {f"{prefix}.{key}": value for key, value in family.keys(config).items()}


def rope_parameters(config: Any) -> dict[str, Any]:
    """rope_type "default", "linear" or "llama3" with its settings. Raises Unsupported for any other."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", getattr(config, "rope_theta", 10000.0))
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise Unsupported(
            f"rotary scaling {rope['rope_type']!r} cannot be written as GGUF here; default, linear, llama3 can"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise Unsupported("a partial rotary embedding cannot be written as GGUF here")
    return rope


def rope_divisors(config: Any) -> np.ndarray[Any, Any] | None:
    """Llama 3 scaling as llama.cpp wants it: float32 [head / 2], a divisor for each rotary frequency; else None."""
    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turns = rope["original_max_position_embeddings"] / (
        2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_width, 2, dtype=np.float64) / head_width)
    )
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - kept) / rope["factor"] + kept)).astype(np.float32)


def file_type(written: list[tuple[str, int]]) -> int:
    """general.file_type from (type name, weights) of the matrices."""
    count: Counter[str] = Counter()
    for name, weights in written:
        count[name] += weights
    return FILE_TYPES.get(count.most_common(1)[0][0], FILE_TYPE_GUESSED) if count else 0


def tokenizer_metadata(tokenizer: PreTrainedTokenizerBase, rows: int) -> Metadata:
    """Tokenizer keys for an embedding table of `rows`.

    Raises Unsupported for a tokenizer that is not byte-level BPE or whose splitter llama.cpp has no name for,
    UsageError when it has more tokens than the table has rows.
    """
    description = _description(tokenizer)
    bpe = description["model"]
    pre = splitter_name(description)
    tokens, types = _tokens(tokenizer, description, rows)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    metadata: Metadata = {
        "tokenizer.ggml.model": ("str", "gpt2"),
        "tokenizer.ggml.pre": ("str", pre),
        "tokenizer.ggml.tokens": ("[str]", tokens),
        "tokenizer.ggml.token_type": ("[i32]", types),
        "tokenizer.ggml.merges": ("[str]", merges),
        "tokenizer.ggml.add_space_prefix": ("bool", False),
    }
    for key, role in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = getattr(tokenizer, f"{role}_token_id", None)
        if index is not None:
            metadata[f"tokenizer.ggml.{key}_token_id"] = ("u32", int(index))
    ids = tokenizer("a")["input_ids"]
    metadata["tokenizer.ggml.add_bos_token"] = ("bool", ids[0] == getattr(tokenizer, "bos_token_id", None))
    metadata["tokenizer.ggml.add_eos_token"] = ("bool", ids[-1] == getattr(tokenizer, "eos_token_id", None))
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if isinstance(template, str):
        metadata["tokenizer.chat_template"] = ("str", template)
    return metadata


def splitter_name(description: dict[str, Any]) -> str:
    """llama.cpp's name for the way a tokenizer.json cuts text into words. Raises Unsupported for an unknown one."""
    steps = _steps(description.get("pre_tokenizer"))
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    digits = any(step["type"] == "Digits" and step.get("individual_digits") for step in steps)
    last = steps[-1] if steps else {"type": "nothing"}
    known = {"Split", "Digits", "ByteLevel"}
    plain = last["type"] == "ByteLevel" and not last.get("add_prefix_space") and {s["type"] for s in steps} <= known
    if plain and len(patterns) <= 1 and len(steps) == 1 + len(patterns) + digits:
        for name in PRE_NAMES:
            splitter = SPLITTERS[name]
            if splitter.digits != digits or last.get("use_regex", True) != (splitter.pattern is None):
                continue
            if bool(description["model"].get("ignore_merges")) != splitter.whole_words:
                continue
            if patterns == ([] if splitter.pattern is None else [splitter.pattern]):
                return name
    shown = " + ".join(step["type"] for step in steps) or "none"
    raise Unsupported(
        f"the tokenizer splits words by {shown}{' with an unknown pattern' if patterns else ''}, which has no name in "
        f"llama.cpp that is known here; known are {', '.join(PRE_NAMES)}"
    )


def _description(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer.json of a fast tokenizer, if it is byte-level BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise Unsupported(
            f"{type(tokenizer).__name__} is no fast tokenizer; only byte-level BPE ones can be written as GGUF"
        )
    description: dict[str, Any] = json.loads(backend.to_str())
    model = description["model"]
    if (
        model["type"] != "BPE"
        or model.get("byte_fallback")
        or not any(step["type"] == "ByteLevel" for step in _steps(description.get("pre_tokenizer")))
    ):
        raise Unsupported(
            f"the tokenizer is {model['type']} without byte level; only byte-level BPE can be written as GGUF"
        )
    if description.get("normalizer") is not None and description["normalizer"].get("type") != "NFC":
        # llama.cpp applies no normalisation; NFC (Qwen) changes only decomposed characters.
        raise Unsupported(
            f"the tokenizer normalises by {description['normalizer'].get('type')}, which llama.cpp cannot"
        )
    return description


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer["pretokenizers"]) if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _tokens(tokenizer: PreTrainedTokenizerBase, description: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding table; rows without a token get a name that no text produces."""
    texts = {index: token for token, index in tokenizer.get_vocab().items()}
    if texts and max(texts) >= rows:
        raise UsageError(f"the tokenizer has token id {max(texts)}, but the embedding table only {rows} rows")
    added = {entry["id"]: CONTROL if entry["special"] else USER_DEFINED for entry in description["added_tokens"]}
    tokens = [texts.get(index, f"[PAD{index}]") for index in range(rows)]
    if len(set(tokens)) != rows:
        raise FormatError("the tokenizer has a token named like an unused row ([PAD...]); it cannot be written as GGUF")
    types = [added.get(index, NORMAL) if index in texts else UNUSED for index in range(rows)]
    return tokens, types

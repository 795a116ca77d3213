"""Key/values of a GGUF file from a transformers model and tokenizer: what llama.cpp needs to run it and to chat.

The architectures are those of `io.gguf_families`, which `edgewright.load` reads back, the tokenizers
byte-level BPE with a word splitter that llama.cpp knows by name. Everything else is refused by name: a file that loads
and speaks wrongly is worse than none.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewright.errors import Unsupported, UsageError
from edgewright.export.gguf.families import writer
from edgewright.io.end_tokens import ALL_ENDS, GGUF_ENDS
from edgewright.io.gguf.families import COMMON_FIELDS, ROPE_SETTINGS, Metadata, head_width, llama3_divisors
from edgewright.io.gguf.tokenizer import CONTROL, SPLITTERS, TEMPLATE_MARKS, USER_DEFINED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NORMAL, UNUSED = 1, 5
# Texts of tokens at which llama.cpp stops without being told (its src/llama-vocab.cpp).
KNOWN_ENDS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "<|eot|>",
        "<|eom|>",
        "<end_of_utterance>",
    ]
)
OTHER_TARGETS = "--to pte and --to onnx write other files, which keep it"
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
    prefix, width = family.architecture, head_width(config)
    metadata: Metadata = {
        "general.architecture": ("str", prefix),
        "general.type": ("str", "model"),
        "general.name": ("str", name),
        "general.quantization_version": ("u32", QUANTIZATION_VERSION),
    }
    fields = {key: (kind, getattr(config, field)) for key, (kind, field) in (COMMON_FIELDS | family.fields).items()}
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        fields[key] = ("u32", width)
    rope = rope_parameters(config)
    fields |= {"vocab_size": ("u32", config.vocab_size), "rope.freq_base": ("f32", rope["rope_theta"])}
    if rope["rope_type"] == "linear":
        fields |= {"rope.scaling.type": ("str", "linear"), "rope.scaling.factor": ("f32", rope["factor"])}
    if rope["rope_type"] == "llama3":
        metadata[ROPE_SETTINGS] = ("str", json.dumps(rope))
    return metadata | {f"{prefix}.{key}": value for key, value in (fields | family.write(config)).items()}


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
    return llama3_divisors(rope, head_width(config))


def file_type(written: list[tuple[str, int]]) -> int:
    """general.file_type from (type name, weights) of the matrices."""
    count: Counter[str] = Counter()
    for name, weights in written:
        count[name] += weights
    return FILE_TYPES.get(count.most_common(1)[0][0], FILE_TYPE_GUESSED) if count else 0


def tokenizer_metadata(tokenizer: PreTrainedTokenizerBase, rows: int, ends: Sequence[int] = ()) -> Metadata:
    """Tokenizer keys for an embedding table of `rows`; ends: the ids at which an answer ends (`io.end_tokens`).

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
    for key, mark in TEMPLATE_MARKS.items():
        index = getattr(tokenizer, f"{mark}_id", None)
        if index is not None:
            metadata[f"tokenizer.ggml.{key}_token_id"] = ("u32", int(index))
    metadata |= _end_metadata(tokenizer, tokens, ends)
    ids = tokenizer("a")["input_ids"]
    metadata["tokenizer.ggml.add_bos_token"] = ("bool", ids[0] == getattr(tokenizer, "bos_token_id", None))
    metadata["tokenizer.ggml.add_eos_token"] = ("bool", ids[-1] == getattr(tokenizer, "eos_token_id", None))
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if isinstance(template, str):
        metadata["tokenizer.chat_template"] = ("str", template)
    return metadata


def _end_metadata(tokenizer: PreTrainedTokenizerBase, tokens: list[str], ends: Sequence[int]) -> Metadata:
    """One end token for each key of llama.cpp; all of them under ours, which our engine and our reader know.

    llama.cpp also stops at tokens that it knows by their text, so the keys go to the others first.
    """
    ends = [token for token in ends if token < len(tokens)]
    if not ends:
        return {}
    first = getattr(tokenizer, "eos_token_id", None)
    first = ends[0] if first is None else first
    rest = sorted((token for token in ends if token != first), key=lambda token: tokens[token] in KNOWN_ENDS)
    places = {"eos": first}
    for token in rest:
        if "eom" in tokens[token]:
            places.setdefault("eom", token)
    for token in rest:
        if token not in places.values() and (free := [key for key in GGUF_ENDS if key not in places]):
            places[free[0]] = token
    lost = [tokens[token] for token in rest if token not in places.values() and tokens[token] not in KNOWN_ENDS]
    if lost:
        warnings.warn(
            f"GGUF has no key for the end tokens {', '.join(lost)}: llama.cpp's own tools write on after them, "
            "`edgewright chat` stops",
            stacklevel=4,
        )
    keys: Metadata = {f"tokenizer.ggml.{key}_token_id": ("u32", token) for key, token in places.items()}
    return keys | ({ALL_ENDS: ("[i32]", ends)} if len(ends) > 1 else {})


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
        f"llama.cpp that is known here; known are {', '.join(PRE_NAMES)}; {OTHER_TARGETS}"
    )


def _description(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer.json of a fast tokenizer, if it is byte-level BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise Unsupported(
            f"{type(tokenizer).__name__} is no fast tokenizer; only byte-level BPE ones can be written as GGUF; "
            "--to onnx writes a file without a tokenizer"
        )
    description: dict[str, Any] = json.loads(backend.to_str())
    model = description["model"]
    if (
        model["type"] != "BPE"
        or model.get("byte_fallback")
        or not any(step["type"] == "ByteLevel" for step in _steps(description.get("pre_tokenizer")))
    ):
        raise Unsupported(
            f"the tokenizer is {model['type']} without byte level; only byte-level BPE can be written as GGUF; "
            f"{OTHER_TARGETS}"
        )
    if description.get("normalizer") is not None and description["normalizer"].get("type") != "NFC":
        # llama.cpp applies no normalisation; NFC (Qwen) changes only decomposed characters.
        raise Unsupported(
            f"the tokenizer normalises by {description['normalizer'].get('type')}, which llama.cpp cannot; "
            f"{OTHER_TARGETS}"
        )
    return description


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer["pretokenizers"]) if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _tokens(tokenizer: PreTrainedTokenizerBase, description: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding table; rows without a token get a name that no text produces."""
    for entry in description["added_tokens"]:
        for flag, words in (("lstrip", "spaces on its left"), ("rstrip", "spaces on its right"), ("single_word", "")):
            if entry.get(flag):
                meaning = f"takes in {words}" if words else "only matches whole words"
                raise Unsupported(
                    f"the added token {entry['content']!r} {meaning} ({flag}), which GGUF cannot say; "
                    f'set "{flag}": false in tokenizer.json if no text needs it; {OTHER_TARGETS}'
                )
    texts = {index: token for token, index in tokenizer.get_vocab().items()}
    if texts and max(texts) >= rows:
        last = max(texts)
        raise UsageError(
            f"the tokenizer has the token {texts[last]!r} with id {last}, but the embedding table only {rows} rows; "
            "pass the tokenizer that the model was trained with"
        )
    added = {entry["id"]: CONTROL if entry["special"] else USER_DEFINED for entry in description["added_tokens"]}
    taken, name = set(texts.values()), "[PAD{}]"
    while any(name.format(index) in taken for index in range(rows) if index not in texts):
        name = f"[{name}]"  # a token is called so
    tokens = [texts.get(index, name.format(index)) for index in range(rows)]
    types = [added.get(index, NORMAL) if index in texts else UNUSED for index in range(rows)]
    return tokens, types

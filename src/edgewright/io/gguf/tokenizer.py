"""The tokenizer inside a GGUF file as a transformers fast tokenizer: byte-level BPE, built from vocabulary and merges.

Encoding and decoding agree token for token with llama.cpp reading the same file (with special tokens parsed).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from edgewright.errors import FormatError, Unsupported
from edgewright.io.gguf.reader import GGUFFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Values of tokenizer.ggml.token_type.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

# Key of a special token in GGUF (llama.cpp's spelling) -> transformers' name, under which chat templates use it.
TEMPLATE_MARKS = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "cls": "cls_token",
    "seperator": "sep_token",
    "mask": "mask_token",
}

# The word splitters published with the models, as regular expressions in the Oniguruma dialect of `tokenizers`.
# None: the GPT-2 splitter that `tokenizers` has built in.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Splitter(NamedTuple):
    """How text is cut into words before BPE. digits: each digit alone first. whole_words: a word in the vocabulary
    is taken without applying merges. adds_bos: whether a file that does not say so begins texts with bos.
    """

    pattern: str | None
    digits: bool = False
    whole_words: bool = False
    adds_bos: bool = False


_GPT2 = Splitter(None)
_SMOLLM = Splitter(None, digits=True)
_LLAMA3 = Splitter(rf"{_CONTRACTION}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", whole_words=True, adds_bos=True)
_QWEN2 = Splitter(rf"{_CONTRACTION}|{_WORDS}|\p{{N}}|{_REST}")

# Value of tokenizer.ggml.pre -> splitter.
SPLITTERS = {
    "gpt-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "refact": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The file's tokenizer with its special tokens and chat template.

    Raises Unsupported for a tokenizer that is not byte-level BPE or has an unknown splitter, FormatError for a
    vocabulary that contradicts itself.
    """
    from transformers import PreTrainedTokenizerFast

    metadata = file.metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise Unsupported(f"{file.path} has the tokenizer {str(kind)[:40]!r}; only byte-level BPE ('gpt2') can be read")
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in SPLITTERS:
        raise Unsupported(
            f"{file.path} has the pre-tokenizer {str(name)[:40]!r}; known ones are {', '.join(SPLITTERS)}"
        )
    splitter = SPLITTERS[name]
    tokens, types = _vocabulary(file)
    special = {role: _token_id(file, role, len(tokens)) for role in TEMPLATE_MARKS}
    tokenizer = _byte_level_bpe(file, tokens, splitter)
    _add_special_tokens(tokenizer, tokens, types)
    _add_ends(tokenizer, file, tokens, special, splitter)

    arguments: dict[str, Any] = {
        mark: tokens[index] for role, mark in TEMPLATE_MARKS.items() if (index := special[role]) is not None
    }
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if isinstance(length, int) and length > 0:
        arguments["model_max_length"] = length
    result = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **arguments)
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        result.chat_template = template
    return result


def _vocabulary(file: GGUFFile) -> tuple[list[str], list[int]]:
    tokens = _list(file, "tokenizer.ggml.tokens", str)
    types = _list(file, "tokenizer.ggml.token_type", int)
    if not tokens:
        raise FormatError(f"{file.path} has an empty vocabulary")
    if len(types) != len(tokens):
        raise FormatError(f"{file.path} has {len(tokens)} tokens but {len(types)} token types")
    return tokens, types


def _list(file: GGUFFile, key: str, kind: type) -> list[Any]:
    value = file.metadata.get(key)
    if not isinstance(value, list) or (value and type(value[0]) is not kind):
        raise FormatError(f"{file.path} has no usable {key}: a list of {kind.__name__} is needed")
    return value


def _token_id(file: GGUFFile, role: str, size: int) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    value = file.metadata.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < size):
        raise FormatError(f"{file.path} has {key} = {str(value)[:40]}, but the vocabulary has {size} tokens")
    return value


def _byte_level_bpe(file: GGUFFile, tokens: list[str], splitter: Splitter) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise FormatError(f"{file.path} has {len(tokens) - len(vocabulary)} tokens that occur twice in its vocabulary")
    ranks: dict[tuple[str, str], None] = {}
    for rank, merge in enumerate(_list(file, "tokenizer.ggml.merges", str)):
        left, _, right = merge.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise FormatError(f"{file.path} has merge {rank}, {merge[:40]!r}, whose parts are not in the vocabulary")
        ranks.setdefault((left, right))  # the first of two equal merges counts, as in llama.cpp
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(ranks), ignore_merges=splitter.whole_words))
    steps: list[Any] = []
    if splitter.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if splitter.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(splitter.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitter.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Make control and user-defined tokens match as they are, before any splitting; only control ones are special."""
    from tokenizers import AddedToken

    added = [
        AddedToken(token, normalized=False, special=kind != USER_DEFINED)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token
    ]
    tokenizer.add_tokens(added)


def _add_ends(
    tokenizer: Tokenizer, file: GGUFFile, tokens: list[str], special: dict[str, int | None], splitter: Splitter
) -> None:
    """Put bos before and eos after every text where the file asks for it."""
    from tokenizers import processors

    pieces = ["$A"]
    used: list[tuple[str, int]] = []
    for role, default in (("bos", splitter.adds_bos), ("eos", False)):
        index = special[role]
        if index is not None and file.metadata.get(f"tokenizer.ggml.add_{role}_token", default) is True:
            pieces.insert(0 if role == "bos" else len(pieces), tokens[index])
            used.append((tokens[index], index))
    byte_level: Any = processors.ByteLevel(trim_offsets=False)
    if used:
        second = ["$B:1" if piece == "$A" else f"{piece}:1" for piece in pieces]
        template = processors.TemplateProcessing(single=pieces, pair=pieces + second, special_tokens=used)
        tokenizer.post_processor = processors.Sequence([byte_level, template])
    else:
        tokenizer.post_processor = byte_level

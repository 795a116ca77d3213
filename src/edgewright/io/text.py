"""Calibration and evaluation text: Python's own documentation topics by default, or a file of the user's.

The two splits never share a topic, paragraph or line, and do not change between runs or machines.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from edgewright.checks import check, one_of, optional, whole
from edgewright.errors import MissingPackage, UsageError
from edgewright.io.decode import read_text
from edgewright.io.hashing import sha256
from edgewright.io.text_rows import rows_reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["calibration", "evaluation", "all"]
SPLITS = ("calibration", "evaluation", "all")
CALIBRATION_SHARE = 0.8
# Topics shorter than this are single cross-references, not prose.
SHORTEST_TOPIC = 400
SHORTEST_ADVICE = 16  # a block length below teaches and measures nothing
# A document to train on is at most about this many characters; longer texts are cut at the ends of paragraphs.
LONGEST_DOCUMENT = 20_000
TEXT_SUFFIXES = (".jsonl", ".md", ".py", ".rst", ".txt")
# Parts of the standard library that are no prose, no idiomatic code, or not there everywhere.
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}


def load_texts(source: str | Path | None = None, split: Split = "all") -> list[str]:
    """Texts of a source, whole or one side of its split.

    Args:
        source: None for the documentation topics inside Python (about 650 KB of English); a file with rows (.jsonl,
            .json, .csv, .tsv), of which the column text, content or messages is read (`io.text_rows`); or any other
            text file (UTF-8, or UTF-16 with its mark; .gz is unpacked).
        split: "all", "calibration" (about 80 % of the text) or "evaluation" (the rest); topics go by a hash of their
            name, a text file is cut at a paragraph, one with rows between them.

    Returns:
        The texts, one a document or row.

    Raises:
        UsageError: an unknown split, or a file that is missing, empty, in another encoding, or without texts.
    """
    check("split", split, one_of(*SPLITS))
    if source is None:
        return _topics(split)
    path = Path(source).expanduser()
    texts = _documents(path)
    if split == "all":
        return texts
    if rows_reader(path) is None:
        return [_side(_cut_text(texts[0], path), split)]
    # Repeated lines would put the same text on both sides.
    texts = list(dict.fromkeys(texts))
    if len(texts) == 1:
        return [_side(_cut_text(texts[0], path), split)]
    cut = min(max(1, round(CALIBRATION_SHARE * len(texts))), len(texts) - 1)
    return texts[:cut] if split == "calibration" else texts[cut:]


class TextFiles:
    """Documents of text files, files with rows and folders (TEXT_SUFFIXES in them), read again at each iteration.

    A row of a .jsonl, .json, .csv or .tsv file is a document, so is a text file; texts beyond LONGEST_DOCUMENT are cut
    between paragraphs.
    Raises UsageError for a path that does not exist, a folder without text, and while reading as `load_texts`.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self.files: list[Path] = []
        for path in (Path(path).expanduser() for path in paths):
            if path.is_dir():
                found = sorted(f for f in path.rglob("*") if f.suffix in TEXT_SUFFIXES and f.is_file())
                found = [file for file in found if file.stat().st_size]
                if not found:
                    raise UsageError(f"the folder {path} holds no text: files of {', '.join(TEXT_SUFFIXES)}")
                self.files += found
            elif path.is_file():
                self.files.append(path)
            else:
                raise UsageError(f"no such text file or folder: {path}")

    def __iter__(self) -> Iterator[str]:
        for path in self.files:
            for document in _documents(path):
                yield from _chapters(document)


def builtin_documents(kind: Literal["english", "python", "both"] = "both") -> list[str]:
    """Text that every Python has, as documents to train on: its topics in English, the sources of its library."""
    documents = [part for topic in _topics("all") for part in _chapters(topic)] if kind != "python" else []
    if kind != "english":
        folder = Path(sysconfig.get_paths()["stdlib"])
        for path in sorted(folder.rglob("*.py")):
            if not NOT_LIBRARY.intersection(path.relative_to(folder).parts) and path.stat().st_size:
                documents += _chapters(_read(path))
    return documents


def token_blocks(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    max_blocks: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Tokens of the texts, joined with the end-of-text token and cut into blocks; an incomplete one is dropped.

    Args:
        texts: documents.
        tokenizer: of transformers.
        block_length: tokens of a block.
        max_blocks: how many are returned at most; None for all.
        seed: of their order.

    Returns:
        int64 [blocks, block_length].

    Raises:
        UsageError: less than one block, or a length below 1.
    """
    check("block_length", block_length, whole(1))
    check("max_blocks", max_blocks, optional(whole(1)))
    ids = _joined(texts, tokenizer)
    if len(ids) < block_length:
        raise _too_short("the text", len(ids), block_length)
    return _blocks(ids, block_length, max_blocks, seed)


def split_blocks(
    source: str | Path | None,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    *,
    calibration: int | None = None,
    evaluation: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """`token_blocks` of both sides of a source (`load_texts`): for calibration and for evaluation.

    calibration, evaluation: at most so many blocks. Raises as both functions do; where the source is too short, the
    length that the message names fits both sides.
    """
    sides = [_joined(load_texts(source, split), tokenizer) for split in ("calibration", "evaluation")]
    shortest = min(len(ids) for ids in sides)
    if shortest < block_length:
        raise _too_short("one side of the text (80 % calibrate, 20 % evaluate)", shortest, block_length)
    first, second = (
        _blocks(ids, block_length, most, seed) for ids, most in zip(sides, (calibration, evaluation), strict=True)
    )
    return first, second


def _joined(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the texts with the end-of-text token between them."""
    texts = [text for text in texts if text]
    if not texts:
        raise UsageError("there is no text to cut into blocks; pass a file with text, or none for the built-in text")
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    ids: list[int] = []
    for encoded in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]:
        if ids and separator is not None:
            ids.append(separator)
        ids += encoded
    return ids


def _blocks(ids: list[int], block_length: int, max_blocks: int | None, seed: int) -> Tensor:
    count = len(ids) // block_length
    blocks = torch.tensor(ids[: count * block_length], dtype=torch.int64).reshape(count, block_length)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return blocks[order[:max_blocks]]


def _too_short(what: str, tokens: int, block_length: int) -> UsageError:
    return UsageError(
        f"{what} has {tokens} tokens, less than one block of {block_length}; pass more text"
        + (f", or block_length={tokens} at most" if tokens >= SHORTEST_ADVICE else "")
    )


def _chapters(text: str) -> list[str]:
    """The text, cut at the last paragraph end (line end, any place) before every LONGEST_DOCUMENT characters."""
    parts = []
    while len(text) > LONGEST_DOCUMENT:
        cuts = [text.rfind(mark, LONGEST_DOCUMENT // 2, LONGEST_DOCUMENT) for mark in ("\n\n", "\n")]
        cut = next((cut for cut in cuts if cut > 0), LONGEST_DOCUMENT)
        parts.append(text[:cut])
        text = text[cut:].lstrip("\n")
    return [*parts, text] if text.strip() else parts


def _topics(split: Split) -> list[str]:
    from pydoc_data.topics import topics

    chosen = [name for name in sorted(topics) if len(topics[name]) >= SHORTEST_TOPIC]
    if split != "all":
        chosen = [name for name in chosen if _is_calibration(name) == (split == "calibration")]
    return [topics[name] for name in chosen]


def _is_calibration(name: str) -> bool:
    return int(sha256(name)[:8], 16) < CALIBRATION_SHARE * 2**32


def _read(path: Path) -> str:
    text = read_text(path)
    if not text.strip():
        raise UsageError(f"the text file {path} is empty")
    return text.replace("\r\n", "\n")


def _documents(path: Path) -> list[str]:
    """The rows of a file that has rows, else its whole text."""
    reader, text = rows_reader(path), _read(path)
    return [text] if reader is None else reader(text, path)


def _side(halves: tuple[str, str], split: Split) -> str:
    return halves[0] if split == "calibration" else halves[1]


def _cut_text(text: str, path: Path) -> tuple[str, str]:
    """Cut at the paragraph end nearest to 80 %; at the nearest white space when the text is one paragraph."""
    text = text.strip()
    target = CALIBRATION_SHARE * len(text)
    for pattern in (r"\n\s*\n", r"\s+"):
        gaps = [match.span() for match in re.finditer(pattern, text)]
        if gaps:
            start, end = min(gaps, key=lambda gap: abs(gap[0] - target))
            return text[:start], text[end:]
    raise UsageError(f"{path} is a single word and cannot be split into calibration and evaluation text")


def docstrings(packages: Iterable[str], shortest: int = 300) -> list[str]:
    """The documentation inside installed packages: their docstrings of `shortest` characters and more, each once.

    Sources are parsed, not imported. Raises MissingPackage for a package that is not installed.
    """
    found: dict[str, None] = {}
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise MissingPackage(f"the package {name} is not installed here; pip install {name}, or name another")
        for path in sorted(Path(next(iter(spec.submodule_search_locations))).rglob("*.py")):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError, RecursionError):  # sources for other Pythons, or of other encodings
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node)
                    if text and len(text) >= shortest:
                        found[text] = None
    return list(found)

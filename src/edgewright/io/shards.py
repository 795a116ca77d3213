"""Token shards: a tokenised corpus as files of plain numbers, read through memory maps.

A folder holds `training-00000.bin`, `validation-00000.bin` and so on, little-endian uint16 or uint32, each document
followed by an end token, and `manifest.json` with the tokenizer's fingerprint, the vocabulary and the tokens and
checksum of every shard. Shards are written one by one, each whole or not at all; a writer that was killed goes on with
the first shard that is missing, and only the manifest of a finished folder says that it is complete.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewright.checks import check, one_of
from edgewright.errors import FormatError, OutputError, UsageError
from edgewright.io.atomic import atomic_file, write_text
from edgewright.io.hashing import blake2b, crc32, sha256
from edgewright.io.json_file import read_json
from edgewright.io.typed import from_json

FORMAT = "edgewright token shards 1"
MANIFEST = "manifest.json"
SPLITS = ("training", "validation")
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5}}\.bin")
SHARD_BYTES = 32 * 2**20  # of text in one shard
MOST_MANIFEST = 64 * 2**20  # bytes; ours have a few hundred a shard
ENCODED_AT_ONCE = 2**20  # characters
VERIFIED_AT_ONCE = 2**23  # tokens

Encode = Callable[[list[str]], Sequence[Sequence[int]]]
Say = Callable[[int, int], None]


@dataclass(frozen=True)
class TokenShard:
    """One file: `bytes` of text in `documents`, checksums of its content (crc32) and of the text (source)."""

    name: str
    split: str
    tokens: int
    documents: int
    bytes: int
    crc32: int
    source: str


class TokenShards:
    """A complete folder of shards. `open_shards` makes it, after checking the files.

    tokenizer: fingerprint of what made the tokens. vocab_size: all ids are below it. end_token: between documents.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], shards: Sequence[TokenShard]) -> None:
        self.folder, self.shards = folder, tuple(shards)
        self.tokenizer, self.vocab_size = str(settings["tokenizer"]), int(settings["vocab_size"])
        self.end_token, self.dtype = int(settings["end_token"]), str(settings["dtype"])
        self._maps: dict[str, NDArray[Any]] = {}

    def of(self, split: str) -> list[TokenShard]:
        """The shards of one split, in order. Raises UsageError for an unknown split."""
        check("split", split, one_of(*SPLITS))
        return [shard for shard in self.shards if shard.split == split]

    def total(self, split: str, field: str = "tokens") -> int:
        """Sum of "tokens", "documents" or "bytes" over a split."""
        return sum(int(getattr(shard, field)) for shard in self.of(split))

    def tokens(self, shard: TokenShard) -> NDArray[Any]:
        """The tokens of a shard as a read-only memory map [tokens]."""
        if shard.name not in self._maps:
            path = self.folder / shard.name
            _check_size(path, shard, DTYPES[self.dtype])
            self._maps[shard.name] = np.memmap(path, DTYPES[self.dtype], "r", shape=(shard.tokens,))
        return self._maps[shard.name]

    def digest(self) -> str:
        """What tells this content from another: a resume on other data must not pass unnoticed."""
        parts = [(shard.name, shard.tokens, shard.crc32) for shard in self.shards]
        return sha256(repr((self.tokenizer, self.vocab_size, parts)))[:24]

    def check_model(self, vocab_size: int, tokenizer: str | None = None) -> None:
        """Raise UsageError unless a model of `vocab_size` rows, with that tokenizer, can be trained on the shards."""
        if self.vocab_size > vocab_size:
            raise UsageError(
                f"the shards in {self.folder} use a vocabulary of {self.vocab_size}, the model has {vocab_size} rows; "
                f"set vocab_size={self.vocab_size}, or tokenise the text again"
            )
        if tokenizer is not None and tokenizer != self.tokenizer:
            raise UsageError(
                f"the shards in {self.folder} were made with another tokenizer (fingerprint {self.tokenizer[:12]}, "
                f"this one has {tokenizer[:12]}); pass the tokenizer that made them, or another folder"
            )


def open_shards(folder: str | Path, verify: bool = True) -> TokenShards:
    """The shards of a folder that `write_shards` finished.

    Sizes are always compared with the manifest; `verify` also reads every shard once, for its checksum and for ids
    beyond the vocabulary. Raises UsageError where there are no shards or an unfinished folder, FormatError naming the
    shard that is missing, truncated, damaged or from another folder.
    """
    folder = Path(folder)
    settings, shards, complete = _read_manifest(folder)
    if not complete:
        raise UsageError(f"the shards in {folder} are unfinished; run the command that began them again")
    for shard in shards:
        path = folder / shard.name
        _check_size(path, shard, DTYPES[settings["dtype"]])
        if verify:
            _verify(path, shard, DTYPES[settings["dtype"]], int(settings["vocab_size"]))
    return TokenShards(folder, settings, shards)


def write_shards(
    folder: str | Path,
    documents: Iterable[str],
    encode: Encode,
    *,
    tokenizer: str,
    vocab_size: int,
    end_token: int,
    validation_share: float = 0.05,
    shard_bytes: int = SHARD_BYTES,
    say: Say | None = None,
) -> TokenShards:
    """Tokenise documents into `folder`, or finish what an earlier call with the same settings began.

    documents: anything that can be iterated twice. encode: texts -> ids, without special tokens. tokenizer: its
    fingerprint. A document goes to validation by a hash of its text alone, so equal documents never part; the one with
    the smallest hash goes there in any case. Shards whose text is unchanged and whose file is sound are kept.
    say(done, total): bytes of text. Raises UsageError for settings or text that cannot be split, ids beyond the
    vocabulary, or a folder of other settings; OutputError when the disk refuses (finished shards stay).
    """
    folder = Path(folder)
    if not 0 < validation_share < 1 or shard_bytes < 1 or not 0 <= end_token < vocab_size:
        raise UsageError(
            f"validation_share={validation_share} must lie between 0 and 1, shard_bytes={shard_bytes} be positive and "
            f"end_token={end_token} be below vocab_size={vocab_size}"
        )
    settings = {
        "format": FORMAT,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "dtype": "uint16" if vocab_size <= 2**16 else "uint32",
        "end_token": end_token,
        "validation_share": validation_share,
        "shard_bytes": shard_bytes,
    }
    known = _earlier(folder, settings)
    limit, total = split_limit(documents, validation_share)
    done: list[TokenShard] = []
    finished = 0
    for name, texts in _groups(documents, limit, shard_bytes):
        source, old = _source(texts), known.get(name)
        new = old is None or old.source != source or not _sound(folder / name, old, settings)
        shard = _write_shard(folder, name, texts, source, encode, settings) if new or old is None else old
        done.append(shard)
        finished += shard.bytes
        if new:
            later = [known[n] for n in known if n not in {shard.name for shard in done}]
            _write_manifest(folder, settings, [*done, *later], complete=False)
            if say is not None:
                say(finished, total)
    _write_manifest(folder, settings, done, complete=True)
    names = {shard.name for shard in done}
    for path in folder.iterdir():  # of an earlier, longer text
        if NAME.fullmatch(path.name) and path.name not in names:
            path.unlink()
    return TokenShards(folder, settings, done)


def split_limit(documents: Iterable[str], validation_share: float) -> tuple[int, int]:
    """(limit, bytes): documents whose `text_hash` is at most the limit are for validation; bytes of all texts.

    Raises UsageError when that leaves nothing on one of the sides.
    """
    if iter(documents) is documents:
        raise UsageError("the documents can be read only once; pass a list, or edgewright.io.text.TextFiles")
    least, most, size = 2**64, -1, 0
    for text in documents:
        if text:
            value = text_hash(text)
            least, most, size = min(least, value), max(most, value), size + len(text.encode())
    if least >= most:
        raise UsageError("training and validation need two documents that differ; pass more text")
    limit = max(int(validation_share * 2**64), least)
    return (limit if limit < most else most - 1), size


def text_hash(text: str) -> int:
    """A number below 2^64 that depends on the text alone."""
    return int(blake2b(text, size=8), 16)


def _groups(documents: Iterable[str], limit: int, shard_bytes: int) -> Iterator[tuple[str, list[str]]]:
    """Name and documents of every shard: a function of the texts alone, whatever the tokenizer makes of them."""
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    sizes, numbers = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    for text in documents:
        if not text:
            continue
        split = SPLITS[text_hash(text) <= limit]
        texts[split].append(text)
        sizes[split] += len(text.encode())
        if sizes[split] >= shard_bytes:
            yield f"{split}-{numbers[split]:05d}.bin", texts[split]
            texts[split], sizes[split], numbers[split] = [], 0, numbers[split] + 1
    for split in SPLITS:
        if texts[split]:
            yield f"{split}-{numbers[split]:05d}.bin", texts[split]


def _write_shard(
    folder: Path, name: str, texts: list[str], source: str, encode: Encode, settings: Mapping[str, Any]
) -> TokenShard:
    dtype, size, crc, vocabulary = DTYPES[settings["dtype"]], 0, 0, settings["vocab_size"]
    with atomic_file(folder / name) as temporary, temporary.open("wb") as file:
        for batch in _batches(texts):
            for ids in encode(batch):
                tokens = np.append(np.asarray(ids, dtype=np.int64), settings["end_token"])
                if tokens.min() < 0 or tokens.max() >= vocabulary:
                    wrong = tokens.max() if tokens.max() >= vocabulary else tokens.min()
                    raise UsageError(f"the tokenizer gives the id {wrong}; the vocabulary is 0 to {vocabulary - 1}")
                data = tokens.astype(dtype).tobytes()
                file.write(data)
                crc, size = crc32(data, start=crc), size + len(tokens)
    length = sum(len(text.encode()) for text in texts)
    return TokenShard(name, name.partition("-")[0], size, len(texts), length, crc, source)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= ENCODED_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _source(texts: Iterable[str]) -> str:
    documents = [text.encode() for text in texts]
    return blake2b(*(part for data in documents for part in (len(data).to_bytes(8, "big"), data)), size=16)


def _earlier(folder: Path, settings: Mapping[str, Any]) -> dict[str, TokenShard]:
    """Shards of an earlier call by name; half-written files of a killed one are removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".*.part"):
            if NAME.match(path.name[1:]) or path.name.startswith(f".{MANIFEST}"):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write into {folder}: {error.strerror}") from error
    if not (folder / MANIFEST).exists():
        return {}
    old, shards, _ = _read_manifest(folder)
    if different := [name for name in settings if old.get(name) != settings[name]]:
        name = different[0]
        raise UsageError(
            f"{folder} holds shards with {name}={old.get(name)!r}, now it is {settings[name]!r}; choose another folder"
        )
    return {shard.name: shard for shard in shards}


def _write_manifest(folder: Path, settings: Mapping[str, Any], shards: Sequence[TokenShard], complete: bool) -> None:
    document = {**settings, "complete": complete, "shards": [dataclasses.asdict(shard) for shard in shards]}
    write_text(folder / MANIFEST, json.dumps(document, indent=1) + "\n")


def _read_manifest(folder: Path) -> tuple[dict[str, Any], list[TokenShard], bool]:
    path = folder / MANIFEST
    document = read_json(path, MOST_MANIFEST, "pass a folder that write_shards made")
    try:
        shards = [from_json(TokenShard, entry, path) for entry in document.pop("shards")]
        complete = document.pop("complete") is True
        wrong = (
            not isinstance(document["tokenizer"], str)
            or document["format"] != FORMAT
            or document["dtype"] not in DTYPES
        )
        numbers = [document["vocab_size"], document["end_token"] + 1]
        for shard in shards:
            wrong |= NAME.fullmatch(shard.name) is None or not shard.name.startswith(shard.split + "-")
            numbers += [shard.tokens, shard.documents, shard.bytes, shard.crc32 + 1]
        wrong |= any(type(number) is not int or number < 1 for number in numbers)
    except (AttributeError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is no manifest of token shards: {error}") from error
    if wrong:
        raise FormatError(f"{path} is no manifest of token shards of this version ({FORMAT})")
    return document, shards, complete


def _check_size(path: Path, shard: TokenShard, dtype: np.dtype[Any]) -> None:
    wanted = shard.tokens * dtype.itemsize
    found = path.stat().st_size if path.is_file() else None
    if found is None:
        raise FormatError(f"the shard {path} is missing; tokenise the text again")
    if found != wanted:
        kind = "truncated" if found < wanted else "damaged"
        raise FormatError(f"the shard {path} is {kind}: {found} bytes, the manifest says {wanted}")


def _verify(path: Path, shard: TokenShard, dtype: np.dtype[Any], vocabulary: int) -> None:
    tokens, crc = np.memmap(path, dtype, "r", shape=(shard.tokens,)), 0
    for start in range(0, shard.tokens, VERIFIED_AT_ONCE):
        part = tokens[start : start + VERIFIED_AT_ONCE]
        crc = crc32(part.data, start=crc)
        if (most := int(part.max())) >= vocabulary:
            raise FormatError(f"the shard {path} holds the id {most}; the vocabulary is 0 to {vocabulary - 1}")
    if crc != shard.crc32:
        raise FormatError(
            f"the shard {path} has the checksum {crc:08x}, the manifest says {shard.crc32:08x}: it is damaged or from "
            "another folder; tokenise the text again"
        )


def _sound(path: Path, shard: TokenShard, settings: Mapping[str, Any]) -> bool:
    try:
        _check_size(path, shard, DTYPES[settings["dtype"]])
        _verify(path, shard, DTYPES[settings["dtype"]], settings["vocab_size"])
    except FormatError:
        return False
    return True

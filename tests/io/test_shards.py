"""Token shards: what goes in comes out, a killed or full disk costs one shard, and damage is named."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgewright.errors import FormatError, OutputError, UsageError
from edgewright.io import shards as module
from edgewright.io.shards import MANIFEST, TokenShards, open_shards, split_limit, text_hash, write_shards

END = 256
DOCUMENTS = [f"document {number} says {'word ' * (number % 7)}ü\n" for number in range(40)]


def encode(texts: list[str]) -> Sequence[Sequence[int]]:
    return [list(text.encode()) for text in texts]


def write(folder: Path, documents: Sequence[str] = DOCUMENTS, **changes: object) -> TokenShards:
    settings = {"tokenizer": "bytes", "vocab_size": 257, "end_token": END, "validation_share": 0.2, "shard_bytes": 300}
    return write_shards(folder, documents, encode, **{**settings, **changes})  # type: ignore[arg-type]


def texts(shards: TokenShards, split: str) -> list[str]:
    ids = np.concatenate([shards.tokens(shard) for shard in shards.of(split)])
    parts = np.split(ids, np.flatnonzero(ids == END) + 1)
    return [bytes(part[:-1].astype(np.uint8)).decode() for part in parts if len(part)]


def test_every_document_comes_out_once_in_order(tmp_path: Path) -> None:
    write(tmp_path)
    opened = open_shards(tmp_path)
    assert len(opened.of("training")) > 2 and all(name[0] != "." for name in (p.name for p in tmp_path.iterdir()))
    limit, size = split_limit(DOCUMENTS, 0.2)
    for split, chosen in (("validation", True), ("training", False)):
        assert texts(opened, split) == [text for text in DOCUMENTS if (text_hash(text) <= limit) == chosen]
    assert size == sum(len(text.encode()) for text in DOCUMENTS) == sum(shard.bytes for shard in opened.shards)
    assert opened.total("training", "documents") + opened.total("validation", "documents") == len(DOCUMENTS)
    assert (
        isinstance(opened.tokens(opened.shards[0]), np.memmap) and not opened.tokens(opened.shards[0]).flags.writeable
    )
    assert opened.dtype == "uint16" and write(tmp_path / "wide", vocab_size=70_000).dtype == "uint32"


def test_the_split_depends_on_each_text_alone() -> None:
    limit, _ = split_limit(DOCUMENTS, 0.2)
    assert split_limit([*reversed(DOCUMENTS), *DOCUMENTS], 0.2)[0] == limit
    for few in (DOCUMENTS[:2], DOCUMENTS[2:4]):  # never an empty side
        low, _ = split_limit(few, 1e-9)
        high, _ = split_limit(few, 1 - 1e-9)
        assert {text_hash(text) <= low for text in few} == {text_hash(text) <= high for text in few} == {True, False}


def test_a_stopped_writer_goes_on_shard_by_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tmp_path / "whole")
    calls: list[str] = []
    original = module._write_shard

    def counted(folder: Path, name: str, *rest: object) -> object:
        calls.append(name)
        if len(calls) == 3:
            (folder / f".{name}.xx.part").write_bytes(b"half")  # what a kill leaves
            raise KeyboardInterrupt
        return original(folder, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_write_shard", counted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut")
    with pytest.raises(UsageError, match="unfinished"):
        open_shards(tmp_path / "cut")
    done = set(calls[:2])
    continued = write(tmp_path / "cut")
    assert not done & set(calls[3:]) and continued.shards == whole.shards and continued.digest() == whole.digest()
    calls.clear()
    assert write(tmp_path / "cut").shards == whole.shards and not calls  # nothing left to do
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


def test_a_full_disk_leaves_whole_shards_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = [2]

    def full(texts: list[str]) -> Sequence[Sequence[int]]:
        if not room[0]:
            raise OSError(28, "No space left on device")
        room[0] -= 1
        return encode(texts)

    with pytest.raises(OutputError, match="No space left"):
        settings = {"tokenizer": "bytes", "vocab_size": 257, "end_token": END, "validation_share": 0.2}
        write_shards(tmp_path, DOCUMENTS, full, shard_bytes=300, **settings)  # type: ignore[arg-type]
    left = json.loads((tmp_path / MANIFEST).read_text())
    assert not left["complete"] and len(left["shards"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([MANIFEST, *(s["name"] for s in left["shards"])])
    assert write(tmp_path).shards == write(tmp_path / "whole").shards


def test_other_text_replaces_what_it_must(tmp_path: Path) -> None:
    write(tmp_path)
    shorter = write(tmp_path, DOCUMENTS[:12])
    assert shorter.shards == write(tmp_path / "new", DOCUMENTS[:12]).shards == open_shards(tmp_path).shards
    with pytest.raises(UsageError, match="tokenizer='bytes', now it is 'other'"):
        write(tmp_path, tokenizer="other")


def test_damage_is_named(tmp_path: Path) -> None:
    shards = write(tmp_path)
    path = tmp_path / shards.shards[1].name
    good = path.read_bytes()
    for bad, message in (
        (good[:-2], "truncated"),
        (good + b"\0\0", "damaged"),
        (good[:-2] + bytes([good[-2] ^ 1, good[-1]]), "the id 257|checksum"),
        ((tmp_path / shards.shards[0].name).read_bytes()[: len(good)].ljust(len(good), b"\1"), "checksum|id"),
        (good[:2][::-1] + good[2:], "holds the id"),
    ):
        path.write_bytes(bad)
        with pytest.raises(FormatError, match=message) as error:
            open_shards(tmp_path)
        assert path.name in str(error.value)
    path.unlink()
    with pytest.raises(FormatError, match="missing"):
        open_shards(tmp_path)
    assert write(tmp_path).shards == shards.shards  # the writer mends it
    assert zlib.crc32(path.read_bytes()) == shards.shards[1].crc32


@pytest.mark.parametrize(
    "change",
    [
        {"format": "something else"},
        {"dtype": "float64"},
        {"shards": [{"name": "../../etc/passwd"}]},
        {"shards": 3},
        {"vocab_size": "many"},
        {"name": "../training-00000.bin"},
        {"tokens": 10**18},
    ],
)
def test_hostile_manifests(tmp_path: Path, change: dict[str, object]) -> None:
    write(tmp_path)
    document = json.loads((tmp_path / MANIFEST).read_text())
    target = document if set(change) & set(document) else document["shards"][0]
    target.update(change)
    (tmp_path / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(FormatError):
        open_shards(tmp_path)


def test_bad_calls(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the id 195; the vocabulary is 0 to 189"):
        write(tmp_path / "a", vocab_size=190, end_token=0)
    with pytest.raises(UsageError, match="two documents"):
        write(tmp_path / "b", ["one"])
    with pytest.raises(UsageError, match="only once"):
        write(tmp_path / "c", iter(DOCUMENTS))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="manifest.json: No such file"):
        open_shards(tmp_path / "nothing")
    shards = write(tmp_path / "d")
    shards.check_model(300, "bytes")
    with pytest.raises(UsageError, match="the model has 256 rows"):
        shards.check_model(256)
    with pytest.raises(UsageError, match="another tokenizer"):
        shards.check_model(257, "other")
    with pytest.raises(UsageError, match="split=.*it must be one of"):
        shards.of("test")

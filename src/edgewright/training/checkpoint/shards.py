"""Data files of a checkpoint: torch.distributed.checkpoint writes and reads them, through our file operations.

Each file is a safetensors file of flat tensors. deviation: DCP ends a checkpoint with `.metadata`, a pickle, which runs
code when it is loaded. Our manifest takes its place: `ShardWriter` writes none, and `ShardReader` makes the metadata
from headers that are checked. DCP's own fsync is off since it goes past the operations: the stream that they give out
is on the disk when it is closed.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemBase, SerializationFormat
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan
from torch.futures import Future

from edgewright.errors import FormatError
from edgewright.io.cover import cover_problem
from edgewright.io.hashing import RunningHash, file_hash
from edgewright.io.safetensors_header import SafetensorsEntry, read_header
from edgewright.training.checkpoint.files import Files

SUFFIX = ".safetensors"
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_PIECE = 1 << 22  # bytes handed to one write


@dataclass(frozen=True)
class WrittenFile:
    """What the manifest says about a file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Place:
    """Where a part of a tensor lies: the file, its first byte there, and its first element of the whole tensor."""

    file: str
    entry: SafetensorsEntry
    offsets: tuple[int, ...]


def whole_shape(name: str, parts: list[Place]) -> list[int]:
    """The shape of a tensor of which these are the parts. Raises FormatError unless they are all of it, once."""
    axes = {(len(p.offsets), len(p.entry.shape), p.entry.dtype) for p in parts}
    if len(axes) != 1 or len({*next(iter(axes))[:2]}) != 1:
        raise FormatError(f"the parts of tensor {name[:80]!r} differ in type or axes")
    shape = [max(p.offsets[i] + p.entry.shape[i] for p in parts) for i in range(len(parts[0].offsets))]
    different = list(dict.fromkeys((p.offsets, p.entry.shape) for p in parts))  # copies of one part are the same part
    if problem := cover_problem(different, shape):
        raise FormatError(f"tensor {name[:80]!r} is not whole: {problem}")
    return shape


def write_shard(files: Files, folder: str, name: str, tensors: Mapping[str, Tensor]) -> WrittenFile:
    """Write tensors (on the CPU) as folder/name.safetensors, which is on the disk when this returns. Raises OSError."""
    writer = ShardWriter(files, folder, name)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), writer.storage_meta(), True)
    writer.set_up_storage_writer(True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, _ = planner.create_global_plan([plan])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    writer.write_data(plan, planner).wait()
    return writer.streams.written[name + SUFFIX]


def read_tensors(files: Files, folder: str, places: Mapping[str, list[Place]], targets: Mapping[str, Tensor]) -> None:
    """Fill `targets`, whole or split over processes, from the parts at `places`. Raises FormatError, OSError."""
    reader = ShardReader(files, folder, places)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False, allow_partial_load=False)
    metadata = reader.read_metadata()
    planner.set_up_planner(dict(targets), metadata, True)
    reader.set_up_storage_reader(metadata, True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    plan = reader.prepare_global_plan(planner.create_global_plan([plan]))[0]
    reader.read_data(planner.finish_plan(plan), planner).wait()


def header(files: Files, path: str) -> dict[str, SafetensorsEntry]:
    """The tensors of a file by name. Raises FormatError, OSError."""
    with files.open(path) as stream:
        entries = read_header(stream, files.size(path), path)
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise FormatError(f"{path}: tensor {name[:80]!r} is of type {entry.dtype}, which no checkpoint holds")
    return entries


def read_file(files: Files, folder: str, name: str) -> dict[str, Tensor]:
    """All tensors of one file, allocated as its header says."""
    entries = header(files, f"{folder}/{name}")
    targets = {key: torch.empty(entry.shape, dtype=DTYPES[entry.dtype]) for key, entry in entries.items()}
    places = {key: [Place(name, entry, (0,) * len(entry.shape))] for key, entry in entries.items()}
    read_tensors(files, folder, places, targets)
    return targets


def digest(files: Files, path: str) -> WrittenFile:
    """sha256 and size of a file as it lies there."""
    with files.open(path) as stream:
        found = file_hash(stream)
    return WrittenFile(found.hexdigest(), found.size)


@dataclass(frozen=True)
class _Prefix:
    """What DCP puts before the number of a file."""

    prefix: str


class ShardWriter(FileSystemWriter):
    """DCP's writer of one file `name`.safetensors in a folder of `files`; a file is never overwritten."""

    def __init__(self, files: Files, folder: str, name: str) -> None:
        super().__init__(
            folder, sync_files=False, overwrite=False, serialization_format=SerializationFormat.SAFETENSORS
        )
        self.name = name
        self.streams = _Streams(files)
        self.fs = self.streams  # type: ignore[assignment]

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return replace(plan, storage_data=_Prefix(self.name))

    def write_data(self, plan: SavePlan, planner: Any) -> Future[Any]:
        self.streams.name = f"{self.name}{SUFFIX}"
        return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Nothing: the manifest says what there is."""


class ShardReader(FileSystemReader):
    """DCP's reader of tensors whose places are known."""

    def __init__(self, files: Files, folder: str, places: Mapping[str, list[Place]]) -> None:
        super().__init__(folder)
        self.files, self.folder, self.places = files, folder, places

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        described: dict[str, Any] = {}
        stored: dict[MetadataIndex, Any] = {}
        for name, parts in self.places.items():
            chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.entry.shape)) for p in parts]
            ends = [[o + n for o, n in zip(p.offsets, p.entry.shape, strict=True)] for p in parts]
            size = torch.Size([max(axis) for axis in zip(*ends, strict=True)])
            properties = TensorProperties(dtype=DTYPES[parts[0].entry.dtype])
            described[name] = TensorStorageMetadata(properties, size, chunks)
            stored |= {MetadataIndex(name, torch.Size(p.offsets)): p for p in parts}
        return Metadata(described, storage_data=stored)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        streams: dict[str, IO[bytes]] = {}
        try:
            for request in plan.items:
                place: Place = self.storage_data[request.storage_index]
                if place.file not in streams:
                    streams[place.file] = self.files.open(f"{self.folder}/{place.file}")
                part = _read(streams[place.file], place)
                for axis, (offset, length) in enumerate(zip(request.storage_offsets, request.lengths, strict=True)):
                    part = part.narrow(axis, offset, length)
                target = planner.resolve_tensor(request).detach()
                target.copy_(part)
                planner.commit_tensor(request, target)
        finally:
            for stream in streams.values():
                stream.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _read(stream: IO[bytes], place: Place) -> Tensor:
    entry = place.entry
    dtype, length = DTYPES[entry.dtype], entry.end - entry.start
    if math.prod(entry.shape) == 0:
        return torch.empty(entry.shape, dtype=dtype)
    stream.seek(entry.start)
    data = bytearray(stream.read(length))
    if len(data) != length:
        raise FormatError(f"{place.file} ends at byte {entry.start + len(data)} of {entry.end}")
    return torch.frombuffer(data, dtype=dtype).view(entry.shape)


class _Sink(io.RawIOBase):
    """What DCP writes into: every piece is one operation, and is hashed on the way."""

    def __init__(self, files: Files, handle: Any) -> None:
        super().__init__()
        self.files, self.handle, self.hash = files, handle, RunningHash()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.hash.size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        pieces = [view] if self.hash.size else [memoryview(header := _ordered(view)), view[len(header) :]]
        for piece in (part[at : at + _PIECE] for part in pieces for at in range(0, len(part), _PIECE)):
            self.files.write(self.handle, piece)
            self.hash.update(piece)
        return len(view)


def _ordered(file: memoryview) -> bytes:
    """The header of a safetensors file with its texts in order: safetensors writes them as its hash table has them."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(bytes(file[8:end]))
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return bytes(file[:8]) + text.ljust(end - 8) if len(text) <= end - 8 else bytes(file[:end])


class _Streams(FileSystemBase):
    """DCP's interface to a file system, over `files`."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.name = ""
        self.written: dict[str, WrittenFile] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        folder = str(path).rpartition("/")[0]
        handle = self.files.create(f"{folder}/{self.name}")
        sink = _Sink(self.files, handle)
        try:
            yield cast(io.IOBase, sink)
            self.files.sync(handle)
        except BaseException:
            self.files.discard(handle)
            raise
        self.written[self.name] = WrittenFile(sink.hash.hexdigest(), sink.hash.size)

    def concat_path(self, path: Any, suffix: str) -> str:
        return f"{path}/{suffix}"

    def init_path(self, path: Any) -> Any:
        return path

    def rename(self, path: Any, new_path: Any) -> None:
        self.files.rename(str(path), str(new_path))

    def mkdir(self, path: Any) -> None:
        self.files.mkdir(str(path))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def exists(self, path: Any) -> bool:
        folder, _, name = str(path).rpartition("/")
        return name in self.files.names(folder)

    def rm_file(self, path: Any) -> None:
        self.files.unlink(str(path))

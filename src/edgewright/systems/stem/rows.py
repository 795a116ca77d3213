"""Rows of a table, in memory or in a file, as floats or as low-bit codes with steps of their own.

A file is a safetensors file with one tensor (floats) or two (codes and steps), so that a table that a checkpoint holds
in a shard of its own is already in this form. Rows are read one by one (`pread`: only the operating system keeps what
was read) or through a memory map. int4 codes lie in pairs; values are step * code, as in every packed tensor.
"""

from __future__ import annotations

import json
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgewright.errors import FormatError, OutputError, UsageError
from edgewright.io.atomic import atomic_file
from edgewright.io.packed import PackedTensor
from edgewright.io.safetensors_header import check_safetensors
from edgewright.quantization.codecs import pack_nibbles, unpack_nibbles
from edgewright.quantization.fake_quantize import Quantizer
from edgewright.quantization.grids import GRIDS
from edgewright.quantization.scales import grouped, initial_alpha

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CODES = {"int8": "absmax", "int4": "mse"}  # grid -> rule of its steps
DTYPES = (*FLOATS, *CODES)
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8"}
ACCESS = ("pread", "mmap")
AT_ONCE = 4096  # rows converted at a time

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class RowFormat:
    """dtype: of DTYPES; width: values of a row; group: values that share a step, None for the whole row."""

    dtype: str
    width: int
    group: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype={self.dtype!r} of a table; choose from {', '.join(DTYPES)}")
        if self.group is not None and (self.group < 1 or self.width % self.group):
            raise UsageError(f"group={self.group} does not divide rows of {self.width} values; use None or a divisor")
        if self.dtype == "int4" and self.width % 2:
            raise UsageError(f"rows of {self.width} values cannot be int4, whose codes lie in pairs; use int8")

    @property
    def parts(self) -> dict[str, tuple[torch.dtype, int]]:
        """Suffix of the tensor's name -> (dtype, columns)."""
        if self.dtype in FLOATS:
            return {"weight": (FLOATS[self.dtype], self.width)}
        codes = (torch.int8, self.width) if self.dtype == "int8" else (torch.uint8, self.width // 2)
        return {"codes": codes, "step": (torch.float32, self.width // (self.group or self.width))}

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return sum(columns * dtype.itemsize for dtype, columns in self.parts.values())

    @torch.no_grad()
    def encode(self, rows: Tensor) -> Parts:
        """Stored form of rows [n, width]."""
        if self.dtype in FLOATS:
            return {"weight": rows.to(FLOATS[self.dtype])}
        if not torch.isfinite(rows).all():
            raise FormatError("rows of a table hold NaN or infinity; they cannot be quantised")
        quantizer = Quantizer(GRIDS[self.dtype])
        values = rows.float()
        weights = grouped(values, self.width // (self.group or self.width))
        alpha = initial_alpha(weights, quantizer.grid, CODES[self.dtype], quantizer.scale_dtype)
        codes, step = quantizer.encode(values, alpha)
        return self.of_codes(codes.to(torch.int8), step)

    def of_codes(self, codes: Tensor, step: Tensor) -> Parts:
        """Stored form of codes int8 [n, width] with steps [n, groups]."""
        return {"codes": pack_nibbles(codes) if self.dtype == "int4" else codes, "step": step}

    def decode(self, parts: Parts) -> Tensor:
        """Rows as stored, [n, width], in the float type of the format (float32 for codes)."""
        if self.dtype in FLOATS:
            return parts["weight"]
        codes = unpack_nibbles(parts["codes"]) if self.dtype == "int4" else parts["codes"]
        return PackedTensor(codes, parts["step"], self.dtype).dequantize()


class RowTable(ABC):
    """A table of `count` rows in a format. Ids are ascending, distinct, int64 [n]; `read` may come from any thread."""

    format: RowFormat
    count: int
    read_only: bool
    path: Path | None = None

    def read(self, ids: Tensor) -> Tensor:
        """Rows [n, width], decoded."""
        return self.format.decode(self.get(ids))

    def write(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Replace rows; what they became, decoded. Raises UsageError where the table is read-only."""
        if self.read_only:
            where = f" {self.path}" if self.path else ""
            raise UsageError(f"the table{where} is read-only; open the store with trainable=True to write rows")
        encoded = self.format.encode(rows)
        self.put(ids, encoded)
        return self.format.decode(encoded)

    @abstractmethod
    def get(self, ids: Tensor) -> Parts:
        """The stored form of rows."""

    @abstractmethod
    def put(self, ids: Tensor, parts: Parts) -> None:
        """Write the stored form of rows."""

    @abstractmethod
    def flush(self) -> None:
        """Have the operating system write what it holds back."""

    @abstractmethod
    def close(self) -> None: ...


class MemoryRows(RowTable):
    """Rows in tensors. A float tensor is used as it is, without a copy."""

    def __init__(self, parts: Parts, format: RowFormat, read_only: bool = False) -> None:
        self.parts, self.format, self.read_only = parts, format, read_only
        self.count = len(next(iter(parts.values())))

    def get(self, ids: Tensor) -> Parts:
        return {name: part.index_select(0, ids) for name, part in self.parts.items()}

    def put(self, ids: Tensor, parts: Parts) -> None:
        for name, part in self.parts.items():
            part.index_copy_(0, ids, parts[name])

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        self.parts = {}


class FileRows(RowTable):
    """Rows of a safetensors file whose tensors are called `name`.weight, or .codes and .step."""

    path: Path

    def __init__(self, path: str | Path, name: str, *, access: str = "pread", read_only: bool = True) -> None:
        self._file = -1
        if access not in ACCESS:
            raise UsageError(f"access={access!r}; choose from {', '.join(ACCESS)}")
        self.path, self.read_only = Path(path), read_only
        self._maps: dict[str, Any] = {}
        if not self.path.is_file():
            raise FormatError(f"the table shard {self.path} is missing; the rows of {name} should be in it")
        self.format, self.count, self._starts = _layout(self.path, name)
        try:
            self._file = os.open(self.path, os.O_RDONLY if read_only else os.O_RDWR)
        except OSError as error:
            how = "reading" if read_only else "writing"
            raise OutputError(f"cannot open {self.path} for {how}: {error}") from error
        if access == "mmap":
            for part, (dtype, columns) in self.format.parts.items():
                shape = (self.count, columns * dtype.itemsize)
                self._maps[part] = np.memmap(self.path, np.uint8, "r", self._starts[part], shape)

    def get(self, ids: Tensor) -> Parts:
        index, parts = ids.numpy(), {}
        for name, (dtype, columns) in self.format.parts.items():
            if self._maps:
                data = self._maps[name][index]
            else:
                data = np.empty((len(index), columns * dtype.itemsize), np.uint8)
                for view, place in self._runs(name, index, data):
                    while view:
                        got = os.preadv(self._file, [view], place)
                        if got == 0:
                            raise FormatError(
                                f"{self.path} ended at byte {place} while a row was read; it was cut short"
                            )
                        view, place = view[got:], place + got
            parts[name] = torch.from_numpy(data).view(dtype).view(len(index), columns)
        return parts

    def put(self, ids: Tensor, parts: Parts) -> None:
        for name, part in parts.items():
            for view, place in self._runs(name, ids.numpy(), part.contiguous().view(torch.uint8).numpy()):
                while view:
                    try:
                        done = os.pwrite(self._file, view, place)
                    except OSError as error:
                        raise OutputError(f"cannot write {self.path}: {error.strerror}") from error
                    view, place = view[done:], place + done

    def _runs(self, name: str, index: Any, data: Any) -> Iterator[tuple[memoryview, int]]:
        """(bytes, place in the file) of every run of neighbouring rows of `data`, uint8 [n, bytes of a row]."""
        firsts = np.flatnonzero(np.diff(index, prepend=-2) != 1).tolist()
        for first, end in pairwise([*firsts, len(index)]):
            yield memoryview(data[first:end].reshape(-1)), self._starts[name] + int(index[first]) * data.shape[1]

    def flush(self) -> None:
        if not self.read_only:
            os.fsync(self._file)

    def close(self) -> None:
        self._maps = {}
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()


def write_rows(path: str | Path, name: str, count: int, format: RowFormat, chunks: Iterable[Tensor | Parts]) -> None:
    """Write a table whole or not at all. chunks: consecutive rows [n, width], or their stored forms."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "group": str(format.group or format.width)}}
    end = 0
    for part, (dtype, columns) in format.parts.items():
        size = count * columns * dtype.itemsize
        header[f"{name}.{part}"] = {
            "dtype": NAMES[dtype], "shape": [count, columns], "data_offsets": [end, end + size]
        }  # fmt: skip
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as temporary:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        rows = FileRows(temporary, name, read_only=False)
        try:
            first = 0
            for chunk in chunks:
                parts = format.encode(chunk) if isinstance(chunk, Tensor) else chunk
                size = len(next(iter(parts.values())))
                rows.put(torch.arange(first, first + size), parts)
                first += size
        finally:
            rows.close()
        if first != count:
            raise UsageError(f"{first} rows were given for a table of {count}")


def _layout(path: Path, name: str) -> tuple[RowFormat, int, dict[str, int]]:
    """(format, rows, first byte of each part) of a table in a safetensors file."""
    entries = check_safetensors(path)
    found = {part: entries.get(f"{name}.{part}") for part in ("weight", "codes", "step")}
    weight, codes, step = (entry if entry is not None and len(entry.shape) == 2 else None for entry in found.values())
    floats = {NAMES[dtype]: kind for kind, dtype in FLOATS.items()}
    if weight is not None and weight.dtype in floats:
        return RowFormat(floats[weight.dtype], weight.shape[1]), weight.shape[0], {"weight": weight.start}
    if codes is not None and step is not None and codes.dtype in ("U8", "I8") and step.dtype == "F32":
        width = codes.shape[1] * (2 if codes.dtype == "U8" else 1)
        if step.shape[0] == codes.shape[0] and step.shape[1] and width % step.shape[1] == 0:
            size = width // step.shape[1]
            format = RowFormat("int4" if codes.dtype == "U8" else "int8", width, None if size == width else size)
            return format, codes.shape[0], {"codes": codes.start, "step": step.start}
    raise FormatError(f"{path} does not hold the rows of {name} (as .weight, or .codes and .step) in a form known here")

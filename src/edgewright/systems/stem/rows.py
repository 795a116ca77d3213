"""Rows of a table, in memory or in a file, as floats or as low-bit codes with steps of their own.

A file is a safetensors file with one tensor (floats) or two (codes and steps), so that a table that a checkpoint holds
in a shard of its own is already in this form. Rows are read one by one (`pread`: only the operating system keeps what
was read) or through a memory map. int4 codes lie in pairs; values are step * code, as in every packed tensor.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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


class Rows(Protocol):
    """A table of `count` rows in a format. `read`: ids ascending, distinct, int64 [n] -> rows; from any thread."""

    format: RowFormat
    count: int
    read_only: bool

    def read(self, ids: Tensor) -> Tensor: ...

    def write(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Replace rows; what they became, decoded."""

    def flush(self) -> None: ...

    def close(self) -> None: ...


class MemoryRows:
    """Rows in tensors. A float tensor is used as it is, without a copy."""

    def __init__(self, parts: Parts, format: RowFormat, read_only: bool = False) -> None:
        self.parts, self.format, self.read_only = parts, format, read_only
        self.count = len(next(iter(parts.values())))

    def read(self, ids: Tensor) -> Tensor:
        return self.format.decode({name: part.index_select(0, ids) for name, part in self.parts.items()})

    def write(self, ids: Tensor, rows: Tensor) -> Tensor:
        _check_writable(self)
        encoded = self.format.encode(rows)
        for name, part in self.parts.items():
            part.index_copy_(0, ids, encoded[name])
        return self.format.decode(encoded)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        self.parts = {}


class FileRows:
    """Rows of a safetensors file whose tensors are called `name`.weight, or .codes and .step."""

    def __init__(
        self, path: str | Path, name: str, *, group: int | None = None, access: str = "pread", read_only: bool = True
    ) -> None:
        self._file = -1
        if access not in ACCESS:
            raise UsageError(f"access={access!r}; choose from {', '.join(ACCESS)}")
        self.path, self.read_only, self._maps = Path(path), read_only, {}
        if not self.path.is_file():
            raise FormatError(f"the table shard {self.path} is missing; the rows of {name} should be in it")
        self.format, self.count, self._starts = _layout(self.path, name, group)
        try:
            self._file = os.open(self.path, os.O_RDONLY if read_only else os.O_RDWR)
        except OSError as error:
            raise OutputError(
                f"cannot open {self.path} for {'reading' if read_only else 'writing'}: {error}"
            ) from error
        if access == "mmap":
            for part, (dtype, columns) in self.format.parts.items():
                shape = (self.count, columns * dtype.itemsize)
                self._maps[part] = np.memmap(self.path, np.uint8, "r", self._starts[part], shape)

    _maps: dict[str, Any]

    def read(self, ids: Tensor) -> Tensor:
        index = ids.numpy()
        parts = {}
        for name, (dtype, columns) in self.format.parts.items():
            data = self._maps[name][index] if self._maps else self._pread(name, index, columns * dtype.itemsize)
            parts[name] = torch.from_numpy(data).view(dtype).view(len(index), columns)
        return self.format.decode(parts)

    def _pread(self, name: str, index: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
        """One call for every run of neighbouring rows."""
        data = np.empty((len(index), size), np.uint8)
        firsts = np.flatnonzero(np.diff(index, prepend=-2) != 1).tolist()
        for first, end in zip(firsts, [*firsts[1:], len(index)], strict=True):
            view = memoryview(data[first:end].reshape(-1))  # type: ignore[arg-type]
            place = self._starts[name] + int(index[first]) * size
            while view:
                got = os.preadv(self._file, [view], place)
                if got == 0:
                    raise FormatError(f"{self.path} ended at byte {place} while a row was read; it was cut short")
                view, place = view[got:], place + got
        return data

    def write(self, ids: Tensor, rows: Tensor) -> Tensor:
        _check_writable(self)
        encoded = self.format.encode(rows)
        self.put(ids, encoded)
        return self.format.decode(encoded)

    def put(self, ids: Tensor, parts: Parts) -> None:
        """Write the stored form of rows."""
        for name, part in parts.items():
            data = part.contiguous().view(torch.uint8).numpy()
            size = data.shape[1]
            index = ids.numpy()
            firsts = np.flatnonzero(np.diff(index, prepend=-2) != 1).tolist()
            for first, end in zip(firsts, [*firsts[1:], len(index)], strict=True):
                view = memoryview(data[first:end].reshape(-1))  # type: ignore[arg-type]
                place = self._starts[name] + int(index[first]) * size
                while view:
                    try:
                        done = os.pwrite(self._file, view, place)
                    except OSError as error:
                        raise OutputError(f"cannot write {self.path}: {error.strerror}") from error
                    view, place = view[done:], place + done

    def flush(self) -> None:
        """Have the operating system write what it holds back."""
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
        rows = FileRows(temporary, name, group=format.group, read_only=False)
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


def slices(table: Tensor) -> Iterable[Tensor]:
    """The rows of a tensor in pieces."""
    return (part.detach().cpu() for part in table.split(AT_ONCE))


def _layout(path: Path, name: str, group: int | None) -> tuple[RowFormat, int, dict[str, int]]:
    """(format, rows, first byte of each part) of a table in a safetensors file."""
    entries = check_safetensors(path)
    found = {e.rpartition(".")[2]: entry for e, entry in entries.items() if e.rpartition(".")[0] == name}
    if "weight" in found and len(found["weight"].shape) == 2:
        kind = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}.get(found["weight"].dtype)
        if kind is not None:
            return (
                RowFormat(kind, found["weight"].shape[1]),
                found["weight"].shape[0],
                {"weight": found["weight"].start},
            )
    if {"codes", "step"} <= found.keys() and all(len(found[part].shape) == 2 for part in ("codes", "step")):
        codes, step = found["codes"], found["step"]
        width = codes.shape[1] * (2 if codes.dtype == "U8" else 1)
        fits = codes.dtype in ("U8", "I8") and step.dtype == "F32" and step.shape[0] == codes.shape[0]
        if fits and step.shape[1] and width % step.shape[1] == 0:
            size = width // step.shape[1]
            format = RowFormat("int4" if codes.dtype == "U8" else "int8", width, None if size == width else size)
            return format, codes.shape[0], {"codes": codes.start, "step": step.start}
    raise FormatError(f"{path} does not hold the rows of {name} (as .weight, or .codes and .step) in a form known here")


def _check_writable(rows: MemoryRows | FileRows) -> None:
    if rows.read_only:
        where = f" {rows.path}" if isinstance(rows, FileRows) else ""
        raise UsageError(f"the table{where} is read-only; open the store with trainable=True to write rows")

"""Rows of a table as tensors of a file: which rows, their codes, and those that no code can hold.

A record "emb.k" in a file is
    emb.k.ids     which rows: differences of ascending ids in the smallest integer type, or a bitmap; absent for a range
    emb.k.codes   uint8 [m, row_bytes]: `PackedRows`, scale and bias included; with bits none the values themselves
    emb.k.raw     the values of rows with NaN, infinity or a range that float16 cannot hold, in the table's own type
    emb.k.raw_at  where among the m rows those stand (their codes are those of a zero row)
    opt.k.NAME    the optimizer's state of these rows, as it is or packed at 8 bits
and its `fields` (JSON) say the rest: table, rows m, first, ids, bits, raw, state_bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from edgewright.errors import FormatError
from edgewright.io.bits import pack_codes, unpack_codes
from edgewright.io.row_codes import PackedRows, row_bytes, unpackable_rows
from edgewright.io.row_ranges import quantize_rows, tune_range

_DELTAS = (torch.uint8, torch.int16, torch.int32, torch.int64)
RANGE = (25, 0.6)  # (nbins, ratio) near k-means by the paper, where nothing was tuned


@dataclass(frozen=True)
class Encoding:
    """How rows are stored. bits None: as they are. nbins, ratio: of the adaptive range, None: tuned on a sample."""

    bits: int | None = None
    method: str = "adaptive"
    nbins: int | None = None
    ratio: float | None = None
    state_bits: int | None = None
    seed: int = 0
    widths: Mapping[int, tuple[int, float]] = field(default_factory=dict)  # width of a row -> tuned (nbins, ratio)

    def range_for(self, width: int) -> tuple[int, float]:
        """(nbins, ratio) for rows of so many values."""
        nbins, ratio = self.widths.get(width, RANGE)
        return self.nbins or nbins, ratio if self.ratio is None else self.ratio


@dataclass(frozen=True)
class RowBatch:
    """Rows of a table: ids int64 [m] ascending, or None for the range from `first`; values [m, ...]; state by name."""

    table: str
    first: int
    ids: Tensor | None
    values: Tensor
    state: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.values)

    def part(self, start: int, stop: int) -> RowBatch:
        """Rows start..stop of these."""
        ids = None if self.ids is None else self.ids[start:stop]
        first = self.first + start if ids is None else int(ids[0])
        return RowBatch(
            self.table, first, ids, self.values[start:stop], {n: t[start:stop] for n, t in self.state.items()}
        )


def encode(rows: RowBatch, key: int, encoding: Encoding) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors of record `key`, its fields)."""
    name = f"emb.{key}"
    fields: dict[str, Any] = {"key": key, "table": rows.table, "rows": len(rows), "first": rows.first}
    tensors: dict[str, Tensor] = {}
    if rows.ids is not None:
        fields["ids"], tensors[f"{name}.ids"] = encode_ids(rows.ids)
        fields["first"] = int(rows.ids[0])
    values = rows.values.reshape(len(rows), -1)
    fields["bits"] = encoding.bits
    if encoding.bits is None:
        tensors[f"{name}.codes"] = rows.values.contiguous()
    else:
        bad = unpackable_rows(values, encoding.bits)
        count = int(bad.sum())
        if count:
            tensors[f"{name}.raw_at"] = bad.nonzero().squeeze(1).to(torch.int32)
            tensors[f"{name}.raw"] = values[bad]
            values = values.masked_fill(bad.unsqueeze(1), 0)
        packed, used = _quantize(values, encoding)
        tensors[f"{name}.codes"] = packed.packed
        fields |= used | {"raw": count}
    for label, state in rows.state.items():
        packable = encoding.state_bits is not None and state.ndim > 1 and state.is_floating_point()
        if packable and not bool(unpackable_rows(state.reshape(len(rows), -1), 8).any()):
            tensors[f"opt.{key}.{label}"] = quantize_rows(state.reshape(len(rows), -1), 8, "minmax").packed
            fields.setdefault("packed_state", []).append(label)
        else:
            tensors[f"opt.{key}.{label}"] = state.contiguous()
    return tensors, fields


def _quantize(values: Tensor, encoding: Encoding) -> tuple[PackedRows, dict[str, Any]]:
    bits = encoding.bits
    assert bits is not None
    if encoding.method != "adaptive" or bits == 8:
        return quantize_rows(values, bits, "symmetric" if encoding.method == "symmetric" else "minmax"), {}
    nbins, ratio = encoding.range_for(values.shape[1])
    return quantize_rows(values, bits, "greedy", nbins, ratio), {"nbins": nbins, "ratio": ratio}


def tuned(encoding: Encoding, jobs: Sequence[RowBatch], known: dict[tuple[int, int], tuple[int, float]]) -> Encoding:
    """The encoding with nbins and ratio for each width of row: given, in `known` (added to), or tuned on the rows of
    the largest table of that width.
    """
    bits = encoding.bits
    if (
        bits is None
        or bits == 8
        or encoding.method != "adaptive"
        or not (encoding.nbins is None or encoding.ratio is None)
    ):
        return encoding
    for rows in sorted(jobs, key=len, reverse=True):
        values = rows.values.reshape(len(rows), -1)
        if (values.shape[1], bits) not in known:
            good = values[~unpackable_rows(values, bits)]
            if len(good):
                generator = torch.Generator().manual_seed(encoding.seed)
                known[values.shape[1], bits] = tune_range(good, bits, generator)
    return replace(encoding, widths={width: pair for (width, b), pair in known.items() if b == bits})


def encode_ids(ids: Tensor) -> tuple[str, Tensor]:
    """("delta", differences) or ("bitmap", bits) of ascending ids, whichever is smaller; both count from the first."""
    deltas = ids.diff()
    most = int(deltas.max()) if len(deltas) else 0
    dtype = next(kind for kind in _DELTAS if most <= torch.iinfo(kind).max)
    span = int(ids[-1] - ids[0]) + 1
    if -(-span // 8) < len(deltas) * dtype.itemsize:
        flags = torch.zeros(span, dtype=torch.bool)
        flags[ids - ids[0]] = True
        return "bitmap", pack_codes(flags, 1)
    return "delta", deltas.to(dtype)


def decode_ids(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], total: int) -> Tensor:
    """The ids of a record, int64 [m]. Raises FormatError unless they are ascending rows of a table of `total`."""
    count, first = fields["rows"], fields["first"]
    kind = fields.get("ids", "range")
    if kind == "range":
        if first + count > total:
            raise _broken(fields, f"its rows {first}..{first + count - 1} are not of {total}")
        return torch.arange(first, first + count)
    stored = _tensor(tensors, f"emb.{fields['key']}.ids")
    if kind == "delta":
        steps = stored.to(torch.int64)
        if bool((steps < 1).any()) or len(steps) != count - 1:
            raise _broken(fields, "its ids do not ascend")
        ids = torch.cat([torch.zeros(1, dtype=torch.int64), steps.cumsum(0)]) + first
    else:
        ids = unpack_codes(stored, 1).nonzero().squeeze(1) + first
    # every id is compared, not the last alone: sums of differences that wrap around may end in range
    if len(ids) != count or bool((ids.diff() < 1).any()) or _outside(ids, total):
        raise _broken(fields, f"its ids are not {count} ascending rows of {total}")
    return ids


def packed_rows(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], dim: int) -> PackedRows:
    """The codes of a record at few bits, checked against its fields. Raises FormatError."""
    codes = _tensor(tensors, f"emb.{fields['key']}.codes")
    if list(codes.shape) != [fields["rows"], row_bytes(dim, fields["bits"])]:
        raise _broken(fields, f"its codes are {list(codes.shape)} for {fields['rows']} rows of {dim} values")
    return PackedRows(codes, fields["bits"], dim)


def decode_values(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], shape: tuple[int, ...],
                  dtype: torch.dtype) -> Tensor:  # fmt: skip
    """The values [m, *shape] of a record in the table's type. Raises FormatError."""
    count, name = fields["rows"], f"emb.{fields['key']}"
    if fields["bits"] is None:
        values = _tensor(tensors, f"{name}.codes")
        if list(values.shape) != [count, *shape] or values.dtype != dtype:
            raise _broken(fields, f"its values are {list(values.shape)} of {values.dtype}, not {[count, *shape]}")
        return values
    dim = math.prod(shape)
    values = packed_rows(fields, tensors, dim).dequantize().to(dtype)
    if fields["raw"]:
        at, raw = _tensor(tensors, f"{name}.raw_at").long(), _tensor(tensors, f"{name}.raw")
        wanted = [fields["raw"], dim]
        if list(raw.shape) != wanted or raw.dtype != dtype or list(at.shape) != wanted[:1] or _outside(at, count):
            raise _broken(fields, "its float rows do not fit")
        values[at] = raw
    return values.reshape(count, *shape)


def decode_state(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], label: str, shape: tuple[int, ...],
                 dtype: torch.dtype) -> Tensor:  # fmt: skip
    """The optimizer's state `label` of a record's rows: [m, *shape]. Raises FormatError."""
    stored = _tensor(tensors, f"opt.{fields['key']}.{label}")
    if label in fields.get("packed_state", ()):
        dim = math.prod(shape)
        if list(stored.shape) != [fields["rows"], row_bytes(dim, 8)]:
            raise _broken(fields, f"its state {label!r} is {list(stored.shape)}")
        return PackedRows(stored, 8, dim).dequantize().to(dtype).reshape(-1, *shape)
    if list(stored.shape) != [fields["rows"], *shape] or stored.dtype != dtype:
        raise _broken(fields, f"its state {label!r} is {list(stored.shape)} of {stored.dtype}")
    return stored


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise FormatError(f"the checkpoint's file lacks the tensor {name!r}")
    return tensors[name]


def _outside(places: Tensor, count: int) -> bool:
    return bool(((places < 0) | (places >= count)).any())


def _broken(fields: Mapping[str, Any], what: str) -> FormatError:
    return FormatError(f"the record of table {fields['table']!r} is broken: {what}")

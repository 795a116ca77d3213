"""What a manifest says about its files, compared with their headers before a byte of their data is used.

A manifest whose digest fits, and files whose sha256 fit, may still have been made by an enemy, or by a fault of ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from edgewright.errors import FormatError
from edgewright.io.row_codes import ROW_BITS, row_bytes
from edgewright.io.safetensors_header import SafetensorsEntry
from edgewright.systems.check_n_run.files import Files
from edgewright.systems.check_n_run.manifest import Manifest, Table, dtype_of
from edgewright.systems.check_n_run.shards import DTYPES, Place, header, whole_shape

ROWS = "edgewright rows"  # in the place of an optimizer's entry that lies with the rows of its table
Kinds = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # tensor -> type and shape
_TAGS = ("__tensor__", "__part__")
_DEPTH = 64  # of the tree of a state
_ID_TYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def check_manifest(files: Files, manifest: Manifest) -> None:
    """Raise FormatError, OSError unless files, records, tensors and state of one checkpoint fit each other."""
    headers = {name: header(files, f"{manifest.id}/{name}") for name in manifest.files}
    kinds = {name: _kinds(entries) for name, entries in headers.items()}
    rows = dict.fromkeys(manifest.tables, 0)
    for record in manifest.records:
        check_record(record, kinds[record["file"]], manifest.tables[record["table"]])
        rows[record["table"]] += record["rows"]
    for name, table in manifest.tables.items():
        if rows[name] > table.rows or (manifest.kind == "full" and rows[name] < table.rows):
            raise FormatError(
                f"{manifest.id}: its records have {rows[name]} of the {table.rows} rows of table {name!r}"
            )
    for name, parts in manifest.dense.items():
        places = []
        for file, offsets in parts:
            if name not in headers[file]:
                raise FormatError(f"{manifest.id}/{file} lacks the tensor {name[:80]!r}")
            places.append(Place(file, headers[file][name], tuple(offsets)))
        whole_shape(name, places)
    _check_state(manifest)


def check_record(fields: Mapping[str, Any], kinds: Kinds, table: Table | None) -> None:
    """Raise FormatError unless a record's tensors have the types and shapes that its fields and its table call for.

    table None: what is in no table's hands is not compared: the width of its rows, and how many there are.
    """
    where = f"the record of table {str(fields['table'])[:80]!r} is broken"
    count, bits, name = fields["rows"], fields["bits"], f"emb.{fields['key']}"
    if table is not None and fields["first"] + count > table.rows:
        raise FormatError(f"{where}: rows {fields['first']}..{fields['first'] + count - 1} are not of {table.rows}")
    found = kinds.get(f"{name}.codes")
    if found is None or not found[1] or found[1][0] != count:
        raise FormatError(f"{where}: it has no codes of {count} rows")
    shape = tuple(table.shape if table is not None else found[1][1:])
    dtype = found[0] if table is None else dtype_of(table.dtype)
    wanted: dict[str, tuple[Any, tuple[int, ...]]] = {}
    if bits is None:
        wanted[f"{name}.codes"] = (dtype, (count, *shape))
    else:
        dim = math.prod(shape)
        if type(bits) is not int or bits not in ROW_BITS or (table is not None and dim < 1):
            raise FormatError(f"{where}: rows of {dim} values at {str(bits)[:20]} bits cannot be")
        wanted[f"{name}.codes"] = (torch.uint8, (count, row_bytes(dim, bits) if table is not None else dim))
        raw = fields.get("raw", 0)
        if type(raw) is not int or not 0 <= raw <= count:
            raise FormatError(f"{where}: it claims {str(raw)[:20]} float rows of {count}")
        if raw:
            wanted[f"{name}.raw_at"] = (torch.int32, (raw,))
            wide = kinds.get(f"{name}.raw", (dtype, (raw, dim)))
            wanted[f"{name}.raw"] = (dtype, (raw, dim)) if table is not None else (wide[0], (raw, *wide[1][1:]))
    packed = fields.get("packed_state", [])
    for label, (kind, entry) in (table.state if table is not None else {}).items():
        as_bytes = label in packed
        size = (row_bytes(max(math.prod(entry), 1), 8),) if as_bytes else tuple(entry)
        wanted[f"opt.{fields['key']}.{label}"] = (torch.uint8 if as_bytes else dtype_of(kind), (count, *size))
    for tensor, (kind, size) in wanted.items():
        if kinds.get(tensor) != (kind, size):
            now = "absent" if tensor not in kinds else f"{kinds[tensor][0]}{list(kinds[tensor][1])}"
            raise FormatError(f"{where}: {tensor[:80]!r} is {now}, not {kind}{list(size)}")
    _check_ids(fields, kinds, where)


def _check_ids(fields: Mapping[str, Any], kinds: Kinds, where: str) -> None:
    kind, name = fields.get("ids", "range"), f"emb.{fields['key']}.ids"
    if kind == "range":
        return
    dtype, shape = kinds.get(name, (None, ()))
    wrong = dtype not in _ID_TYPES or shape != (fields["rows"] - 1,)
    if kind == "bitmap":
        wrong = dtype != torch.uint8 or len(shape) != 1
    if wrong:
        raise FormatError(f"{where}: its ids ({str(kind)[:20]}) are {dtype}{list(shape)}")


def kinds_of(tensors: Mapping[str, torch.Tensor]) -> Kinds:
    """Types and shapes of tensors that were read."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _kinds(entries: Mapping[str, SafetensorsEntry]) -> Kinds:
    return {name: (DTYPES[entry.dtype], entry.shape) for name, entry in entries.items()}


def _check_state(manifest: Manifest) -> None:
    state = manifest.state
    optimizers, ranks = state.get("optimizers"), state.get("ranks")
    if not isinstance(optimizers, list) or not isinstance(ranks, list) or len(ranks) != manifest.world:
        raise FormatError(
            f"{manifest.id}: its state lacks optimizers, or a part for each of {manifest.world} processes"
        )
    for rank in ranks:
        if not isinstance(rank, dict) or "reader" not in rank or not isinstance(rank.get("random"), dict):
            raise FormatError(f"{manifest.id}: the state of a process lacks random numbers or the reader")
    for entry in optimizers:
        groups, held = (entry.get("groups"), entry.get("state")) if isinstance(entry, dict) else (None, None)
        if not isinstance(groups, list) or not isinstance(held, dict) or not isinstance(entry["class"], str):
            raise FormatError(f"{manifest.id}: an optimizer lacks its class, groups or state")
        if not all(isinstance(group, dict) for group in groups) or not all(isinstance(v, dict) for v in held.values()):
            raise FormatError(f"{manifest.id}: the groups or the state of an optimizer are no tables")
        for name, labels in held.items():
            by_row = manifest.tables[name].state if name in manifest.tables else {}
            if any(not isinstance(labels.get(label), dict) or ROWS not in labels[label] for label in by_row):
                raise FormatError(f"{manifest.id}: {name[:80]!r} lacks its state by row")
            for label, value in labels.items():
                if isinstance(value, dict) and ROWS in value and (
                    name not in manifest.tables or value[ROWS] != label or label not in manifest.tables[name].state
                ):  # fmt: skip
                    raise FormatError(f"{manifest.id}: {name[:80]!r} has no state {label[:80]!r} by row")
    for tag in _tags(state, 0):
        if not isinstance(tag, str) or tag not in manifest.dense:
            raise FormatError(f"{manifest.id}: its state names the tensor {str(tag)[:80]!r}, which is not there")


def _tags(tree: Any, depth: int) -> Iterator[Any]:
    if depth > _DEPTH:
        raise FormatError("the state of a checkpoint is nested more deeply than any that we write")
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in _TAGS:
                yield value
            else:
                yield from _tags(value, depth + 1)
    elif isinstance(tree, list):
        for value in tree:
            yield from _tags(value, depth + 1)

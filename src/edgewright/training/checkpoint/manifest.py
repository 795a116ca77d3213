"""manifest.json: what a checkpoint is made of. Written last, checked first; JSON, never a pickle.

Its own sha256 stands in it (`digest`, over everything else), and every checkpoint names its ancestors with theirs, so
that a chain cannot be put together from parts of different runs. A manifest whose digest fits, and files whose sha256
fit, may still have been made by an enemy, or by a fault of ours: `check_manifest` compares what it says about its files
with their headers before a byte of their data is used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from edgewright.errors import FormatError
from edgewright.io.hashing import sha256
from edgewright.io.row_codes import ROW_BITS, row_bytes
from edgewright.io.safetensors_header import SafetensorsEntry
from edgewright.training.checkpoint.files import Files
from edgewright.training.checkpoint.shards import DTYPES, Place, header, whole_shape
from edgewright.training.checkpoint.tree import TAGS

KIND, VERSION = "edgewright-checkpoint", 1
NAME = "manifest.json"
LARGEST = 64 << 20  # bytes of a manifest
ID = re.compile(r"ckpt-\d{1,18}-[0-9a-f]{8}")
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.safetensors")
_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


class OtherVersion(FormatError):
    """A checkpoint of a format that this version does not know."""


@dataclass(frozen=True)
class Table:
    """rows x shape values of `dtype`; `state`: the optimizer's entries a row, name -> [dtype, shape of a row's]."""

    rows: int
    shape: list[int]
    dtype: str
    state: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """One checkpoint. chain: [id, digest] of the ancestors that a restore needs, the full one first, itself not in it.

    files: name -> [sha256, bytes]. records: see `records`, each with its file. dense: tensor -> [[file, offsets], ...].
    state: JSON of everything that is no tensor, tensors by their names. sequence grows with every checkpoint of a root.
    """

    id: str
    kind: str
    step: int
    sequence: int
    parent: str | None
    chain: list[list[str]]
    policy: str
    bits: int | None
    method: str
    restores: int
    world: int
    tables: dict[str, Table]
    records: list[dict[str, Any]]
    files: dict[str, list[Any]]
    dense: dict[str, list[list[Any]]]
    state: dict[str, Any]
    sizes: list[float]
    versions: dict[str, str]
    created: int

    @property
    def base(self) -> str:
        """Id of the full checkpoint that this one builds upon; its own where it is one."""
        return self.chain[0][0] if self.chain else self.id

    @property
    def rows(self) -> int:
        """Rows of tables in this checkpoint's own records."""
        return sum(record["rows"] for record in self.records)

    @property
    def raw_rows(self) -> int:
        """Of these, the rows that are stored as floats since no code can hold them."""
        return sum(record.get("raw", 0) for record in self.records)

    @property
    def data_bytes(self) -> int:
        """Bytes of the data files."""
        return sum(entry[1] for entry in self.files.values())

    def encode(self) -> tuple[bytes, str]:
        """(the file's bytes, its digest)."""
        body = {"format": KIND, "version": VERSION, **asdict(self)}
        digest = _digest(body)
        return json.dumps({**body, "digest": digest}, separators=(",", ":")).encode(), digest


def decode(text: bytes, where: str) -> tuple[Manifest, str]:
    """(the manifest, its digest). Raises FormatError, OtherVersion."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON ({str(error)[:80]})") from error
    if not isinstance(body, dict) or body.get("format") != KIND:
        raise FormatError(f"{where} is not the manifest of a checkpoint of ours (format {KIND!r})")
    if _too_deep(body):
        raise FormatError(f"{where} is nested more deeply than any manifest")
    digest = body.pop("digest", None)
    try:
        fits = digest == _digest(body)
    except RecursionError as error:
        raise FormatError(f"{where} is nested more deeply than any manifest") from error
    if not fits:  # first, so that a flipped bit in the version is damage and not another format
        raise FormatError(f"{where} was changed: its digest does not fit")
    if body.get("version") != VERSION:
        raise OtherVersion(
            f"{where} has format version {str(body.get('version'))[:20]}; this version reads {VERSION}: restore it "
            "with the edgewright that wrote it"
        )
    body = {name: value for name, value in body.items() if name not in ("format", "version")}
    if set(body) != {f.name for f in fields(Manifest)}:
        raise FormatError(f"{where} lacks fields, or has others: {sorted(set(body))[:30]}")
    try:
        manifest = Manifest(**{**body, "tables": {name: Table(**t) for name, t in body["tables"].items()}})
        problem = _problem(manifest)
    except (TypeError, KeyError, AttributeError, ValueError, IndexError, OverflowError) as error:
        raise FormatError(f"{where} has a field of another type ({str(error)[:120]})") from error
    if problem:
        raise FormatError(f"{where}: {problem}")
    return manifest, digest


def read(files: Files, folder: str) -> tuple[Manifest, str]:
    """The manifest in a checkpoint's folder. Raises FormatError where there is none or it is broken, OtherVersion."""
    path = f"{folder}/{NAME}"
    if files.kind(folder) != "folder":
        raise FormatError(f"{folder} is a link or a file; links are not followed")
    try:
        if (size := files.size(path)) > LARGEST:
            raise FormatError(f"{path} has {size} bytes; at most {LARGEST} are allowed")
        with files.open(path) as stream:
            text = stream.read(LARGEST + 1)
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error.strerror or error})") from error
    manifest, digest = decode(text, path)
    if manifest.id != folder:
        raise FormatError(f"{path} is the manifest of {manifest.id}")
    return manifest, digest


def _too_deep(tree: Any, most: int = 64) -> bool:
    level = [tree]
    for _ in range(most):
        level = [v for node in level for v in (node.values() if isinstance(node, dict) else node)
                 if isinstance(v, dict | list)]  # fmt: skip
        if not level:
            return False
    return True


def _digest(body: Mapping[str, Any]) -> str:
    return sha256(json.dumps(body, sort_keys=True, separators=(",", ":")))


def dtype_of(name: str) -> Any:
    """Torch's type of a stored name. Raises FormatError."""
    if name not in _TYPES:
        raise FormatError(f"dtype {str(name)[:40]!r} is none that a checkpoint holds")
    return _TYPES[name]


def _problem(manifest: Manifest) -> str | None:
    """What is impossible in a manifest whose digest fits: it may have been made by an enemy."""
    chain = [ancestor for ancestor, _ in manifest.chain]
    if not all(isinstance(i, str) and ID.fullmatch(i) for i in [manifest.id, *chain]):
        return "an id is not ckpt-<step>-<8 hex digits>"
    if len({manifest.id, *chain}) != len(chain) + 1 or (manifest.kind == "full") != (not chain):
        return "its chain names a checkpoint twice, or does not fit its kind"
    if manifest.kind not in ("full", "diff") or not (manifest.bits is None or manifest.bits in ROW_BITS):
        return f"kind {manifest.kind!r} or bits {manifest.bits!r} is unknown"
    if not all(_whole(v) for v in (manifest.step, manifest.sequence, manifest.restores, manifest.world)):
        return "step, sequence, restores or world is no whole number"
    if not all(
        FILE.fullmatch(n) and _whole(size) and isinstance(sha, str) for n, (sha, size) in manifest.files.items()
    ):
        return "a file's name, size or sha256 is not one of ours"
    for name, table in manifest.tables.items():
        dtype_of(table.dtype)
        if not _whole(table.rows) or not all(map(_whole, table.shape)):
            return f"table {name[:80]!r} has no shape"
        for dtype, shape in table.state.values():
            dtype_of(dtype)
            if not all(map(_whole, shape)):
                return f"the optimizer's state of table {name[:80]!r} has no shape"
    for record in manifest.records:
        bits = record["bits"]
        if _whole(record["rows"]) and record["rows"] > manifest.files[record["file"]][1]:
            return f"a record claims {record['rows']} rows in a file of {manifest.files[record['file']][1]} bytes"
        if record["file"] not in manifest.files or record["table"] not in manifest.tables:
            return "a record names a file or table that is not there"
        if not (_whole(record["rows"]) and record["rows"] and _whole(record["first"]) and _whole(record["key"])):
            return "a record has no rows"
        if not (bits is None or (type(bits) is int and bits in ROW_BITS and _whole(record["raw"]))):
            return f"a record has {bits!r} bits"
        if record.get("ids", "range") not in ("range", "delta", "bitmap"):
            return f"a record has ids of kind {str(record['ids'])[:20]!r}"
    for name, parts in manifest.dense.items():
        if not parts or not all(file in manifest.files and all(map(_whole, offsets)) for file, offsets in parts):
            return f"tensor {name[:80]!r} lies nowhere"
    if not isinstance(manifest.state, dict) or not all(isinstance(s, int | float) for s in manifest.sizes):
        return "state or sizes are of another type"
    return None


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


ROWS = "edgewright rows"  # in the place of an optimizer's entry that lies with the rows of its table
Kinds = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # tensor -> type and shape
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
    ranks, optimizers = state.get("ranks"), state.get("optimizers", [])
    if not isinstance(ranks, list) or len(ranks) != manifest.world:
        raise FormatError(f"{manifest.id}: its state lacks a part for each of {manifest.world} processes")
    if not isinstance(optimizers, list):
        raise FormatError(f"{manifest.id}: its optimizers are no list")
    for rank in ranks if "optimizers" in state else ():
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
            if key in TAGS:
                yield value
            else:
                yield from _tags(value, depth + 1)
    elif isinstance(tree, list):
        for value in tree:
            yield from _tags(value, depth + 1)

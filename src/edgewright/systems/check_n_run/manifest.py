"""manifest.json: what a checkpoint is made of. Written last, checked first; JSON, never a pickle.

Its own sha256 stands in it (`digest`, over everything else), and every checkpoint names its ancestors with theirs, so
that a chain cannot be put together from parts of different runs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from edgewright.errors import FormatError
from edgewright.io.row_codes import ROW_BITS
from edgewright.systems.check_n_run.files import Files
from edgewright.systems.check_n_run.shards import DTYPES

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
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def dtype_of(name: str) -> Any:
    """torch's type of a stored name. Raises FormatError."""
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

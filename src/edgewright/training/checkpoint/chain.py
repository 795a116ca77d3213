"""The folder of checkpoints: how one comes to be and goes, which ones can be used, and the replay of a chain.

A crash at any moment leaves the checkpoint before or the new one, never a mixture:

    1. tmp-<uuid>/: data files, then manifest.json, each on the disk (fsync) before the next step
    2. fsync of that folder
    3. rename to ckpt-<step>-<uuid8>, fsync of the root           from here on the checkpoint exists
    4. LATEST.tmp, fsync, rename to LATEST, fsync of the root     a hint for people; nothing depends on it

Where nothing can be renamed (object stores) the data goes to the final folder and the manifest is the last object.
Deleting begins when the new checkpoint is on the disk, and renames to trash-<uuid> first.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgewright.errors import FormatError, UsageError
from edgewright.training.checkpoint.files import Files
from edgewright.training.checkpoint.manifest import (
    FILE,
    ID,
    LARGEST,
    NAME,
    Manifest,
    OtherVersion,
    check_manifest,
    decode,
    dtype_of,
    read,
)
from edgewright.training.checkpoint.records import decode_ids, decode_state, decode_values
from edgewright.training.checkpoint.shards import SUFFIX, Place, digest, header, read_file


@dataclass
class Catalogue:
    """The checkpoints of a root: manifests newest first, digests, and why a folder is none."""

    found: list[Manifest] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    other_version: FormatError | None = None

    def get(self, identity: str) -> Manifest | None:
        return next((manifest for manifest in self.found if manifest.id == identity), None)


@dataclass
class TableRows:
    """A table, or rows first .. first + len(values) of it, with the optimizer's state of those rows."""

    first: int
    values: Tensor
    state: dict[str, Tensor]


def catalogue(files: Files) -> Catalogue:
    """Read every manifest."""
    result = Catalogue()
    for name in files.names(""):
        if not ID.fullmatch(name):
            continue
        try:
            manifest, result.digests[name] = read(files, name)
            result.found.append(manifest)
        except OtherVersion as error:
            result.broken[name], result.other_version = str(error), error
        except FormatError as error:
            result.broken[name] = str(error)
    result.found.sort(key=lambda manifest: (manifest.sequence, manifest.step, manifest.id), reverse=True)
    return result


def chain_of(known: Catalogue, manifest: Manifest) -> list[Manifest]:
    """The full checkpoint, what follows it, and `manifest` last. Raises FormatError naming what is missing."""
    chain = []
    for identity, wanted in manifest.chain:
        ancestor = known.get(identity)
        if ancestor is None:
            reason = known.broken.get(identity, "it is not there")
            raise FormatError(f"{manifest.id} builds upon {identity}, which cannot be used: {reason}")
        if known.digests[identity] != wanted:
            raise FormatError(f"{manifest.id} builds upon another {identity} than the one that lies there")
        chain.append(ancestor)
    if chain and chain[0].kind != "full":
        raise FormatError(f"{manifest.id} builds upon {chain[0].id}, which is no full checkpoint")
    return [*chain, manifest]


def check_files(files: Files, manifest: Manifest, content: bool = True) -> None:
    """Size and (`content`) sha256 of every file of one checkpoint. Raises FormatError naming the first that differs."""
    for name, (sha256, size) in manifest.files.items():
        path = f"{manifest.id}/{name}"
        try:
            now = files.size(path)
            if now != size:
                raise FormatError(f"{path} has {now} bytes instead of {size}")
            if content and digest(files, path).sha256 != sha256:
                raise FormatError(f"{path} has other bytes than were written (sha256)")
        except OSError as error:
            raise FormatError(f"{path} cannot be read ({error.strerror or 'missing'})") from error


def check_chain(
    files: Files, known: Catalogue, manifest: Manifest, verified: set[str] | None = None, content: bool = True
) -> list[Manifest]:
    """The chain of a checkpoint, every file verified but those of checkpoints in `verified`, to which it adds."""
    verified = set() if verified is None else verified
    chain = chain_of(known, manifest)
    for link in chain:
        if link.id not in verified:
            check_files(files, link, content)
            try:
                check_manifest(files, link)
            except OSError as error:
                raise FormatError(f"{link.id} cannot be read ({error.strerror or error})") from error
            verified.add(link.id)
    return chain


def newest(files: Files, known: Catalogue) -> tuple[list[Manifest] | None, dict[str, str]]:
    """(chain of the newest checkpoint that can be used, or None; why the newer ones cannot)."""
    skipped, verified = dict(known.broken), set[str]()
    for manifest in known.found:
        try:
            return check_chain(files, known, manifest, verified), skipped
        except FormatError as error:
            skipped[manifest.id] = str(error)
    return None, skipped


def choose(files: Files, identity: str | None) -> tuple[list[Manifest], dict[str, str]]:
    """(chain, what was skipped and why) of the newest usable checkpoint, or of the one named.

    Raises UsageError (there is none), FormatError (of another format version; none can be used, with the reasons).
    """
    known = catalogue(files)
    if known.other_version is not None and identity not in known.digests:
        raise known.other_version
    if identity is not None:
        manifest = known.get(identity)
        if manifest is None:
            reason = known.broken.get(identity)
            names = ", ".join(m.id for m in known.found[:5]) or "none"
            raise FormatError(reason) if reason else UsageError(f"{files} holds no {identity}; it holds {names}")
        return check_chain(files, known, manifest), {}
    chain, skipped = newest(files, known)
    if chain is None and not skipped:
        raise UsageError(f"{files} holds no checkpoint; they are folders called ckpt-<step>-<id>")
    if chain is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(skipped.items(), reverse=True)[:5])
        raise FormatError(f"no checkpoint of {files} can be used: {reasons}")
    return chain, skipped


def replay(
    files: Files, chain: list[Manifest], parts: dict[str, tuple[int, int]] | None = None
) -> dict[str, TableRows]:
    """The tables after a chain, in memory of their own: of each, every row is that of the last record that has it.

    parts: table -> (first row, rows) where less than the whole is wanted; tables that are not named are left out.
    Raises FormatError for records that cannot be, or rows that no record has.
    """
    tip = chain[-1]
    wanted = {name: (0, table.rows) for name, table in tip.tables.items()} if parts is None else parts
    result: dict[str, TableRows] = {}
    covered: dict[str, Tensor] = {}
    for link in chain:
        seen: dict[str, Tensor] = {}  # rows that this checkpoint has
        for file, records in _by_file(link).items():
            tensors = None
            for fields in records:
                name = fields["table"]
                if name not in wanted or not wanted[name][1]:
                    continue
                tensors = read_file(files, link.id, file) if tensors is None else tensors
                table, (first, count) = link.tables[name], wanted[name]
                if table != tip.tables.get(name):
                    raise FormatError(f"table {name!r} is another in {link.id} than in {tip.id}")
                ids = decode_ids(fields, tensors, table.rows)
                values = decode_values(fields, tensors, tuple(table.shape), dtype_of(table.dtype))
                states = {
                    label: decode_state(fields, tensors, label, tuple(shape), dtype_of(dtype))
                    for label, (dtype, shape) in table.state.items()
                }
                if name not in result:  # once a record was decoded, so that lies about sizes reserve no memory
                    if _rows_of(chain, name) < count:
                        raise FormatError(f"{tip.id}: its records do not have all {count} rows of table {name!r}")
                    result[name] = _empty(table.shape, table.dtype, table.state, first, count)
                    covered[name] = torch.zeros(count, dtype=torch.bool)
                once = seen.setdefault(name, torch.zeros(count, dtype=torch.bool))
                mine = ids[(ids >= first) & (ids < first + count)] - first
                if bool(once[mine].any()):
                    raise FormatError(f"{link.id} has a row of table {name!r} twice")
                once[mine] = covered[name][mine] = True
                _put(result[name].values, first, ids, values)
                for label, entries in states.items():
                    _put(result[name].state[label], first, ids, entries)
    for name, (first, count) in wanted.items():
        if count and (name not in covered or not bool(covered[name].all())):
            raise FormatError(f"{tip.id}: no record has all of the rows {first}..{first + count - 1} of table {name!r}")
        if not count:
            table = tip.tables[name]
            result[name] = _empty(table.shape, table.dtype, table.state, first, 0)
    return result


def dense_places(files: Files, manifest: Manifest, names: Iterable[str]) -> dict[str, list[Place]]:
    """Where the parts of dense tensors lie. Raises FormatError."""
    headers = {}
    places: dict[str, list[Place]] = {}
    for name in names:
        if name not in manifest.dense:
            raise FormatError(f"{manifest.id} lacks the tensor {name!r}")
        for file, offsets in manifest.dense[name]:
            if file not in headers:
                headers[file] = header(files, f"{manifest.id}/{file}")
            entry = headers[file].get(name)
            if entry is None or len(entry.shape) != len(offsets):
                raise FormatError(f"{manifest.id}/{file} lacks the tensor {name!r}, or has it in another shape")
            places.setdefault(name, []).append(Place(file, entry, tuple(offsets)))
    return places


def _put(target: Tensor, first: int, ids: Tensor, source: Tensor) -> None:
    """source[i] to row ids[i] of a table of which `target` has the rows from `first` on; rows outside are left out."""
    start, stop = int(ids[0]) - first, int(ids[-1]) - first + 1
    if start < 0 or stop > len(target):
        inside = (ids >= first) & (ids < first + len(target))
        ids, source = ids[inside], source[inside]
        if len(ids):
            _put(target, first, ids, source)
    elif stop - start == len(ids):  # a range is copied as one
        target[start:stop] = source
    else:
        target.index_copy_(0, ids - first, source)


def _rows_of(chain: list[Manifest], table: str) -> int:
    return sum(record["rows"] for link in chain for record in link.records if record["table"] == table)


def _by_file(manifest: Manifest) -> dict[str, list[dict]]:
    result: dict[str, list[dict]] = {}
    for record in manifest.records:
        result.setdefault(record["file"], []).append(record)
    return result


def _empty(shape: list[int], dtype: str, state: dict[str, list], first: int, count: int) -> TableRows:
    values = torch.zeros(count, *shape, dtype=dtype_of(dtype))
    return TableRows(first, values, {n: torch.zeros(count, *s, dtype=dtype_of(d)) for n, (d, s) in state.items()})


LATEST = "LATEST"
TEMPORARY, TRASH = "tmp-", "trash-"
_STARTED = time.time()


def checkpoint_id(step: int, unique: str) -> str:
    """ckpt-<step>-<uuid8>."""
    return f"ckpt-{step:08d}-{unique[:8]}"


def working_folder(files: Files, identity: str, unique: str) -> str:
    """Where the files of a checkpoint are written until it exists."""
    return f"{TEMPORARY}{unique}" if files.renames else identity


def write_file(files: Files, path: str, data: bytes) -> None:
    """A new file whose bytes are on the disk when this returns."""
    handle = files.create(path)
    try:
        files.write(handle, data)
        files.sync(handle)
    except BaseException:
        files.discard(handle)
        raise


def commit(files: Files, folder: str, manifest: Manifest) -> str:
    """Make the checkpoint in `folder`, whose data files are on the disk, exist; its digest.

    Raises OSError, and UsageError for a state that is too large or too deep to be read again.
    """
    text, digest = manifest.encode()
    try:
        if len(text) > LARGEST:
            raise FormatError(f"it has {len(text)} bytes without its tensors, {LARGEST} are allowed")
        decode(text, manifest.id)
    except FormatError as error:
        raise UsageError(f"this state cannot be kept: {error}; hold numbers in tensors and nest less") from error
    write_file(files, f"{folder}/{NAME}", text)
    files.sync_folder(folder)
    if files.renames:
        files.rename(folder, manifest.id)
    files.sync_folder("")
    return digest


def update_latest(files: Files, identity: str) -> None:
    """LATEST names this checkpoint. Raises OSError, after which the checkpoint exists all the same."""
    if not files.renames:
        write_file(files, LATEST, f"{identity}\n".encode())
        return
    if f"{LATEST}.tmp" in files.names(""):  # a link is removed, not what it names
        files.unlink(f"{LATEST}.tmp")
    write_file(files, f"{LATEST}.tmp", f"{identity}\n".encode())
    files.rename(f"{LATEST}.tmp", LATEST)
    files.sync_folder("")


def latest(files: Files) -> str | None:
    """What LATEST says, if that could be a checkpoint's name."""
    try:
        with files.open(LATEST) as stream:
            text = stream.read(64).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if ID.fullmatch(text) else None


def remove(files: Files, folders: Iterable[str]) -> None:
    """Delete checkpoints in this order; what builds upon others comes before them. Raises OSError."""
    for folder in folders:
        if files.renames:
            trash = f"{TRASH}{uuid.uuid4().hex}"
            files.rename(folder, trash)
            files.sync_folder("")
            discard(files, trash)
        else:  # without its manifest it is no checkpoint
            if NAME in files.names(folder):
                files.unlink(f"{folder}/{NAME}")
            discard(files, folder)


def discard(files: Files, folder: str) -> None:
    """Delete a folder of files that a checkpointer wrote. Raises OSError."""
    for name in files.names(folder):
        files.unlink(f"{folder}/{name}")
    files.rmdir(folder)


def ours(files: Files, folder: str) -> bool:
    """Whether this is a folder, no link to one, and holds nothing but files that a checkpointer writes.

    Whatever else has the name of a checkpoint, or lies in one, is somebody's: it is never deleted.
    """
    return files.kind(folder) == "folder" and all(
        (name == NAME or FILE.fullmatch(name)) and files.kind(f"{folder}/{name}") == "file"
        for name in files.names(folder)
    )


def orphans(files: Files, before: float = _STARTED) -> list[str]:
    """Folders that a killed process left behind: temporary ones and trash, older than `before` (this process)."""
    found = []
    for name in files.names(""):
        if name.startswith((TEMPORARY, TRASH)):
            unfinished = True
        else:
            unfinished = not files.renames and bool(ID.fullmatch(name)) and NAME not in files.names(name)
        if unfinished and _age(files, name) < before:
            found.append(name)
    return found


def clean(files: Files, before: float = _STARTED) -> list[str]:
    """Delete the orphans; those that cannot be, or hold files of others, stay. The names of those gone."""
    gone = []
    for name in orphans(files, before):
        if not ours(files, name):
            continue
        try:
            discard(files, name)
            gone.append(name)
        except OSError:
            continue
    return gone


def _age(files: Files, name: str) -> float:
    try:
        inside = [files.modified(f"{name}/{part}") for part in files.names(name) if part.endswith(SUFFIX)]
        return max(inside, default=files.modified(name))
    except OSError:
        return 0.0


def clear(files: Files) -> None:
    """Delete every checkpoint and what killed processes left; no link, nothing of others. Raises OSError."""
    remove(files, [name for name in files.names("") if ID.fullmatch(name) and ours(files, name)])
    clean(files, math.inf)
    if files.kind(LATEST) == "file":
        files.unlink(LATEST)


def kept(files: Files, known: Catalogue, keep: int, verified: set[str] | None = None) -> set[str]:
    """Ids of the newest `keep` checkpoints whose chains verify, and of their chains. verified: needs no new check."""
    verified = set() if verified is None else verified
    result: set[str] = set()
    count = 0
    for manifest in known.found:
        if count == keep:
            break
        try:
            result |= {link.id for link in check_chain(files, known, manifest, verified)}
            count += 1
        except FormatError:
            continue
    return result


def collect(files: Files, keep: int, verified: set[str] | None = None, broken: bool = False) -> list[str]:
    """Delete what `kept` does not name; the ids that are gone. broken: also folders whose manifest cannot be read,
    except those of another format version. Nothing is deleted where nothing can be restored, and no link or folder with
    files of others ever. Raises OSError.
    """
    known = catalogue(files)
    stay = kept(files, known, keep, verified)
    if not stay:
        return []
    gone = [manifest.id for manifest in known.found if manifest.id not in stay]
    if broken and known.other_version is None:
        gone = [*known.broken, *gone]
    gone = [name for name in gone if ours(files, name)]
    remove(files, gone)
    return gone

"""A disk that forgets: file operations in memory, recorded, and every state that a crash may leave of them.

What is guaranteed after a crash is what was asked for: the bytes of a file up to its last fsync, the names of a folder
up to the fsync of that folder. Everything later may be there, lost, cut short, torn (holes of zeros) or, between files
and names, in another order; a rename is there or not. That is harsher than a killed process, which leaves all it wrote.
"""

from __future__ import annotations

import errno
import io
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

from edgewright.errors import UsageError
from edgewright.training.checkpoint.files import Kind


@dataclass
class _File:
    """The bytes written, and how many of them were on the disk at the last fsync."""

    data: bytearray = field(default_factory=bytearray)
    safe: int = 0


@dataclass(frozen=True)
class Operation:
    """One recorded operation: its name and its arguments."""

    name: str
    path: str
    target: str = ""
    data: bytes = b""


class Killed(BaseException):
    """The power went."""


class MemoryFiles:
    """File operations on a disk in memory. before(operation) may raise: OSError for a fault, Killed for the end."""

    renames = True

    def __init__(self, before: Callable[[Operation], None] | None = None) -> None:
        self.files: dict[str, _File] = {}
        self.folders: dict[str, set[str]] = {"": set()}
        self.log: list[Operation] = []
        self.before = before
        self.locked = False

    def __str__(self) -> str:
        return "memory"

    def _note(self, name: str, path: str, target: str = "", data: bytes = b"") -> None:
        operation = Operation(name, path, target, data)
        if self.before is not None:
            self.before(operation)
        self.log.append(operation)

    def mkdir(self, path: str) -> None:
        if path not in self.folders:
            self._note("mkdir", path)
            self.folders[path] = set()
            self.folders[""].add(path)

    def create(self, path: str) -> str:
        folder, name = _split(path)
        if name in self.folders[folder]:
            raise FileExistsError(errno.EEXIST, "it is there", path)
        self._note("create", path)
        self.files[path] = _File()
        self.folders[folder].add(name)
        return path

    def write(self, handle: str, data: Any) -> None:
        piece = bytes(memoryview(data).cast("B"))
        self._note("write", handle, data=piece)
        self.files[handle].data += piece

    def sync(self, handle: str) -> None:
        self._note("fsync", handle)
        self.files[handle].safe = len(self.files[handle].data)

    def discard(self, handle: str) -> None:
        """Nothing is held open."""

    def sync_folder(self, path: str) -> None:
        self._note("fsync_folder", path)

    def rename(self, source: str, target: str) -> None:
        self._note("rename", source, target)
        _rename(self.files, self.folders, source, target)

    def unlink(self, path: str) -> None:
        folder, name = _split(path)
        if name not in self.folders.get(folder, ()):
            raise FileNotFoundError(errno.ENOENT, "it is not there", path)
        self._note("unlink", path)
        self.folders[folder].remove(name)
        del self.files[path]

    def rmdir(self, path: str) -> None:
        if path not in self.folders:
            raise FileNotFoundError(errno.ENOENT, "it is not there", path)
        self._note("rmdir", path)
        del self.folders[path]
        self.folders[""].discard(path)

    def names(self, path: str) -> list[str]:
        return sorted(self.folders.get(path, ()))

    def kind(self, path: str) -> Kind:
        return "folder" if path in self.folders else "file" if path in self.files else "other"

    def size(self, path: str) -> int:
        return len(self._file(path).data)

    def modified(self, path: str) -> float:
        return 0.0

    def open(self, path: str) -> IO[bytes]:
        return io.BytesIO(bytes(self._file(path).data))

    def _file(self, path: str) -> _File:
        if path not in self.files:
            raise FileNotFoundError(errno.ENOENT, "it is not there", path)
        return self.files[path]

    def lock(self) -> Any:
        if self.locked:
            raise UsageError("memory is being written by process 0: two writers would delete each other's checkpoints")
        self.locked = True
        return self

    def unlock(self, held: Any) -> None:
        self.locked = False


def crashed(log: list[Operation], at: int, draw: random.Random, torn: bool = True) -> MemoryFiles:
    """The disk after the power went before operation number `at` of a recorded run.

    torn False: a killed process, whose writes the system keeps. True: of everything without an fsync, draw decides.
    """
    disk, live = MemoryFiles(), dict[str, _File]()  # what is on the disk; what the running system sees
    waiting: dict[str, list[tuple[Operation, _File | None]]] = {}  # folder -> changes of its names since its fsync
    for operation in log[:at]:
        name, path = operation.name, operation.path
        if name == "write":
            live[path].data += operation.data
        elif name == "fsync":
            live[path].safe = len(live[path].data)
        elif name == "fsync_folder":
            for change, file in waiting.pop(path, []):
                _apply(disk, change, file)
        else:
            if name == "create":
                live[path] = _File()
            waiting.setdefault(_split(path)[0], []).append((operation, live.get(path)))
            if name == "rename":
                _move(live, path, operation.target)
    if torn and at < len(log) and log[at].name == "write":  # the one under way, as far as it came
        live[log[at].path].data += log[at].data[: draw.randrange(len(log[at].data) + 1)]
    for changes in waiting.values():
        for change, file in changes:
            if not torn or draw.random() < 0.5:
                _apply(disk, change, file)
    if torn:
        for file in {id(f): f for f in disk.files.values()}.values():
            _tear(file, draw)
    return disk


def _tear(file: _File, draw: random.Random) -> None:
    """What may have become of the bytes after the last fsync: gone, cut, whole, or with holes."""
    late = len(file.data) - file.safe
    if late <= 0:
        return
    how = draw.randrange(4)
    if how == 0:
        del file.data[file.safe :]
    elif how == 1:
        del file.data[file.safe + draw.randrange(late) :]
    elif how == 2:
        start = file.safe + draw.randrange(late)
        stop = min(start + 1 + draw.randrange(late), len(file.data))
        file.data[start:stop] = bytes(stop - start)


def _apply(disk: MemoryFiles, change: Operation, file: _File | None) -> None:
    """A change of names reaches the disk, whether or not those before it did."""
    folder, name = _split(change.path)
    if change.name == "mkdir":
        disk.folders.setdefault(change.path, set())
        disk.folders[""].add(change.path)
    elif change.name == "create":
        assert file is not None
        disk.folders.setdefault(folder, set()).add(name)
        disk.files[change.path] = file
    elif change.name == "unlink":
        disk.folders.get(folder, set()).discard(name)
        disk.files.pop(change.path, None)
    elif change.name == "rmdir":
        disk.folders[""].discard(change.path)
        disk.folders.pop(change.path, None)
    else:
        disk.folders[""].discard(change.path)
        disk.folders[""].add(change.target)
        if file is not None:
            disk.files.pop(change.path, None)
            disk.files[change.target] = file
        else:
            disk.folders[change.target] = disk.folders.pop(change.path, set())
            _move(disk.files, change.path, change.target)


def _move(files: dict[str, _File], source: str, target: str) -> None:
    """A file, or everything in a folder, under its new name."""
    for path in [p for p in files if p == source or p.startswith(f"{source}/")]:
        files[target + path[len(source) :]] = files.pop(path)


def _rename(files: dict[str, _File], folders: dict[str, set[str]], source: str, target: str) -> None:
    if source in folders:
        folders[target] = folders.pop(source)
        folders[""].discard(source)
        folders[""].add(target)
    else:
        folders[""].discard(source)
        folders[""].add(target)
    _move(files, source, target)


def _split(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    return folder, name

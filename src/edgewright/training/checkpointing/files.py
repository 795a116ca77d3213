"""The file operations of a checkpoint, all of them: what is counted, failed and killed in the tests is what runs.

Paths are relative to the root and use "/". A file is made with `create`, `write`..., `sync`; nothing is overwritten in
place. `url_files.UrlFiles` is the same over fsspec.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
from pathlib import Path
from typing import IO, Any, Protocol

from edgewright.errors import OutputError, UsageError
from edgewright.io.atomic import sync_file

LOCK = "LOCK"


class Files(Protocol):
    """A root folder and what may be done in it. Every method that changes something is one operation."""

    renames: bool  # whether a folder can be renamed in one operation

    def mkdir(self, path: str) -> None: ...
    def create(self, path: str) -> Any: ...
    def write(self, handle: Any, data: Any) -> None: ...
    def sync(self, handle: Any) -> None: ...
    def discard(self, handle: Any) -> None: ...
    def sync_folder(self, path: str) -> None: ...
    def rename(self, source: str, target: str) -> None: ...
    def unlink(self, path: str) -> None: ...
    def rmdir(self, path: str) -> None: ...
    def names(self, path: str) -> list[str]: ...
    def size(self, path: str) -> int: ...
    def modified(self, path: str) -> float: ...
    def open(self, path: str) -> IO[bytes]: ...
    def lock(self) -> Any: ...
    def unlock(self, held: Any) -> None: ...


class LocalFiles:
    """A folder of this machine."""

    renames = True

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def __str__(self) -> str:
        return str(self.root)

    def mkdir(self, path: str) -> None:
        (self.root / path).mkdir(parents=True, exist_ok=True)

    def create(self, path: str) -> int:
        """A new file, open for writing; FileExistsError where there is one."""
        return os.open(self.root / path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, handle: int, data: Any) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            view = view[os.write(handle, view) :]

    def sync(self, handle: int) -> None:
        """The file's bytes are on the disk when this returns; closes it."""
        os.fsync(handle)
        os.close(handle)

    def discard(self, handle: int) -> None:
        """Close a file that will not be finished."""
        try:
            os.close(handle)
        except OSError:
            pass

    def sync_folder(self, path: str) -> None:
        """The folder's names are on the disk when this returns."""
        sync_file(self.root / path)

    def rename(self, source: str, target: str) -> None:
        os.replace(self.root / source, self.root / target)

    def unlink(self, path: str) -> None:
        (self.root / path).unlink()

    def rmdir(self, path: str) -> None:
        (self.root / path).rmdir()

    def names(self, path: str) -> list[str]:
        """What lies in a folder; nothing where there is none."""
        try:
            return sorted(os.listdir(self.root / path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, path: str) -> int:
        """Bytes of a regular file; FileNotFoundError for anything else, so that links and pipes are never opened."""
        found = os.lstat(self.root / path)
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a regular file", path)
        return found.st_size

    def modified(self, path: str) -> float:
        return os.lstat(self.root / path).st_mtime

    def open(self, path: str) -> IO[bytes]:
        return (self.root / path).open("rb")

    def lock(self) -> Any:
        """Become the one writer of this root; the lock ends with the process. Raises UsageError naming the other."""
        import fcntl

        self.mkdir("")
        descriptor = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            other = os.read(descriptor, 4096)
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise locked(str(self.root), other) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, owner())
        return descriptor

    def unlock(self, held: Any) -> None:
        os.close(held)


def open_files(root: str | Path | Files) -> Files:
    """The file operations of a folder, an fsspec URL, or of an object that has them."""
    if isinstance(root, str) and "://" in root:
        from edgewright.training.checkpointing.url_files import UrlFiles

        return UrlFiles(root)
    if isinstance(root, str | os.PathLike):
        path = Path(root)
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; checkpoints lie in a folder, e.g. runs/checkpoints")
        return LocalFiles(path)
    return root


def output_error(files: Files, error: OSError) -> OutputError:
    """An operation that the disk refused, as one sentence."""
    return OutputError(f"cannot write a checkpoint into {files}: {error.strerror or error}")


def owner() -> bytes:
    """What a lock says about who holds it."""
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()


def read_owner(text: bytes) -> tuple[Any, Any]:
    """(process, machine) of a lock."""
    try:
        found = json.loads(text)
        return found["pid"], found["host"]
    except (ValueError, KeyError, TypeError):
        return "unknown", "unknown"


def is_dead(text: bytes) -> bool:
    """Whether the owner was a process of this machine that has ended."""
    pid, host = read_owner(text)
    if host != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def locked(root: str, text: bytes) -> UsageError:
    """The sentence for whoever comes second."""
    pid, host = read_owner(text)
    return UsageError(
        f"{root} is being written by process {pid} on {host} (its file {LOCK}); two writers would delete each other's "
        "checkpoints: end that process, or give this run a folder of its own"
    )

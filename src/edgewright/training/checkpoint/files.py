"""The file operations of a checkpoint, all of them: what is counted, failed and killed in the tests is what runs.

Paths are relative to the root and use "/". A file is made with `create`, `write`..., `sync`; nothing is overwritten in
place. `UrlFiles` is the same over fsspec (s3://, gs://, memory:// and whatever else it knows): an object appears whole
when its stream is closed, and nothing can be renamed, so that the manifest, written last, makes a checkpoint exist.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, Protocol, cast

from edgewright.errors import MissingPackage, OutputError, UsageError

LOCK = "LOCK"
UNKNOWN = ("unknown", "unknown")  # owner of a lock that we did not write
Kind = Literal["file", "folder", "other"]  # other: links, pipes, devices, and what is not there


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
    def kind(self, path: str) -> Kind: ...
    def size(self, path: str) -> int: ...
    def modified(self, path: str) -> float: ...
    def open(self, path: str) -> IO[bytes]: ...
    def lock(self) -> Any: ...
    def unlock(self, held: Any) -> None: ...


class LocalFiles:
    """A folder of this machine. The root may be a link; below it none is followed, whoever made it and when: every
    operation goes through a descriptor of its folder.
    """

    renames = True

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def __str__(self) -> str:
        return str(self.root)

    @contextmanager
    def _at(self, path: str) -> Iterator[tuple[int, str]]:
        """(descriptor of the folder that holds `path`, last part of its name)."""
        *folders, name = path.split("/")
        with self._folder("/".join(folders)) as folder:
            if name in ("", ".", ".."):
                raise OSError(errno.EINVAL, "not a name in this folder", path)
            yield folder, name

    @contextmanager
    def _folder(self, path: str) -> Iterator[int]:
        """A descriptor of a folder; NotADirectoryError where it, or one on the way to it, is a link or a file."""
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in path.split("/") if path else ():
                if part in ("", ".", ".."):
                    raise OSError(errno.EINVAL, "not a folder in this folder", path)
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = below
            yield descriptor
        finally:
            os.close(descriptor)

    def mkdir(self, path: str) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        done = ""
        for part in path.split("/") if path else ():
            done = f"{done}/{part}" if done else part
            with self._at(done) as (folder, name), contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=folder)
        with self._folder(path):  # what was there already is a folder
            pass

    def create(self, path: str) -> int:
        """A new file, open for writing; FileExistsError where there is one."""
        with self._at(path) as (folder, name):
            return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666, dir_fd=folder)

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
        with self._folder(path) as folder:
            os.fsync(folder)

    def rename(self, source: str, target: str) -> None:
        with self._at(source) as (source_folder, old), self._at(target) as (target_folder, new):
            os.replace(old, new, src_dir_fd=source_folder, dst_dir_fd=target_folder)

    def unlink(self, path: str) -> None:
        """A link is removed, not what it names."""
        with self._at(path) as (folder, name):
            os.unlink(name, dir_fd=folder)

    def rmdir(self, path: str) -> None:
        with self._at(path) as (folder, name):
            os.rmdir(name, dir_fd=folder)

    def names(self, path: str) -> list[str]:
        """What lies in a folder; nothing where there is none."""
        try:
            with self._folder(path) as folder:
                return sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def kind(self, path: str) -> Kind:
        try:
            with self._at(path) as (folder, name):
                mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
        except OSError:
            return "other"
        return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"

    def size(self, path: str) -> int:
        """Bytes of a regular file; FileNotFoundError for anything else, so that links and pipes are never opened."""
        with self._at(path) as (folder, name):
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a regular file", path)
        return found.st_size

    def modified(self, path: str) -> float:
        with self._at(path) as (folder, name):
            return os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime

    def open(self, path: str) -> IO[bytes]:
        """A regular file to read; FileNotFoundError for anything else. A pipe makes nobody wait."""
        with self._at(path) as (folder, name):
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FileNotFoundError(errno.ENOENT, "not a regular file", path)
        return os.fdopen(descriptor, "rb")

    def lock(self) -> Any:
        """Become the one writer of this root; the lock ends with the process. Raises UsageError naming the other, or
        where LOCK is something else than the file that we write: it would be overwritten.
        """
        self.mkdir("")
        descriptor = self._open_lock()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            before = os.read(descriptor, 4096)
            if before and read_owner(before) == UNKNOWN:
                raise self._foreign("it has other contents")
        except OSError as error:
            other = os.read(descriptor, 4096)
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise locked(str(self.root), other) from None
        except UsageError:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner(), 0)
        return descriptor

    def _open_lock(self) -> int:
        try:
            with self._at(LOCK) as (folder, name):
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
                descriptor = os.open(name, flags, 0o666, dir_fd=folder)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise self._foreign("it is a link or a folder") from error
            raise
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:  # a hard link is a file that somebody else has too
            os.close(descriptor)
            raise self._foreign("it is no file of its own")
        return descriptor

    def _foreign(self, why: str) -> UsageError:
        return UsageError(
            f"{self.root / LOCK} is not the lock that a checkpointer writes ({why}), and locking would overwrite it; "
            "remove it if it is not needed, or give another folder"
        )

    def unlock(self, held: Any) -> None:
        os.close(held)


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
    except (ValueError, KeyError, TypeError, RecursionError):
        return UNKNOWN


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


class UrlFiles:
    """A folder behind an fsspec URL. Its lock is an object, which a killed writer on another machine leaves behind."""

    renames = False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._open()

    def _open(self) -> None:
        try:
            from fsspec.core import url_to_fs

            self.system, self.base = url_to_fs(self.url)
        except ImportError as error:
            raise MissingPackage(
                f"{self.url} needs a package ({error}); for s3:// pip install 'edgewright[s3]'"
            ) from error
        except ValueError as error:
            raise UsageError(f"{self.url} is no URL that fsspec knows ({error}); e.g. s3://bucket/run") from error

    def __str__(self) -> str:
        return self.url

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.url = state["url"]
        self._open()

    def _path(self, path: str) -> str:
        return f"{self.base}/{path}" if path else self.base

    def mkdir(self, path: str) -> None:
        self.system.makedirs(self._path(path), exist_ok=True)

    def create(self, path: str) -> Any:
        return self.system.open(self._path(path), "wb")

    def write(self, handle: Any, data: Any) -> None:
        handle.write(bytes(memoryview(data)))

    def sync(self, handle: Any) -> None:
        handle.close()

    def discard(self, handle: Any) -> None:
        getattr(handle, "discard", lambda: None)()  # an upload in parts is given up

    def sync_folder(self, path: str) -> None:
        """Nothing to do: a closed object is durable."""

    def rename(self, source: str, target: str) -> None:
        """A copy and a removal: for small files whose loss does no harm."""
        self.system.mv(self._path(source), self._path(target))

    def unlink(self, path: str) -> None:
        self.system.rm_file(self._path(path))

    def rmdir(self, path: str) -> None:
        if self.system.exists(self._path(path)):
            self.system.rm(self._path(path), recursive=True)

    def names(self, path: str) -> list[str]:
        self.system.invalidate_cache()
        try:
            found = self.system.ls(self._path(path), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {str(entry).rstrip("/").rpartition("/")[2] for entry in found}
        return sorted(names - {"", self._path(path).rpartition("/")[2] if not found else ""})

    def kind(self, path: str) -> Kind:
        where = self._path(path)
        return "folder" if self.system.isdir(where) else "file" if self.system.exists(where) else "other"

    def size(self, path: str) -> int:
        return int(self.system.size(self._path(path)))

    def modified(self, path: str) -> float:
        """Seconds since 1970; infinity where the system keeps no such time, so that nothing is taken for old."""
        try:
            return float(self.system.modified(self._path(path)).timestamp())
        except (NotImplementedError, FileNotFoundError, AttributeError):
            return math.inf

    def open(self, path: str) -> IO[bytes]:
        return cast(IO[bytes], self.system.open(self._path(path), "rb"))

    def lock(self) -> Any:
        """As of a folder; an owner on this machine that is no longer alive is passed over."""
        self.mkdir("")
        where = self._path(LOCK)
        if self.system.exists(where):
            other = self.system.cat_file(where)
            if not is_dead(other):
                raise locked(self.url, other)
        self.system.pipe_file(where, owner())
        return where

    def unlock(self, held: Any) -> None:
        self.system.rm_file(held)


def open_files(root: str | Path | Files) -> Files:
    """The file operations of a folder, an fsspec URL, or of an object that has them."""
    if isinstance(root, str) and "://" in root:
        return UrlFiles(root)
    if isinstance(root, str | os.PathLike):
        path = Path(root)
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; checkpoints lie in a folder, e.g. runs/checkpoints")
        return LocalFiles(path)
    return root

"""The file operations of a checkpoint over fsspec: s3://, gs://, memory:// and whatever else it knows.

An object appears whole when its stream is closed, and nothing can be renamed, so that the manifest, written last, is
what makes a checkpoint exist.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import IO, Any, cast

from edgewright.errors import MissingPackage, UsageError
from edgewright.systems.check_n_run.files import LOCK, Files, Kind, LocalFiles, is_dead, locked, owner


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

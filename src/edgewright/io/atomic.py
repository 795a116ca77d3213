"""Outputs that are written whole or not at all: a temporary neighbour, flushed, then renamed."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgewright.errors import EdgewrightError, OutputError, UsageError
from edgewright.io.temporaries import OLD, PART, prefix, sweep

RUST_ERROR = re.compile(r"\(os error (\d{1,4})\)")


def _prepare(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create the output folder {path.parent}: {error.strerror}") from error
    return path.parent


def sync_file(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before going on. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on any error it is removed.

    Raises OutputError when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    folder = _prepare(path)
    try:
        sweep(folder, path.name)
        descriptor, name = tempfile.mkstemp(prefix=prefix(path.name), suffix=PART, dir=folder)
    except OSError as error:
        raise OutputError(f"cannot write into {folder}: {error.strerror}") from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        sync_file(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files; a result should read like any other
        os.replace(temporary, path)
    except EdgewrightError:
        raise
    except Exception as error:
        raise output_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | Path, ours: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path`, on any error it is removed.

    An existing folder at `path` is replaced only after the new one is complete. ours: whatever lies in it was made by
    the run that calls; otherwise a folder with files that the new one does not have is somebody's, and stays.
    Raises OutputError as `atomic_file`, UsageError for somebody's folder.
    """
    path = Path(path)
    parent = _prepare(path)
    try:
        sweep(parent, path.name)
        temporary = Path(tempfile.mkdtemp(prefix=prefix(path.name), suffix=PART, dir=parent))
    except OSError as error:
        raise OutputError(f"cannot write into {parent}: {error.strerror}") from error
    old: Path | None = None
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            if not ours:
                _check_replaceable(path, temporary)
            old = temporary.with_suffix(OLD)
            os.replace(path, old)
        os.replace(temporary, path)
    except EdgewrightError:
        raise
    except Exception as error:
        if old is not None and not path.exists():
            os.replace(old, path)
        raise output_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old is not None and old.is_symlink():  # the link was in the way, what it names was not
            old.unlink(missing_ok=True)
        elif old is not None:
            shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(path: Path, new: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        raise UsageError(f"{path} is a file or a link; choose another folder")
    if lost := sorted({entry.name for entry in path.iterdir()} - {entry.name for entry in new.iterdir()}):
        raise UsageError(
            f"{path} holds {lost[0][:80]!r}, which would be lost; choose another folder, or remove this one"
        )


def output_error(path: str | Path, error: Exception) -> Exception:
    """An OutputError for what the operating system refused, whoever says so; any other error as it is.

    safetensors and tokenizers, written in Rust, put the system's error into a text of an exception of their own.
    """
    if isinstance(error, OSError):
        return OutputError(f"cannot write {path}: {error.strerror or error}")
    if type(error) is Exception or type(error).__module__.startswith("safetensors"):
        if code := RUST_ERROR.search(str(error)):
            return OutputError(f"cannot write {path}: {os.strerror(int(code[1]))}")
    return error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

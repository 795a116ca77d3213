"""Names of temporary files and folders that tell who writes them, so that those of killed processes can be removed.

`.NAME.HOST-PID-RANDOM.part` becomes NAME when it is complete; `.NAME.HOST-PID-RANDOM.old` is the folder NAME while the
new one takes its place. Only a process of the same machine that no longer runs leaves one that may be removed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from edgewright.io.hashing import blake2b

PART, OLD = ".part", ".old"
_NAME = re.compile(
    r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{6})-(?P<pid>\d+)-(?P<random>\w+)(?P<kind>\.part|\.old)", re.DOTALL
)


def prefix(name: str) -> str:
    """How the name of a temporary neighbour of `name` begins, written by this process."""
    return f".{name}.{_host()}-{os.getpid()}-"


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is a temporary one of this package, of whatever process."""
    return _NAME.fullmatch(name) is not None


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes have left in `folder`; a folder that was being replaced gets its name back.

    Args:
        folder: where to look; one that is not there is left alone.
        name: only temporaries of this file or folder; None: of any, in all folders below too (links are not followed).
    """
    for path in _below(folder) if name is None else _entries(folder):
        match = _NAME.fullmatch(path.name)
        if match is None or (name is not None and match["name"] != name) or not _left_behind(path, match):
            continue
        target = path.with_name(match["name"])
        with contextlib.suppress(OSError):
            if match["kind"] == OLD and not os.path.lexists(target):
                os.rename(path, target)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _below(folder: Path) -> Iterator[Path]:
    for path in _entries(folder):
        yield path
        if not is_temporary(path.name) and path.is_dir() and not path.is_symlink():
            yield from _below(path)


def _left_behind(path: Path, match: re.Match[str]) -> bool:
    """Whether the process that made it ran on this machine and runs no longer."""
    if match["host"] != _host():
        return False
    pid = int(match["pid"])
    if pid == os.getpid():
        return False
    try:
        return psutil.Process(pid).create_time() > path.lstat().st_ctime + 1.0  # the number was given again
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):
        return False


def _host() -> str:
    return blake2b(platform.node(), size=3)

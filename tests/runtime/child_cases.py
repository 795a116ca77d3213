"""What a child process can do to a file's first run: the functions of test_child_check."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

from edgewright.errors import Unsupported


def size(path: str) -> dict[str, int]:
    return {"bytes": len(Path(path).read_bytes())}


def crash(path: str) -> None:
    ctypes.string_at(0)


def hang(path: str) -> None:
    time.sleep(60)


def rest(path: str) -> str:
    time.sleep(1.2)
    return "rested"


def leave(path: str) -> None:
    os._exit(0)


def refuse(path: str) -> None:
    raise Unsupported(f"{path} is of another kind")


def complain(path: str) -> None:
    raise RuntimeError("first line\nlast line")


def swallow(path: str) -> None:
    bytearray(1 << 42)

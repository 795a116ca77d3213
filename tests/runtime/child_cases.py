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


def spin(path: str) -> None:
    """Say which process this is, then run for ever."""
    Path(path).with_suffix(".pid").write_text(str(os.getpid()))
    while True:
        sum(range(1000))


def spin_without_signal(path: str) -> None:
    """As `spin`, where the system knows no signal for the death of a parent."""
    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
    spin(path)


def loop(count: int) -> int:
    while count:
        count += 1
    return count


def grow(size: int) -> int:
    return len(bytearray(size))


def text(size: int) -> str:
    return "x" * size


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


def process() -> int:
    print("what a function prints is not its answer")
    return os.getpid()


def refuse_all(reason: str) -> None:
    raise Unsupported(reason)

"""Peak memory: of a call in a fresh process of its own (exact), or of a block of code in this one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewright.errors import EdgewrightError, UsageError
from edgewright.io.child_process import end_with_parent

_CHILD = "from edgewright.measure.memory import _child; _child()"


@dataclass(frozen=True)
class PeakMemory:
    """Bytes: `peak` resident set of the whole process (memory-mapped weights that were touched included), `baseline`
    of it before the call (interpreter and imports), `cuda` the peak that torch allocated on a GPU; and the `result`.
    """

    peak: int
    baseline: int
    cuda: int = 0
    result: Any = None


def peak_memory(function: Callable[..., Any], *args: Any, timeout: float | None = None, **kwargs: Any) -> PeakMemory:
    """Run `function(*args, **kwargs)` in a fresh Python process and measure its peak memory.

    The function must live in an importable module and, like its arguments and result, pickle. An exception in the child
    is raised here; a child that dies (killed for memory, say) or exceeds `timeout` seconds is an EdgewrightError.
    """
    name = getattr(function, "__qualname__", repr(function))
    if getattr(function, "__module__", "__main__") == "__main__" or "<" in name:
        raise UsageError(
            f"peak_memory runs its function in a fresh process and cannot find {name} there; "
            "move it to the top level of a module, e.g. peak_memory(my_module.work, 3)"
        )
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder, "request"), Path(folder, "answer")
        request.write_bytes(pickle.dumps((function, args, kwargs)))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-c", _CHILD, str(request), str(answer), str(os.getpid())]
        with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as process:
            try:
                code = process.wait(timeout)
            except BaseException as error:
                process.kill()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                raise EdgewrightError(f"measuring the memory of {name} took longer than {timeout:g} s") from None
        if not answer.exists():
            raise EdgewrightError(f"the process that measured the memory of {name} died with code {code}")
        value = pickle.loads(answer.read_bytes())  # written by our own child into our own private folder
    if isinstance(value, BaseException):
        raise value
    assert isinstance(value, PeakMemory)
    return value


def _child() -> None:
    request, answer, parent = sys.argv[1:4]
    end_with_parent(int(parent))
    value: PeakMemory | BaseException
    try:
        function, args, kwargs = pickle.loads(Path(request).read_bytes())
        baseline = current_rss()
        with peak_rss() as peak:
            result = function(*args, **kwargs)
        torch = sys.modules.get("torch")
        cuda = torch.cuda.max_memory_allocated() if torch is not None and torch.cuda.is_available() else 0
        value = PeakMemory(peak.bytes, baseline, cuda, result)
    except Exception as error:
        value = error
    try:
        data = pickle.dumps(value)
    except Exception as error:
        data = pickle.dumps(EdgewrightError(f"the outcome of the measured call cannot be sent back: {error}"))
    Path(answer).write_bytes(data)


class Peak:
    """Filled when its block ends: `bytes`, and `exact` (kept by the kernel) or sampled."""

    bytes: int = 0
    exact: bool = False


@contextlib.contextmanager
def peak_rss(interval: float = 0.005) -> Iterator[Peak]:
    """Peak resident set of this process inside the block.

    Linux keeps it exactly (VmHWM, set back through /proc/self/clear_refs); elsewhere, or where that is not permitted,
    a thread looks every `interval` seconds and short peaks can escape it.
    """
    peak = Peak()
    peak.exact = _reset_high_water()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak.bytes = max(peak.bytes, current_rss())
            stop.wait(interval)

    watcher = None if peak.exact else threading.Thread(target=watch, daemon=True)
    if watcher is not None:
        watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        if watcher is not None:
            watcher.join()
        high = (_status_bytes("VmHWM") or 0) if peak.exact else 0
        peak.bytes = max(peak.bytes, high, current_rss())


def current_rss() -> int:
    """Bytes of this process resident in memory now."""
    value = _status_bytes("VmRSS")
    if value is not None:
        return value
    import psutil

    return int(psutil.Process().memory_info().rss)


def _reset_high_water() -> bool:
    before = _status_bytes("VmHWM")
    if before is None:
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def release_free_memory() -> None:
    """Hand freed memory back to the system where the C library can (glibc): before work with a bound on its peak."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return
    trim(0)

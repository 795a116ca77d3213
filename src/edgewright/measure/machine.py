"""This machine: processor, cores, memory, versions, and how fast it can read (the roofline of decoding)."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from edgewright.errors import UsageError
from edgewright.measure.timing import Measurement

PACKAGES = (
    "edgewright", "torch", "transformers", "numpy", "safetensors", "tokenizers", "accelerate", "gguf", "xllamacpp",
    "torchao", "onnxruntime", "executorch",
)  # fmt: skip
MIN_BUFFER = 256 * 2**20


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory in GB, operating system, accelerator: what a number was measured on."""
    import psutil

    return {
        "cpu": _cpu_name(),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "os": f"{platform.system()} {platform.release()}",
        "gpu": _gpu_name(),
    }


def best_device() -> str:
    """ "cuda" where torch sees such a GPU, else "cpu": what recipes run on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that a result depends on; nothing is imported for it."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def usable_cores() -> int:
    """Physical cores this process may use: the least of the machine's, its affinity mask and its container's quota."""
    import psutil

    counts = [psutil.cpu_count(logical=False) or os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        counts.append(max(1, int(quota) // int(period)))  # "max 100000" without a quota: int() refuses it
    except (OSError, ValueError):
        pass
    return max(1, min(counts))


class BandwidthProbe:
    """Reads a buffer far larger than the last-level cache with `threads` threads; `sample()` gives bytes/s.

    Two honest readers compete and the faster counts: `torch.sum` over int64 (one stream a thread) and libc's `memcmp`
    of the buffer's equal halves (two streams a thread). Neither writes, so unlike a memcpy figure (about 0.4 of it in
    bytes copied) this is the ceiling that reading weights meets.
    """

    def __init__(self, threads: int | None = None, buffer_bytes: int | None = None) -> None:
        import psutil
        import torch

        self.threads = usable_cores() if threads is None else threads
        if self.threads < 1:
            raise UsageError(f"threads must be at least 1, got {threads}; leave it out to use every core")
        limit = max(psutil.virtual_memory().available // 4, 2**20)
        size = min(max(MIN_BUFFER, 8 * _last_level_cache()), limit) if buffer_bytes is None else buffer_bytes
        unit = 16 * self.threads  # int64s, in two halves, in equal shares
        self.nbytes = max(size // unit, 1) * unit
        self._buffer = torch.ones(self.nbytes // 8, dtype=torch.int64)  # written, so that every page is a real one
        self._memcmp = _memcmp()

    @property
    def readers(self) -> dict[str, Callable[[], Any]]:
        """Name -> one whole read of the buffer."""
        readers: dict[str, Callable[[], Any]] = {"torch.sum": self._torch_sum}
        if self._memcmp is not None:
            readers["memcmp"] = self._compare_halves
        return readers

    def sample(self) -> float:
        """Bytes/s of the fastest reader, one read each."""
        best = float("inf")
        for read in self.readers.values():
            start = time.perf_counter()
            read()
            best = min(best, time.perf_counter() - start)
        return self.nbytes / best

    def _torch_sum(self) -> None:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            self._buffer.sum()
        finally:
            torch.set_num_threads(before)

    def _compare_halves(self) -> None:
        assert self._memcmp is not None
        half, share = self.nbytes // 2, self.nbytes // 2 // self.threads
        start = self._buffer.data_ptr()
        addresses = [start + i * share for i in range(self.threads)]
        if self.threads == 1:
            self._memcmp(start, start + half, share)
            return
        with ThreadPoolExecutor(self.threads) as pool:  # ctypes releases the interpreter lock during the call
            list(pool.map(lambda address: self._memcmp(address, address + half, share), addresses))


def read_bandwidth(threads: int | None = None, *, repeats: int = 7, buffer_bytes: int | None = None) -> Measurement:
    """Read bandwidth of this machine in bytes/s with `threads` threads (None: every core), median over `repeats`."""
    probe = BandwidthProbe(threads, buffer_bytes)
    probe.sample()
    return Measurement.of((probe.sample() for _ in range(repeats)), "B/s")


def _memcmp() -> Any:
    try:
        function = ctypes.CDLL(None).memcmp
    except (OSError, TypeError, AttributeError):  # Windows has no process-wide handle; torch.sum remains
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    function.restype = ctypes.c_int
    return function


def _last_level_cache() -> int:
    """Bytes of the largest cache that the system tells of, 32 MiB where it does not."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = file.read_text().strip()
            sizes.append(int(text[:-1]) * units[text[-1]])
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return max(sizes) or 32 * 2**20


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu_name() -> str | None:
    torch = sys.modules.get("torch")  # a report must not spend seconds on importing torch for one name
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            for line in file.read_text().splitlines():
                if line.startswith("Model:"):
                    return line.split(":", 1)[1].strip()
        except OSError:
            continue
    return None

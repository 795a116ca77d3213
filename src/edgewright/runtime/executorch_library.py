"""ExecuTorch's Python bindings with the kernels that our files use: quantised embeddings, attention over a cache."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from edgewright.errors import EdgewrightError, MissingPackage, UsageError, in_one_line
from edgewright.measure.machine import usable_cores

INSTALL = "pip install 'edgewright[executorch]'"
KERNELS = ("kernels/quantized/*quantized_ops_aot_lib.*", "extension/llm/custom_ops/*custom_ops_aot_lib.*")


@cache
def library() -> Any:
    """The bindings. Raises MissingPackage naming the extra."""
    try:
        with warnings.catch_warnings(), silent():
            warnings.simplefilter("ignore")
            import executorch
            import torch
            from executorch.extension.pybindings import portable_lib

            # loaded as libraries: the Python modules beside them bring torch's compiler, which running does not need
            root = Path(next(iter(executorch.__path__)))
            for pattern in (
                "kernels/quantized/*quantized_ops_aot_lib.*",
                "extension/llm/custom_ops/*custom_ops_aot_lib.*",
            ):
                for file in root.glob(pattern):
                    torch.ops.load_library(file)
            portable_lib._threadpool_get_thread_count()
    except (ImportError, OSError, StopIteration) as error:
        raise MissingPackage(f"running .pte files needs executorch: {INSTALL} ({error})") from error
    return portable_lib


_open: weakref.WeakSet[Any] = weakref.WeakSet()  # engines and programs of this process


def set_threads(threads: int | None, opened: Any) -> int:
    """Give the runtime's one thread pool this many threads (None: every core); returns the number that it has.

    A pool that an open file computes with cannot be exchanged: its next call would wait for ever. While one is open
    the number stays, and another that was asked for is said with a warning. opened: the object that asks, which is
    open as long as its `_module` is something.
    """
    wanted = usable_cores() if threads is None else threads
    if not 1 <= wanted <= 1024:
        raise UsageError(f"threads must be 1 to 1024, got {threads}; leave it out to use every core")
    bindings = library()
    now = int(bindings._threadpool_get_thread_count())
    if now != wanted:
        if any(one._module is not None for one in _open):
            if threads is not None:
                warnings.warn(
                    f"another .pte is open with {now} threads: {wanted} have to wait until it is closed", stacklevel=3
                )
            wanted = now
        else:
            with silent():
                bindings._unsafe_reset_threadpool(wanted)
    _open.add(opened)
    return wanted


def load(path: Path) -> Any:
    """A loaded module. Raises EdgewrightError with ExecuTorch's reason."""
    bindings = library()
    try:
        with silent():
            return bindings._load_for_executorch(
                str(path), program_verification=bindings.Verification.InternalConsistency
            )
    except RuntimeError as error:
        raise EdgewrightError(f"ExecuTorch does not load {path}: {in_one_line(error)}") from error


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what the C++ side writes to stderr: it reports every file of /proc that a machine does not have."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)

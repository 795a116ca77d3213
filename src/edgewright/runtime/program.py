"""Exported files that map arrays to arrays: one small interface, and the function that picks the runtime for a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from edgewright.errors import Unsupported, UsageError
from edgewright.runtime.program_inputs import TensorSpec

if TYPE_CHECKING:
    import numpy as np


PROGRAM_SUFFIXES = (".onnx", ".pte")


class Program(Protocol):
    """An opened file. `run` may be called any number of times, from one thread at a time."""

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, arrays: Sequence[np.ndarray] | Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs, in their order, for the inputs by position or by name."""

    def close(self) -> None:
        """Free the program; harmless when called again."""

    def __enter__(self) -> Program: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_program(path: str | Path, threads: int | None = None, *, check: bool = True) -> Program:
    """Open an exported file in the runtime of its suffix (.onnx: ONNX Runtime, .pte: ExecuTorch).

    Args:
        path: the file.
        threads: 1 to 1024; None uses every core.
        check: run the file once in a process of its own first; False only for a file that was written or checked a
            moment ago.

    Returns:
        The program, called with tensors.

    Raises:
        UsageError: no such file.
        Unsupported: another suffix.
        FormatError: a broken file.
        MissingPackage: the runtime is not installed.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in PROGRAM_SUFFIXES:
        raise Unsupported(
            f"no runtime here opens {path} as a program: its suffix is {suffix or 'missing'!r}, "
            f"supported: {', '.join(PROGRAM_SUFFIXES)} (open_engine opens language models)"
        )
    if not path.is_file():
        raise UsageError(f"there is no file {path}; give an exported model, e.g. open_program('out/model.onnx')")
    if threads is not None and not 1 <= threads <= 1024:
        raise UsageError(f"threads must be 1 to 1024, got {threads}; leave it out to use every core")
    if suffix == ".onnx":
        from edgewright.runtime.onnx import OnnxProgram

        return OnnxProgram(path, threads=threads, check=check)
    from edgewright.runtime.executorch_program import ExecuTorchProgram

    return ExecuTorchProgram(path, threads=threads, check=check)

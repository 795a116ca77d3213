"""The function that picks the runtime for an exported language model."""

from __future__ import annotations

from pathlib import Path

from edgewright.errors import Unsupported, UsageError
from edgewright.runtime.interfaces import Engine

SUFFIXES = (".gguf", ".pte")
PROGRAMS = (".onnx",)  # arrays in, arrays out: `runtime.program` opens them


def open_engine(
    path: str | Path,
    *,
    threads: int | None = None,
    context: int = 2048,
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    check: bool = True,
) -> Engine:
    """Open a language model in the runtime of its suffix (.gguf: llama.cpp, .pte: ExecuTorch).

    Args:
        path: the file.
        threads: None uses every core.
        context: tokens of prompt and answer together; a .pte has it fixed in the file.
        cache_type_k: of the keys in the cache: "f16", "q8_0" or "q4_0"; a .pte has none to choose.
        cache_type_v: of the values.
        check: run the file first in a child process, so that a file that aborts the runtime ends only that.

    Returns:
        The engine; close it, or use it in a `with` block.

    Raises:
        UsageError: no such file, or a cache type for a .pte.
        Unsupported: another suffix, or a .pte that holds no language model.
        FormatError: a broken file.
        MissingPackage: the runtime is not installed.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        if suffix in PROGRAMS:
            raise Unsupported(
                f"no engine writes text with {suffix} files ({path}); open_program runs them, {known} chat"
            )
        raise Unsupported(f"no engine runs {path}: its suffix is {suffix or 'missing'!r}, supported: {known}")
    if not path.is_file():
        raise UsageError(f"there is no file {path}; give an exported model, e.g. edgewright bench out/model.gguf")
    if suffix == ".pte":
        if (cache_type_k, cache_type_v) != ("f16", "f16"):
            raise UsageError(
                f"the cache types {cache_type_k}/{cache_type_v} are llama.cpp's; a .pte file keeps float32"
            )
        from edgewright.runtime.executorch import ExecuTorchEngine

        return ExecuTorchEngine(path, threads=threads, check=check)
    from edgewright.runtime.llamacpp import LlamaCppEngine

    caches = {"cache_type_k": cache_type_k, "cache_type_v": cache_type_v}
    return LlamaCppEngine(path, threads=threads, context=context, check=check, **caches)

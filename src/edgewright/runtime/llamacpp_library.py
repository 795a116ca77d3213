"""llama.cpp's C interface inside the xllamacpp wheel: found, loaded, its layout checked, its log kept quiet.

Parameter structs stay opaque: llama.cpp fills one with its defaults, we change the few fields we need at offsets that
are believed only if every known default lies where it should. A library that is laid out differently is refused.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import signal
import struct
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_uint8, c_void_p
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from edgewright.errors import EdgewrightError, MissingPackage

# Offsets in llama_context_params, with the int32 default that must be found there.
N_CTX, N_BATCH, N_UBATCH, N_SEQ_MAX = 0, 4, 8, 12
N_THREADS, N_THREADS_BATCH = 28, 32
FLASH_ATTENTION, TYPE_K, TYPE_V = 52, 104, 108
CONTEXT_DEFAULTS = {
    N_CTX: 512, N_BATCH: 2048, N_UBATCH: 512, N_SEQ_MAX: 1, 16: 0, 20: 0, 24: 1, N_THREADS: 4, N_THREADS_BATCH: 4,
    36: 0, 40: -1, 44: -1, 48: -1, FLASH_ATTENTION: -1, 56: 0, 60: 0, 80: 0, TYPE_K: 1, TYPE_V: 1,
}  # fmt: skip
CACHE_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}  # ggml type ids
LOG_WARN, LOG_ERROR = 3, 4

_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class Params(ctypes.Structure):
    """A parameter struct of any kind; larger than each of them, which is harmless for an argument passed by value."""

    _fields_ = [("bytes", c_uint8 * 512)]

    def get(self, offset: int) -> int:
        return int(struct.unpack_from("<i", self, offset)[0])

    def set(self, offset: int, value: int) -> None:
        struct.pack_into("<i", self, offset, value)


class Batch(ctypes.Structure):
    """llama_batch: n tokens with position, sequences and the wish for logits of each."""

    _fields_ = [
        ("n", c_int32),
        ("token", POINTER(c_int32)),
        ("embedding", c_void_p),
        ("position", POINTER(c_int32)),
        ("sequence_count", POINTER(c_int32)),
        ("sequence", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LogCallback, c_void_p]),
    "llama_model_default_params": (Params, []),
    "llama_context_default_params": (Params, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, Params]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_model_has_encoder": (c_bool, [c_void_p]),
    "llama_model_has_decoder": (c_bool, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, Params]),
    "llama_free": (None, [c_void_p]),
    "llama_n_ctx": (ctypes.c_uint32, [c_void_p]),
    "llama_n_batch": (ctypes.c_uint32, [c_void_p]),
    "llama_n_threads": (c_int32, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_vocab_is_control": (c_bool, [c_void_p, c_int32]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_detokenize": (c_int32, [c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool]),
    "llama_token_to_piece": (c_int32, [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool]),
}


class Log:
    """The lines that llama.cpp wrote as warnings or errors since `clear`; nothing reaches the screen."""

    def __init__(self) -> None:
        self.lines: deque[tuple[int, str]] = deque(maxlen=16)
        self.callback = _LogCallback(self._write)  # must live as long as the library, which is for ever

    def clear(self) -> None:
        self.lines.clear()

    def reason(self) -> str:
        """The first error since `clear`, else the last warning: the later errors only say that all of it failed."""
        errors = [line for level, line in self.lines if level == LOG_ERROR]
        warnings = [line for level, line in self.lines if level == LOG_WARN]
        return (errors[:1] or warnings[-1:] or ["no reason given"])[0]

    def _write(self, level: int, text: bytes, _: object) -> None:
        line = text.decode("utf-8", "replace").strip() if level in (LOG_WARN, LOG_ERROR) and text else ""
        if line:
            self.lines.append((level, line))


@contextmanager
def interrupts_afterwards() -> Iterator[None]:
    """Around a call of the library: Ctrl-C takes effect when it has returned.

    The library calls `Log` back, and an exception inside a callback from C is printed and forgotten.
    """
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught and callable(before):
            before(*caught[0])


class Library:
    """The loaded library: `c` holds its functions by name, `log` its last words."""

    def __init__(self, path: Path, version: str) -> None:
        self.version = version
        self.log = Log()
        try:
            self.c = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self.c, name)
                function.restype, function.argtypes = result, arguments
        except OSError as error:
            raise EdgewrightError(f"xllamacpp {version} is installed but its library does not load: {error}") from error
        except AttributeError as error:
            raise self._refusal(f"it lacks a function ({error})") from error
        self.c.llama_log_set(self.log.callback, None)
        self._check_layout()
        self.c.llama_backend_init()

    def context_params(self) -> Params:
        return self.c.llama_context_default_params()  # type: ignore[no-any-return]

    def _check_layout(self) -> None:
        params = self.context_params()
        for offset, expected in CONTEXT_DEFAULTS.items():
            if params.get(offset) != expected:
                raise self._refusal(f"default {params.get(offset)} instead of {expected} at byte {offset}")

    def _refusal(self, why: str) -> EdgewrightError:
        return EdgewrightError(
            f"xllamacpp {self.version} has another llama.cpp interface than the one edgewright knows ({why}); "
            "a version that works: pip install xllamacpp==2026.10.11549"
        )


@cache
def library() -> Library:
    """The library, loaded once a process at the first call. Raises MissingPackage without the xllamacpp wheel."""
    spec = importlib.util.find_spec("xllamacpp")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = [file for folder in folders for file in Path(folder).glob("xllamacpp*") if file.suffix in (".so", ".pyd")]
    if not files:
        raise MissingPackage("running a GGUF file needs the package xllamacpp: pip install xllamacpp")
    return Library(files[0], importlib.metadata.version("xllamacpp"))

"""llama.cpp's own block decoders and quantisers, called in the shared library that the xllamacpp wheel carries.

Used as an oracle (what will the runtime make of these bytes?) and as a peer (what would its quantiser have written?).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgewright.errors import EdgewrightError, Unsupported
from edgewright.export.gguf.blocks import TYPE_IDS, Array, ggml_type
from edgewright.runtime.llamacpp_library import library

DECODERS = {
    "Q4_0": "q4_0",
    "Q4_1": "q4_1",
    "Q5_0": "q5_0",
    "Q5_1": "q5_1",
    "Q8_0": "q8_0",
    "Q2_0": "q2_0",
    "Q1_0": "q1_0",
    "TQ1_0": "tq1_0",
    "TQ2_0": "tq2_0",
    "Q2_K": "q2_K",
    "Q3_K": "q3_K",
    "Q4_K": "q4_K",
    "Q5_K": "q5_K",
    "Q6_K": "q6_K",
    "IQ4_NL": "iq4_nl",
}


# What llama_cpp_quantize offers: the types whose default choice for every tensor is known exactly.
PEER_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def dequantize(raw: Array, name: str) -> Array:
    """float32 [values] of the blocks in `raw` (uint8), decoded by llama.cpp. Raises Unsupported for other types."""
    if name not in DECODERS:
        raise Unsupported(f"no llama.cpp decoder is called here for {name}; {', '.join(DECODERS)} have one")
    kind = ggml_type(name)
    raw = np.ascontiguousarray(raw).reshape(-1)
    values = np.empty(len(raw) // kind.bytes * kind.block, np.float32)
    function = _function(f"dequantize_row_{DECODERS[name]}", None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64])
    function(raw.ctypes.data, values.ctypes.data, values.size)
    return values


def quantize(values: Array, name: str) -> Array:
    """What llama.cpp's quantiser makes of float32 [rows, columns]: uint8 [rows, bytes]. No importance matrix."""
    kind = ggml_type(name)
    values = np.ascontiguousarray(values, np.float32)
    rows, columns = values.shape
    out = np.empty((rows, columns // kind.block * kind.bytes), np.uint8)
    arguments: list[Any] = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    function = _function("ggml_quantize_chunk", ctypes.c_size_t, arguments)
    written = function(TYPE_IDS[name], values.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    if written != out.nbytes:
        raise EdgewrightError(f"llama.cpp's quantiser wrote {written} bytes of {name} instead of {out.nbytes}")
    return out


def default_type(tensor: str, shape: Sequence[int], wanted: str, tied: bool) -> tuple[str, str]:
    """(type, why) that llama.cpp's quantiser gives a tensor when asked for one of PEER_TYPES.

    The matrix that makes the logits gets Q6_K (Q8_0 when its rows are no multiple of 256 or Q8_0 was asked for), a row
    that no block divides F16, vectors F32.
    """
    if len(shape) == 1:
        return "F32", "llama.cpp keeps vectors in float32"
    columns = shape[-1]
    name, why = wanted, "asked for"
    if tensor == ("token_embd.weight" if tied else "output.weight") and wanted != "Q8_0":
        name, why = "Q6_K", "llama.cpp's choice for the output matrix"
    if columns % ggml_type(name).block:
        why = f"{name} needs rows divisible by {ggml_type(name).block}, this one has {columns}"
        name = "Q8_0" if name == "Q6_K" and columns % 32 == 0 else "F16"
    return name, why


def _function(name: str, result: Any, arguments: list[Any]) -> Any:
    try:
        function = getattr(library().c, name)
    except AttributeError as error:
        raise EdgewrightError(f"xllamacpp {library().version} has no function {name}") from error
    function.restype, function.argtypes = result, arguments
    return function

"""Linear layers of bits: 64 products of signs are one xor and one count of ones.

Inputs are {-1, +1} (signed) or {0, 1} times one scale, weights are signs; bit 1 means +1 or 1, bit 0 means -1 or 0.
Column c of a row of n entries is bit c % 64 of word c // 64; unused bits of the last word are 0. Then
    signed     dot = n - 2 * ones(a xor w)            {0, 1}     dot = 2 * ones(a and w) - ones(a)
`binary_linear` has three ways that agree in every bit: the compiled kernel (popcount.cpp), plain torch, and
a float matrix product of the codes, which is exact as well because the sums are integers below 2^24.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from edgewright.checks import check, one_of
from edgewright.errors import EdgewrightError, UsageError
from edgewright.io.bits import pack_codes, unpack_codes
from edgewright.kernels.build import load_kernel

WORD = 64
LANES = 8  # outputs that the kernel computes side by side, as in popcount.cpp
PATHS = ("auto", "kernel", "torch", "float")
MOST_INPUTS = 1 << 24  # beyond it float32 no longer holds every integer
PRODUCTS_PER_THREAD = 1 << 24  # below it a second thread costs more than it saves
WORDS_AT_ONCE = 1 << 20  # temporary of the torch path: 8 MB


def pack_bits(bits: Tensor) -> Tensor:
    """Bool [rows, n] -> int64 words [rows, ceil(n / 64)]."""
    return pack_codes(F.pad(bits, (0, -bits.shape[1] % WORD)), 1).view(torch.int64)


def unpack_bits(words: Tensor, n: int) -> Tensor:
    """int64 words [rows, ceil(n / 64)] -> bool [rows, n]."""
    return unpack_codes(words.contiguous().view(torch.uint8), 1)[:, :n].bool()


def unpack_signs(words: Tensor, n: int) -> Tensor:
    """int64 words [rows, ceil(n / 64)] -> float32 -1 and +1 [rows, n], a byte at a time from a table of 256 rows."""
    bytes_ = torch.arange(256, dtype=torch.uint8, device=words.device).unsqueeze(1)
    table = unpack_codes(bytes_, 1).float() * 2 - 1  # [256, 8]
    parts = (words.unsqueeze(-1) >> torch.arange(0, WORD, 8, device=words.device)) & 0xFF  # [rows, k, 8], lowest first
    return F.embedding(parts, table).reshape(len(words), WORD * words.shape[1])[:, :n]


def count_ones(words: Tensor) -> Tensor:
    """Number of ones in each int64, int64 of the same shape: pairs, nibbles, bytes, then the sum of the bytes."""
    # Shifts of int64 copy the sign downwards; every mask below removes those copies.
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((words * 0x0101010101010101) >> 56) & 0xFF


def binary_dot(inputs: Tensor, weights: Tensor, n: int, signed: bool) -> Tensor:
    """Integer products of packed rows: int64 words [rows, k] and [out, k] -> int64 [rows, out]."""
    at_once = max(1, WORDS_AT_ONCE // max(weights.numel(), 1))
    parts = []
    for part in inputs.split(at_once):
        pair = part.unsqueeze(1) ^ weights if signed else part.unsqueeze(1) & weights  # [rows, out, k]
        ones = count_ones(pair).sum(-1)
        parts.append(n - 2 * ones if signed else 2 * ones - count_ones(part).sum(-1, keepdim=True))
    return torch.cat(parts) if parts else inputs.new_zeros(0, len(weights))


def input_bits(x: Tensor, shift: Tensor | None, alpha: Tensor, signed: bool) -> Tensor:
    """Bits of float inputs [..., n]: (x + shift) / alpha >= 0, or > 1/2 where the set is {0, 1}."""
    y = (x if shift is None else x + shift) / alpha
    return y >= 0 if signed else y > 0.5


def tile(words: Tensor) -> Tensor:
    """Weight words [out, k] in the kernel's order [ceil(out / 8), k, 8]; outputs that are not there are zeros."""
    padded = F.pad(words, (0, 0, 0, -len(words) % LANES))
    return padded.reshape(-1, LANES, words.shape[1]).transpose(1, 2).contiguous()


def binary_linear(
    x: Tensor,
    words: Tensor,
    *,
    alpha_x: Tensor,
    alpha_w: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    signed: bool = True,
    tiles: Tensor | None = None,
    path: str = "auto",
) -> Tensor:
    """dot(codes of x, signs of the weight) * (alpha_w * alpha_x) + bias. float32 [..., n] -> [..., out].

    words: int64 [out, ceil(n / 64)]. alpha_x: scalar. alpha_w: [out] or [1]. shift: [n], added before the codes are
    taken. tiles: `tile(words)` where it is at hand. path: "kernel" (compiled, CPU), "torch" (torch), "float" (a matrix
    product of the codes); "auto" takes the kernel where there is one, else float. Without gradients.
    """
    check("path", path, one_of(*PATHS))
    n, out = x.shape[-1], len(words)
    if words.shape[1] != -(-n // WORD) or not 0 < n < MOST_INPUTS:
        raise UsageError(f"inputs of {n} features do not fit weights of {words.shape[1]} words of {WORD} signs")
    rows = x.detach().reshape(-1, n).to(torch.float32)
    scale = (alpha_w.detach() * alpha_x.detach()).float().expand(out).contiguous()
    if path == "auto":
        path = "kernel" if x.device.type == "cpu" and why_no_kernel() is None else "float"
    if path == "kernel":
        y = _through_kernel(rows, tile(words) if tiles is None else tiles, shift, alpha_x, scale, bias, signed)
        return y.reshape(*x.shape[:-1], out)
    bits = input_bits(rows, shift, alpha_x, signed)
    if path == "torch":
        dots = binary_dot(pack_bits(bits), words, n, signed).float()
    else:
        dots = F.linear(bits.float() * 2 - 1 if signed else bits.float(), unpack_signs(words, n))
    y = dots * scale
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], out)


def why_no_kernel() -> str | None:
    """None where the compiled kernel works here, else the reason in one sentence."""
    return _kernel()[1]


@functools.cache
def _kernel(extra: tuple[str, ...] = ()) -> tuple[ctypes.CDLL | None, str | None]:
    """(library, None), or (None, why not); compiled at the first call."""
    try:
        library = load_kernel("popcount", extra)
    except EdgewrightError as error:
        return None, str(error)
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    function = library.edgewright_binary_linear
    function.argtypes = [pointer, pointer, ctypes.c_float, number, *[pointer] * 4, *[size] * 3, number]
    function.restype = number
    return library, None


def _through_kernel(
    rows: Tensor,
    tiles: Tensor,
    shift: Tensor | None,
    alpha_x: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    signed: bool,
    extra: tuple[str, ...] = (),
) -> Tensor:
    library, reason = _kernel(extra)
    if library is None:
        raise UsageError(f"path='kernel' cannot be taken: {reason}; path='auto' takes another")
    if rows.device.type != "cpu" or tiles.device.type != "cpu":
        raise UsageError(f"the kernel runs on the CPU, the tensors are on {rows.device}; take path='float'")
    (count, n), out = rows.shape, len(scale)
    y = torch.empty(count, out)
    # Held in variables: a pointer does not keep its tensor alive.
    rows, tiles = rows.contiguous(), tiles.contiguous()
    offset = None if shift is None else shift.detach().float().contiguous()
    added = None if bias is None else bias.detach().float().contiguous()
    threads = max(1, min(torch.get_num_threads(), count * n * out // PRODUCTS_PER_THREAD))
    failed = library.edgewright_binary_linear(
        rows.data_ptr(),
        None if offset is None else offset.data_ptr(),
        float(alpha_x),
        int(signed),
        tiles.data_ptr(),
        scale.data_ptr(),
        None if added is None else added.data_ptr(),
        y.data_ptr(),
        count,
        n,
        out,
        threads,
    )
    if failed:
        raise EdgewrightError(f"out of memory in a binary layer of {count} rows and {n} inputs")
    return y

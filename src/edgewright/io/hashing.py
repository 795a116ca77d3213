"""Digests of texts, bytes, tensors, files and JSON values, and mixed seeds: the same on every machine.

Files hold such digests, so what one of these functions returns for given parts never changes. torch and numpy are
imported by the functions that need them, because commands import this module before they know what they will do.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Part = str | bytes | bytearray | memoryview | Tensor

GOLDEN = 0x9E3779B97F4A7C15  # the constants of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014)
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_PIECE = 1 << 22  # bytes of a file that are read at once
_CHUNK = 1 << 20  # elements of a tensor that are summed at once


class RunningHash:
    """SHA-256 and number of the bytes that came by, piece by piece."""

    def __init__(self) -> None:
        self._hash, self.size = hashlib.sha256(), 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self._hash.update(data)
        self.size += len(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def sha256(*parts: Part) -> str:
    """SHA-256 in hexadecimal of the parts one after the other: texts as UTF-8, tensors as their bytes in row order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(_data(part))
    return digest.hexdigest()


def blake2b(*parts: Part, size: int) -> str:
    """BLAKE2b of `size` bytes, in hexadecimal, of the parts one after the other."""
    digest = hashlib.blake2b(digest_size=size)
    for part in parts:
        digest.update(_data(part))
    return digest.hexdigest()


def crc32(*parts: Part, start: int = 0) -> int:
    """CRC-32 of the parts one after the other, continued from `start`: finds accidents, withstands no adversary."""
    for part in parts:
        start = zlib.crc32(_data(part), start)
    return start


def crc32_each(texts: Iterable[str]) -> Iterator[int]:
    """CRC-32 of every text; what was read with `surrogateescape` counts as the bytes that it was."""
    crc = zlib.crc32
    return (crc(text.encode("utf-8", "surrogateescape")) for text in texts)


def json_hash(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return sha256(json.dumps(value, sort_keys=True))


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors, in the order of their names."""
    named = [(name, tensors[name]) for name in sorted(tensors)]
    return sha256(*(part for name, t in named for part in (f"{name} {t.dtype} {list(t.shape)}\n", t)))


def file_hash(file: IO[bytes]) -> RunningHash:
    """Of all that is left to read of an open file."""
    found = RunningHash()
    while piece := file.read(_PIECE):
        found.update(piece)
    return found


def bit_sum(tensor: Tensor) -> int:
    """Sum of the bit patterns modulo 2^64, signed: fast on every device, blind to the order of the elements."""
    import torch

    return int(_patterns(tensor).sum(dtype=torch.int64))


def ordered_bit_sum(tensor: Tensor) -> int:
    """The same with an odd weight for each place: 64 bits, signed, that depend on every bit and where it stands."""
    import torch

    bits = _patterns(tensor.detach().contiguous()).flatten()
    total = 0
    for start in range(0, len(bits), _CHUNK):
        piece = bits[start : start + _CHUNK].to(torch.int64)
        odd = torch.arange(2 * start + 1, 2 * (start + len(piece)) + 1, 2, device=piece.device)
        total += int((piece * odd).sum()) + len(piece)
    return signed64(total)


def mixed_seed(*numbers: int) -> int:
    """A seed of 63 bits for a torch.Generator from numbers of at least 0 that name a draw; neighbours are unrelated."""
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64, a bijection: every bit of the result depends on every bit of the number."""
    x: Any = values  # numpy's stubs give int64 for uint64 and an int, numpy uint64
    x = (x ^ (x >> 30)) * _FIRST
    x = (x ^ (x >> 27)) * _SECOND
    return x ^ (x >> 31)


def splitmix64(states: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The next output of SplitMix64 from each state: uint64 array [...] -> the same shape."""
    x: Any = states
    return mix64(x + GOLDEN)


def splitmix64_(states: Tensor) -> Tensor:
    """The same in place, the 64 bits in an int64 tensor."""
    states.add_(signed64(GOLDEN))
    for shift, multiplier in ((30, _FIRST), (27, _SECOND)):
        states.bitwise_xor_(_shifted(states, shift)).mul_(signed64(multiplier))
    return states.bitwise_xor_(_shifted(states, 31))


def signed64(value: int) -> int:
    """The int64 with the bits of `value` modulo 2^64."""
    return (value + 2**63) % 2**64 - 2**63


def _shifted(states: Tensor, shift: int) -> Tensor:
    """To the right with zeros, where the shift of int64 copies the sign."""
    return (states >> shift).bitwise_and_(2 ** (64 - shift) - 1)


def _data(part: Part) -> bytes | bytearray | memoryview:
    if isinstance(part, str):
        return part.encode()
    if isinstance(part, bytes | bytearray | memoryview):
        return part
    import torch

    return part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _patterns(tensor: Tensor) -> Tensor:
    """The bits of each element, or of each part of a complex one, as a signed integer."""
    import torch

    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return real.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[real.element_size()])

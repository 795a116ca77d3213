"""Digests against hashlib and zlib, mixing against SplitMix64 in Python's integers, and values that files hold."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from torch import Tensor

from edgewright.io import hashing
from edgewright.io.hashing import bit_sum, mix64, mixed_seed, ordered_bit_sum, signed64, splitmix64, splitmix64_

MASK = 2**64 - 1
PARTS = ("ä", b"\x00\x01", bytearray(b"two"), memoryview(b"three"), torch.tensor([[1, 2], [3, 4]]).t())
PLAIN = "ä".encode() + b"\x00\x01twothree" + np.array([1, 3, 2, 4]).tobytes()


def test_parts_are_hashed_one_after_the_other() -> None:
    assert hashing.sha256(*PARTS) == hashlib.sha256(PLAIN).hexdigest()
    assert hashing.blake2b(*PARTS, size=12) == hashlib.blake2b(PLAIN, digest_size=12).hexdigest()
    assert hashing.crc32(*PARTS) == zlib.crc32(PLAIN)
    assert hashing.crc32(*PARTS[2:], start=hashing.crc32(*PARTS[:2])) == zlib.crc32(PLAIN)
    assert list(hashing.crc32_each(["68fd1e64", "", "\udc80"])) == [zlib.crc32(b"68fd1e64"), 0, zlib.crc32(b"\x80")]
    assert hashing.sha256() == hashlib.sha256().hexdigest()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_a_tensor_is_its_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(2, shape).to(dtype)
    raw = bytes(tensor.flatten().view(torch.uint8).tolist())
    assert hashing.sha256(tensor) == hashlib.sha256(raw).hexdigest()


def test_stored_digests_stay_as_they_are() -> None:
    # written down once: checkpoints, manifests and caches hold them
    tensors = {"b": torch.arange(3.0), "a": torch.tensor([[1, -1]], dtype=torch.int8)}
    assert hashing.tensors_hash(tensors)[:16] == "2a8e0921b37ca13a"
    assert hashing.tensors_hash(dict(reversed(tensors.items()))) == hashing.tensors_hash(tensors)
    assert hashing.json_hash({"b": [1, 2.5, None], "a": "ä"})[:16] == "2ed0f54c6c91c515"
    assert bit_sum(torch.tensor([1.0, -2.0])) == 0x3F800000 - 0x40000000
    assert ordered_bit_sum(torch.tensor([3, 5], dtype=torch.int8)) == 3 * 1 + 5 * 3 + 2
    assert mixed_seed(5, 0) == 6315739163131927091 and mixed_seed(1, 2, 3) == 6498626229777268288


def test_a_file_is_read_to_its_end() -> None:
    data = bytes(range(256)) * 20_000  # more than one piece
    found = hashing.file_hash(io.BytesIO(data))
    assert (found.hexdigest(), found.size) == (hashlib.sha256(data).hexdigest(), len(data))


def test_json_is_hashed_whatever_the_order_of_its_keys() -> None:
    value = {"b": 1, "a": {"d": None, "c": [True, 0.1]}}
    assert hashing.json_hash(value) == hashing.json_hash(json.loads(json.dumps(value, sort_keys=True)))
    assert hashing.json_hash(value) != hashing.json_hash(value | {"b": 2})


def plain_mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def test_mixing_is_that_of_splitmix64() -> None:
    states = [0, 1, MASK, 1 << 63, 0x9E3779B97F4A7C15, *range(1000, 1100)]
    array = np.array(states, np.uint64)
    expected = [plain_mix((state + 0x9E3779B97F4A7C15) & MASK) for state in states]
    assert expected[0] == 0xE220A8397B1DCDAF  # the first output of the reference code for seed 0
    assert mix64(array).tolist() == [plain_mix(state) for state in states]
    assert splitmix64(array).tolist() == expected
    assert splitmix64_(torch.tensor([signed64(state) for state in states])).tolist() == [signed64(x) for x in expected]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_sums_of_bits_see_every_change(dtype: torch.dtype) -> None:
    tensor = torch.randn(40, dtype=torch.complex64 if dtype.is_complex else torch.float32).mul(50).to(dtype).view(5, 8)
    changed, swapped = tensor.clone(), tensor.clone()
    changed[3, 2] += 1
    swapped[0, :2] = torch.tensor([1, 2], dtype=dtype)
    other = swapped.clone()
    other[0, :2] = torch.tensor([2, 1], dtype=dtype)
    for total in (bit_sum, ordered_bit_sum):
        assert total(tensor) == total(tensor.clone()) != total(changed)
        assert -(2**63) <= total(tensor) < 2**63
    assert bit_sum(swapped) == bit_sum(other) and ordered_bit_sum(swapped) != ordered_bit_sum(other)


def test_ordered_sums_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor: Tensor = torch.randn(1000)
    whole = ordered_bit_sum(tensor)
    monkeypatch.setattr(hashing, "_CHUNK", 64)
    assert ordered_bit_sum(tensor) == whole


def test_the_module_is_light_until_a_tensor_comes() -> None:
    code = "import sys, edgewright.io.hashing as h; h.sha256('a'); print({'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"

"""Packed numbers against Python's own integers, NumPy's packbits and llama.cpp's nibbles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from edgewright.errors import FormatError, UsageError
from edgewright.io.bits import (
    TRITS,
    pack_codes,
    pack_planes,
    pack_trits,
    packed_bytes,
    unpack_codes,
    unpack_planes,
    unpack_trits,
)


def plain(row: list[int], bits: int) -> list[int]:
    """The row as one long integer, least significant first."""
    value = sum(code << bits * place for place, code in enumerate(row))
    return list(value.to_bytes(packed_bytes(len(row), bits), "little"))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(0,), (1,), (40,), (3, 17), (5, 0), (2, 3, 9)])
def test_rows_are_one_string_of_bits(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(2**bits, shape)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], packed_bytes(shape[-1], bits))
    rows = codes.reshape(-1, shape[-1]) if codes.numel() else codes.new_empty(0, 1)
    assert [int(byte) for byte in packed.flatten()] == [byte for row in rows.tolist() for byte in plain(row, bits)]
    assert torch.equal(unpack_codes(packed, bits, shape[-1]), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", range(1, 9))
def test_parts_of_a_tensor_need_no_alignment(bits: int) -> None:
    whole = torch.randint(2**bits, (5, 61), dtype=torch.uint8)
    for codes in (whole[1:, 3:], whole[:, 2::3], whole.t(), whole[2, 5:]):
        packed = pack_codes(codes, bits)
        assert torch.equal(packed, pack_codes(codes.contiguous().clone(), bits))
        apart = torch.nn.functional.pad(packed, (1, 0))[..., 1:]
        assert torch.equal(unpack_codes(apart, bits, codes.shape[-1]), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_byte_unpacks_and_packs_again(bits: int) -> None:
    packed = torch.randint(256, (7, 3 * bits), dtype=torch.uint8)
    codes = unpack_codes(packed, bits)
    assert codes.shape == (7, 24) and int(codes.max()) < 2**bits and torch.equal(pack_codes(codes, bits), packed)


def test_signs_are_those_of_packbits() -> None:
    signs = torch.rand(6, 37) > 0.5
    assert pack_codes(signs, 1).tolist() == np.packbits(signs.numpy(), axis=1, bitorder="little").tolist()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_halves_lie_above_one_another(bits: int) -> None:
    parts = 8 // bits
    codes = torch.randint(2**bits, (3, 5, 4 * parts))
    packed = pack_codes(codes, bits, "halves")
    split: list[Tensor] = list(codes.chunk(parts, -1))
    assert torch.equal(packed.long(), sum(part << bits * place for place, part in enumerate(split)))  # type: ignore[arg-type]
    assert torch.equal(unpack_codes(packed, bits, order="halves").long(), codes)


def test_halves_are_llama_cpps_nibbles() -> None:
    from gguf import GGMLQuantizationType, quants

    codes = torch.randint(16, (2, 32))
    block = np.concatenate([np.ones((2, 1), np.float16).view(np.uint8), pack_codes(codes, 4, "halves").numpy()], 1)
    assert quants.dequantize(block, GGMLQuantizationType.Q4_0).tolist() == (codes - 8).tolist()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="rows of 5 codes of 4 bits cannot be packed in 2 parts"):
        pack_codes(torch.zeros(2, 5), 4, "halves")
    with pytest.raises(UsageError, match="codes of 3 bits"):
        pack_codes(torch.zeros(8), 3, "halves")
    with pytest.raises(FormatError, match="35 numbers of 3 bits need 14 bytes, found 13"):
        unpack_codes(torch.zeros(13, dtype=torch.uint8), 3, 35)
    with pytest.raises(FormatError, match="torch.int8"):
        unpack_codes(torch.zeros(14, dtype=torch.int8), 3, 35)


@pytest.mark.parametrize("bits", [1, 3, 11])
def test_planes_come_back(bits: int) -> None:
    codes = torch.randint(2**bits, (48,), dtype=torch.int16)
    packed = pack_planes(codes, bits)
    assert packed.shape == (6 * bits,) and torch.equal(unpack_planes(packed, bits), codes)
    assert torch.equal(packed[:6], pack_codes(codes & 1, 1))


def test_trits_are_digits_of_base_3() -> None:
    trits = torch.randint(-1, 2, (2, 35), dtype=torch.int8)
    digits = (trits + 1).view(2, 7, TRITS).long()
    assert torch.equal(pack_trits(trits).long(), (digits * 3 ** torch.arange(TRITS)).sum(-1))
    assert torch.equal(unpack_trits(pack_trits(trits)), trits)
    assert unpack_trits(torch.arange(243, 256, dtype=torch.uint8)).abs().sum() == 0

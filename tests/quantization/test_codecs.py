"""Block codecs: gguf-py as the independent implementation of q8_0 and q4_0, bit for bit; packing; gradients of none."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from edgewright.errors import UsageError
from edgewright.quantization.codecs import Codec, ggml_bytes, pack_nibbles, unpack_nibbles

GGML = {"q8_0": (8, gguf.GGMLQuantizationType.Q8_0), "q4_0": (4, gguf.GGMLQuantizationType.Q4_0)}


def rows() -> torch.Tensor:
    """2000 rows over twelve orders of magnitude, and edges: zeros, ties in size and in rounding, one-sided rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 96, generator=generator)
    x *= 10 ** (3 * torch.randn(2000, 1, generator=generator)).clamp(-6, 4)
    x[0] = 0
    x[1, :4] = torch.tensor([1.0, -1.0, 0.5, -0.5])  # two peaks of opposite sign: the first one gives q4_0 its sign
    x[2] = torch.arange(96) - 47.5
    x[3] = (torch.arange(96) % 32 - 16) * 127 / 32  # halves of the q8_0 step
    x[4] = x[4].abs()
    x[5] = -x[5].abs()
    x[6, 32:64] = 0
    x[7] = 1e-6
    return x


@pytest.mark.parametrize("name", GGML)
def test_bytes_and_values_equal_gguf(name):
    bits, kind = GGML[name]
    codec, x = Codec(name, bits, 32), rows()
    expected = gguf.quants.quantize(x.numpy(), kind)
    codes, scales = codec.encode(x)
    assert np.array_equal(ggml_bytes(codes, scales, name).numpy(), expected)
    assert np.array_equal(codec.decode(codes, scales).numpy(), gguf.quants.dequantize(expected, kind))


@pytest.mark.parametrize(
    "codec", [Codec("q8_0", 8, 32), Codec("q4_0", 4, 32), Codec("symmetric", 4, 48), Codec("symmetric", 8, 96)]
)
def test_values_equal_what_is_stored(codec):
    x = rows()
    codes, scales = codec.encode(x)
    assert codes.dtype == torch.int8 and scales.dtype == torch.float16
    assert torch.equal(codec.values(x), codec.decode(codes, scales))


@pytest.mark.parametrize("codec", [Codec("q8_0", 8, 32), Codec("q4_0", 4, 32), Codec("symmetric", 4, 32)])
def test_encoding_twice_changes_nothing(codec):
    # Scales below 6e-5 are fp16 subnormals of few bits, whose codes do not reach the end of the range again.
    x = rows()
    x = x[(x.unflatten(-1, (-1, 32)).abs().amax(-1) > 0.1).all(-1)]
    once = codec.values(x)
    assert len(x) > 500 and torch.equal(codec.values(once), once)


def test_symmetric_vector_of_the_specification():
    x = torch.tensor([[0.5, -1.0, 0.33, 0.07]])
    found = Codec("symmetric", 4, 4, torch.float32).values(x)
    torch.testing.assert_close(found, torch.tensor([[0.571429, -1.0, 0.285714, 0.0]]), rtol=0, atol=6e-7)  # six digits


@pytest.mark.parametrize("codec", [Codec("q8_0", 8, 32), Codec("q4_0", 4, 32), Codec("symmetric", 4, 32)])
def test_vanishing_and_zero_blocks_decode_to_zero(codec):
    for value in (0.0, 1e-40, -1e-42):
        found = codec.values(torch.full((2, 32), value))
        assert torch.equal(found, torch.zeros(2, 32))


def test_nibbles_round_trip():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    packed = pack_nibbles(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 16)
    assert torch.equal(unpack_nibbles(packed), codes)
    with pytest.raises(UsageError, match="rows of 5 codes of 4 bits"):
        pack_nibbles(codes[:, :5])


def test_blocks_must_divide_the_row_and_codes_must_fit_a_byte():
    with pytest.raises(UsageError, match="40 entries.*blocks of 32"):
        Codec("q8_0", 8, 32).encode(torch.ones(2, 40))
    with pytest.raises(UsageError, match="bits of stored codes=12; it must be a whole number from 2 to 8"):
        Codec("symmetric", 12, 32).encode(torch.ones(2, 32))

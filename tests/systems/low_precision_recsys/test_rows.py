"""Forms of rows beyond the shared quantiser: codebooks, float16, rows that are kept; NumPy is the oracle of k-means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgewright.errors import FormatError, UsageError
from edgewright.systems.low_precision_recsys import quantize_rows
from edgewright.systems.low_precision_recsys.tables import CodebookRows, Float16Rows, MixedRows, StoredRows, kmeans_rows


def table(rows: int = 50, dim: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)) * 0.05


def lloyd(values: np.ndarray, steps: int) -> np.ndarray:
    """The slow, obvious algorithm on one row, in float32 as the module computes it."""
    centres = (values.min() + (values.max() - values.min()) * np.arange(16, dtype=np.float32) / np.float32(15)).astype(
        np.float32
    )
    for _ in range(steps):
        nearest = np.abs(values[:, None] - centres).argmin(1)
        for k in range(16):
            if (nearest == k).any():
                centres[k] = values[nearest == k].mean(dtype=np.float32)
    return centres


def test_kmeans_is_lloyds_algorithm() -> None:
    weight = table(8, 64)
    found = kmeans_rows(weight, steps=5)
    for row, book in zip(weight.numpy(), found.books, strict=True):
        # means are summed in another order, then rounded to float16
        np.testing.assert_allclose(book.float().numpy(), lloyd(row, 5), atol=1e-4)


@pytest.mark.parametrize("block", [1, 4, 16])
def test_codebooks_beat_even_steps_and_cost_what_the_format_says(block: int) -> None:
    weight = table(50, 33)
    books = quantize_rows(weight, 4, "kmeans", block=block)
    assert books.nbytes == 50 * 17 + 32 * -(-50 // block) and len(books) == 50
    assert books.codes().shape == (50, 33)
    errors = (books.dequantize() - weight).norm()
    if block == 1:
        assert float(errors) < float((quantize_rows(weight, 4, "minmax").dequantize() - weight).norm())
    # every value is the nearest of its book
    centres = books.books[torch.arange(50) // block].float()
    best = (weight.unsqueeze(2) - centres.unsqueeze(1)).abs().amin(2)
    torch.testing.assert_close((books.dequantize() - weight).abs(), best, rtol=0, atol=1e-7)
    assert torch.equal(books.dequantize(torch.tensor([49, 3])), books.dequantize()[[49, 3]])


def test_rows_of_zeros_stay_zero_in_every_form() -> None:
    weight = table()
    weight[0] = weight[17] = 0.0
    for bits, method in ((8, "minmax"), (4, "minmax"), (4, "greedy"), (2, "greedy"), (4, "kmeans")):
        for block in (1, 16):
            values = quantize_rows(weight, bits, method, block=block).dequantize()
            assert not values[[0, 17]].any(), (bits, method, block)


def test_odd_widths_are_padded_and_remembered() -> None:
    weight = table(6, 7)
    for bits, method in ((4, "minmax"), (2, "minmax"), (4, "kmeans")):
        rows = quantize_rows(weight, bits, method)
        assert rows.dequantize().shape == (6, 7) and rows.dim == 7


def test_rows_that_no_code_holds_are_named_or_kept() -> None:
    weight = table()
    weight[3, 2], weight[7, 0] = float("nan"), float("inf")
    weight[9] = 1.0 + torch.linspace(0, 1e-8, 12)  # constant in float32
    for bits in (2, 4, 8):
        with pytest.raises(ValueError, match="row 3 has NaN"):
            quantize_rows(weight, bits)
        kept = quantize_rows(weight, bits, "minmax", keep="fp16")
        assert isinstance(kept, MixedRows) and kept.ids.tolist() == [3, 7]
        assert torch.equal(kept.dequantize()[[3, 7]].nan_to_num(5.0), weight[[3, 7]].half().float().nan_to_num(5.0))
        good = torch.tensor([0, 1, 49])
        assert torch.equal(kept.dequantize(good), quantize_rows(weight[good], bits, "minmax").dequantize())
        assert torch.equal(
            StoredRows(kept).vectors(torch.tensor([[3, 0]])).nan_to_num(5.0)[0, 0], kept.kept[0].float().nan_to_num(5.0)
        )
    narrow = table()
    narrow[5] = torch.linspace(0, 1e-8, 12)  # float16 has no scale for it
    assert quantize_rows(narrow, 4, keep="fp16").ids.tolist() == [5]
    with pytest.raises(UsageError, match="row 3 has NaN"):
        kmeans_rows(weight)


def test_bad_arguments() -> None:
    for bits in (1, 3, 5, 16):
        with pytest.raises(ValueError, match=f"bits={bits}; it must be one of 2, 4, 8"):
            quantize_rows(table(), bits)
    with pytest.raises(UsageError, match="method='kmeans'; it must be one of minmax, greedy"):
        quantize_rows(table(), 8, "kmeans")
    with pytest.raises(UsageError, match="keep='fp32'"):
        quantize_rows(table(), 4, keep="fp32")
    with pytest.raises(UsageError, match="block=0"):
        kmeans_rows(table(), 0)
    with pytest.raises(FormatError, match=r"books float16 \[2, 16\]"):
        CodebookRows(torch.zeros(9, 4, dtype=torch.uint8), torch.zeros(1, 16).half(), 8, 8)
    assert Float16Rows(table().half()).nbytes == 2 * 50 * 12

"""Packing and counting on cases small enough to see."""

from __future__ import annotations

import pytest
import torch

from edgewright.distillation.sequences import distinct_n, pack_sequences
from edgewright.errors import UsageError

END = 2


def test_sequences_are_joined_with_exactly_one_end_token_each():
    tokens = torch.tensor([[5, 6, END, END], [7, 8, 9, 10], [11, END, END, END]])
    blocks = pack_sequences(tokens, torch.tensor([3, 4, 1]), 3, END)
    assert blocks.tolist() == [[5, 6, END], [7, 8, 9], [10, END, 11]]  # the last end token fills no block


def test_too_little_text_is_named():
    tokens = torch.tensor([[5, 6]])
    with pytest.raises(UsageError, match="3 tokens do not fill one block of block_length=4"):
        pack_sequences(tokens, torch.tensor([2]), 4, END)
    with pytest.raises(UsageError):
        pack_sequences(tokens, torch.tensor([2]), 0, END)


def test_distinct_n_counts_within_sequences():
    tokens = torch.tensor([[1, 2, 1, 2], [1, 2, 3, 0]])
    assert distinct_n(tokens, 1) == 4 / 8
    assert distinct_n(tokens, 2, torch.tensor([4, 3])) == 3 / 5  # 12 21 12 | 12 23
    with pytest.raises(UsageError, match="no 9-gram"):
        distinct_n(tokens, 9)
    with pytest.raises(UsageError, match="n=0; it must be a whole number from 1 up; tokens of an n-gram"):
        distinct_n(tokens, 0)

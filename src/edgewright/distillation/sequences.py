"""Token sequences of different lengths: packed into training blocks, and measured for repetition."""

from __future__ import annotations

import torch
from torch import Tensor

from edgewright.checks import check, whole
from edgewright.errors import UsageError


def pack_sequences(tokens: Tensor, lengths: Tensor, block_length: int, end_token: int) -> Tensor:
    """Join sequences with one end token after each and cut them to blocks; the rest that fills no block is dropped.

    Args:
        tokens: int64 [N, T].
        lengths: int64 [N].
        block_length: tokens of a block.
        end_token: its id.

    Returns:
        int64 [M, block_length]

    Raises:
        UsageError: too few tokens for one block.
    """
    pieces: list[Tensor] = []
    end = tokens.new_tensor([end_token])
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        sequence = row[:length]
        pieces += [sequence] if length and int(sequence[-1]) == end_token else [sequence, end]
    stream = torch.cat(pieces) if pieces else tokens.new_empty(0)
    count = len(stream) // block_length if block_length > 0 else 0
    if count == 0:
        raise UsageError(f"{len(stream)} tokens do not fill one block of block_length={block_length}; generate more")
    return stream[: count * block_length].view(count, block_length)


def distinct_n(tokens: Tensor, n: int, lengths: Tensor | None = None) -> float:
    """Share of different n-grams among all n-grams: low for repetitive text.

    Args:
        tokens: int64 [N, T].
        n: at least 1.
        lengths: int64 [N]; None: all of them are T.

    Raises:
        UsageError: no sequence is as long as n.
    """
    check("n", n, whole(1), "tokens of an n-gram")
    limits = [tokens.shape[1]] * len(tokens) if lengths is None else lengths.tolist()
    sequences = zip(tokens.tolist(), limits, strict=True)
    grams = [tuple(row[at : at + n]) for row, end in sequences for at in range(end - n + 1)]
    if not grams:
        raise UsageError(f"no sequence has {n} tokens, so there is no {n}-gram to count")
    return len(set(grams)) / len(grams)

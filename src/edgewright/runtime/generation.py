"""Writing on after a prompt, token by token: the part of `Engine.generate` that no runtime changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgewright.errors import UsageError
from edgewright.runtime.interfaces import Generation

Row = NDArray[np.float32]  # logits [vocabulary]


class Decoder(Protocol):
    """What an engine gives: prompt and tokens in, logits of the next token out. `kept_ids[i]` is the token of output i
    where the head was cut, else None.
    """

    context: int
    kept_ids: tuple[int, ...] | None

    def prompt_ids(self, prompt: str | Sequence[int], room: int) -> list[int]:
        """Checked ids of a prompt behind which `room` tokens still fit."""

    def prefill(self, ids: list[int], reuse: bool) -> tuple[Row, int]:
        """(logits after the last id, how many ids were in the cache already)."""

    def follow(self, token: int) -> Row:
        """Logits after one token more."""

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""

    def writer(self, on_token: Callable[[str], object] | None) -> Writer:
        """What turns the new tokens into text."""


class Writer(Protocol):
    """New tokens in, the text in whole characters out."""

    def add(self, token: int) -> None: ...

    def end(self) -> str:
        """The whole text."""


def write_on(
    decoder: Decoder,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float,
    seed: int,
    on_token: Callable[[str], object] | None,
    reuse: bool,
    ignore_end: bool,
) -> Generation:
    """`Engine.generate` in terms of a decoder. Raises UsageError for settings or a prompt that cannot work."""
    if max_new_tokens < 1 or not (0 <= temperature < float("inf")):
        raise UsageError(
            f"generate needs max_new_tokens >= 1 and temperature >= 0, got {max_new_tokens} and {temperature}; "
            "e.g. generate(text, 128, temperature=0.7)"
        )
    begin = time.perf_counter()
    ids = decoder.prompt_ids(prompt, 1)
    rng = np.random.default_rng(seed)
    writer = decoder.writer(on_token)
    row, reused = decoder.prefill(ids, reuse)
    written: list[int] = []
    seconds: list[float] = []
    finish = "length"
    while True:
        place = sample(row, temperature, rng)
        token = place if decoder.kept_ids is None else decoder.kept_ids[place]
        seconds.append(time.perf_counter() - begin)
        if decoder.is_end(token) and not ignore_end:
            finish = "stop"
            break
        written.append(token)
        writer.add(token)
        if len(written) == max_new_tokens:
            break
        if len(ids) + len(written) > decoder.context:
            finish = "context"
            break
        begin = time.perf_counter()
        row = decoder.follow(token)
    return Generation(
        text=writer.end(),
        ids=tuple(written),
        prompt_tokens=len(ids),
        prefill_seconds=seconds[0],
        token_seconds=tuple(seconds[1:]),
        finish=finish,
        reused_tokens=reused,
    )


def sample(row: Row, temperature: float, rng: np.random.Generator) -> int:
    """Place of the likeliest output at temperature 0, else one drawn from the softmax of row / temperature."""
    if temperature == 0:
        return int(row.argmax())
    cumulative = np.cumsum(np.exp((row.astype(np.float64) - row.max()) / temperature))
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def common_prefix(cached: Sequence[int], ids: Sequence[int]) -> int:
    """How many of `ids` a cache holds already; never the last, whose logits are wanted."""
    limit = min(len(cached), len(ids) - 1)
    keep = 0
    while keep < limit and cached[keep] == ids[keep]:
        keep += 1
    return keep

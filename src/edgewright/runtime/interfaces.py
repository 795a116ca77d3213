"""What every runtime of language models answers to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Generation:
    """What a model wrote and how long it took.

    ids: the new tokens without the one that ended the text. prefill_seconds: from the prompt to the first token.
    token_seconds: for every later decoding step (the one that found the end included). finish: "stop" (end of text),
    "length" (max_new_tokens), "context" (no room left).
    """

    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    prefill_seconds: float
    token_seconds: tuple[float, ...]
    finish: str = "length"
    reused_tokens: int = 0

    @property
    def time_to_first_token(self) -> float:
        """Seconds."""
        return self.prefill_seconds

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens computed (not those reused from the previous call) per second."""
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens per second after the first; NaN when there was none."""
        seconds = sum(self.token_seconds)
        return len(self.token_seconds) / seconds if seconds else float("nan")


class Engine(Protocol):
    """A loaded model file. All ids are plain ints; nothing is kept between calls unless `reuse` asks for it."""

    path: Path
    vocabulary: int
    context: int

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special` reads special tokens written in the text and adds those the model starts with."""

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included."""

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [T, vocabulary]: the logits after each of T ids, starting from an empty cache."""

    def logits_stream(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """The rows of `logits` in chunks, so that never more than one chunk is in memory."""

    def next_logits(self, ids: Sequence[int], *, reuse: bool = False) -> NDArray[np.float32]:
        """float32 [vocabulary]: the logits after the last id; `reuse` computes only what the cache does not hold."""

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        on_token: Callable[[str], object] | None = None,
        reuse: bool = False,
        ignore_end: bool = False,
    ) -> Generation:
        """Continue `prompt`: greedily at temperature 0, else by sampling with `seed`."""

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The messages ({"role", "content"}) in the model's own chat format, ready for its answer."""

    def close(self) -> None:
        """Free the model; the engine cannot be used afterwards."""

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

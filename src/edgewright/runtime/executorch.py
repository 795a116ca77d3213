"""The ExecuTorch engine: logits, generation and chat prompts of a language model in a .pte file of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewright.errors import EdgewrightError, FormatError, MissingPackage, Unsupported, UsageError, in_one_line
from edgewright.io.pte import read_layout
from edgewright.runtime.chat_template import render_chat
from edgewright.runtime.child_check import first_run_in_child
from edgewright.runtime.executorch_library import set_threads, silent
from edgewright.runtime.executorch_program import FORWARD, open_file
from edgewright.runtime.generation import common_prefix, write_on
from edgewright.runtime.interfaces import Generation
from edgewright.runtime.pte_metadata import language_settings


class ExecuTorchEngine:
    """A .pte of `export_executorch` with a language model in it; answers to `runtime.engine.Engine`.

    `context` is fixed in the file. `vocabulary` is the width of the logits: fewer than `tokens` where the head was cut,
    and then `kept_ids[i]` is the token of output i. Threads belong to the whole process: they are set where no other
    .pte is open. Raises FormatError (damaged or foreign file), Unsupported (a .pte that is no language model).
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, check: bool = True) -> None:
        self._module: Any = None
        self.path = Path(path)
        read_layout(self.path)
        if check:
            first_run_in_child("edgewright.runtime.executorch_program", "first_run", self.path)
        self.threads = set_threads(threads, self)
        module, metadata = open_file(self.path)
        if metadata.get("kind") != "language":
            raise Unsupported(f"{self.path} holds no language model of edgewright; open it with open_program(path)")
        self.settings = language_settings(metadata, self.path)
        self.context, self.tokens = self.settings.context, self.settings.vocabulary
        self.kept_ids = self.settings.kept_ids
        meta = module.method_meta(FORWARD)
        try:
            self._chunk = int(meta.input_tensor_meta(0).sizes()[1])
            self.vocabulary = int(meta.output_tensor_meta(0).sizes()[1])
        except (RuntimeError, IndexError) as error:
            raise FormatError(f"{self.path}: its program is not that of a language model") from error
        self._tokenizer = _tokenizer(metadata.get("tokenizer"), self.path)
        self._cached: list[int] = []
        self._module = module

    def close(self) -> None:
        """Free the model; harmless when called again."""
        self._module = None

    def __enter__(self) -> ExecuTorchEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- text and tokens

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` reads special tokens in the text and adds those the model starts with."""
        tokenizer = self._text()
        tokenizer.encode_special_tokens = not special
        ids = list(tokenizer.encode(text, add_special_tokens=special).ids)
        start = self.settings.start
        # a chat template that writes the start token itself would otherwise get it twice
        return ids[1:] if special and len(ids) > 1 and ids[0] == ids[1] == start else ids

    def detokenize(self, ids: Sequence[int], special: bool = True) -> str:
        """The text of `ids`; `special` writes special tokens out."""
        text: str = self._text().decode(self._checked(ids, empty_is_fine=True), skip_special_tokens=not special)
        return text

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""
        return token in self.settings.ends

    def is_control(self, token: int) -> bool:
        """Whether the token is a mark rather than text."""
        return token in self.settings.specials

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The messages in the chat format that the file carries, ready for the answer."""
        settings = self.settings
        if settings.template is None:
            raise UsageError(f"{self.path} carries no chat template; continue a plain text with generate(text) instead")
        marks = {"bos_token": settings.start_text or None, "eos_token": settings.end_text or None}
        return render_chat(settings.template, messages, marks=marks)

    # ---- the model

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [T, vocabulary]: the logits after each of the T ids, from an empty cache."""
        return np.concatenate(list(self.logits_stream(ids)))

    def logits_stream(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """The rows of `logits` in order, at most 128 at a time."""
        checked = self._checked(ids)
        self._fits(len(checked))
        self._cached = []
        for start in range(0, len(checked), self._chunk):
            part = checked[start : start + self._chunk]
            yield self._forward(part, range(len(part)))

    def logits_by_token(self, ids: Sequence[int], begin: int) -> NDArray[np.float32]:
        """The rows of `logits` from `begin` on, each computed by a call of its own on what is in the cache."""
        checked = self._checked(ids)
        self._fits(len(checked))
        self._cached = []
        self.prefill(checked[:begin], reuse=False)
        return np.concatenate([self._forward([token], [0]) for token in checked[begin:]])

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
        """Continue `prompt` (text or ids): greedily at temperature 0, else sampled from the softmax with `seed`.

        on_token gets the text as it grows, never half a character. reuse: keep what the previous call left in the cache
        as far as it is the same. ignore_end: go on after the end of the text (benchmarks). Raises UsageError when the
        prompt does not fit the context.
        """
        return write_on(
            self, prompt, max_new_tokens,
            temperature=temperature, seed=seed, on_token=on_token, reuse=reuse, ignore_end=ignore_end,
        )  # fmt: skip

    def next_logits(self, ids: Sequence[int], *, reuse: bool = False) -> NDArray[np.float32]:
        """float32 [vocabulary]: the logits after the last of `ids`; with `reuse`, only what the cache does not hold
        already is computed.
        """
        checked = self._checked(ids)
        self._fits(len(checked))
        return self.prefill(checked, reuse)[0].copy()

    # ---- what `generation.write_on` asks for

    def prompt_ids(self, prompt: str | Sequence[int], room: int) -> list[int]:
        """Checked ids of a prompt behind which `room` tokens still fit."""
        ids = self._checked(self.tokenize(prompt) if isinstance(prompt, str) else prompt)
        self._fits(len(ids) + room)
        return ids

    def writer(self, on_token: Callable[[str], object] | None) -> _Writer:
        """What turns new tokens into text."""
        return _Writer(self._tokenizer, on_token)

    def prefill(self, ids: list[int], reuse: bool) -> tuple[NDArray[np.float32], int]:
        """(logits after the last of `ids`, how many of them were in the cache already)."""
        keep = common_prefix(self._cached, ids) if reuse else 0
        self._cached = self._cached[:keep]
        for start in range(keep, len(ids), self._chunk):
            part = ids[start : start + self._chunk]
            rows = self._forward(part, [len(part) - 1])  # the head is computed once a chunk, not once a token
        return rows[0], keep

    def follow(self, token: int) -> NDArray[np.float32]:
        """Logits after one token more."""
        return self._forward([token], [0])[0]  # type: ignore[no-any-return]

    def _forward(self, tokens: Sequence[int], rows: Sequence[int]) -> NDArray[np.float32]:
        """Feed tokens behind what is in the cache; float32 [len(rows), vocabulary]."""
        import torch

        self._alive()
        place = len(self._cached)
        inputs = (torch.tensor([list(tokens)]), torch.tensor([place]), torch.tensor(list(rows)))
        try:
            (logits,) = self._module.forward(inputs)
        except RuntimeError as error:
            self._cached = []
            raise EdgewrightError(f"ExecuTorch stopped at token {place}: {in_one_line(error)}") from error
        self._cached += tokens
        result: NDArray[np.float32] = logits.numpy()
        return result

    # ---- checks

    def _alive(self) -> None:
        if self._module is None:
            raise UsageError(f"the engine of {self.path} is closed; open it again with open_engine(path)")

    def _text(self) -> Any:
        self._alive()
        if self._tokenizer is None:
            raise UsageError(f"{self.path} carries no tokenizer; give token ids, or export it with its tokenizer")
        return self._tokenizer

    def _checked(self, ids: Sequence[int], empty_is_fine: bool = False) -> list[int]:
        self._alive()
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        if not array.size and not empty_is_fine:
            raise UsageError("there are no tokens to run: the text is empty and the model adds no start token")
        if array.size and not (array.min() >= 0 and array.max() < self.tokens):
            bad = array[(array < 0) | (array >= self.tokens)][0]
            raise UsageError(f"token {bad} is not in the vocabulary of {self.path.name} (0 to {self.tokens - 1})")
        return [int(token) for token in array]

    def _fits(self, needed: int) -> None:
        if needed > self.context:
            raise UsageError(
                f"{needed} tokens do not fit the context of {self.context} that {self.path.name} was exported with; "
                f"shorten the text, or export again with context={needed}"
            )


class _Writer:
    """The new text as it grows, handed on in whole characters."""

    def __init__(self, tokenizer: Any, on_token: Callable[[str], object] | None) -> None:
        self.tokenizer, self.on_token = tokenizer, on_token
        self.ids: list[int] = []
        self.text = ""

    def add(self, token: int) -> None:
        self.ids.append(token)
        if self.tokenizer is not None and self.on_token is not None:
            whole = self.tokenizer.decode(self.ids, skip_special_tokens=True)
            if not whole.endswith("\ufffd"):
                self._emit(whole)

    def end(self) -> str:
        if self.tokenizer is None:
            return ""
        self._emit(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        return self.text

    def _emit(self, whole: str) -> None:
        new, self.text = whole[len(self.text) :], whole
        if new and self.on_token is not None:
            self.on_token(new)


def _tokenizer(text: Any, path: Path) -> Any:
    if text is None:
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingPackage("the tokenizer inside the file needs tokenizers: pip install tokenizers") from error
    try:
        with silent():
            return Tokenizer.from_str(text)
    except Exception as error:  # the package raises plain Exception for everything it cannot read
        raise FormatError(f"{path}: the tokenizer inside the file cannot be read: {in_one_line(error)}") from error

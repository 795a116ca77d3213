"""The llama.cpp engine: logits, generation and chat prompts of a GGUF file on the CPU."""

from __future__ import annotations

import atexit
import codecs
import ctypes
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import psutil
from numpy.typing import NDArray

from edgewright.errors import EdgewrightError, FormatError, Unsupported, UsageError
from edgewright.io.end_tokens import gguf_end_tokens
from edgewright.io.gguf.reader import GGUFFile
from edgewright.io.gguf.tokenizer import TEMPLATE_MARKS
from edgewright.measure.machine import usable_cores
from edgewright.runtime import llamacpp_library as lib
from edgewright.runtime.chat_template import render_chat
from edgewright.runtime.child_check import GGUF_RUN, MEMORY_FLOOR, first_run_in_child
from edgewright.runtime.generation import common_prefix, write_on
from edgewright.runtime.gguf_sizes import cache_bytes, check_sizes, learned_positions
from edgewright.runtime.interfaces import Generation

BATCH = 512  # tokens per llama_decode call when only the last logits are wanted
LOGIT_ROWS = 128  # and when all are: float32 [128, vocabulary] is what is in memory at once
MAX_CONTEXT = 1 << 20

_open_engines: weakref.WeakSet[LlamaCppEngine] = weakref.WeakSet()


class LlamaCppEngine:
    """A GGUF file in llama.cpp (see `edgewright.runtime.engine.Engine` for the calls).

    The file's header is checked by `GGUFFile` before llama.cpp sees it, and llama.cpp sees it first in a child process
    with the same settings (unless `check` is False: a file that this process wrote): it ends its process on headers
    that it does not like. `context` is never more than the positions for which a model has learned embeddings (GPT-2).
    A quantised value cache runs with flash attention, which it needs; everything else stays at llama.cpp's defaults.
    Not for use from several threads at once.
    """

    kept_ids: tuple[int, ...] | None = None

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        context: int = 2048,
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
        check: bool = True,
    ) -> None:
        self._model: int | None = None
        self._context: int | None = None
        self._batch: lib.Batch | None = None
        self._cached: list[int] = []  # what the key-value cache holds
        self.path = Path(path)
        self.threads = usable_cores() if threads is None else threads
        _check_options(self.threads, context, cache_type_k, cache_type_v)
        file = GGUFFile(self.path)
        check_sizes(file)
        context = min(context, learned_positions(file) or context)
        if check:
            caches = {"cache_type_k": cache_type_k, "cache_type_v": cache_type_v}
            cache = min(cache_bytes(file, context), psutil.virtual_memory().total)
            memory = MEMORY_FLOOR + 16 * self.path.stat().st_size + cache
            first_run_in_child(*GGUF_RUN, self.path, memory=memory, options={"context": context, **caches})
        self.metadata = file.metadata
        self._ends = frozenset(gguf_end_tokens(file.metadata))  # more than llama.cpp has keys for
        self._lib = lib.library()
        self._c = self._lib.c
        self._load()
        self._start(context, cache_type_k, cache_type_v)
        self._vocabulary = self._c.llama_model_get_vocab(self._model)
        self.vocabulary: int = self._c.llama_vocab_n_tokens(self._vocabulary)
        self.context: int = min(self._c.llama_n_ctx(self._context), learned_positions(file) or MAX_CONTEXT)
        self._batch = self._c.llama_batch_init(BATCH, 0, 1)
        _open_engines.add(self)

    # ---- opening and closing

    def _load(self) -> None:
        self._lib.log.clear()
        path = str(self.path).encode("utf-8", "surrogateescape")
        with lib.interrupts_afterwards():
            self._model = self._c.llama_model_load_from_file(path, self._c.llama_model_default_params())
        if not self._model:
            raise FormatError(f"llama.cpp does not load {self.path}: {self._lib.log.reason()}")
        if self._c.llama_model_has_encoder(self._model) or not self._c.llama_model_has_decoder(self._model):
            self.close()
            raise Unsupported(f"{self.path} is not a decoder-only language model; the llama.cpp engine runs only those")

    def _start(self, context: int, cache_type_k: str, cache_type_v: str) -> None:
        context = -(-context // 256) * 256  # llama.cpp rounds up so; told the round number it keeps n_batch as asked
        batch = min(BATCH, context)
        params = self._lib.context_params()
        params.set(lib.N_CTX, context)
        params.set(lib.N_BATCH, batch)
        params.set(lib.N_UBATCH, batch)
        params.set(lib.N_THREADS, self.threads)
        params.set(lib.N_THREADS_BATCH, self.threads)
        params.set(lib.TYPE_K, lib.CACHE_TYPES[cache_type_k])
        params.set(lib.TYPE_V, lib.CACHE_TYPES[cache_type_v])
        if cache_type_v != "f16":
            params.set(lib.FLASH_ATTENTION, 1)
        self._lib.log.clear()
        with lib.interrupts_afterwards():
            self._context = self._c.llama_init_from_model(self._model, params)
        if not self._context:
            reason = self._lib.log.reason()
            self.close()
            raise EdgewrightError(
                f"llama.cpp cannot start {self.path} with context={context} "
                f"and cache types {cache_type_k}/{cache_type_v}: {reason}"
            )
        # a second verification that the offsets are right: llama.cpp tells what it understood
        told = (self._c.llama_n_batch(self._context), self._c.llama_n_threads(self._context))
        if told != (batch, self.threads) or self._c.llama_n_ctx(self._context) < context:
            self.close()
            raise EdgewrightError(f"xllamacpp {self._lib.version} did not take its settings; please report it")

    def close(self) -> None:
        """Free everything; harmless when called again."""
        if self._batch is not None:
            self._c.llama_batch_free(self._batch)
        if self._context:
            self._c.llama_free(self._context)
        if self._model:
            self._c.llama_model_free(self._model)
        self._batch = self._context = self._model = None

    def __enter__(self) -> LlamaCppEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not sys.is_finalizing():  # by then atexit has closed it, and ctypes may be gone
            self.close()

    # ---- text and tokens

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` reads special tokens in the text and adds those the model starts with."""
        self._alive()
        data = text.encode("utf-8", "replace")
        size = len(data) + 8
        for _ in range(2):
            out = (ctypes.c_int32 * size)()
            count = self._c.llama_tokenize(self._vocabulary, data, len(data), out, size, special, special)
            if count >= 0:
                break
            size = -count
        if count < 0:
            raise EdgewrightError(f"llama.cpp cannot tokenise a text of {len(data)} bytes")
        ids = list(out[:count])
        start = self._c.llama_vocab_bos(self._vocabulary) if self._c.llama_vocab_get_add_bos(self._vocabulary) else None
        # a chat template that writes the start token itself would otherwise get it twice
        return ids[1:] if special and len(ids) > 1 and ids[0] == ids[1] == start else ids

    def detokenize(self, ids: Sequence[int], special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. `special` writes special tokens out."""
        return self.detokenize_bytes(ids, special).decode("utf-8", "replace")

    def detokenize_bytes(self, ids: Sequence[int], special: bool = True) -> bytes:
        """As `detokenize`, the bytes themselves."""
        array = self._checked(ids, empty_is_fine=True)
        tokens = array.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        size = 16 * len(array) + 64
        for _ in range(2):
            out = ctypes.create_string_buffer(size)
            count = self._c.llama_detokenize(self._vocabulary, tokens, len(array), out, size, False, special)
            if count >= 0:
                return out.raw[:count]
            size = -count
        raise EdgewrightError(f"llama.cpp cannot write {len(array)} tokens as text")

    def piece(self, token: int) -> bytes:
        """The bytes of one token inside a text; empty for a special one."""
        size = 64
        for _ in range(2):
            out = ctypes.create_string_buffer(size)
            count = self._c.llama_token_to_piece(self._vocabulary, token, out, size, 0, False)
            if count >= 0:
                return out.raw[:count]
            size = -count
        return b""

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""
        return token in self._ends or bool(self._c.llama_vocab_is_eog(self._vocabulary, token))

    def is_control(self, token: int) -> bool:
        """Whether the token is a mark rather than text."""
        return bool(self._c.llama_vocab_is_control(self._vocabulary, token))

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The messages in the chat format that the file carries, ready for the answer."""
        template = self.metadata.get("tokenizer.chat_template")
        if not isinstance(template, str):
            raise UsageError(f"{self.path} carries no chat template; continue a plain text with generate(text) instead")
        self._alive()
        names = self.metadata["tokenizer.ggml.tokens"]
        # from the header: where it names none, llama.cpp answers with a token that happens to stand at some place
        ids = {mark: self.metadata.get(f"tokenizer.ggml.{key}_token_id", -1) for key, mark in TEMPLATE_MARKS.items()}
        marks = {mark: names[i] for mark, i in ids.items() if 0 <= i < len(names)}
        return render_chat(template, messages, marks=marks)

    # ---- the model

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [T, vocabulary]: the logits after each of the T ids, from an empty cache."""
        return np.concatenate(list(self.logits_stream(ids)))

    def logits_stream(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """The rows of `logits` in order, at most 128 at a time."""
        array = self._checked(ids)
        if len(array) > self.context:
            raise self._too_long(len(array))
        self._forget(0)
        for start in range(0, len(array), LOGIT_ROWS):
            chunk = array[start : start + LOGIT_ROWS]
            self._decode(chunk, start, every=True)
            rows = self._c.llama_get_logits(self._context)
            yield np.ctypeslib.as_array(rows, shape=(len(chunk), self.vocabulary)).copy()

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

        on_token gets the text as it grows, never half a character. reuse: start from what the previous call left in
        the cache as far as it is the same (a growing chat); the numbers may then differ in the last bits. ignore_end:
        go on after the end of the text (benchmarks). Raises UsageError when the prompt does not fit the context.
        """
        return write_on(
            self, prompt, max_new_tokens,
            temperature=temperature, seed=seed, on_token=on_token, reuse=reuse, ignore_end=ignore_end,
        )  # fmt: skip

    def next_logits(self, ids: Sequence[int], *, reuse: bool = False) -> NDArray[np.float32]:
        """float32 [vocabulary]: the logits after the last of `ids`; with `reuse`, only what the cache does not hold
        already is computed.
        """
        return self.prefill(self.prompt_ids(ids, 0), reuse)[0].copy()

    # ---- what `generation.write_on` asks for

    def prompt_ids(self, prompt: str | Sequence[int], room: int) -> list[int]:
        """Checked ids of a prompt behind which `room` tokens still fit."""
        array = self._checked(self.tokenize(prompt) if isinstance(prompt, str) else prompt)
        if len(array) + room > self.context:
            raise self._too_long(len(array) + room)
        return [int(token) for token in array]

    def writer(self, on_token: Callable[[str], object] | None) -> _Writer:
        """What turns new tokens into text."""
        return _Writer(self.piece, on_token)

    def prefill(self, ids: list[int], reuse: bool) -> tuple[NDArray[np.float32], int]:
        """(logits after the last of `ids`, good until the next call; how many of them were in the cache already)."""
        keep = self._forget(common_prefix(self._cached, ids) if reuse else 0)
        for start in range(keep, len(ids), BATCH):
            self._decode(np.array(ids[start : start + BATCH], dtype=np.int32), start)
        return self._last_logits(), keep

    def follow(self, token: int) -> NDArray[np.float32]:
        """Logits after one token more, good until the next call."""
        self._decode(np.array([token], dtype=np.int32), len(self._cached))
        return self._last_logits()

    def _last_logits(self) -> NDArray[np.float32]:
        return np.ctypeslib.as_array(self._c.llama_get_logits(self._context), shape=(self.vocabulary,))

    def _forget(self, keep: int) -> int:
        """Cut the cache to its first `keep` tokens (all of it where the model cannot be cut); returns what is left."""
        memory = self._c.llama_get_memory(self._context)
        if keep and self._c.llama_memory_seq_rm(memory, 0, keep, -1):
            self._cached = self._cached[:keep]
        else:
            self._c.llama_memory_clear(memory, True)
            self._cached = []
        return len(self._cached)

    def _decode(self, tokens: NDArray[np.int32], position: int, every: bool = False) -> None:
        """Feed tokens; afterwards llama.cpp holds logits of the last one, or of every one."""
        batch = self._batch
        assert batch is not None
        batch.n = count = len(tokens)
        for i, token in enumerate(tokens.tolist()):
            batch.token[i], batch.position[i] = token, position + i
            batch.sequence_count[i], batch.sequence[i][0] = 1, 0
            batch.logits[i] = every or i == count - 1
        self._lib.log.clear()
        with lib.interrupts_afterwards():
            code = self._c.llama_decode(self._context, batch)
        if code != 0:
            self._forget(0)
            raise EdgewrightError(f"llama.cpp stopped at token {position} (code {code}): {self._lib.log.reason()}")
        self._cached += tokens.tolist()

    # ---- checks

    def _alive(self) -> None:
        if self._model is None:
            raise UsageError(f"the engine of {self.path} is closed; open it again with open_engine(path)")

    def _checked(self, ids: Sequence[int], empty_is_fine: bool = False) -> NDArray[np.int32]:
        self._alive()
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        if not array.size and not empty_is_fine:
            raise UsageError("there are no tokens to run: the text is empty and the model adds no start token")
        if array.size and not (array.min() >= 0 and array.max() < self.vocabulary):
            bad = array[(array < 0) | (array >= self.vocabulary)][0]
            raise UsageError(f"token {bad} is not in the vocabulary of {self.path.name} (0 to {self.vocabulary - 1})")
        return array.astype(np.int32)

    def _too_long(self, needed: int) -> UsageError:
        return UsageError(
            f"{needed} tokens do not fit the context of {self.context}; "
            f"open the file with more, e.g. open_engine(path, context={-(-needed // 256) * 256}), or shorten the text"
        )


def first_run(path: str, context: int = 256, cache_type_k: str = "f16", cache_type_v: str = "f16") -> dict[str, int]:
    """Open a file as the caller will and run tokens at the first and at the last position; for a child process."""
    caches = {"cache_type_k": cache_type_k, "cache_type_v": cache_type_v}
    with LlamaCppEngine(path, threads=1, context=context, check=False, **caches) as engine:
        engine.next_logits([0] * min(8, engine.context))  # a batch, which takes another path than one token
        engine._forget(0)
        engine._decode(np.zeros(1, np.int32), engine.context - 1)
        return {"vocabulary": engine.vocabulary, "pieces": len(engine.detokenize(engine.tokenize("a b")))}


class _Writer:
    """The new text as it grows: the bytes of tokens, handed on in whole characters."""

    def __init__(self, piece: Callable[[int], bytes], on_token: Callable[[str], object] | None) -> None:
        self.piece, self.on_token = piece, on_token
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.parts: list[str] = []

    def add(self, token: int) -> None:
        self._emit(self.decoder.decode(self.piece(token)))

    def end(self) -> str:
        self._emit(self.decoder.decode(b"", final=True))
        return "".join(self.parts)

    def _emit(self, text: str) -> None:
        if text:
            self.parts.append(text)
            if self.on_token is not None:
                self.on_token(text)


def _check_options(threads: int, context: int, cache_type_k: str, cache_type_v: str) -> None:
    if not 1 <= threads <= 1024:
        raise UsageError(f"threads must be 1 to 1024, got {threads}; leave it out to use every core")
    if not 1 <= context <= MAX_CONTEXT:
        raise UsageError(f"context must be 1 to {MAX_CONTEXT} tokens, got {context}; e.g. context=2048")
    for name, value in (("cache_type_k", cache_type_k), ("cache_type_v", cache_type_v)):
        if value not in lib.CACHE_TYPES:
            raise UsageError(f"{name} must be one of {', '.join(lib.CACHE_TYPES)}, got {value!r}; e.g. {name}='q8_0'")


@atexit.register
def _close_all() -> None:
    for engine in list(_open_engines):
        engine.close()

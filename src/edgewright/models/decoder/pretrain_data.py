"""What pre-training reads: a tokenizer and token shards, made once from text and found again by later calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.errors import FormatError
from edgewright.io.atomic import atomic_directory
from edgewright.io.shards import SHARD_BYTES, TokenShards, open_shards, split_limit, text_hash, write_shards
from edgewright.models.decoder.tokenizer import end_token, tokenizer_fingerprint, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER, SHARDS = "tokenizer", "shards"
TOKENIZER_TEXT = 64 * 2**20  # characters that a tokenizer is trained on at most


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder. Raises FormatError where there is none that transformers can read."""
    from edgewright.io import foreign

    try:
        return foreign.load_tokenizer(Path(folder))
    except FormatError as error:
        raise FormatError(f"{folder} holds no tokenizer that can be read: {error}") from error


def prepare_data(
    texts: Iterable[str],
    vocab_size: int,
    validation_share: float,
    output: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    accelerator: Any,
    fresh: bool = False,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = lambda sentence: None,
) -> tuple[PreTrainedTokenizerBase, TokenShards]:
    """Tokenizer and shards in `output`, made by the first process where they are missing and read by all.

    tokenizer None: one of at most `vocab_size` tokens is trained on the documents that are not for validation, unless
    the folder has one. fresh: nothing of an earlier call is used again.
    """
    if accelerator.is_main_process:
        folder = output / TOKENIZER
        if tokenizer is None and (fresh or not folder.is_dir()):
            say(f"training a tokenizer of {vocab_size} tokens")
            limit, _ = split_limit(texts, validation_share)
            trained = train_tokenizer(_for_training(texts, limit), vocab_size)
            with atomic_directory(folder, ours=True) as temporary:
                trained.save_pretrained(temporary)
        # Read back, as a later call does: what transformers adds when it reads ends up in the checkpoint.
        tokenizer = load_tokenizer(folder) if tokenizer is None else tokenizer
        if fresh:
            (output / SHARDS / "manifest.json").unlink(missing_ok=True)
        encoder = tokenizer

        def encode(batch: list[str]) -> list[list[int]]:
            return encoder(batch, add_special_tokens=False, verbose=False)["input_ids"]

        shards = write_shards(
            output / SHARDS,
            texts,
            encode,
            tokenizer=tokenizer_fingerprint(tokenizer),
            vocab_size=len(tokenizer),
            end_token=end_token(tokenizer),
            validation_share=validation_share,
            shard_bytes=shard_bytes,
            say=lambda done, total: say(f"tokenised {done / 1e6:.1f} of {total / 1e6:.1f} MB"),
        )
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        tokenizer = load_tokenizer(output / TOKENIZER) if tokenizer is None else tokenizer
        shards = open_shards(output / SHARDS, verify=False)  # the first process has just read them
    assert tokenizer is not None
    return tokenizer, shards


def _for_training(texts: Iterable[str], limit: int) -> Iterator[str]:
    size = 0
    for text in texts:
        if text and text_hash(text) > limit:
            yield text
            size += len(text)
            if size >= TOKENIZER_TEXT:
                return

"""Tokenizers trained from scratch: byte-level BPE that llama.cpp, transformers and the GGUF writer all read alike.

Byte-level byte-pair encoding (Sennrich et al., arXiv 1508.07909; bytes as in GPT-2) with every digit a token of its
own, as SmolLM's: a splitter that llama.cpp knows by name. No text is unknown to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from edgewright.errors import UsageError
from edgewright.io.hashing import json_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END = "<|endoftext|>"
SPECIAL = (END, "<|im_start|>", "<|im_end|>")  # the names that SmolLM uses, ready for tuning to a chat
# A model that has only read text continues text: the turns stand below one another, without marks it never saw.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ '' if loop.last else '\\n' }}{% endfor %}"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, special_tokens: Iterable[str] = SPECIAL, min_frequency: int = 2
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens; the first special token begins and ends texts.

    Ids: special tokens, 256 bytes, merges in the order in which they were found. A small text gives fewer tokens.
    Raises UsageError for a vocabulary without room for the bytes, and when there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    names = list(dict.fromkeys(special_tokens))
    least = 256 + len(names)
    if not names or vocab_size < least:
        raise UsageError(
            f"vocab_size={vocab_size} with {len(names)} special tokens; give one special token or more, and {least} "
            "or more in all: each byte is a token"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=names,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = _Counted(texts)
    tokenizer.train_from_iterator(seen, trainer)
    if not seen.characters:
        raise UsageError("there is no text to train a tokenizer on")
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=names[0],
        eos_token=names[0],
        pad_token=names[0],
        additional_special_tokens=names[1:],
        clean_up_tokenization_spaces=False,
    )
    result.chat_template = CHAT_TEMPLATE
    return result


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what turns text into ids: equal for a tokenizer that was saved and loaded, whatever its padding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    else:
        content = json.loads(backend.to_str())
        content = {name: content.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    return json_hash(content)[:32]


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that parts documents. Raises UsageError for a tokenizer without one."""
    for index in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if index is not None:
            return int(index)
    raise UsageError("the tokenizer has no end-of-text token, which parts the documents; set tokenizer.eos_token")


class _Counted:
    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.characters = texts, 0

    def __iter__(self) -> Any:
        for text in self.texts:
            self.characters += len(text)
            yield text

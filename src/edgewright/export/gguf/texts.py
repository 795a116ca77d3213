"""The texts with which a GGUF file is verified: its tokenizer and its chat template against those of transformers.

A fixed text cannot show what it lacks, so the model's own tokens are put into texts, and its template is rendered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgewright.errors import CheckFailed, FormatError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Ordinary prose with what trips tokenizers: digits, contractions, capitals, punctuation.
PROSE = """The river rises in the hills above the village, and when it reaches the mill it is about 40 metres wide.
In 1873 the miller's daughter, who couldn't read, counted the boats that passed: 12 on a weekday, 31 on a Sunday.
"Why do you count them?" asked the schoolmaster. She didn't answer at first. Then she said that numbers were the only
things in the valley which nobody could take away from her, and that's why she'd kept them in a small blue book.

Temperature is a measure of how fast the particles of a body move; heat is the energy that flows from a warmer body to
a colder one. Water boils at 100 °C at sea level, but at 3,000 m it boils near 90 °C - tea made there tastes weak.
"""
CODE = """def area(radius):
    return 3.14159 * radius ** 2    # naïve, but good enough

\tif (x[0] != None && y->z >= 1e-7) { printf("%d\\n", 0xFF); }\r\n  <a href='/b?c=1'>e</a>   \n\n\n{"k": [1, 22, 333]}
"""
SCRIPTS = """Zürich, São Paulo, Kraków; Москва и Київ; 東京は大きい。你好，世界! 한국어 텍스트. Ελλάδα, שלום עולם, الخط
العربي, हिन्दी, ไทย.
E-mail: someone@example.org (50% off!) 👩‍🚀 🙂 ﬁ ½ I'LL we've CAN'T 12345678 3.14 2024-01-02 1,000,000
"""
# No decomposed characters: llama.cpp does not compose them as tokenizers with NFC do, which `normalization` says.
TEXTS = (PROSE, CODE, SCRIPTS)
SHARE = (160, 40, 48)  # tokens of each text whose logits are compared
MOST_TOKENS = 4096  # of the model's own added tokens, that are put into texts

USER = {"role": "user", "content": "What is 2 + 2?  Say it in French: naïve."}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "It is 4."}
CHATS: tuple[list[dict[str, Any]], ...] = ([USER], [SYSTEM, USER], [USER, ANSWER, USER])


def own_token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts in which every special and added token stands alone, in words, doubled, and between spaces and lines."""
    added = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())][:MOST_TOKENS]
    if not added:
        return []
    every = "".join(f"a{token}b" for token in added)
    spaced = "".join(f"x {token} y  {token}\n{token}{token}\n" for token in added)
    return [every, spaced, "\n".join(added)]


def normalization(tokenizer: Any) -> str:
    """What the verification says about the tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if getattr(backend, "normalizer", None) is None:
        return "equal"
    return "equal, but for decomposed characters, which llama.cpp does not compose (NFC)"


def check_tokens(engine: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids whose logits are worth comparing, after checking that the engine splits all texts like the tokenizer.

    Raises CheckFailed naming the place of the first difference.
    """
    ids: list[int] = []
    for text, share in zip(TEXTS, SHARE, strict=True):
        for special in (False, True):
            ours = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
            _check_equal(engine.tokenize(text, special=special), ours, tokenizer)
        ids += ours[:share]
    for text in own_token_texts(tokenizer):
        ours = list(tokenizer(text, verbose=False)["input_ids"])
        _check_equal(engine.tokenize(text, special=True), _without_second_start(ours, tokenizer), tokenizer)
    return ids


def check_template(engine: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many conversations the engine puts into the same prompt as transformers, or refuses as transformers does.

    Raises CheckFailed for a difference. 0 for a tokenizer without a template.
    """
    if not getattr(tokenizer, "chat_template", None):
        return 0
    for chat in CHATS:
        for _ in range(2):  # a template may write the time, which may pass on between the two
            theirs, ours = _rendered(engine, tokenizer, chat)
            if theirs == ours:
                break
        if theirs != ours:
            raise CheckFailed(
                f"the chat template in the file gives another prompt than transformers for the roles "
                f"{', '.join(message['role'] for message in chat)}: {_near(ours, theirs)}; the file was not kept"
            )
        if theirs is not None:
            expected = list(tokenizer(theirs, add_special_tokens=False, verbose=False)["input_ids"])
            got = engine.tokenize(ours, special=True)
            start = getattr(tokenizer, "bos_token_id", None)
            if got[:1] == [start] and expected[:1] != [start]:  # the engine begins every text with it
                got = got[1:]
            _check_equal(got, expected, tokenizer)
    return len(CHATS)


def _rendered(engine: Any, tokenizer: Any, chat: list[dict[str, Any]]) -> tuple[str | None, str | None]:
    """(transformers' prompt, the engine's); None where the template refuses the chat or does not work."""
    theirs: str | None
    ours: str | None
    try:
        theirs = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except Exception:  # whatever Jinja or the template raises
        theirs = None
    try:
        ours = engine.chat_prompt(chat)
    except (UsageError, FormatError):
        ours = None
    return theirs, ours


def _without_second_start(ids: list[int], tokenizer: Any) -> list[int]:
    """Engines put the start token before a text only where it does not stand there already."""
    start = getattr(tokenizer, "bos_token_id", None)
    begins = tokenizer("a")["input_ids"][:1] == [start]
    return ids[1:] if begins and len(ids) > 1 and ids[0] == ids[1] == start else ids


def _check_equal(theirs: Sequence[int], ours: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
    if list(theirs) == list(ours):
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    near = tokenizer.decode(list(ours)[max(0, at - 2) : at + 3])
    raise CheckFailed(
        f"the runtime splits the text differently from the tokenizer, first near {near!r}; the file was not kept; for "
        "llama.cpp's splitters, --to pte and --to onnx write other files, which use the tokenizer itself"
    )


def _near(first: str | None, second: str | None) -> str:
    if first is None or second is None:
        return f"only {'transformers' if first is None else 'the engine'} renders it"
    at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return f"{first[max(0, at - 20) : at + 20]!r} instead of {second[max(0, at - 20) : at + 20]!r}"

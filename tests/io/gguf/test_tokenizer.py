"""The tokenizer from a GGUF file against llama.cpp reading the same file, splitter by splitter."""

from __future__ import annotations

import random

import pytest

from edgewright.errors import FormatError, Unsupported
from edgewright.io.gguf.reader import GGUFFile
from edgewright.io.gguf.tokenizer import gguf_tokenizer

TEXTS = [
    "",
    " ",
    "\n",
    "   leading and trailing   ",
    "Hello, world! It's 2024-05-17; don't DON'T we'LL I'd've.",
    "1 12 123 1234 12345 1234567 3.14159 0x7fff ½ ² Ⅷ ٣٤٥",
    "tabs\tand\n\nnew lines\r\n\r\n  mixed \n \n x",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # comment\n\n\nclass A:\n\tpass\n",
    "naïve café Straße Ελληνικά русский עברית العربية हिन्दी ไทย 日本語 한국어",
    "emoji 😀 👨‍👩‍👧‍👦 🇨🇭 zero\u200bwidth nb\u00a0space combining e\u0301 \ufeffbom",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <|im_end|>  <|im_start|> <user> the<user>the",
    '$100 +-*/=<>^~|\\ "quoted" (brackets) [x] {y} @#&%_',
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 4,
    "the thing in the ring on the string, nothing",
]


def random_texts(count: int, seed: int) -> list[str]:
    """Words, numbers, blanks and characters of assigned code points from many scripts, thrown together."""
    rng = random.Random(seed)
    pieces = [
        "the",
        " the",
        "123",
        "'t",
        "'LL",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "<|im_end|>",
        "é",
        "日本",
        "😀",
        "½",
        "x1",
        ".",
    ]
    ranges = [
        (33, 127),
        (0xA1, 0x17F),
        (0x391, 0x3A1),
        (0x410, 0x44F),
        (0x5D0, 0x5EA),
        (0x4E00, 0x9000),
        (0x2190, 0x21FF),
    ]
    texts = []
    for _ in range(count):
        parts = [rng.choice(pieces) if rng.random() < 0.6 else chr(rng.randint(*rng.choice(ranges))) for _ in range(30)]
        texts.append("".join(parts))
    return texts


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_path):
    return gguf_tokenizer(GGUFFile(smollm2_path))


def test_smollm2_equals_llama_cpp(smollm2_tokenizer, smollm2_path):
    from pydoc_data.topics import topics

    from edgewright.runtime.llamacpp import LlamaCppEngine

    texts = [*TEXTS, *random_texts(400, 0), *(topics[name] for name in sorted(topics)[::4])]
    with LlamaCppEngine(smollm2_path, context=512, threads=1) as engine:
        for text in texts:
            ids = smollm2_tokenizer(text, verbose=False)["input_ids"]
            assert ids == engine.tokenize(text), text
            assert smollm2_tokenizer.decode(ids) == engine.detokenize(ids) == text


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2", "starcoder"])
def test_every_splitter_equals_llama_cpp(tiny, write_gguf, smollm2_path, pre):
    from edgewright.runtime.llamacpp import LlamaCppEngine

    # The real vocabulary, so that merges reach across whatever a wrong splitter would leave together.
    metadata = GGUFFile(smollm2_path).metadata
    vocabulary = tuple(metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges"))
    small = {"hidden_size": 32, "head_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    path = write_gguf(tiny(vocab_size=len(vocabulary[0]), **small), pre=pre, vocabulary=vocabulary)
    tokenizer = gguf_tokenizer(GGUFFile(path))
    with LlamaCppEngine(path, context=512, threads=1) as engine:
        for text in [*TEXTS, *random_texts(200, 1)]:
            ids = tokenizer(text)["input_ids"]
            if text.startswith("<|im_start|>") and ids[:2] == [1, 1]:
                ids = ids[1:]  # the engine, unlike llama.cpp, drops a bos before a bos that the text spells out
            assert ids == engine.tokenize(text), text
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_bos_and_eos_where_the_file_asks_for_them(tiny, write_gguf, bos, eos):
    extra = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    tokenizer = gguf_tokenizer(GGUFFile(write_gguf(tiny(), extra=extra)))
    plain = tokenizer("the", add_special_tokens=False)["input_ids"]
    assert tokenizer("the")["input_ids"] == [1] * bos + plain + [2] * eos
    assert tokenizer("the", "the")["input_ids"] == ([1] * bos + plain + [2] * eos) * 2


def test_special_tokens_and_template(tiny, write_gguf):
    tokenizer = gguf_tokenizer(GGUFFile(write_gguf(tiny())))
    ids = tokenizer("<|im_start|>the<user><|im_end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "the", "<user>", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<user>"  # user-defined tokens are text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.model_max_length == 128
    shown = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert shown == "<|im_start|>hi<|im_end|>"


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_saved_tokenizer_reloads_the_same(tiny, write_gguf, tmp_path, pre):
    from transformers import AutoTokenizer

    from edgewright.io.gguf.model import load_gguf

    model, tokenizer = load_gguf(write_gguf(tiny(), pre=pre))
    model.save_pretrained(tmp_path / "saved")  # AutoTokenizer looks at config.json too
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in [*TEXTS, *random_texts(50, 2)]:
        ids = tokenizer(text)["input_ids"]
        assert again(text)["input_ids"] == ids
        assert again.decode(ids) == tokenizer.decode(ids)
    assert again.chat_template == tokenizer.chat_template


def test_unknown_splitters_and_models_are_refused(tiny, write_gguf):
    with pytest.raises(Unsupported, match="pre-tokenizer 'tekken'"):
        gguf_tokenizer(GGUFFile(write_gguf(tiny(), pre="tekken")))
    file = GGUFFile(write_gguf(tiny()))
    file.metadata["tokenizer.ggml.model"] = "llama"
    with pytest.raises(Unsupported, match="tokenizer 'llama'"):
        gguf_tokenizer(file)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tokens", ["a", "a"], "occur twice"),
        ("tokens", [], "empty vocabulary"),
        ("tokens", "text", "no usable tokenizer.ggml.tokens"),
        ("token_type", [1], "token types"),
        ("merges", ["x y z"], "merge 0"),
        ("merges", ["nospace"], "merge 0"),
        ("merges", ["t h", "the qq"], "merge 1"),
    ],
)
def test_contradicting_vocabularies_are_refused(tiny, write_gguf, key, value, words):
    file = GGUFFile(write_gguf(tiny()))
    file.metadata[f"tokenizer.ggml.{key}"] = value
    if key == "tokens" and value == ["a", "a"]:
        file.metadata["tokenizer.ggml.token_type"] = [1, 1]
        for role in ("bos", "eos", "padding"):
            file.metadata[f"tokenizer.ggml.{role}_token_id"] = 0
    if key == "tokens" and value == []:
        file.metadata["tokenizer.ggml.token_type"] = []
    with pytest.raises(FormatError, match=words):
        gguf_tokenizer(file)

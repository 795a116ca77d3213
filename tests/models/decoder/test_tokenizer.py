"""Tokenizers from scratch: nothing is unknown, digits stand alone, the GGUF writer knows the splitter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as some

from edgewright.errors import UsageError
from edgewright.export.gguf.metadata import splitter_name, tokenizer_metadata
from edgewright.models.decoder.pretrain_data import load_tokenizer
from edgewright.models.decoder.tokenizer import END, SPECIAL, end_token, tokenizer_fingerprint, train_tokenizer

TEXTS = ["the cat and the dog, 1234 times: the end\n" * 20, "ein Käse für 20 € — naïve\n" * 10]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 290)


@settings(deadline=None, max_examples=60)
@given(text=some.text(max_size=60))
def test_any_text_comes_back(tokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not any(name in text for name in SPECIAL):
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_shape_of_the_vocabulary(tokenizer) -> None:
    assert len(tokenizer) == 290 and [tokenizer.convert_ids_to_tokens(i) for i in range(3)] == list(SPECIAL)
    assert tokenizer.convert_ids_to_tokens(tokenizer("the")["input_ids"]) == ["the"]
    assert len(tokenizer("1234")["input_ids"]) == 4  # however often the number came
    assert end_token(tokenizer) == tokenizer.convert_tokens_to_ids(END) == tokenizer.bos_token_id
    again = train_tokenizer(iter(TEXTS), 290)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_the_gguf_writer_knows_it(tokenizer) -> None:
    assert splitter_name(json.loads(tokenizer.backend_tokenizer.to_str())) == "smollm"
    metadata = tokenizer_metadata(tokenizer, 352)
    assert metadata["tokenizer.ggml.pre"] == ("str", "smollm") and len(metadata["tokenizer.ggml.tokens"][1]) == 352
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "the cat\nsat"


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    tokenizer(TEXTS, padding=True, truncation=True, max_length=8)  # leaves its settings in the backend
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert tokenizer_fingerprint(train_tokenizer(TEXTS, 280)) != tokenizer_fingerprint(tokenizer)


def test_bad_calls() -> None:
    with pytest.raises(UsageError, match="259 or more"):
        train_tokenizer(TEXTS, 258)
    with pytest.raises(UsageError, match="no text"):
        train_tokenizer([], 300)
    with pytest.raises(UsageError, match="no text"):
        train_tokenizer([""], 300)

"""Texts and blocks: the same every time, the two splits apart, one sentence for every bad file."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st

from edgewright.errors import UsageError
from edgewright.io.text import SPLITS, _cut_text, load_texts, token_blocks


class Letters:
    """One token a character; the end-of-text token is 0."""

    eos_token_id: int | None = 0
    sep_token_id: int | None = None

    def __call__(self, texts, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def test_topics_split_by_name():
    calibration, evaluation, everything = (load_texts(None, split) for split in SPLITS)
    assert not set(calibration) & set(evaluation)
    assert sorted(calibration + evaluation) == sorted(everything)
    share = sum(map(len, calibration)) / sum(map(len, everything))
    assert 0.7 < share < 0.9
    assert sum(map(len, everything)) > 400_000
    assert load_texts(None, "calibration") == calibration


def test_text_file_is_cut_at_a_paragraph(tmp_path):
    path = tmp_path / "a.txt"
    paragraphs = [f"Paragraph {i}: " + "word " * (10 + i) for i in range(50)]
    path.write_text("\r\n\r\n".join(paragraphs), encoding="utf-8-sig", newline="")
    calibration, evaluation = load_texts(path, "calibration"), load_texts(path, "evaluation")
    assert len(calibration) == len(evaluation) == 1
    whole = load_texts(str(path), "all")[0]
    assert whole.startswith("Paragraph 0") and whole.startswith(calibration[0])
    assert evaluation[0].startswith("Paragraph ") and whole.rstrip().endswith(evaluation[0])
    assert 0.75 < len(calibration[0]) / len(whole) < 0.85


def test_jsonl_is_split_between_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [f"text {i}" for i in range(10)]
    path.write_text("\n".join(json.dumps({"text": row, "id": 1}) for row in [*rows, rows[0]]) + "\n\n")
    assert load_texts(path) == [*rows, rows[0]]
    assert load_texts(path, "calibration") == rows[:8]
    assert load_texts(path, "evaluation") == rows[8:]


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_cut_keeps_every_character_but_the_gap(text):
    try:
        first, second = _cut_text(text, "a.txt")
    except UsageError:
        assert len(text.split()) <= 1
        return
    stripped = text.strip()
    assert first and second and stripped.startswith(first) and stripped.endswith(second)
    assert not stripped[len(first) : len(stripped) - len(second)].strip()


def test_blocks_hold_the_joined_tokens():
    texts = ["abcde", "", "fgh"]
    blocks = token_blocks(texts, Letters(), 3)
    assert blocks.dtype == torch.int64 and blocks.shape == (3, 3)
    expected = [[ord(c) for c in "abc"], [ord("d"), ord("e"), 0], [ord(c) for c in "fgh"]]
    assert sorted(blocks.tolist()) == sorted(expected)


def test_blocks_repeat_with_the_seed_and_differ_without():
    texts = ["".join(chr(33 + i % 90) for i in range(1000))]
    first = token_blocks(texts, Letters(), 7, seed=3)
    assert torch.equal(first, token_blocks(texts, Letters(), 7, seed=3))
    other = token_blocks(texts, Letters(), 7, seed=4)
    assert not torch.equal(first, other)
    assert sorted(first.tolist()) == sorted(other.tolist())
    assert torch.equal(token_blocks(texts, Letters(), 7, max_blocks=5, seed=3), first[:5])


def test_blocks_without_an_end_token():
    tokenizer = Letters()
    tokenizer.eos_token_id = None
    assert token_blocks(["ab", "cd"], tokenizer, 4).tolist() == [[97, 98, 99, 100]]
    tokenizer.sep_token_id = 7
    assert token_blocks(["ab", "cd"], tokenizer, 5).tolist() == [[97, 98, 7, 99, 100]]


def test_real_tokenizer(smollm2):
    _, tokenizer = smollm2
    blocks = token_blocks(load_texts(None, "evaluation"), tokenizer, 256, max_blocks=8)
    assert blocks.shape == (8, 256) and int(blocks.max()) < 49152


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "No such file"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\t \n", "is empty"),
        ("bytes.txt", b"good \xff\xfe", r"not UTF-8 text \(byte 5 is 0xff\); save it as UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("b.jsonl", b'{"text": "a"}\n\n["a"]\n', 'line 3: no "text" string'),
        ("c.jsonl", b'{"text": 5}', 'line 1: no "text" string'),
        ("d.jsonl", b'{"text": " "}', "every text in .* is empty"),
        ("e.jsonl", b"[" * 100000, "line 1: not JSON"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        load_texts(path)
    assert "\n" not in str(caught.value)


def test_other_bad_arguments(tmp_path):
    with pytest.raises(UsageError, match="split='train'; it must be one of calibration, evaluation, all"):
        load_texts(None, "train")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Is a directory"):
        load_texts(tmp_path)
    (tmp_path / "word.txt").write_text("word")
    with pytest.raises(UsageError, match="single word"):
        load_texts(tmp_path / "word.txt", "evaluation")
    with pytest.raises(UsageError, match="5 tokens, less than one block of 6"):
        token_blocks(["abcde"], Letters(), 6)
    with pytest.raises(UsageError, match="no text"):
        token_blocks([], Letters(), 6)
    with pytest.raises(UsageError, match="a whole number from 1 up"):
        token_blocks(["abc"], Letters(), 0)

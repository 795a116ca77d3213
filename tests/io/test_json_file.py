"""JSON from outside: every way in which a file can be wrong is one sentence that names it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from edgewright.errors import FormatError, UsageError
from edgewright.io.json_file import DEEPEST, json_value, plain_number, read_json, read_object


def test_values_and_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"é": [1, 2]}', encoding="utf-8")
    assert read_json(path) == read_object(path) == {"é": [1, 2]}
    path.write_text("[1]")
    assert read_json(path) == [1]
    with pytest.raises(FormatError, match="a.json holds list where a JSON object is needed"):
        read_object(path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, b""])
def test_what_is_not_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FormatError, match="a.json is not JSON"):
        read_json(tmp_path / "a.json")


def test_depth_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for start, end in (("[", "]"), ('{"a":', "}")):
        path.write_text(start * DEEPEST + "1" * (start != "[") + end * DEEPEST)
        read_json(path)
        path.write_text(f"[{path.read_text()}]")
        with pytest.raises(FormatError, match=f"a.json is nested more than {DEEPEST} deep"):
            read_json(path)


def test_size_and_absence(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2, 3]")
    with pytest.raises(FormatError, match="a.json has 9 bytes; at most 8 are allowed"):
        read_json(tmp_path / "a.json", largest=8)
    with pytest.raises(UsageError, match="cannot read .*b.json: No such file or directory; make it"):
        read_json(tmp_path / "b.json", hint="make it")


def test_values_become_json() -> None:
    @dataclass(frozen=True)
    class Inner:
        scale: float = float("nan")

    @dataclass(frozen=True)
    class Outer:
        inner: Inner = Inner()
        path: Path = Path("a/b")
        sizes: tuple[int, ...] = (1, 2)
        kinds: frozenset[str] = frozenset({"b", "a"})
        by_layer: Mapping[int, object] = field(default_factory=lambda: {3: np.float32(0.5), 4: np.int64(7)})
        rest: object = torch.float32

    found = json_value(Outer())
    assert json.dumps(found, allow_nan=False) == json.dumps(
        {
            "inner": {"scale": None},
            "path": "a/b",
            "sizes": [1, 2],
            "kinds": ["a", "b"],
            "by_layer": {"3": 0.5, "4": 7},
            "rest": "torch.float32",
        }
    )
    assert json_value([True, None, float("inf"), -float("inf"), 1.5, "x", range(2)]) == [
        True, None, None, None, 1.5, "x", [0, 1],
    ]  # fmt: skip
    assert json_value({"a": b"x"}, lambda value: f"no JSON: {value!r}") == {"a": "no JSON: b'x'"}
    assert type(plain_number(np.int64(3))) is int and type(plain_number(True)) is int and plain_number(2.5) == 2.5

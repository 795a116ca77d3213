"""Checkpoint folders: what goes in comes out to the bit, and nothing else is accepted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgewright.errors import FormatError, UsageError
from edgewright.training import run_checkpoint as checkpoint


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a) and list(a) == list(b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def test_any_tree_survives(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    state = {
        "numbers": [1, -2.5, 1e-300, float("inf"), True, None, 2**63, "text \n é"],
        "keys": {0: torch.zeros(()), "0": torch.ones(2), (1, 2): "tuple", "__tensor__": "no tag", "__odd": 1},
        "tensors": (torch.zeros(0, 3), torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.bfloat16)),
        "views": [flat[2:5], flat.view(3, 4).T, flat, torch.tensor([1 + 2j])],
        "array": np.arange(6, dtype=np.uint16).reshape(2, 3),
        "empty": [{}, [], ()],
    }
    path = checkpoint.checkpoint_path(tmp_path, 3, 1)
    checkpoint.write_checkpoint(path, {"w": flat.view(3, 4).T}, state)
    assert same(checkpoint.read_state(path), state)
    assert sorted(file.name for file in path.iterdir()) == ["model.safetensors", "state.json", "state.safetensors"]
    read = checkpoint.read_model(path, {"w": torch.zeros(4, 3)})
    assert torch.equal(read["w"], flat.view(3, 4).T) and checkpoint.model_names(path) == {"w"}
    assert checkpoint.read_state(path)["numbers"][2] == 1e-300


def test_objects_are_refused_with_their_place(tmp_path: Path) -> None:
    path = checkpoint.checkpoint_path(tmp_path, 0, 0)
    with pytest.raises(UsageError, match=r"state\.a\[1\] is of type object"):
        checkpoint.write_checkpoint(path, {}, {"a": [1, object()]})
    with pytest.raises(UsageError, match="make it dense"):
        checkpoint.write_checkpoint(path, {}, {"a": torch.eye(2).to_sparse()})
    assert list(tmp_path.iterdir()) == []


def test_latest_is_the_furthest_and_removal_keeps_one(tmp_path: Path) -> None:
    assert checkpoint.latest_checkpoint(tmp_path) is None
    for step, micro in [(9, 1), (10, 0), (9, 0), (123456789, 2)]:
        checkpoint.write_checkpoint(checkpoint.checkpoint_path(tmp_path, step, micro), {}, {})
    torn = tmp_path / "checkpoints" / ".step-00000011.0.abc.part"
    torn.mkdir()
    last = checkpoint.latest_checkpoint(tmp_path)
    assert last is not None and last.name == "step-123456789.2"
    checkpoint.remove_checkpoints(tmp_path, keep=last)
    assert list(last.parent.iterdir()) == [last]
    checkpoint.remove_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_copied_from_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    path = checkpoint.checkpoint_path(tmp_path, 1, 0)
    checkpoint.write_checkpoint(path, {"a": torch.ones(2), "b": torch.ones(3)}, {})
    for wrong, sentence in [
        (torch.zeros(4), r"'b' was float32\[3\], now float32\[4\]"),
        (torch.zeros(3, dtype=torch.float64), r"'b' was float32\[3\], now float64\[3\]"),
    ]:
        targets = {"a": torch.zeros(2), "b": wrong}
        with pytest.raises(UsageError, match=sentence):
            checkpoint.read_model(path, targets)
        assert not targets["a"].any()
    with pytest.raises(UsageError, match="'a' was .*, now absent"):
        checkpoint.read_model(path, {"b": torch.zeros(3)})


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 2, "state": {}}', '{"format": 1, "state": {"__tensor__": "x"}}']
)
def test_hostile_state_is_a_format_error(content: str, tmp_path: Path) -> None:
    path = checkpoint.checkpoint_path(tmp_path, 1, 0)
    checkpoint.write_checkpoint(path, {}, {})
    (path / "state.json").write_text(content)
    with pytest.raises(FormatError):
        checkpoint.read_state(path)

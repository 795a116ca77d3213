"""Checkpoints of a whole state: what goes in comes out to the bit, and nothing else is accepted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgewright.errors import FormatError, UsageError
from edgewright.systems.check_n_run import DiffCheckpointer
from edgewright.training.checkpoint import chain, writer
from edgewright.training.checkpoint.chain import clear
from edgewright.training.checkpoint.files import LocalFiles
from edgewright.training.checkpoint.ranks import Ranks
from edgewright.training.checkpoint.whole import SavedState, capture_state, save_state
from edgewright.training.resume import checkpoint_path, latest_checkpoint
from tests.systems.check_n_run.toy import Run


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


def save(root: Path, tensors, state, own=None, step: int = 3, keep: int = 1, unique: str = "") -> SavedState:
    files, ranks = LocalFiles(root), Ranks()
    saved = save_state(files, ranks, capture_state(step, tensors, state, own, ranks), unique, keep)
    return SavedState(files, saved.id)


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
    saved = save(tmp_path, {"w": flat.view(3, 4).T}, state, own=[flat, {"a": 1}])
    assert same(saved.state(), state) and same(saved.own(0), [flat, {"a": 1}])
    assert torch.equal(saved.new({"w": torch.zeros(4, 3)})["w"], flat.view(3, 4).T)
    assert {name for name in saved.names if " " not in name} == {"w"}
    assert saved.state()["numbers"][2] == 1e-300
    with pytest.raises(FormatError, match="there is no process 1"):
        saved.own(1)


def test_objects_are_refused_with_their_place(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"state\.a\[1\] is of type object"):
        save(tmp_path, {}, {"a": [1, object()]})
    with pytest.raises(UsageError, match="make it dense"):
        save(tmp_path, {}, {"a": torch.eye(2).to_sparse()})
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep: list = []
    for _ in range(70):
        deep = [deep]
    with pytest.raises(UsageError, match="cannot be kept.*nested"):
        save(tmp_path, {}, {"a": deep})
    monkeypatch.setattr(chain, "LARGEST", 5000)
    with pytest.raises(UsageError, match="cannot be kept.*5000 are allowed"):
        save(tmp_path, {}, {"a": list(range(5000))})
    assert list(tmp_path.iterdir()) == []


def test_large_states_lie_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_DENSE", 1000)
    tensors = {f"t{i}": torch.randn(20 * (i + 1)) for i in range(9)}  # 80 to 720 bytes
    saved = save(tmp_path, tensors, {"a": torch.ones(300)})
    files = sorted((tmp_path / saved.manifest.id).glob("*.safetensors"))
    assert len(files) == 6 and all(file.stat().st_size < 2500 for file in files)
    read = saved.new(tensors)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors) and torch.equal(
        saved.state()["a"], torch.ones(300)
    )


def test_latest_is_the_furthest_and_deleting_keeps_what_is_not_ours(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step, micro in [(9, 1), (10, 0), (9, 0), (123456789, 2)]:
        save(tmp_path / "checkpoints", {}, {}, step=step, unique=f"{micro:08x}", keep=9)
    last = latest_checkpoint(tmp_path)
    assert last == checkpoint_path(tmp_path, 123456789, 2)
    (torn := tmp_path / "checkpoints" / "tmp-00000000").mkdir()
    (torn / "r00000-00000.safetensors").write_bytes(b"half")
    (theirs := tmp_path / "checkpoints" / "ckpt-00000001-00000000").mkdir()
    (theirs / "notes.txt").write_text("mine")
    clear(LocalFiles(tmp_path / "checkpoints"))
    assert sorted(path.name for path in (tmp_path / "checkpoints").rglob("*")) == [theirs.name, "notes.txt"]


def test_nothing_is_filled_from_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    saved = save(tmp_path, {"a": torch.ones(2), "b": torch.ones(3)}, {})
    for wrong, sentence in [
        (torch.zeros(4), r"'b' as float32\[3\], here it is float32\[4\]"),
        (torch.zeros(3, dtype=torch.float64), r"'b' as float32\[3\], here it is float64\[3\]"),
    ]:
        targets = {"a": torch.zeros(2), "b": wrong}
        with pytest.raises(FormatError, match=sentence):
            saved.read(targets)
        assert not targets["a"].any()
    with pytest.raises(FormatError, match="'c' as absent"):
        saved.read({"c": torch.zeros(3)})


def test_checkpoints_of_rows_are_none_of_a_state(tmp_path: Path) -> None:
    run = Run()
    with DiffCheckpointer(tmp_path, run.model, run.optimizers, reader=run.reader) as checkpointer:
        run.step()
        checkpointer.save(now=True)
    with pytest.raises(FormatError, match="changed rows"):
        SavedState(LocalFiles(tmp_path))

"""Folders that somebody else made: links are never followed, no pickle is opened, and nothing is restored by halves."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgewright import cli
from edgewright.errors import EdgewrightError, FormatError, UsageError
from edgewright.io.cover import cover_problem
from edgewright.systems.check_n_run import CheckpointConfig, DiffCheckpointer, restore
from edgewright.training.checkpoint.files import LocalFiles
from edgewright.training.checkpoint.manifest import NAME, _digest
from tests.fuzz_readers import build_checkpoints, seal_checkpoints
from tests.systems.check_n_run.toy import Run, same


def saved(root: Path, steps: int = 1) -> Run:
    run = Run()
    config = CheckpointConfig(bits="none", nbins=25, ratio=0.6)
    with DiffCheckpointer(root, run.model, run.optimizers, reader=run.reader, config=config) as checkpointer:
        for _ in range(steps):
            run.step()
            checkpointer.save(now=True)
    return run


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Somebody's folder, with files that look like ours and others."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("thesis.txt", NAME, "r00000-00000.safetensors", "LOCK"):
        (folder / name).write_text(f"theirs: {name}")
    return folder


PLACES = ("ckpt-00000009-deadbeef", "tmp-0123", "trash-0123", "LATEST", "LATEST.tmp")


@pytest.mark.parametrize("place", PLACES)
def test_a_link_in_a_root_is_never_followed(place: str, theirs: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    saved(root)
    before = tree(theirs)
    link = root / place
    link.unlink(missing_ok=True)
    link.symlink_to(theirs if not place.startswith("LATEST") else theirs / "thesis.txt")
    os.utime(link, (1, 1), follow_symlinks=False)
    assert cli.main(["checkpoint", "gc", str(root), "--keep", "1"]) == 0
    saved(root)
    assert tree(theirs) == before
    assert place.startswith("LATEST") or link.is_symlink()


@pytest.mark.parametrize("kind", ["link", "hard link", "file of theirs", "folder", "pipe"])
def test_a_lock_that_is_not_ours_is_not_overwritten(kind: str, theirs: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    lock, precious = root / "LOCK", theirs / "thesis.txt"
    {
        "link": lambda: lock.symlink_to(precious),
        "hard link": lambda: os.link(precious, lock),
        "file of theirs": lambda: lock.write_text("keep me"),
        "folder": lock.mkdir,
        "pipe": lambda: os.mkfifo(lock),
    }[kind]()
    with pytest.raises(UsageError, match="LOCK is not the lock"):
        LocalFiles(root).lock()
    assert precious.read_text() == "theirs: thesis.txt" and os.path.lexists(lock)
    assert kind != "file of theirs" or lock.read_text() == "keep me"


def test_gc_leaves_a_broken_checkpoint_with_files_of_others(tmp_path: Path) -> None:
    saved(tmp_path)
    broken = tmp_path / "ckpt-00000001-0000abcd"
    (broken / "photos").mkdir(parents=True)
    (broken / "photos" / "a.jpg").write_text("mine")
    empty = tmp_path / "ckpt-00000001-0000abce"
    empty.mkdir()
    (empty / "r00000-00000.safetensors").write_text("cut short")
    assert cli.main(["checkpoint", "gc", str(tmp_path)]) == 0
    assert (broken / "photos" / "a.jpg").read_text() == "mine" and not empty.exists()


def test_parts_and_manifests_that_are_links_or_lead_outside_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    saved(root)
    (folder,) = root.glob("ckpt-*")
    part = next(folder.glob("*.safetensors"))
    part.rename(tmp_path / "elsewhere.safetensors")
    part.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(FormatError, match="cannot be read"):
        restore(root, Run().model)
    part.unlink()
    (tmp_path / "elsewhere.safetensors").rename(part)
    restore(root, Run().model)
    manifest = folder / NAME
    manifest.rename(tmp_path / "manifest.json")
    manifest.symlink_to(tmp_path / "manifest.json")
    with pytest.raises(FormatError, match="cannot be read"):
        restore(root, Run().model)
    for path in ("../theirs", "a/../../theirs", "..", "."):
        with pytest.raises(OSError):
            LocalFiles(root).open(path)


# -- manifests that lie ------------------------------------------------------------------------------------------------


def _edit(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    (folder,) = root.glob("ckpt-*")
    body = json.loads((folder / NAME).read_text())
    del body["digest"]
    change(body)
    (folder / NAME).write_text(json.dumps({**body, "digest": _digest(body)}))


def _first(body: dict[str, Any], start: str) -> str:
    return next(name for name in body["dense"] if name.startswith(start))


def _set(body: dict[str, Any], path: str, value: Any) -> None:
    *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    for key in keys:
        body = body[key]
    body[last] = value


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    # a tensor whose only part begins further on: the memory before it was never filled
    "hole": lambda b: _set(
        b, "dense", {**b["dense"], "model.top.weight": [[*b["dense"]["model.top.weight"][0][:1], [0, 6]]]}
    ),
    "other axes": lambda b: _set(
        b, "dense", {**b["dense"], "model.top.weight": [[b["dense"]["model.top.weight"][0][0], [0]]]}
    ),
    "absent tensor": lambda b: b["dense"].update({"model.top.bias": b["dense"].pop("model.top.weight")}),
    "row twice": lambda b: b["records"].append(dict(b["records"][0])),
    "row missing": lambda b: b["records"].pop(),
    "rows of another table": lambda b: _set(b, "records/0/table", b["records"][1]["table"]),
    "more rows": lambda b: _set(b, "tables/tables.0.weight/rows", 10**9),
    "wider rows": lambda b: _set(b, "tables/tables.0.weight/shape", [10**9]),
    "other type": lambda b: _set(b, "tables/tables.0.weight/dtype", "float16"),
    "first row elsewhere": lambda b: _set(b, "records/0/first", 7),
    "no group": lambda b: _set(b, "state/optimizers/0/groups", []),
    "group is text": lambda b: _set(b, "state/optimizers/0/groups/0", "x"),
    "rate is text": lambda b: _set(b, "state/optimizers/0/groups/0/lr", "fast"),
    "state of no row": lambda b: _set(b, "state/optimizers/1/state/tables.0.weight", {"x": {"edgewright rows": "x"}}),
    "unknown tensor": lambda b: _set(b, "state/optimizers/0/groups/0/lr", {"__tensor__": "nowhere"}),
    "random is none": lambda b: _set(b, "state/ranks/0/random", None),
    "random is text": lambda b: _set(b, "state/ranks/0/random/cpu", "x"),
    "random of another size": lambda b: _set(
        b, "state/ranks/0/random/cpu", {"__tensor__": _first(b, "model.top.weight")}
    ),
    "reader is text": lambda b: _set(b, "state/ranks/0/reader", {"position": "x"}),
    "deep state": lambda b: _set(b, "state/ranks/0/reader", json.loads("[" * 400 + "]" * 400)),
    "no ranks": lambda b: _set(b, "state/ranks", []),
    "a file above": lambda b: b["files"].update({"../../etc/passwd": ["0", 1]}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_changes_nothing(lie: str, tmp_path: Path) -> None:
    saved(tmp_path)
    _edit(tmp_path, LIES[lie])
    run = Run(seed=5)
    run.step()
    before = run.state()
    with pytest.raises(EdgewrightError):
        restore(tmp_path, run.model, run.optimizers, run.reader)
    assert same(run.state(), before)
    if not lie.startswith(("random", "reader", "no group", "group", "rate")):
        with pytest.raises(FormatError):
            from edgewright.systems.check_n_run.recovery import load_model

            load_model(LocalFiles(tmp_path))


def test_markup_in_a_file_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path)
    _edit(tmp_path, lambda b: b["tables"].update({"[/red] [bold": b["tables"]["tables.0.weight"]}))
    assert cli.main(["checkpoint", "list", str(tmp_path)]) == 0
    assert "[/red]" in "".join(capsys.readouterr().out.split("\n"))


def test_coverage() -> None:
    assert cover_problem([((0, 0), (2, 3))], (2, 3)) is None and cover_problem([((), ())], ()) is None
    assert cover_problem([((0,), (2,)), ((2,), (0,)), ((2,), (3,))], (5,)) is None
    assert cover_problem([((0, 0), (1, 4)), ((1, 0), (1, 2)), ((1, 2), (1, 2))], (2, 4)) is None
    for parts, shape in (
        ([((1,), (4,))], (5,)),
        ([((0,), (3,)), ((2,), (2,))], (5,)),
        ([((0, 0), (1, 4)), ((0, 0), (1, 4))], (2, 4)),
        ([((-1,), (5,))], (5,)),
        ([((0,), (6,))], (5,)),
        ([((), ()), ((), ())], ()),
        ([], (0,)),
    ):
        assert cover_problem(parts, shape) is not None, (parts, shape)


# -- pickles -----------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> Any:
        return (os.system, ("touch exploded",))


def test_a_sharded_model_opens_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    from edgewright.systems.dlrm.model import DLRM, DLRMConfig
    from edgewright.systems.dlrm.sharded import ShardedDLRM

    monkeypatch.chdir(tmp_path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        config = DLRMConfig(2, (5, 7), 4, (4,), (1,))
        first, second = (ShardedDLRM(DLRM(config, seed)) for seed in (0, 1))
        first.save("good")
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / ".metadata").write_bytes(pickle.dumps(Bomb()))

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("a pickle was opened")

        for name in ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"):
            monkeypatch.setattr(pickle, name, refuse)
        monkeypatch.setattr(torch, "load", refuse)
        before = {name: value.clone() for name, value in second.state_dict().items()}
        with pytest.raises(UsageError, match="bad holds no checkpoint"):
            second.load("bad")
        (part,) = (tmp_path / "good").glob("*/manifest.json")
        content = part.read_bytes()
        manifest = json.loads(content)
        manifest["dense"]["tables.0.weight"][0][1] = [1, 0]
        manifest["digest"] = _digest({name: value for name, value in manifest.items() if name != "digest"})
        part.write_text(json.dumps(manifest))
        with pytest.raises(FormatError):
            second.load("good")
        assert all(torch.equal(second.state_dict()[name], value) for name, value in before.items())
        part.write_bytes(content)
        second.load("good")
        state = second.state_dict()
        assert all(torch.equal(state[name], value) for name, value in first.state_dict().items())
    finally:
        dist.destroy_process_group()
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("label", "null"), [("step", False), ("exp_avg", False), ("exp_avg_sq", False), ("exp_avg", True)]
)
def test_state_that_the_next_step_needs_must_be_there(label: str, null: bool, tmp_path: Path) -> None:
    build_checkpoints(tmp_path)
    manifest = sorted((tmp_path / "ck").glob(f"ckpt-*/{NAME}"))[-1]
    body = json.loads(manifest.read_text())
    states = [state for optimizer in body["state"]["optimizers"] for state in optimizer["state"].values()]
    held = next(state for state in states if label in state)
    held.pop(label)
    held |= {label: None} if null else {}
    manifest.write_text(json.dumps(body))
    seal_checkpoints(tmp_path)
    run = Run(seed=5)
    run.step()
    before = run.state()
    with pytest.raises(FormatError, match=f"has no '{label}' of a parameter"):
        restore(tmp_path / "ck", run.model, run.optimizers, run.reader)
    assert same(run.state(), before)

"""Whatever is interrupted, torn or refused: a restore gives the state before or the new one, bit for bit."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgewright.errors import FormatError, OutputError, UsageError
from edgewright.systems.check_n_run import CheckpointConfig, DiffCheckpointer, restore
from edgewright.training.checkpoint.files import LocalFiles
from tests.systems.check_n_run.faults import Killed, MemoryFiles, Operation, crashed
from tests.systems.check_n_run.toy import Run, same

CONFIG = CheckpointConfig(policy="one-shot", bits="none", keep=1, every_steps=0)


def train(files: Any, saves: int, config: CheckpointConfig = CONFIG, tell: Callable[[int], None] | None = None) -> list:
    """Train and save; the states at the saves, as restoring them must give them back."""
    run = Run()
    torch.manual_seed(0)
    checkpointer = DiffCheckpointer(files, run.model, run.optimizers, reader=run.reader, config=config)
    states = []
    try:
        for number in range(saves):
            run.step()
            states.append(run.state())
            checkpointer.steps += 1
            checkpointer.save(now=True)
            if tell is not None:
                tell(number)
    finally:
        checkpointer.close()
    return states


def restored(files: Any) -> dict[str, Any]:
    """The state that a restore gives; torch's random state stays, for whoever trains on."""
    with torch.random.fork_rng(devices=[]):
        run = Run(seed=5)
        restore(files, run.model, run.optimizers, run.reader)
        return run.state()


def which(files: Any, states: list) -> int:
    """Number of the state that a restore gives, -1 where there is no checkpoint. Anything else fails."""
    try:
        found = restored(files)
    except UsageError as error:
        assert "holds no checkpoint" in str(error)
        return -1
    return next(i for i in range(len(states)) if same(states[i], found))


def recorded(config: CheckpointConfig, saves: int) -> tuple[list[Operation], list, list[int]]:
    """(operations, states, the operation after which each save was done)."""
    disk, ends = MemoryFiles(), list[int]()
    states = train(disk, saves, config, lambda _: ends.append(len(disk.log)))
    return disk.log, states, ends


@pytest.mark.parametrize("policy", ["one-shot", "consecutive", "full"])
def test_power_fails_at_every_operation(policy: Any) -> None:
    """Before each operation of three checkpoints and their clean-up: once killed, twice with what a disk may lose."""
    log, states, ends = recorded(CheckpointConfig(policy=policy, bits="none", keep=1), 3)
    assert {"mkdir", "create", "write", "fsync", "fsync_folder", "rename"} <= {op.name for op in log}
    assert policy != "full" or {"unlink", "rmdir"} <= {op.name for op in log}
    draw = random.Random(0)
    for at in range(len(log) + 1):
        done = sum(end <= at for end in ends) - 1  # the last save that had returned
        for torn in (False, True, True):
            found = which(crashed(log, at, draw, torn), states)
            assert found in (done, done + 1), f"operation {at} of {len(log)}: state {found} after {done}"


def test_each_fsync_is_needed() -> None:
    """Without one of them some crash loses what was promised: the model of the disk can tell."""
    log, states, ends = recorded(CheckpointConfig(policy="full", bits="none", keep=1), 2)
    for kind in ("fsync", "fsync_folder"):
        careless, kept = [], []
        for at, operation in enumerate(log):
            if operation.name != kind:
                careless.append(operation)
            if at + 1 in ends:
                kept.append(len(careless))
        draw, lost = random.Random(0), 0
        for _ in range(25):
            try:
                lost += which(crashed(careless, kept[-1], draw), states) != 1
            except (FormatError, StopIteration):
                lost += 1
        assert lost, kind


def test_what_is_renamed_was_synced_before() -> None:
    log, _, _ = recorded(CONFIG, 3)
    dirty: set[str] = set()
    names: set[str] = set()
    for operation in log:
        if operation.name in ("create", "write"):
            dirty.add(operation.path)
            names.add(operation.path.rpartition("/")[0])
        elif operation.name == "fsync":
            dirty.discard(operation.path)
        elif operation.name == "fsync_folder":
            names.discard(operation.path)
        elif operation.name == "rename":
            assert not [path for path in dirty if path == operation.path or path.startswith(f"{operation.path}/")]
            assert operation.path not in names
    renamed = [op for op in log if op.name == "rename" and op.target.startswith("ckpt-")]
    for op in renamed:  # the manifest is the last file, and the root is synced next
        at = log.index(op)
        last = [o.path for o in log[:at] if o.name == "create"][-1]
        assert last == f"{op.path}/manifest.json" and log[at + 1] == Operation("fsync_folder", "")


def refusing(disk: MemoryFiles, at: int, code: int) -> Callable[[Operation], None]:
    """Operation number `at` fails, once."""
    failed = []

    def before(operation: Operation) -> None:
        if len(disk.log) == at and not failed:
            failed.append(operation)
            raise OSError(code, os.strerror(code))

    return before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_refused_operation_is_surfaced_and_the_training_goes_on(code: int) -> None:
    """Each operation of the second save fails once: the third save has the rows of both, as if nothing had been."""
    log, states, ends = recorded(CONFIG, 3)
    for at in range(ends[0], ends[1]):
        disk = MemoryFiles()
        disk.before = refusing(disk, at, code)
        run = Run()
        torch.manual_seed(0)
        checkpointer = DiffCheckpointer(disk, run.model, run.optimizers, reader=run.reader, config=CONFIG)
        for number in range(3):
            run.step()
            checkpointer.steps += 1
            if number != 1:
                checkpointer.save(now=True)
                continue
            with warnings.catch_warnings(record=True) as heard:  # warned of where the checkpoint exists all the same
                warnings.simplefilter("always")
                try:
                    checkpointer.save(now=True)
                    said = str(heard[0].message)
                except OutputError as error:
                    said = str(error)
            assert os.strerror(code) in said
            assert which(disk, states) in (0, 1)
        assert which(disk, states) == 2, log[at]
        assert len(checkpointer.failures) == 1
        checkpointer.close()  # nothing is left to be raised: a later checkpoint has it all


def test_a_failed_last_write_is_raised_at_the_end() -> None:
    def before(operation: Operation) -> None:
        if operation.name == "fsync":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = Run()
    disk = MemoryFiles(before)
    config = CheckpointConfig(policy="one-shot", bits="none", every_steps=1)
    checkpointer = DiffCheckpointer(disk, run.model, run.optimizers, config=config)
    run.step()
    checkpointer.step()
    with pytest.warns(RuntimeWarning, match="No space left"), pytest.raises(OutputError, match="No space left"):
        checkpointer.close()
    assert not disk.locked
    assert len(checkpointer.tracker.last[0]) > 0  # its rows are as unsaved as before
    assert not [name for name in disk.names("") if name.startswith("tmp-")]


# -- damage done to what lies there ------------------------------------------------------------------------------------


def damages(folder: Path) -> dict[str, Callable[[], object]]:
    data = sorted(folder.glob("*.safetensors"))[0]
    manifest = folder / "manifest.json"

    def flip(path: Path, at: int) -> None:
        text = bytearray(path.read_bytes())
        text[at] ^= 1
        path.write_bytes(text)

    return {
        "flipped data": lambda: flip(data, len(data.read_bytes()) // 2),
        "flipped header": lambda: flip(data, 20),
        "flipped manifest": lambda: flip(manifest, 200),
        "flipped version": lambda: flip(manifest, manifest.read_bytes().index(b'"version":') + len(b'"version":')),
        "short data": lambda: data.write_bytes(data.read_bytes()[:-1]),
        "long data": lambda: data.write_bytes(data.read_bytes() + b"0"),
        "missing shard": lambda: data.unlink(),
        "missing manifest": lambda: manifest.unlink(),
        "empty manifest": lambda: manifest.write_bytes(b""),
        "foreign manifest": lambda: manifest.write_text('{"format": "orbax"}'),
        "nested manifest": lambda: manifest.write_text("[" * 100_000),
        "list": lambda: manifest.write_text("[]"),
    }


DAMAGES = (
    "flipped data", "flipped header", "flipped manifest", "flipped version", "short data", "long data", "missing shard",
    "missing manifest", "empty manifest", "foreign manifest", "nested manifest", "list",
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(damage: str, tmp_path: Path) -> None:
    config = CheckpointConfig(policy="one-shot", bits="none", keep=2)
    states = train(tmp_path, 3, config)
    newest = sorted(tmp_path.glob("ckpt-*"))[-1]
    damages(newest)[damage]()
    run = Run(seed=5)
    info = restore(tmp_path, run.model, run.optimizers, run.reader)
    assert same(run.state(), states[1]) and newest.name in info.skipped and newest.name in info.skipped[newest.name]
    base = tmp_path / info.chain[0]  # what both build upon
    damages(base)[damage]()
    before = Run(seed=5)
    untouched = before.state()
    with pytest.raises(FormatError, match="no checkpoint of .* can be used"):
        restore(tmp_path, before.model, before.optimizers, before.reader)
    assert same(before.state(), untouched)


def test_latest_is_only_a_hint(tmp_path: Path) -> None:
    states = train(tmp_path, 2)
    assert (tmp_path / "LATEST").read_text().strip() == sorted(tmp_path.glob("ckpt-*"))[-1].name
    for text in ("ckpt-00000099-00000000\n", "../../etc/passwd", "\xff"):
        (tmp_path / "LATEST").write_text(text, encoding="latin-1")
        assert which(tmp_path, states) == 1
    (tmp_path / "LATEST").unlink()
    assert which(tmp_path, states) == 1


def test_leftovers_of_a_killed_process_are_cleared_when_they_are_old(tmp_path: Path) -> None:
    train(tmp_path, 1)
    for name in ("tmp-dead", "trash-dead", "tmp-young"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "r.safetensors").write_bytes(b"x")
    for name in ("tmp-dead", "trash-dead"):
        os.utime(tmp_path / name / "r.safetensors", (1, 1))
    states = train(tmp_path, 1)
    assert sorted(p.name[:5] for p in tmp_path.iterdir() if p.is_dir()) == ["ckpt-", "tmp-y"]
    assert which(tmp_path, states) == 0


# -- killed processes --------------------------------------------------------------------------------------------------


class Kill(LocalFiles):
    """The process is killed (SIGKILL) before its operation number `at`; half of a write is done."""

    def __init__(self, root: Path, at: int) -> None:
        super().__init__(root)
        self.left = at

    def _count(self) -> bool:
        self.left -= 1
        return self.left < 0

    def write(self, handle: int, data: Any) -> None:
        if self._count():
            view = memoryview(data).cast("B")
            super().write(handle, view[: len(view) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(handle, data)


def _killing(name: str) -> Callable[..., Any]:
    def method(self: Kill, *arguments: Any) -> Any:
        if self._count():
            os.kill(os.getpid(), signal.SIGKILL)
        return getattr(LocalFiles, name)(self, *arguments)

    return method


for _name in ("create", "sync", "sync_folder", "rename", "unlink", "rmdir"):
    setattr(Kill, _name, _killing(_name))


def test_killed_children_leave_the_state_before_or_the_new_one(tmp_path: Path) -> None:
    """SIGKILL at operations spread over three checkpoints and their clean-up, in children of one process."""
    config = CheckpointConfig(policy="full", bits="none", keep=1)
    counting = Kill(tmp_path / "whole", 10**9)
    states = train(counting, 3, config)
    total = 10**9 - counting.left
    seen = set()
    for at in random.Random(1).sample(range(total), 14):
        root = tmp_path / str(at)
        pid = os.fork()
        if not pid:
            torch.set_num_threads(1)  # the parent's threads are not in the child
            try:
                train(Kill(root, at), 3, config, lambda n, root=root: (root / f"done-{n}").touch())
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        done = max((n for n in range(3) if (root / f"done-{n}").exists()), default=-1)
        found = which(root, states)
        assert found in (done, done + 1)
        seen.add(found)
        assert train(root, 1, config) and which(root, states) >= 0  # and the next run goes on in that folder
    assert len(seen) > 1


def test_killed_at_a_random_time(tmp_path: Path) -> None:
    states = train(tmp_path / "whole", 8)
    draw = random.Random(2)
    for turn in range(4):
        root = tmp_path / str(turn)
        pid = os.fork()
        if not pid:
            torch.set_num_threads(1)  # the parent's threads are not in the child
            try:
                train(root, 8)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0.02, 0.4))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        which(root, states)


def ending(disk: MemoryFiles, at: int) -> Callable[[Operation], None]:
    """The process ends before operation number `at`."""

    def before(operation: Operation) -> None:
        if len(disk.log) >= at:
            raise Killed

    return before


def test_the_killed_disk_is_the_killed_process() -> None:
    """`Killed` raised inside an operation, like a process that ends there, leaves what `crashed` says it leaves."""
    log, states, _ = recorded(CONFIG, 2)
    for at in range(0, len(log), 7):
        disk = MemoryFiles()
        disk.before = ending(disk, at)
        with pytest.raises((Killed, OutputError)):
            train(disk, 2)
        disk.before = None
        assert which(disk, states) == which(crashed(log, at, random.Random(0), torn=False), states)

"""Policies, bits, and everything that is refused: one sentence, and nothing has been changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgewright.errors import CheckFailed, EdgewrightError, FormatError, Unsupported, UsageError
from edgewright.systems.check_n_run import CheckpointConfig, DiffCheckpointer, RestoreInfo, RowShard, restore
from edgewright.systems.check_n_run.config import full_is_due, next_kind, stored_bits
from edgewright.systems.check_n_run.tables import RowBits
from edgewright.training.checkpoint.manifest import _digest
from tests.systems.check_n_run.faults import MemoryFiles
from tests.systems.check_n_run.toy import Clicks, Run, same


def test_the_predictor_resets_after_the_seventh_difference() -> None:
    sizes = [0.26, 0.33, 0.38, 0.42, 0.45, 0.47, 0.49]
    assert [full_is_due(sizes[:i]) for i in range(8)] == [False] * 7 + [True]
    assert 1 + sum(sizes) == pytest.approx(3.80) and 8 * sizes[-1] == pytest.approx(3.92)
    assert next_kind("intermittent", True, sizes) == "full" and next_kind("one-shot", True, sizes) == "diff"
    assert next_kind("consecutive", True, sizes) == "diff" and next_kind("full", True, []) == "full"
    assert {next_kind(policy, False, []) for policy in ("one-shot", "consecutive", "intermittent")} == {"full"}


def test_bits_follow_the_expected_restores() -> None:
    wanted = {0: 2, 1: 2, 1.5: 3, 3: 3, 3.1: 4, 19.9: 4, 20: 8, 500: 8}
    assert {value: stored_bits("auto", value, 0) for value in wanted} == wanted
    assert stored_bits("auto", 1, 1) == 2 and stored_bits("auto", 1, 2) == 8  # more restores than expected
    assert stored_bits(2, 3, 3) == 2 and stored_bits(2, 3, 4) == 8 and stored_bits("none", 0, 99) is None


def test_more_restores_than_expected_give_eight_bits() -> None:
    files, info = MemoryFiles(), None
    found = []
    for _ in range(4):
        run = Run()
        if info is not None or found:
            info = restore(files, run.model, run.optimizers)
        config = CheckpointConfig(expected_restores=1, nbins=25, ratio=0.6)
        checkpointer = DiffCheckpointer(files, run.model, run.optimizers, config=config, restored=info)
        run.step()
        checkpointer.save(now=True)
        found.append(checkpointer.history[0].bits)
        checkpointer.close()
    assert found == [2, 2, 8, 8]


def test_row_bits_are_a_set() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 7, 8, 9, 100):
        bits, wanted = RowBits(rows), set()
        for _ in range(5):
            some = torch.randperm(rows, generator=generator)[: rows // 2 + 1]
            bits.mark(some)
            wanted |= set(some.tolist())
            assert bits.indices().tolist() == sorted(wanted) and len(bits) == len(wanted)
        other = RowBits(rows)
        other.mark(torch.tensor([0]))
        other.merge(bits)
        assert set(other.indices().tolist()) == wanted | {0}
        bits.fill()
        assert len(bits) == rows and bits.bits.numel() == -(-rows // 8)


@pytest.mark.parametrize("policy", ["one-shot", "consecutive", "intermittent"])
@pytest.mark.parametrize(("kind", "sparse"), [("adam", False), ("momentum", False), ("momentum", True)])
def test_optimizers_that_move_untouched_rows_are_refused(policy: Any, kind: str, sparse: bool) -> None:
    run = Run(kind=kind, sparse=sparse)
    with pytest.raises(ValueError, match="moves rows of tables.0.weight that no sample touched.*policy='full'"):
        DiffCheckpointer(MemoryFiles(), run.model, run.optimizers, config=CheckpointConfig(policy=policy))
    for config in (CheckpointConfig(policy="full"), CheckpointConfig(policy=policy, dense_tables="full")):
        files = MemoryFiles()
        checkpointer = DiffCheckpointer(files, run.model, run.optimizers, reader=run.reader, config=config)
        if config.policy == "full" and not (kind == "momentum" and sparse):  # whose state is a sparse tensor
            run.step()
            checkpointer.save(now=True)
            other = Run(seed=4, kind=kind, sparse=sparse)
            restore(files, other.model, other.optimizers, other.reader)
            assert same(run.state(), other.state())


def test_weight_decay_and_lookups_that_change_rows_are_refused() -> None:
    model = Clicks()
    decays = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(UsageError, match="SGD with weight_decay=0.1"):
        DiffCheckpointer(MemoryFiles(), model, decays)
    clipped = nn.Sequential(nn.Embedding(5, 3, max_norm=1.0, sparse=True))
    with pytest.raises(UsageError, match="max_norm=1.0"):
        DiffCheckpointer(MemoryFiles(), clipped, torch.optim.SGD(clipped.parameters(), lr=0.1))


@pytest.mark.parametrize("bits", [1, 5, 16, 4.0, True, "4", None])
def test_other_bits_are_refused(bits: Any) -> None:
    with pytest.raises(ValueError, match=r"2, 3, 4 or 8 bits"):
        CheckpointConfig(bits=bits)


@pytest.mark.parametrize(
    "changes",
    [{"policy": "sometimes"}, {"keep": 0}, {"on_busy": "drop"}, {"executor": "gpu"}, {"expected_restores": -1},
     {"every_steps": -1}, {"ratio": 2.0}, {"method": "k-means"}, {"optimizer_bits": 4}, {"timeout_seconds": 0}],
)  # fmt: skip
def test_other_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(changes))):
        CheckpointConfig(**changes)


def test_a_model_without_tables_needs_to_say_so() -> None:
    model = nn.Linear(3, 2)
    checkpointer = DiffCheckpointer(MemoryFiles(), model, torch.optim.Adam(model.parameters()))
    with pytest.raises(UsageError, match="policy='full'"):
        checkpointer.save()


def test_what_cannot_be_kept_is_refused_at_the_start() -> None:
    run = Run()
    with pytest.raises(UsageError, match="no state_dict"):
        DiffCheckpointer(MemoryFiles(), run.model, run.optimizers, reader=iter([]))
    stray = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
    with pytest.raises(UsageError, match="not in the model"):
        DiffCheckpointer(MemoryFiles(), run.model, stray)

    class Own(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            return {}

    with pytest.raises(Unsupported, match="Own keeps state in a form of its own"):
        DiffCheckpointer(MemoryFiles(), run.model, Own(run.model.top.parameters(), lr=0.1))


def test_rows_changed_behind_the_optimizer_are_found() -> None:
    run = Run()
    config = CheckpointConfig(bits="none", verify_untracked=True)
    checkpointer = DiffCheckpointer(MemoryFiles(), run.model, run.optimizers, config=config)
    run.step()
    checkpointer.save(now=True)
    with torch.no_grad():
        run.model.tables[1].weight[11] += 1
    with pytest.raises(CheckFailed, match="1 rows of tables.1.weight changed outside.*row 11"):
        checkpointer.save(now=True)


def test_two_writers_on_one_root(tmp_path: Path) -> None:
    run = Run()
    first = DiffCheckpointer(tmp_path, run.model, run.optimizers)
    with pytest.raises(UsageError, match=f"is being written by process {os.getpid()} on "):
        DiffCheckpointer(tmp_path, run.model, run.optimizers)
    pid = os.fork()
    if not pid:
        torch.set_num_threads(1)
        try:
            DiffCheckpointer(tmp_path, run.model, run.optimizers)
        except UsageError as error:
            os._exit(0 if f"process {os.getppid()} on" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    first.close()
    DiffCheckpointer(tmp_path, run.model, run.optimizers).close()


def test_a_lock_does_not_outlive_its_holder(tmp_path: Path) -> None:
    run = Run()
    with pytest.raises(ZeroDivisionError), DiffCheckpointer(tmp_path, run.model, run.optimizers):
        _ = 1 / 0
    DiffCheckpointer(tmp_path, run.model, run.optimizers)  # dropped without a word
    with pytest.raises(UsageError, match="which `restored` names"):
        info = RestoreInfo(1, "ckpt-00000001-00000000", (), None, 1, {})
        DiffCheckpointer(tmp_path, run.model, run.optimizers, restored=info)
    with DiffCheckpointer(tmp_path, run.model, run.optimizers, config=CheckpointConfig(bits="none")) as checkpointer:
        run.step()
        checkpointer.save()
    assert len(checkpointer.history) == 1
    run.step()
    assert not len(checkpointer.tracker.last[0])  # nothing follows any longer


def saved(root: Any, **changes: Any) -> Run:
    run = Run()
    config = CheckpointConfig(**{"bits": "none", "policy": "one-shot", **changes})
    checkpointer = DiffCheckpointer(root, run.model, run.optimizers, reader=run.reader, config=config)
    for _ in range(2):
        run.step()
        checkpointer.steps += 1
        checkpointer.save(now=True)
    checkpointer.close()
    return run


def test_another_model_is_refused_with_its_tables_and_stays_as_it_was(tmp_path: Path) -> None:
    saved(tmp_path)
    model = Clicks(sizes=(23, 61))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError, match=r"table tables.1.weight was float32\[60, 6\], now float32\[61, 6\]"):
        restore(tmp_path, model)
    assert same(before, dict(model.state_dict()))
    with pytest.raises(UsageError, match="tensor top.weight was"):
        restore(tmp_path, Clicks(sizes=(23, 60, 5)))
    run = Run(kind="adagrad")
    with pytest.raises(UsageError, match="saved with the optimizers Adam, RowwiseAdagrad .* here are Adam, Adagrad"):
        restore(tmp_path, run.model, run.optimizers)
    run = Run()
    run.reader.seed = 12
    state = run.state()
    with pytest.raises(UsageError, match="the seed of the batches was 1, now 12"):
        restore(tmp_path, run.model, run.optimizers, run.reader)
    assert same(state, run.state())


def rewrite(folder: Path, change: Any) -> None:
    """A manifest of an enemy: changed, with a digest that fits."""
    path = folder / "manifest.json"
    body = json.loads(path.read_text())
    del body["digest"]
    change(body)
    path.write_text(json.dumps({**body, "digest": _digest(body)}))


def test_another_format_version_is_refused_and_never_deleted(tmp_path: Path) -> None:
    saved(tmp_path)
    newest = sorted(tmp_path.glob("ckpt-*"))[-1]
    rewrite(newest, lambda body: body.update(version=2))
    run = Run()
    with pytest.raises(FormatError, match="format version 2; this version reads 1"):
        restore(tmp_path, run.model)
    with pytest.raises(FormatError, match="format version 2"):
        DiffCheckpointer(tmp_path, run.model, run.optimizers)
    assert newest.exists()


HOSTILE = {
    "a path": lambda b: b["files"].update({"../../etc/passwd": ["0" * 64, 3]}),
    "rows beyond the table": lambda b: b["records"][0].update(first=2**40),
    "more rows than bytes": lambda b: b["records"][0].update(rows=2**50),
    "a table without end": lambda b: b["tables"]["tables.0.weight"].update(rows=2**60),
    "a wide table": lambda b: b["tables"]["tables.0.weight"].update(shape=[2**40]),
    "a wide state": lambda b: b["tables"]["tables.0.weight"]["state"].update(sum=["float32", [2**40]]),
    "a negative step": lambda b: b.update(step=-1),
    "bits": lambda b: b["records"][0].update(bits=5),
    "a type": lambda b: b["tables"]["tables.0.weight"].update(dtype="object"),
    "no tables": lambda b: b.update(tables=None),
    "no records": lambda b: b.update(records=[]),
    "a circle": lambda b: b.update(kind="diff", chain=[[b["id"], "0" * 64]]),
    "a foreign chain": lambda b: b.update(kind="diff", chain=[["ckpt-00000001-00000000", "0" * 64]]),
    "a tensor nowhere": lambda b: b["dense"].update({"model.top.bias": [["r00000-00000.safetensors", [0, 0]]]}),
    "a missing tensor": lambda b: b["dense"].pop("model.top.bias"),
    "no random states": lambda b: b["state"].pop("ranks"),
    "other fields": lambda b: b.update(code="import os"),
}


@pytest.mark.parametrize("what", list(HOSTILE))
def test_a_hostile_manifest_is_refused(what: str, tmp_path: Path) -> None:
    saved(tmp_path, policy="full", keep=1)
    (folder,) = tmp_path.glob("ckpt-*")
    rewrite(folder, HOSTILE[what])
    run = Run(seed=9)
    before = run.state()
    with pytest.raises(EdgewrightError):
        restore(tmp_path, run.model, run.optimizers, run.reader)
    assert same(before, run.state())


def test_an_empty_root_and_unknown_names(tmp_path: Path) -> None:
    run = Run()
    with pytest.raises(UsageError, match="holds no checkpoint"):
        restore(tmp_path, run.model)
    with pytest.raises(UsageError, match="is a file"):
        restore(__file__, run.model)
    saved(tmp_path)
    with pytest.raises(UsageError, match="holds no ckpt-00000009-00000000; it holds ckpt-"):
        restore(tmp_path, run.model, identity="ckpt-00000009-00000000")
    first = sorted(tmp_path.glob("ckpt-*"))[0].name
    assert restore(tmp_path, run.model, identity=first).step == 1


def test_a_checkpoint_that_is_due_while_one_is_written_waits_or_is_skipped() -> None:
    import threading

    for on_busy, expected in (("wait", [1, 2, 3]), ("skip", [1, 3])):
        gate = threading.Event()
        files = MemoryFiles(lambda operation, gate=gate: gate.wait(30) and None)  # type: ignore[misc]
        run = Run()
        config = CheckpointConfig(bits="none", every_steps=1, on_busy=on_busy)
        checkpointer = DiffCheckpointer(files, run.model, run.optimizers, config=config)
        run.step()
        checkpointer.step()
        if on_busy == "wait":
            gate.set()
        run.step()
        checkpointer.step()  # the first one is still being written
        gate.set()
        checkpointer.wait()
        run.step()
        checkpointer.step()
        checkpointer.close()
        assert [one.step for one in checkpointer.history] == expected
        assert checkpointer.skipped == (on_busy == "skip")


def test_time_makes_a_checkpoint_due(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    config = CheckpointConfig(bits="none", every_seconds=30)
    checkpointer = DiffCheckpointer(MemoryFiles(), run.model, run.optimizers, config=config)
    for seconds in (10, 10, 15, 10, 25):
        now[0] += seconds
        run.step()
        checkpointer.step()
    checkpointer.close()
    assert [one.step for one in checkpointer.history] == [3, 5]


def test_registration_comes_first_and_names_are_unique() -> None:
    run = Run()
    checkpointer = DiffCheckpointer(MemoryFiles(), run.model, run.optimizers, config=CheckpointConfig(bits="none"))
    with pytest.raises(UsageError, match="give it a name"):
        checkpointer.register_rows(torch.zeros(3, 2))
    checkpointer.save(now=True)
    with pytest.raises(UsageError, match="before the first checkpoint"):
        checkpointer.register_rows(run.model.tables[0].weight)
    weight = run.model.tables[0].weight
    with pytest.raises(UsageError, match="do not lie in a table of 5"):
        DiffCheckpointer(MemoryFiles(), run.model, run.optimizers, shards=[RowShard(weight, "t", 0, 5)])

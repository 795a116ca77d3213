"""What is restored is what lived: bit for bit without quantisation, within half a step with it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgewright.errors import OutputError
from edgewright.io.row_codes import unpackable_rows
from edgewright.io.row_ranges import quantize_rows
from edgewright.systems.check_n_run import CheckpointConfig, DiffCheckpointer, Prefetched, RestoreInfo, restore
from edgewright.training.checkpoint.chain import catalogue, chain_of, replay
from tests.systems.check_n_run.faults import MemoryFiles, Operation
from tests.systems.check_n_run.toy import DIM, Run, same

POLICIES = ("full", "one-shot", "consecutive", "intermittent")


def plain(**changes: Any) -> CheckpointConfig:
    return CheckpointConfig(**{"bits": "none", "nbins": 25, "ratio": 0.6, "verify_untracked": True, **changes})


def checkpointed(run: Run, files: Any, config: CheckpointConfig, steps: int, every: int,
                 restored: RestoreInfo | None = None) -> DiffCheckpointer:  # fmt: skip
    checkpointer = DiffCheckpointer(
        files, run.model, run.optimizers, reader=run.reader, config=config, restored=restored
    )
    for step in range(1, steps + 1):
        run.step()
        checkpointer.step()
        if step % every == 0:
            checkpointer.save(now=True)
    return checkpointer


@pytest.mark.parametrize("kind", ["rowwise", "adagrad", "sparse adam", "sgd"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_state_comes_back_bit_for_bit_and_training_goes_on_as_if_never_stopped(policy: Any, kind: str) -> None:
    files = MemoryFiles()
    run = Run(kind=kind)
    torch.manual_seed(3)
    checkpointed(run, files, plain(policy=policy), 9, 3).close()
    live = run.state()
    other = Run(seed=8, kind=kind)
    other.step()  # so that its optimizer has state of its own
    torch.manual_seed(99)
    info = restore(files, other.model, other.optimizers, other.reader)
    assert same(other.state(), live)
    assert info.step == 9 and info.restores_so_far == 1 and not info.skipped and info.random
    assert len(info.chain) == {"full": 1, "one-shot": 2, "consecutive": 3, "intermittent": 2}[policy]
    for _ in range(25):
        other.step()
    resumed = other.state()
    torch.set_rng_state(live["random"])
    for _ in range(25):
        run.step()
    assert same(run.state(), resumed)


def test_five_hundred_steps_later_it_is_still_the_same(tmp_path: Path) -> None:
    run = Run()
    torch.manual_seed(3)
    checkpointed(run, tmp_path, plain(), 40, 10).close()
    random = torch.get_rng_state()
    other = Run(seed=8)
    restore(tmp_path, other.model, other.optimizers, other.reader)
    for _ in range(500):
        other.step()
    resumed = other.state()
    torch.set_rng_state(random)
    for _ in range(500):
        run.step()
    assert same(run.state(), resumed)


def test_dense_gradients_of_row_local_optimizers_are_followed(tmp_path: Path) -> None:
    for kind in ("sgd", "adagrad"):
        run = Run(kind=kind, sparse=False)
        checkpointer = checkpointed(run, tmp_path / kind, plain(policy="one-shot"), 4, 2)
        assert [saved.kind for saved in checkpointer.history] == ["full", "diff"]
        assert 0 < checkpointer.history[1].rows < 83
        checkpointer.close()
        other = Run(seed=8, kind=kind, sparse=False)
        restore(tmp_path / kind, other.model, other.optimizers, other.reader)
        assert same(other.state(), run.state())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method", ["adaptive", "minmax", "symmetric"])
def test_quantised_rows_are_those_of_the_shared_quantiser(bits: Any, method: Any) -> None:
    run, files = Run(), MemoryFiles()
    checkpointed(run, files, plain(bits=bits, method=method, policy="one-shot"), 6, 3).close()
    other = Run(seed=8)
    restore(files, other.model, other.optimizers, other.reader)
    kind = {"adaptive": "greedy" if bits < 8 else "minmax"}.get(method, method)
    for mine, theirs in zip(run.model.tables, other.model.tables, strict=True):
        expected = quantize_rows(mine.weight, bits, kind, 25, 0.6).dequantize()
        assert torch.equal(theirs.weight, expected)
        if method == "minmax":
            low, high = mine.weight.aminmax(dim=1, keepdim=True)
            step = (high - low) / (2**bits - 1)
            half = 0 if bits == 8 else 1e-3 * (low.abs() + high - low)  # float16 scale and bias
            assert bool(((theirs.weight - mine.weight).abs() <= step / 2 + half + 1e-6).all())
    for name, value in run.state().items():  # everything else is exact
        assert "tables" in name or torch.equal(value, other.state()[name])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("policy", ["full", "one-shot", "consecutive"])
def test_rows_that_were_not_touched_since_a_restore_do_not_drift(bits: Any, policy: Any) -> None:
    """Three rounds of save, restore, two steps: untouched rows keep their bits (at 8 bits one unit in the last place,
    see row_codes: scale and bias are float32 there and are rounded anew)."""
    run, files = Run(), MemoryFiles()
    info = None
    checkpointed(run, files, plain(bits=bits, policy=policy, expected_restores=99), 2, 2).close()
    for _ in range(3):
        run = Run(seed=8)
        info = restore(files, run.model, run.optimizers, run.reader)
        before = [table.weight.detach().clone() for table in run.model.tables]
        checkpointer = DiffCheckpointer(
            files, run.model, run.optimizers, reader=run.reader, restored=info,
            config=plain(bits=bits, policy=policy, expected_restores=99),
        )  # fmt: skip
        run.step()
        run.step()
        touched = [bits_.mask() for bits_ in checkpointer.tracker.last]
        checkpointer.steps += 2
        checkpointer.save(now=True)
        checkpointer.close()
        again = Run(seed=9)
        restore(files, again.model, again.optimizers, again.reader)
        for was, table, mask in zip(before, again.model.tables, touched, strict=True):
            assert bool(mask.any()) and not bool(mask.all())
            if bits == 8:
                torch.testing.assert_close(table.weight[~mask], was[~mask], rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(table.weight[~mask], was[~mask])


def test_a_chain_goes_on_after_a_restore() -> None:
    for policy in ("one-shot", "consecutive", "intermittent"):
        run, files = Run(), MemoryFiles()
        checkpointed(run, files, plain(policy=policy, keep=9), 4, 2).close()
        other = Run(seed=8)
        info = restore(files, other.model, other.optimizers, other.reader)
        checkpointer = checkpointed(other, files, plain(policy=policy, keep=9), 4, 2, info)
        assert [saved.kind for saved in checkpointer.history] == ["diff", "diff"], policy
        assert checkpointer.history[-1].step == 8
        checkpointer.close()
        last = Run(seed=9)
        assert restore(files, last.model, last.optimizers, last.reader).restores_so_far == 2
        assert same(last.state(), other.state())


def test_the_last_writer_of_a_row_wins() -> None:
    run, files = Run(), MemoryFiles()
    config = plain(policy="consecutive", keep=9, verify_untracked=False)
    checkpointer = DiffCheckpointer(files, run.model, run.optimizers, config=config)
    checkpointer.save(now=True)
    weight = run.model.tables[0].weight
    for number in range(3):
        with torch.no_grad():
            weight[5] = float(number)
            weight[6 + number] = float(10 + number)
        checkpointer.tracker.mark(0, torch.tensor([5, 6 + number]))
        checkpointer.save(now=True)
    known = catalogue(files)
    chain = chain_of(known, known.found[0])
    values = replay(files, chain)["tables.0.weight"].values
    assert len(chain) == 4 and torch.equal(values, weight)
    assert values[5, 0] == 2.0 and values[6:9, 0].tolist() == [10.0, 11.0, 12.0]


def test_what_is_trained_during_a_write_is_in_the_next_checkpoint_only() -> None:
    going, held = threading.Event(), threading.Event()

    def before(operation: Operation) -> None:
        if operation.name == "create" and not held.is_set() and len(checkpointer.history) == 1:
            held.set()
            assert going.wait(30)

    run, files = Run(), MemoryFiles(before)
    torch.manual_seed(0)
    checkpointer = DiffCheckpointer(files, run.model, run.optimizers, reader=run.reader,
                                    config=plain(policy="consecutive"))  # fmt: skip
    checkpointer.save(now=True)
    run.step()
    snapshot = run.state()
    checkpointer.save()
    assert held.wait(30)
    run.step()
    marked = [bits.mask() for bits in checkpointer.tracker.last]
    assert any(bool(mask.any()) for mask in marked)
    going.set()
    checkpointer.wait()
    other = Run(seed=8)
    restore(files, other.model, other.optimizers, other.reader)
    assert same(other.state(), snapshot)
    checkpointer.save(now=True)
    restore(files, other.model, other.optimizers, other.reader)
    assert same(other.state(), run.state())
    assert checkpointer.history[-1].rows == sum(int(mask.sum()) for mask in marked)


def test_rows_that_no_code_holds_are_stored_as_they_are_and_counted() -> None:
    run, files = Run(), MemoryFiles()
    with torch.no_grad():
        run.model.tables[0].weight[3, 2] = float("nan")
        run.model.tables[1].weight[7] = float("inf")
        run.model.tables[1].weight[9, 0] = 1e6  # no float16 scale
    bad = [unpackable_rows(table.weight, 4) for table in run.model.tables]
    checkpointer = DiffCheckpointer(files, run.model, run.optimizers, config=plain(bits=4, verify_untracked=False))
    checkpointer.save(now=True)
    assert checkpointer.history[0].raw_rows == 3 == sum(int(mask.sum()) for mask in bad)
    other = Run(seed=8)
    restore(files, other.model, other.optimizers)
    for mine, theirs, mask in zip(run.model.tables, other.model.tables, bad, strict=True):
        assert torch.equal(mine.weight[mask].nan_to_num(5.0), theirs.weight[mask].nan_to_num(5.0))
        assert bool(theirs.weight[~mask].isfinite().all())


def test_optimizer_rows_at_eight_bits() -> None:
    run, files = Run(kind="adagrad"), MemoryFiles()
    checkpointed(run, files, plain(optimizer_bits=8), 6, 3).close()
    other = Run(seed=8, kind="adagrad")
    restore(files, other.model, other.optimizers, other.reader)
    for mine, theirs in zip(run.model.tables, other.model.tables, strict=True):
        assert torch.equal(mine.weight, theirs.weight)
        live, back = (o.tables.state[t.weight]["sum"] for o, t in ((run, mine), (other, theirs)))
        low, high = live.aminmax(dim=1, keepdim=True)
        assert not torch.equal(live, back)
        assert bool(((live - back).abs() <= (high - low) / 255 / 2 * 1.001 + 1e-6).all())


def test_state_that_appears_later_makes_the_next_checkpoint_full() -> None:
    run, files = Run(kind="sparse adam"), MemoryFiles()
    checkpointer = DiffCheckpointer(files, run.model, run.optimizers, reader=run.reader, config=plain())
    checkpointer.save(now=True)  # before SparseAdam has any
    run.step()
    checkpointer.save(now=True)
    run.step()
    checkpointer.save(now=True)
    assert [saved.kind for saved in checkpointer.history] == ["full", "full", "diff"]
    other = Run(seed=8, kind="sparse adam")
    restore(files, other.model, other.optimizers, other.reader)
    assert same(other.state(), run.state())


def test_many_chunks_and_the_child_process_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewright.training.checkpoint import writer

    run = Run()
    begin = writer.Job.__init__

    def small(job: Any, *arguments: Any) -> None:
        begin(job, *arguments, chunk=10 * DIM * 4)

    monkeypatch.setattr(writer.Job, "__init__", small)
    config = plain(bits=4, executor="process", policy="consecutive")
    checkpointer = checkpointed(run, tmp_path, config, 4, 2)
    assert len(list((tmp_path / checkpointer.history[0].id).glob("*.safetensors"))) == 8
    other = Run(seed=8)
    restore(tmp_path, other.model, other.optimizers, other.reader)
    for mine, theirs in zip(run.model.tables, other.model.tables, strict=True):
        assert torch.equal(theirs.weight, quantize_rows(mine.weight, 4, "greedy", 25, 0.6).dequantize())
    run.step()
    before = [len(bits) for bits in checkpointer.tracker.last]
    assert isinstance(checkpointer._executor, writer.InProcess)
    checkpointer._executor._child.kill()
    checkpointer._executor._child.is_alive = lambda: True  # as if it died after it was asked
    with pytest.raises(OutputError, match="the process that writes checkpoints died"):
        checkpointer.save(now=True)
    assert [len(bits) for bits in checkpointer.tracker.last] == before  # its rows are as unsaved as before
    checkpointer.close()


def test_experts_and_adapters_are_rows_too() -> None:
    """A parameter [experts, out, in] of which a step changes those that its router chose."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0)))

    model, files = Experts(), MemoryFiles()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    chosen: list[int] = []
    checkpointer = DiffCheckpointer(files, model, optimizer, config=plain(verify_untracked=False))
    checkpointer.register_rows(model.up, lambda: torch.tensor(chosen))
    checkpointer.save(now=True)
    chosen[:] = [2, 5, 2]
    model.up[torch.tensor([2, 5])].sum().backward()
    optimizer.step()
    checkpointer.save(now=True)
    assert [(s.kind, s.rows) for s in checkpointer.history] == [("full", 7), ("diff", 2)]
    other = Experts()
    restore(files, other, torch.optim.SGD(other.parameters(), lr=0.1))
    assert torch.equal(other.up, model.up)


def test_a_dense_model_gets_atomic_full_checkpoints_from_the_same_code(tmp_path: Path) -> None:
    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2), nn.BatchNorm1d(2))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    model, optimizer = make(0)
    checkpointer = DiffCheckpointer(tmp_path, model, optimizer, config=CheckpointConfig(policy="full", every_steps=2))
    ids = torch.randint(0, 9, (5, 3))
    for _ in range(4):
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()
        checkpointer.step()
    checkpointer.close()
    assert [saved.step for saved in checkpointer.history] == [2, 4]
    other, its = make(1)
    restore(tmp_path, other, its)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)  # also at the default bits: dense parts are never quantised
    states: list[dict[str, Tensor]] = [
        {f"{i}.{k}": torch.as_tensor(v) for i, e in o.state_dict()["state"].items() for k, v in e.items()}
        for o in (optimizer, its)
    ]
    assert same(*states)


def test_the_position_is_that_of_the_consumed_batches(tmp_path: Path) -> None:
    run = Run()
    ahead = Prefetched(run.reader, ahead=3)
    run.reader = ahead  # type: ignore[assignment]
    checkpointer = DiffCheckpointer(tmp_path, run.model, run.optimizers, reader=ahead, config=plain())
    for _ in range(5):
        run.step()
    checkpointer.save(now=True)
    expected = [next(ahead)["ids"] for _ in range(4)]
    other = Run(seed=8)
    there = Prefetched(other.reader, ahead=3)
    next(there)
    restore(tmp_path, other.model, other.optimizers, there)
    assert [b.tolist() for b in expected] == [next(there)["ids"].tolist() for _ in range(4)]
    assert ahead.batches.position > ahead.state_dict()["position"]
    checkpointer.close()

"""Distributed Lion between processes over gloo, held against its workers in one process (see lion_toy.py)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgewright.errors import FormatError, UsageError
from edgewright.systems.distributed_lion.checkpoint import load_replicas
from edgewright.systems.distributed_lion.distributed import DistributedLion, lion_groups
from edgewright.systems.distributed_lion.exchange import wire_bytes
from edgewright.systems.distributed_lion.simulated import SimulatedLion
from edgewright.training.checkpoint.files import LocalFiles
from edgewright.training.checkpoint.ranks import Ranks
from edgewright.training.checkpoint.whole import capture_state, save_state
from tests.processes import run_script
from tests.systems.distributed_lion import toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lion")
    run_script(toy.__file__, folder, timeout=240)
    ends = json.loads((folder / "ends.json").read_text())
    for name, world in (("four", 4), ("two", 2), ("sharded", 4)):
        assert ends[name][0] == [0] * world
    return folder


def texts(folder: Path, rank: int = 0, name: str = "texts") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}-{rank}.json").read_text())
    return found


@cache
def simulated(world: int, aggregate: str, zero: str) -> tuple[list[Any], SimulatedLion]:
    named = toy.parameters()
    optimizer = SimulatedLion(named, world, toy.LR, weight_decay=toy.DECAY, aggregate=aggregate, zero=zero)
    for step in range(toy.STEPS):
        for rank in range(world):
            for name, parameter in named:
                parameter.grad = toy.gradient(name, step, rank)
            optimizer.keep()
        optimizer.step()
    return named, optimizer


def test_processes_are_the_workers_of_one_process_bit_for_bit(folder: Path) -> None:
    """Parameters and every momentum, for 2 to 4 processes, both aggregates, ways, replies and both rules for zeros."""
    found = [load_file(folder / f"cases-{rank}.safetensors") for rank in range(4)]
    for case in toy.CASES:
        world, aggregate, _, zero, _ = case
        named, optimizer = simulated(world, aggregate, zero)
        for rank in range(world):
            for name, parameter in named:
                key = " ".join(map(str, case)) + f"/{name}"
                assert torch.equal(found[rank][key], parameter), (key, rank)
                momentum = optimizer.state[parameter].get("exp_avg")
                mine = torch.zeros_like(parameter) if momentum is None else momentum[rank]
                assert torch.equal(found[rank][key + "/momentum"], mine), (key, rank)


def test_bytes_are_counted_as_the_table_says(folder: Path) -> None:
    for key, sent in texts(folder)["traffic"].items():
        scheme, ternary = key.removesuffix(" ternary"), key.endswith("ternary")
        assert sent == pytest.approx(wire_bytes(scheme, 10_000, 4, ternary)) or (
            ternary and scheme == "avg two_phase" and sent == 3 / 4 * 10_000 * (1.6 + 4) / 8
        )
    for case, stats in json.loads((folder / "stats-0.json").read_text()).items():
        assert stats["sent_bytes"] == stats["recv_bytes"] > stats["pad_bytes"] >= 0, case
        assert stats["steps"] == toy.STEPS


@pytest.mark.parametrize("form", ["mavo local", "mavo hook", "avg local", "avg hook"])
def test_ddp_gives_the_bits_of_processes_without_it(folder: Path, form: str) -> None:
    assert all(texts(folder, rank)["parallel"][form] for rank in range(4))


def test_equal_data_on_all_is_lion_and_averaged_gradients_are_refused(folder: Path) -> None:
    for rank in range(4):
        found = texts(folder, rank)
        assert found["one"]["identical"]
        for refusal in (found["one"]["averaged"], found["parallel"]["ddp without the hook"]):
            assert refusal.startswith("UsageError: all processes have the same gradient, bit for bit")
            assert "disable_gradient_allreduce(model)" in refusal


def test_copies_that_differ_are_named_and_300_steps_keep_them_equal(folder: Path) -> None:
    found = [texts(folder, rank) for rank in range(4)]
    for one in found:
        assert one["one"]["different"].startswith("CheckFailed: the processes hold different values of weight")
    assert len({str(one["parallel"]["300 steps"]) for one in found}) == 1


def test_one_gradient_that_is_not_finite_skips_the_step_of_all(folder: Path) -> None:
    for rank in range(4):
        found = texts(folder, rank)
        assert found["one"]["infinite"] == [1, 1, True]
        assert found["parallel"]["infinite in the hook"] == [1, True]
        assert found["one"]["scaled"]  # through GradScaler: the bits of unscaled gradients


def test_shared_momenta_and_clipping(folder: Path) -> None:
    for rank in range(4):
        found = texts(folder, rank)["one"]
        assert found["holder 0"] == f"process {rank} of 4" and found["holder 1"] == "all processes" and found["synced"]
        assert found["clipped"] == pytest.approx(0.01, rel=1e-3)  # torch's clipping adds 1e-6 to the norm
        assert "holds the momentum of process 1 of 7" in found["other"]


def test_what_the_hook_refuses(folder: Path) -> None:
    found = texts(folder)["parallel"]
    assert "clip_local=None" in found["clip in the hook"]
    assert "Sequential is no DistributedDataParallel" in found["no ddp"]
    assert "does not hold 0.weight" in found["lacking"]


def test_resume_is_exact_and_the_newest_checkpoint_is_read(folder: Path) -> None:
    for rank in range(4):
        found = texts(folder, rank)["checkpoint"]
        assert found["resumed"] and found["extra"] == {"seen": 2} and found["mean"]
        assert found["again"] == [2, 4]
    assert len(list((folder / "again").glob("ckpt-*"))) == 1


def test_another_number_of_processes_goes_on_with_the_mean(folder: Path) -> None:
    """Four wrote; two went on, and one does here."""
    network = toy.model(seed=9)
    optimizer = DistributedLion(lion_groups(network), toy.LR)
    assert load_replicas(folder / "checkpoint", network, optimizer, "mean") == {"seen": 2} and optimizer.steps == 2
    for rank in range(2):
        found = texts(folder, rank, "pair")
        assert "written by 4 processes and here are 2: strategy='mean'" in found["exact"]
        assert found["mean steps"] == found["reset steps"] == 2
        momenta = load_file(folder / f"elastic-{rank}.safetensors")
        for number, (_, parameter) in enumerate(optimizer.members()):
            assert torch.equal(momenta[f"mean/{number}"], optimizer.momentum(parameter))
            assert not momenta[f"reset/{number}"].any() and momenta[f"mean/{number}"].any()


def test_weights_split_over_one_row_of_a_mesh_vote_over_the_other(folder: Path) -> None:
    for rank in range(4):
        found = texts(folder, rank, "sharded")
        assert found["same"] and found["moved"]
        assert "fully_shard(model, mesh=mesh['shard'])" in found["fsdp"]
        assert "votes among 2 of 4 processes" in found["saving"]


def test_fit_resumes_with_everybodys_momentum_and_gradients(folder: Path) -> None:
    for rank in range(2):
        found = texts(folder, rank, "pair")
        assert all(found[f"{name} resumes"] for name in ("shared", "own", "within"))
        assert found["of its own"] == [2, ["optimizer", "random"], False]


@pytest.mark.parametrize("how", toy.DEATHS)
def test_a_process_that_dies_ends_the_others_in_time(folder: Path, how: str) -> None:
    """Killed: at once. Stopped: after the timeout of 1 s. Parameters stay as they were before the step."""
    codes, seconds = json.loads((folder / "ends.json").read_text())[how]
    assert codes[:2] == [1, 1] and seconds < 30  # 1 s and a busy machine
    for rank in range(2):
        found = texts(folder, rank, how)
        assert found["step"] == 2 and found["seconds"] < 20 and found["same"]
        assert f"EdgewrightError: process {rank} of 3 lost another one" in found["error"]
        assert "start all of them again from the last checkpoint" in found["error"]


def test_damaged_and_foreign_checkpoints_are_refused(folder: Path, tmp_path: Path) -> None:
    network = toy.model()
    optimizer = DistributedLion(lion_groups(network), toy.LR)
    with pytest.raises(UsageError, match="holds no checkpoint"):
        load_replicas(tmp_path, network, optimizer)
    files, ranks = LocalFiles(tmp_path), Ranks()
    save_state(files, ranks, capture_state(1, {}, {"world": 1}, None, ranks))
    with pytest.raises(FormatError, match="is no checkpoint of a Distributed Lion run"):
        load_replicas(tmp_path, network, optimizer)
    manifest = next(tmp_path.glob("ckpt-*")) / "manifest.json"
    manifest.write_text(manifest.read_text()[:-9])
    with pytest.raises(FormatError, match="no checkpoint .* can be used"):
        load_replicas(tmp_path, network, optimizer)
    with pytest.raises(UsageError, match="strategy='sum'; it must be one of exact, mean, reset"):
        load_replicas(folder / "checkpoint", network, optimizer, "sum")
    small = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match="written by another model"):
        load_replicas(folder / "checkpoint", small, DistributedLion(small.parameters()), "mean")

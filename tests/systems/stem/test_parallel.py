"""Tables shared out between two and four gloo processes: the same training as one process with all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from edgewright.errors import UsageError
from edgewright.systems.stem.training import shard_tables
from tests.processes import run_script
from tests.systems.stem import parallel_group as group
from tests.systems.stem.toys import stem


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("group")
    run_script(group.__file__, path, timeout=150)
    return path


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    model = stem()
    group.train(model, slice(None))
    return group.whole(model.state_dict())


@pytest.mark.parametrize("layout", ["2-1", "2-2", "4-1", "4-2"])
def test_it_is_one_process(layout: str, folder: Path, alone: dict[str, torch.Tensor]) -> None:
    theirs = load_file(folder / f"{layout}.safetensors")
    start = stem().state_dict()
    for name, value in theirs.items():
        # gradients are added in another order: a few units in the last place of weights near 1
        torch.testing.assert_close(value, alone[name], rtol=0, atol=2e-6)
        assert not torch.equal(value, start[name]) or "norm" in name


@pytest.mark.parametrize("world", [2, 4])
def test_a_checkpoint_of_shards_is_a_checkpoint(world: int, folder: Path) -> None:
    model = stem(seed=3)
    state = model.state_dict()
    dcp.load({"model": state}, checkpoint_id=str(folder / f"checkpoint-{world}"), no_dist=True)
    saved = load_file(folder / f"{world}-1.safetensors")
    for name, value in saved.items():
        assert torch.equal(state[name], value)


@pytest.mark.parametrize("world", [2, 4])
def test_rows_that_do_not_divide_are_refused(world: int, folder: Path) -> None:
    width = 50 if world == 4 else 49
    for rank in range(world):
        text = (folder / f"refused-{world}-{rank}").read_text()
        assert text == f"layer 1: rows of {width} values do not divide among {world} processes of stem"


def test_a_mesh_without_the_dimension_is_refused() -> None:
    mesh: Any = type("Mesh", (), {"mesh_dim_names": ("dp", "tp")})()
    with pytest.raises(UsageError, match=r"sharded tables need \('dp', 'stem'\)"):
        shard_tables(stem(), mesh)

"""Checkpoints of the loop that are written behind it: the same files, the same resume, and failures that are heard."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgewright.errors import OutputError
from edgewright.training import BlockBatches, TrainConfig, fit, resume
from edgewright.training.checkpoint.files import LocalFiles
from edgewright.training.checkpoint.whole import SavedState
from edgewright.training.resume import MODEL, latest_checkpoint, step_of


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def run(folder: Path | None, model: nn.Module, steps: int = 9, behind: bool = True, function: Any = loss) -> Any:
    rows = torch.randn(32, 3, generator=torch.Generator().manual_seed(1))
    config = TrainConfig(steps=steps, learning_rate=0.1, checkpoint_every=2, checkpoint_async=behind)
    return fit(model, function, BlockBatches(rows, 4), config, output=folder, progress=False)


class Stop(Exception):
    pass


def stopping(at: int) -> Any:
    """The loss that fails at call number `at`."""
    calls = [0]

    def function(model: nn.Module, batch: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == at:
            raise Stop
        return loss(model, batch)

    return function


def contents(folder: Path) -> dict[str, Tensor]:
    path = latest_checkpoint(folder)
    assert path is not None
    targets = {MODEL + name: tensor for name, tensor in make(5).named_parameters()}
    return {"step": torch.tensor(step_of(path)), **SavedState(LocalFiles(path.parent)).new(targets)}


@pytest.mark.parametrize("first", [True, False])
def test_a_stopped_run_resumes_to_the_same_bits_whichever_way_it_saved(first: bool, tmp_path: Path) -> None:
    whole = make()
    run(None, whole)
    model = make()
    with pytest.raises(Stop):
        run(tmp_path, model, behind=first, function=stopping(6))
    assert step_of(latest_checkpoint(tmp_path)) == 4  # written whole, though the run ended by an error
    again = make(3)
    result = run(tmp_path, again, behind=not first)
    assert result.resumed_from == 4
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(list((tmp_path / "checkpoints").glob("ckpt-*"))) == 1


def test_the_checkpoint_is_that_of_its_step_while_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stop):
        run(tmp_path / "now", make(), behind=False, function=stopping(4))
    gate, write = threading.Event(), resume.save_state

    def slowly(*arguments: Any) -> None:
        assert gate.wait(30)
        write(*arguments)

    monkeypatch.setattr(resume, "save_state", slowly)
    calls = [0]

    def function(model: nn.Module, batch: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 4:  # a step later, the checkpoint of step 2 is still being written
            assert latest_checkpoint(tmp_path / "behind") is None
            gate.set()
            raise Stop
        return loss(model, batch)

    with pytest.raises(Stop):
        run(tmp_path / "behind", make(), function=function)
    now, behind = contents(tmp_path / "now"), contents(tmp_path / "behind")
    assert all(torch.equal(now[name], behind[name]) for name in now)


def test_a_write_that_fails_ends_the_run_and_names_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = resume.save_state, [0]

    def failing(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OutputError("cannot write: No space left on device")
        write(*arguments)

    monkeypatch.setattr(resume, "save_state", failing)
    with pytest.raises(OutputError, match="No space left"):
        run(tmp_path, make())
    assert step_of(latest_checkpoint(tmp_path)) == 2

"""A run whose weights are split over two processes, and the same run resumed by two with whole models, or by one.

python split_resume.py FOLDER
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from edgewright.errors import UsageError
from edgewright.training import BlockBatches, TrainConfig, TrainingInterrupted, fit
from edgewright.training.sharded import shard_, whole_state
from tests.processes import run_group

BEFORE, STEPS = 2, 4


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def train(model: nn.Module, output: Path, steps: int, seen: list[dict[str, torch.Tensor]]) -> None:
    """`fit`, interrupted when `steps` updates are done; `seen` gets the weights before the first of them."""
    blocks = {"x": torch.randn(32, 6, generator=torch.Generator().manual_seed(1)), "y": torch.arange(32) % 4}

    def loss(model: Any, batch: Any) -> Any:
        if not seen:
            state = whole_state(getattr(model, "module", model), True)  # inside DDP's wrapper
            seen.append({name: value.clone() for name, value in state.items()})
        loss.calls += 1
        if loss.calls > steps:
            raise KeyboardInterrupt
        return F.cross_entropy(model(batch["x"]), batch["y"])

    loss.calls = 0
    config = TrainConfig(STEPS, 0.05, checkpoint_every=1)
    try:
        fit(model, loss, BlockBatches(blocks, 4, seed=1), config, output=output, progress=False)
    except (KeyboardInterrupt, TrainingInterrupted):
        pass


def split(output: Path, rank: int) -> None:
    torch.distributed.init_process_group("gloo")
    model = network(0)
    shard_(model, [model[0], model[2]])
    train(model, output / "run", BEFORE, [])
    state = whole_state(model, rank == 0)
    if rank == 0:
        save_file(state, output / "split.safetensors")
    torch.distributed.destroy_process_group()


def alone(output: Path, rank: int) -> None:
    """One process is refused, and its model is left as it was."""
    model, before = network(5), network(5).state_dict()
    try:
        train(model, output / "run", STEPS, [])
    except UsageError as error:
        assert "processes was 2, now 1" in str(error), error
    else:
        raise AssertionError("it went on")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def whole(output: Path, rank: int) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    model = network(5)
    train(model, output / "run", STEPS, seen)
    if rank == 0:
        save_file(seen[0], output / "whole.safetensors")
        save_file(model.state_dict(), output / "end.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import accelerate.utils  # noqa: F401
    import torch.distributed.checkpoint
    import torch.distributed.fsdp

    for world, part in ((2, split), (1, alone), (2, whole)):
        run_group(world, partial(part, Path(sys.argv[1])))

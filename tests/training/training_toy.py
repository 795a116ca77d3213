"""A run with everything that can spoil a resume, and a process that is killed and started again until it ends.

python training_toy.py killed FOLDER SEED     kill the run at random moments until it finishes
python training_toy.py pair FOLDER            one run in two processes, interrupted and resumed, and one that is not
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from edgewright.training import BlockBatches, TrainConfig, TrainingInterrupted, TrainResult, fit
from edgewright.training.metrics import write_loss_plot
from tests.processes import run_group

STEPS, ACCUMULATION = 5, 2


class Toy(nn.Module):
    """Dropout, batch statistics, a frozen layer, and a moving average that is frozen but changes."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 8).requires_grad_(False)
        self.hidden = nn.Linear(8, 8)
        self.normalised = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, 3)
        self.average = nn.Linear(8, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(F.relu(self.normalised(self.hidden(self.base(x)))))
        return self.head(hidden) + 0.1 * self.average(hidden)


class Plain(nn.Module):
    """Nothing random and nothing that depends on how a batch is split."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def seeded(kind: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind()


def data(batch_size: int = 4) -> BlockBatches:
    generator = torch.Generator().manual_seed(7)
    blocks = {"x": torch.randn(21, 6, generator=generator), "y": torch.randint(0, 3, (21,), generator=generator)}
    return BlockBatches(blocks, batch_size, seed=3)


def cross_entropy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def toy_run(
    output: Path | None, on_micro: Callable[[int], None] = lambda call: None, **changes: Any
) -> tuple[dict[str, Tensor], TrainResult]:
    """One call of fit on fresh objects; all state at its end. `on_micro` gets the number of each loss call, from 1."""
    model, generator, calls = seeded(Toy), torch.Generator().manual_seed(11), [0]
    hidden, rest = model.hidden.parameters(), [*model.normalised.parameters(), *model.head.parameters()]
    optimizer = torch.optim.AdamW([{"params": hidden, "lr": 3e-2}, {"params": rest}], lr=1e-2, amsgrad=True)

    def loss_function(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float | Tensor]]:
        calls[0] += 1
        on_micro(calls[0])
        noisy = batch["x"] + 0.1 * torch.randn(batch["x"].shape, generator=generator)
        loss = F.cross_entropy(model(noisy), batch["y"])
        for slow, fast in zip(model.average.parameters(), model.head.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.1)  # .data: invisible to autograd's version counters
        return loss, {"noise": noisy.std(), "calls": 1.0}

    settings = {"steps": STEPS, "accumulation": ACCUMULATION, "warmup_steps": 2, "checkpoint_every": 0, **changes}
    result = fit(
        model,
        loss_function,
        data(),
        TrainConfig(**settings),
        optimizer=optimizer,
        output=output,
        evaluate=lambda model: {"loss": float(torch.rand(()) + model(torch.randn(2, 6, generator=generator)).mean())},
        evaluate_every=2,
        generator=generator,
        progress=False,
    )
    return everything(model, optimizer), result


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    for index, entries in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{name}": value.clone() for name, value in entries.items()}
    return state


def _import_everything() -> None:
    """What the first run would import, so that forked ones need not. No backward pass: autograd survives no fork."""
    import accelerate.utils  # noqa: F401

    torch.set_num_threads(1)
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    torch.optim.AdamW([parameter], amsgrad=True).step()
    with tempfile.TemporaryDirectory() as folder:
        write_loss_plot(Path(folder) / "loss.png", [{"step": 1, "loss": 1.0}], "")


def _killed(folder: Path, seed: int) -> None:
    chance, kills = random.Random(seed), 0
    while True:
        ear, mouth = os.pipe()
        child = os.fork()
        if child == 0:

            def on_micro(call: int, mouth: int = mouth) -> None:
                os.write(mouth, b".")
                time.sleep(0.01)

            state, _ = toy_run(folder / "run", on_micro, checkpoint_every=1, steps=20)
            save_file(state, folder / "end.safetensors")
            os._exit(0)
        os.close(mouth)
        if os.read(ear, 1):  # training has begun
            time.sleep(chance.uniform(0, 0.2))
            os.kill(child, signal.SIGKILL)
        os.close(ear)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
            print(kills)
            return
        kills += 1


def _pair(folder: Path, rank: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    _one_of_pair(folder, "whole", 0)
    _one_of_pair(folder, "cut", 3 if rank else 0)  # one of the two is asked to stop, in the middle of a step
    _one_of_pair(folder, "cut", 0)
    torch.distributed.destroy_process_group()


def _one_of_pair(folder: Path, name: str, interrupt_at: int) -> None:
    rank = os.environ["RANK"]
    model, calls = seeded(Plain, seed=int(rank)), [0]  # other weights in each: the wrapper must make them equal

    def loss_function(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        calls[0] += 1
        if calls[0] == interrupt_at:
            signal.raise_signal(signal.SIGINT)
        return cross_entropy(model, batch), {"first": float(batch["x"][0, 0])}

    try:
        fit(
            model, loss_function, data(), TrainConfig(STEPS, 1e-2, accumulation=2), output=folder / name, progress=False
        )
    except TrainingInterrupted as stopped:
        (folder / f"stopped-{rank}").write_text(str(stopped.step))
    save_file(model.state_dict(), folder / f"{name}-{rank}.safetensors")


if __name__ == "__main__":
    _import_everything()
    if sys.argv[1] == "killed":
        _killed(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        run_group(2, partial(_pair, Path(sys.argv[2])))

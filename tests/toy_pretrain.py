"""A model that trains in a second, and processes that are killed, stopped and split.

python toy_pretrain.py FOLDER PROCESSES    a killed and resumed run, and runs of a group of processes
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.next_token import NextToken
from edgewright.models.decoder.pretrain import PretrainResult, PretrainSettings, pretrain
from edgewright.training import TrainingInterrupted
from edgewright.training.metrics import write_loss_plot
from tests.processes import rendezvous

STEPS, KILLED_AT, CHECKPOINT_EVERY = 6, 6, 2


def shape(**changes: Any) -> EdgeDecoderConfig:
    """Two blocks, each run twice; 13,000 weights."""
    fields: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "share_map": [0, 0, 1, 1]}
    fields |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return EdgeDecoderConfig(**{**fields, **changes})


def documents(count: int = 60) -> list[str]:
    chance = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "12", "dogs", "run", "to", "some", "far", "house"]
    return [" ".join(chance.choice(words) for _ in range(60)) + f" {number}.\n" for number in range(count)]


def settings(**changes: Any) -> PretrainSettings:
    fields: dict[str, Any] = {"context": 16, "batch_size": 8, "steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY}
    fields |= {"evaluate_every": 3, "validation_rows": 7, "samples": 1, "sample_tokens": 4, "device": "cpu"}
    return PretrainSettings(**{**fields, **changes})


def run(output: Path, *, config: EdgeDecoderConfig | None = None, data: Any = None, **changes: Any) -> PretrainResult:
    return pretrain(config or shape(), data or documents(), settings(**changes), output, progress=False)


def at_update(number: int, action: Callable[[], None]) -> None:
    """Do something in the middle of an update, counted from 1."""
    original, calls = NextToken.forward, [0]

    def forward(self: NextToken, tokens: torch.Tensor, what: str = "loss", cache: Any = None) -> torch.Tensor:
        calls[0] += what == "loss"
        if calls[0] == number and what == "loss":
            action()
        return original(self, tokens, what, cache)

    NextToken.forward = forward  # type: ignore[method-assign]


def weights(result: PretrainResult) -> dict[str, torch.Tensor]:
    assert result.model is not None
    return {name: parameter.detach().clone() for name, parameter in result.model.named_parameters()}


def _children(count: int, action: Callable[[int], None]) -> list[int]:
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            try:
                action(rank)
            except BaseException:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                os._exit(1)
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _killed(folder: Path) -> None:
    def first(rank: int) -> None:
        at_update(KILLED_AT, lambda: os.kill(os.getpid(), signal.SIGKILL))
        run(folder / "killed")

    def second(rank: int) -> None:
        said: list[str] = []
        result = pretrain(shape(), documents(), settings(), folder / "killed", progress=False, say=said.append)
        save_file(weights(result), folder / "killed.safetensors")
        (folder / "killed.txt").write_text(f"{result.lost}\n{said[-1]}")

    assert _children(1, first) == [-signal.SIGKILL]
    assert _children(1, second) == [0]


def _group(folder: Path, processes: int) -> None:
    place = rendezvous()

    def one(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(processes), **place}
        shards = folder / "killed" / "shards"
        for name, parallel in (("ddp", "ddp"), ("fsdp", "fsdp"), ("cut", "fsdp")):
            if name == "cut":
                original = NextToken.forward
                at_update(4, lambda: signal.raise_signal(signal.SIGINT) if rank == 0 else None)
                try:
                    run(folder / name, data=shards, parallel=parallel)
                    raise AssertionError("the run was not interrupted")
                except TrainingInterrupted as stopped:
                    assert stopped.step == 4
                NextToken.forward = original  # type: ignore[method-assign]
            result = run(folder / name, data=shards, parallel=parallel)
            assert (result.model is None) == (rank > 0)
            if rank == 0:
                save_file(weights(result), folder / f"{name}.safetensors")
        torch.distributed.destroy_process_group()

    assert _children(processes, one) == [0] * processes


if __name__ == "__main__":
    import accelerate.utils  # noqa: F401
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import transformers.generation
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    parameter = torch.nn.Parameter(torch.zeros(2))  # what a first step and a first plot import, forked ones have then
    parameter.grad = torch.ones(2)
    torch.optim.AdamW([parameter]).step()
    write_loss_plot(target / "loss.png", [{"step": 1, "loss": 1.0}], "")
    _killed(target)
    _group(target, int(sys.argv[2]))

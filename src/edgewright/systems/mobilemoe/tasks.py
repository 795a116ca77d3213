"""The task of the recipe: bytes of documentation and of Python's own sources, and the loss on them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import exp
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.evaluation.statistics import ratio_of_sums
from edgewright.systems.mobilemoe.layer import SparseMoE, moe_layers
from edgewright.systems.mobilemoe.training import LoadBalancer, MoELoss
from edgewright.training.batches import BlockBatches
from edgewright.training.loop import TrainConfig, fit
from edgewright.training.optimizer import default_optimizer

MODULES = (
    "argparse", "ast", "bdb", "calendar", "cgitb", "codecs", "configparser", "csv", "dataclasses", "datetime",
    "decimal", "difflib", "dis", "doctest", "enum", "fractions", "ftplib", "functools", "gettext", "inspect",
    "ipaddress", "locale", "mailbox", "optparse", "pdb", "pickle", "pickletools", "platform", "plistlib", "pstats",
    "pydoc", "random", "shutil", "smtplib", "socket", "sre_parse", "ssl", "statistics", "subprocess", "tarfile",
    "threading", "tokenize", "turtle", "typing", "uuid", "zipfile",
)  # fmt: skip
HELD_OUT = ("heapq", "imaplib", "logging/__init__", "selectors", "shlex", "string", "textwrap", "traceback", "weakref")


def sources(names: Sequence[str]) -> list[str]:
    """Modules of Python's own library; those that this version no longer has are passed over."""
    paths = [Path(os.__file__).parent / f"{name}.py" for name in names]
    return [path.read_text("utf-8") for path in paths if path.exists()]


def byte_blocks(texts: Sequence[str], length: int, seed: int, count: int | None = None) -> Tensor:
    """The texts' bytes, int64 [blocks, length], shuffled; the first `count` of them."""
    data = torch.tensor(list("\n\n".join(texts).encode()), dtype=torch.int64)
    blocks = data[: len(data) // length * length].view(-1, length)
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:count]]


def train(
    model: nn.Module,
    blocks: Tensor,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    balance_rate: float,
    seed: int,
    output: Path,
) -> None:
    """Train a decoder in place on token ids [N, T], its experts balanced; a finished run gives its weights at once."""
    optimizer: Any = default_optimizer(model, learning_rate, 0.1, (0.9, 0.95))
    loss: Any = lambda model, batch: model(input_ids=batch, labels=batch, use_cache=False).loss  # noqa: E731
    if any(isinstance(module, SparseMoE) for module in model.modules()):
        loss = MoELoss(loss, LoadBalancer(model, balance_rate).attach(optimizer))
    fit(
        model,
        loss,
        BlockBatches(blocks, batch, seed=seed),
        TrainConfig(steps, learning_rate, warmup_steps=max(1, steps // 20), checkpoint_every=max(10, steps // 5)),
        optimizer=optimizer,
        output=output,
        label=output.name,
    )


def held_out_loss(model: nn.Module, domains: dict[str, Tensor]) -> dict[str, Any]:
    """Mean loss over all blocks, as a row's value, se (the block is the unit of chance) and n."""
    sums: list[float] = []
    counts: list[int] = []
    with torch.no_grad():
        for blocks in domains.values():
            for part in blocks.split(8):
                logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
                losses = F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").double().sum(1)
                sums += losses.tolist()
                counts += [part.shape[1] - 1] * len(part)
    loss = ratio_of_sums(sums, counts)
    return {"value": loss.value, "se": loss.se, "n": loss.clusters}


def perplexity_row(model: nn.Module, subject: str, domains: dict[str, Tensor]) -> dict[str, Any]:
    """A row of the report."""
    loss = held_out_loss(model.eval(), domains)
    value = exp(loss["value"])
    return {"metric": "perplexity", "subject": subject, "value": value, "se": value * loss["se"], "n": loss["n"]}


def draw_experts(model: nn.Module, seed: int) -> None:
    """Random weights for every sparse layer, as a model from scratch has them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in moe_layers(model).values():
            for weight in layer.parameters():
                weight.normal_(0.0, 0.02, generator=generator)
            layer.gate.e_score_correction_bias.zero_()

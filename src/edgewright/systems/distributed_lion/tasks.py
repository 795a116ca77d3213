"""The two tasks of the recipe, bytes of English and digits, and a training of either by any of the methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from edgewright.io.images import digits
from edgewright.io.text import load_texts
from edgewright.systems.distributed_lion.distributed import lion_groups
from edgewright.systems.distributed_lion.lion import Lion
from edgewright.systems.distributed_lion.simulated import SimulatedLion, SimulatedWorkers
from edgewright.training.batches import BlockBatches
from edgewright.training.config import TrainConfig
from edgewright.training.loop import fit

if TYPE_CHECKING:
    from torch import Tensor

MAVO, AVG, LION, ADAMW, NO_MOMENTUM = "majority vote", "average", "Lion", "AdamW", "vote without momentum"
METHODS = (MAVO, AVG, LION, ADAMW, NO_MOMENTUM)
DECAY = {ADAMW: 0.1}  # the others take 1.0, as Lion wants it ten times AdamW's where its rate is a tenth
RATE = 10.0  # AdamW's learning rates, in those of the others


@dataclass(frozen=True)
class Text:
    """A byte-level Llama on Python's documentation topics; `batch` rows of `length` bytes for each worker."""

    width: int = 96
    layers: int = 3
    length: int = 64
    batch: int = 8
    workers: int = 4
    steps: int = 250
    held_out: int = 96


@dataclass(frozen=True)
class Digits:
    """A vision transformer on 8 x 8 digits, for every number of workers; `batch` images for all of them together."""

    width: int = 48
    layers: int = 2
    batch: int = 64
    workers: tuple[int, ...] = (1, 2, 4, 8)
    steps: int = 400


def train_text(task: Text, method: str, rate: float, steps: int, seed: int) -> dict[str, Any]:
    """What a Llama learned from bytes of English, see `_train`."""
    held_out = _rows("evaluation", task.length)
    held_out = held_out[:: max(1, len(held_out) // task.held_out)][: task.held_out]
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=task.width,
        intermediate_size=task.width * 8 // 3 // 8 * 8,
        num_hidden_layers=task.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=task.length,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)

    def loss(network: nn.Module, batch: Tensor) -> Tensor:
        value: Tensor = network(input_ids=batch, labels=batch).loss
        return value

    def evaluate(network: nn.Module) -> dict[str, float]:
        return {"loss": float(loss(network, held_out))}

    batches = BlockBatches(_rows("calibration", task.length), task.batch, seed=seed)
    return _train(model, loss, batches, method, rate, steps, task.workers, evaluate, seed)


def train_digits(task: Digits, method: str, rate: float, workers: int, seed: int) -> dict[str, Any]:
    """What a vision transformer learned from digits, see `_train`, with its accuracy."""
    images, labels = digits("calibration")
    held_out, answers = digits("evaluation")

    def loss(network: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(network(batch["x"]), batch["y"])

    def evaluate(network: nn.Module) -> dict[str, float]:
        logits = network(held_out)
        accuracy = float((logits.argmax(1) == answers).float().mean())
        return {"loss": float(F.cross_entropy(logits, answers)), "accuracy": accuracy}

    model = vision_transformer(task.width, task.layers, seed)
    batches = BlockBatches({"x": images, "y": labels}, max(1, task.batch // workers), seed=seed)
    return _train(model, loss, batches, method, rate, task.steps, workers, evaluate, seed)


def optimizer_of(method: str, model: nn.Module, rate: float, workers: int) -> Any:
    """The optimizer of a method; `lion_groups` decides what decays, tables of embeddings vote ternary."""
    decay = DECAY.get(method, 1.0)
    groups = lion_groups(model, decay)
    plain = [{"params": [p for _, p in group["params"]], "weight_decay": group["weight_decay"]} for group in groups]
    if method == ADAMW:
        return torch.optim.AdamW(plain, lr=rate * RATE, betas=(0.9, 0.95))
    if method == LION:
        return Lion(plain, rate)
    betas = (0.0, 0.99) if method == NO_MOMENTUM else (0.9, 0.99)
    return SimulatedLion(groups, workers, rate, betas, aggregate="avg" if method == AVG else "mavo")


def vision_transformer(width: int, layers: int, seed: int) -> nn.Module:
    """Images [N, 1, 8, 8] to ten classes: patches of 2 x 2 with learned places, encoder layers, the mean of them."""

    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(16, width)

        def forward(self, patches: Tensor) -> Tensor:
            return patches.flatten(2).transpose(1, 2) + self.embedding.weight

    class Mean(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return tokens.mean(1)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = [
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        ]
        return nn.Sequential(
            nn.Conv2d(1, width, 2, 2), Places(), *blocks, nn.LayerNorm(width), Mean(), nn.Linear(width, 10)
        )


def _train(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: BlockBatches,
    method: str,
    rate: float,
    steps: int,
    workers: int,
    evaluate: Callable[[nn.Module], dict[str, float]],
    seed: int,
) -> dict[str, Any]:
    """One run of `fit`: a micro step is the batch of one worker, whether gradients are averaged or vote.

    Returns:
        loss: the last held-out one; looks: [step, held-out loss] ten times; tables, others: weights in embeddings and
        elsewhere; and the metrics of `evaluate` as eval_*.
    """
    optimizer = optimizer_of(method, model, rate, workers)
    function: Any = SimulatedWorkers(loss, optimizer) if isinstance(optimizer, SimulatedLion) else loss
    config = TrainConfig(steps, accumulation=workers, clip_norm=None, warmup_steps=min(20, steps // 4), seed=seed)
    result = fit(
        model,
        function,
        batches,
        config,
        optimizer=optimizer,
        evaluate=evaluate,
        evaluate_every=max(1, steps // 10),
        progress=False,
    )
    looks = [(int(row["step"]), float(row["eval_loss"])) for row in result.history if "eval_loss" in row]
    counts = {"tables": 0, "others": 0}
    for group in lion_groups(model):
        kind = "tables" if group["zero"] == "ternary" else "others"
        counts[kind] += sum(parameter.numel() for _, parameter in group["params"])
    return {"loss": looks[-1][1], "looks": looks, **counts, **result.metrics}


def _rows(split: Any, length: int) -> Tensor:
    """The built-in text as int64 [rows, length] of its bytes."""
    ids = torch.frombuffer(bytearray("\n".join(load_texts(None, split)).encode()), dtype=torch.uint8).long()
    return ids[: len(ids) // length * length].view(-1, length)

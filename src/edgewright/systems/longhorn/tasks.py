"""The two tasks of the recipe, recall by key and characters of English, and the models that learn them.

Multi-query associative recall: pairs to remember, then their keys again, each asking for its value.

    k1 v1 k2 v2 ... kP vP   0 0 k2 0 kP 0 0 0 k1 ...          (arXiv 2312.04927; the vocabulary's token 0 is filler)

Only what follows a repeated key is to be predicted, so accuracy is what a layer can hold and find again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from edgewright.checks import check_fields, number, optional, whole
from edgewright.io.text import load_texts
from edgewright.io.transformers_names import cache_of
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import new_decoder
from edgewright.models.decoder.state_cache import snapshot
from edgewright.training.batches import BlockBatches
from edgewright.training.loop import TrainConfig, fit

if TYPE_CHECKING:
    from torch import nn

IGNORED = -100
ABLATION = "Longhorn, beta fixed at 0.5"
CHARACTERS = 128  # ASCII
INITIAL = 0.1  # standard deviation of weights at the start
REACHED = 0.9  # recall whose first step is reported


@dataclass(frozen=True)
class RecallTask:
    """`pairs` in rows of `length` tokens. Keys are of the first half of the vocabulary (without 0), values of the
    second.

    density None: each key is asked for once, fillers stand at random places between. A number: each place behind the
    pairs asks for any of the keys with this probability, which gives more to learn from a row.
    """

    pairs: int = 8
    length: int = 64
    vocabulary: int = 64
    density: float | None = None

    def __post_init__(self) -> None:
        keys, least = self.vocabulary // 2 - 1, 3 * self.pairs + 1
        check_fields(self, {"pairs": whole(1, keys), "length": whole(least)})
        check_fields(self, {"density": optional(number(most=1, above=0))})


def recall_rows(task: RecallTask, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """{"input_ids", "labels"}, int64 [rows, length]. labels: the value one place behind each repeated key, else -100.

    That is the form of transformers' losses, which compare the logits of a token with the label of the next place.
    """
    P, half = task.pairs, task.vocabulary // 2

    def shuffled(count: int) -> Tensor:
        return torch.rand(rows, count, generator=generator).argsort(1)

    keys = 1 + shuffled(half - 1)[:, :P]
    values = half + torch.randint(task.vocabulary - half, (rows, P), generator=generator)
    ids = torch.zeros(rows, task.length, dtype=torch.long)
    ids[:, 0 : 2 * P : 2], ids[:, 1 : 2 * P : 2] = keys, values
    behind = task.length - 2 * P - 1  # a label needs one place behind it
    if task.density is None:
        places, order = 2 * P + shuffled(behind)[:, :P].sort(1).values, shuffled(P)
        asked, answers = keys.gather(1, order), values.gather(1, order)
    else:
        places = torch.arange(2 * P, task.length - 1).expand(rows, -1)
        order = torch.randint(P, (rows, behind), generator=generator)
        asks = torch.rand(rows, behind, generator=generator) < task.density
        asks[:, 0] = True  # a row without a question has no accuracy
        asked = keys.gather(1, order).where(asks, 0)
        answers = values.gather(1, order).where(asks, IGNORED)
    labels = torch.full_like(ids, IGNORED)
    return {"input_ids": ids.scatter_(1, places, asked), "labels": labels.scatter_(1, places + 1, answers)}


def recall_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers of each row [rows], of logits [rows, length, vocabulary] and labels as above."""
    expected = labels[:, 1:]
    asked = expected != IGNORED
    right = (logits[:, :-1].argmax(-1) == expected) & asked
    return right.sum(1) / asked.sum(1)


@dataclass(frozen=True)
class Recall:
    """`pairs` to remember in rows of `length` tokens; tested there and at `longer`. looks: times a run is judged.

    A small vocabulary and a question at nearly every place (`density`): with 8 pairs of 64 tokens, each asked for
    once, none of the models learned to tell one pair from another within 1200 steps of 16 rows. Attention, which
    stays at chance with the others' learning rate, has one of its own; rates come from pilots of one seed.
    """

    pairs: int = 4
    length: int = 32
    longer: int = 128
    vocabulary: int = 16
    density: float | None = 0.75
    width: int = 64
    layers: int = 2
    steps: int = 800
    batch: int = 32
    learning_rate: float = 5e-3
    attention_learning_rate: float = 2e-3
    rows: int = 256
    looks: int = 20
    ablation: bool = True


@dataclass(frozen=True)
class CharacterText:
    """Characters of Python's documentation topics in blocks of `length`; held-out topics are scored."""

    length: int = 128
    width: int = 96
    layers: int = 3
    steps: int = 300
    batch: int = 8
    learning_rate: float = 2e-3
    held_out_blocks: int = 64


# -- the models --------------------------------------------------------------------------------------------------------


def feed_forward_width(width: int, d_state: int = 16) -> int:
    """That with which a layer of attention and feed-forward has the parameters of a Longhorn block of that width."""
    inner, rank = 2 * width, math.ceil(width / 16)
    block = 2 * width * inner + 7 * inner + inner * (2 * rank + 2 * d_state) + inner * width
    return max(1, round((block - 4 * width * width - width) / (3 * width)))


def model_of(name: str, vocabulary: int, width: int, layers: int, context: int, seed: int) -> nn.Module:
    """A language model by the name of its mixer, weights drawn from the seed.

    Embeddings and the weights of attention are N(0, 0.1^2), as transformers' Mamba has them: from 0.02, the usual
    number for large models, attention of this width had not begun to recall after 1200 steps.
    """
    if name == "Mamba":
        tokens: dict[str, Any] = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        shape = MambaConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, state_size=16, use_cache=False,
            use_mambapy=True, tie_word_embeddings=True, initializer_range=INITIAL, **tokens,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return MambaForCausalLM(shape)
    attends = name == "attention"
    return new_decoder(
        EdgeDecoderConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=feed_forward_width(width),
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 32),
            mixers="full_attention" if attends else "longhorn",
            ffn_types="mlp" if attends else "none",
            longhorn={"fixed_beta": 0.5} if name == ABLATION else None,
            initializer_range=INITIAL,
            max_position_embeddings=context,
        ),
        seed,
    )


# -- the tasks ---------------------------------------------------------------------------------------------------------


def train_recall(task: Recall, weight_decay: float, name: str, seed: int) -> dict[str, Any]:
    """Recall of a model by its name after its training, at both lengths, and on the way: curve is [steps, recall]."""
    short, longer = (
        RecallTask(task.pairs, length, task.vocabulary, task.density) for length in (task.length, task.longer)
    )
    held_out = [recall_rows(t, task.rows, torch.Generator().manual_seed(10**6 + seed)) for t in (short, longer)]
    model = model_of(name, task.vocabulary, task.width, task.layers, task.longer, seed)
    every = max(1, task.steps // task.looks)
    curve: list[float] = []

    def look(m: Any) -> dict[str, float]:
        curve.append(_accuracy(m, held_out[0]))
        return {"recall": curve[-1]}

    rate = task.attention_learning_rate if name == "attention" else task.learning_rate
    batches = _RecallBatches(short, task.batch, seed)
    _fit(task, model, batches, rate, weight_decay, seed, evaluate=look, evaluate_every=every)
    model.eval()
    with torch.no_grad():
        far = _accuracy(model, held_out[1])
    steps = [min((i + 1) * every, task.steps) for i in range(len(curve))]
    reached = next((step for step, value in zip(steps, curve, strict=True) if value >= REACHED), task.steps + 1)
    return {
        "recall": curve[-1],
        "recall_longer": far,
        "recall_lost": curve[-1] - far,
        f"steps_to_{REACHED:.0%}": reached,
        "recall_parameters": sum(p.numel() for p in model.parameters()),
        "curve": [steps, curve],
    }


def train_text(task: CharacterText, weight_decay: float, name: str, seed: int) -> dict[str, Any]:
    """Held-out loss of a model by its name after its training, and the losses of the training."""
    training, held_out = _blocks("calibration", task.length), _blocks("evaluation", task.length)[: task.held_out_blocks]
    model = model_of(name, CHARACTERS, task.width, task.layers, task.length, seed)

    def evaluate(m: Any) -> dict[str, float]:
        return {"loss": sum(float(m(input_ids=b, labels=b).loss) * len(b) for b in held_out.split(16))}

    batches = BlockBatches({"input_ids": training, "labels": training}, task.batch, seed=seed)
    result = _fit(
        task, model, batches, task.learning_rate, weight_decay, seed, evaluate=evaluate, evaluate_every=task.steps
    )
    return {
        "text_loss": result.metrics["eval_loss"] / len(held_out),
        "text_parameters": sum(p.numel() for p in model.parameters()),
        "losses": [float(row["loss"]) for row in result.history],
    }


def cache_bytes(task: CharacterText, name: str, seed: int) -> list[int]:
    """Bytes of a model's cache after a text of the task's length and after one eight times longer."""
    model: Any = model_of(name, CHARACTERS, task.width, task.layers, 8 * task.length, seed).eval()
    with torch.no_grad():
        texts = [torch.zeros(1, length, dtype=torch.long) for length in (task.length, 8 * task.length)]
        return [snapshot(cache_of(model(text, use_cache=True))).bytes for text in texts]


def _fit(
    task: Recall | CharacterText, model: Any, batches: Any, rate: float, weight_decay: float, seed: int, **options: Any
) -> Any:
    config = TrainConfig(
        task.steps,
        rate,
        warmup_steps=math.ceil(0.05 * task.steps),
        weight_decay=weight_decay,
        betas=(0.9, 0.95),
        seed=seed,
    )
    return fit(model, lambda m, batch: m(**batch).loss, batches, config, progress=False, **options)


class _RecallBatches:
    """Fresh rows without end."""

    def __init__(self, task: RecallTask, batch: int, seed: int) -> None:
        self.task, self.batch, self.generator = task, batch, torch.Generator().manual_seed(seed)

    def __iter__(self) -> _RecallBatches:
        return self

    def __next__(self) -> Any:
        return recall_rows(self.task, self.batch, self.generator)


def _accuracy(model: Any, rows: dict[str, Tensor]) -> float:
    pieces = [model(input_ids=ids).logits for ids in rows["input_ids"].split(32)]
    return float(recall_accuracy(torch.cat(pieces), rows["labels"]).mean())


def _blocks(split: Any, length: int) -> Tensor:
    """The built-in text as int64 [blocks, length] of its characters."""
    text = "\n".join(load_texts(None, split)).encode("ascii", "replace")
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return ids[: len(ids) // length * length].view(-1, length)

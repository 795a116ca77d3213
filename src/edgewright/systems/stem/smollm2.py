"""The part of the STEM recipe that converts SmolLM2-135M and trains its STEM layers for a moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edgewright
from edgewright.distillation.language import LanguageDistillation
from edgewright.evaluation.language import model_logits
from edgewright.io.text import load_texts, token_blocks
from edgewright.models.decoder.from_native import from_native
from edgewright.systems.run import language_rows
from edgewright.systems.stem.convert import stemify, token_means
from edgewright.systems.stem.layer import stem_blocks, stem_layers
from edgewright.systems.stem.offload import offload_
from edgewright.systems.stem.training import RowAdamW, StemAdamW
from edgewright.training import BlockBatches, TrainConfig, fit


@dataclass(frozen=True)
class SmolLM2:
    """middle: the one layer; calibration_blocks 0 leaves SmolLM2 out."""

    middle: int = 15
    layers: str = "1/3"
    length: int = 256
    calibration_blocks: int = 96
    held_out_blocks: int = 8
    steps: int = 40
    batch: int = 2
    learning_rate: float = 1e-4
    rows_learning_rate: float = 2e-3


class _Distilled:
    """Distillation whose state is what the store learned, so that a stopped run goes on from the same rows."""

    def __init__(self, teacher: Any, store: Any) -> None:
        self.loss, self.store = LanguageDistillation(teacher), store

    def __call__(self, model: Any, ids: Any) -> Any:
        return self.loss(model, ids)

    def state_dict(self) -> dict[str, Any]:
        return self.store.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.store.load_state_dict(state)


def convert_smollm2(s: SmolLM2, seed: int, starts: Sequence[str], output: Path) -> list[dict[str, Any]]:
    """Rows of perplexity and KL of every conversion, and after training the layers of the last."""
    native, tokenizer = edgewright.load("smollm2-135m")
    dense = from_native(native).eval()
    texts = load_texts(None, "calibration")
    calibration = token_blocks(texts, tokenizer, s.length, s.calibration_blocks, seed)
    held_out = token_blocks(load_texts(None, "evaluation"), tokenizer, s.length, s.held_out_blocks, seed)
    function = model_logits(dense)
    logits = {ids.numpy().tobytes(): function(ids) for ids in held_out.split(1)}
    reference = lambda ids: logits[ids.numpy().tobytes()]  # noqa: E731

    def rows(model: Any, subject: str) -> list[dict[str, Any]]:
        call = reference if model is dense else model_logits(model)
        return language_rows(call, held_out, reference, subject, ("perplexity", "kl"))

    report = rows(dense, "dense SmolLM2")
    chosen = {"one layer": [s.middle], "a third": stem_layers(dense.config.num_hidden_layers, s.layers)}
    means = token_means(dense, sorted({b for layers in chosen.values() for b in layers}), calibration.split(4))
    for name, layers in chosen.items():
        for start in starts:
            model = stemify(dense, layers, means, start, dtype="bf16").eval()
            report += rows(model, f"{name}, {start}")
            del model
    model = stemify(dense, chosen["a third"], means).requires_grad_(False)
    store = offload_(model, trainable=RowAdamW(weight_decay=0.0))
    trained = [p for layer in stem_blocks(model).values() for p in layer.parameters()]
    for p in trained:
        p.requires_grad_(True)
    group = {"params": trained, "lr": s.learning_rate, "weight_decay": 0.0, "clip_norm": 1.0, "part": "backbone"}
    optimizer = StemAdamW([group])
    store.attach(optimizer, s.rows_learning_rate / s.learning_rate)
    config = TrainConfig(s.steps, warmup_steps=s.steps // 10, clip_norm=None, seed=seed)
    batches = BlockBatches(calibration, s.batch, seed)
    fit(
        model,
        _Distilled(dense, store),
        batches,
        config,
        optimizer=optimizer,
        output=output / "smollm2",
        label="SmolLM2",
    )
    report += rows(model.eval(), "a third, trained")
    store.close()
    return report

"""BiT (arXiv 2205.13016): an encoder of 1-bit weights and 1-bit activations, reached by stepwise distillation.

The MiniLM-L6 sentence encoder (its first three layers at size small) learns, in binary, to give its own full-precision
hidden states and embeddings. All students get the same number of steps: the sign everywhere, two sets with learned
scales and thresholds at once or by way of 2-bit activations, binary weights alone, and the method with one part taken
away. Every figure is of the packed student, its linear layers multiplied as bits.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from edgewright.data.sentences import SentenceBench, SentenceSettings
from edgewright.distillation.stages import Stage, distill_in_stages
from edgewright.measure.report import Report
from edgewright.systems.bit.distillation import (
    EncoderDistillation,
    agreement,
    byte_rows,
    embedding_distance,
    probability_zeros,
)
from edgewright.systems.bit.folder import save_binary
from edgewright.systems.bit.linear import pack_binary_
from edgewright.systems.bit.model import BitConfig, binarize_encoder_, parameter_groups
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import Run
from edgewright.training.batches import BlockBatches

DIRECT, STEPWISE, SIGNS = "W1A1, direct", "W1A1, via W1A2", "W1A1, sign everywhere"


@dataclass(frozen=True)
class Arm:
    """A student: activation bits of its stages, changes to BitConfig, whether it is repeated over the seeds, and
    whether it is the method with one part taken away.
    """

    activations: tuple[int, ...]
    changes: tuple[tuple[str, Any], ...] = ()
    repeated: bool = False
    ablation: bool = False


ARMS = {
    "W1A32": Arm((32,)),
    "W1A2": Arm((2,)),
    DIRECT: Arm((1,), repeated=True),
    STEPWISE: Arm((2, 1), repeated=True),
    SIGNS: Arm((1,), (("two_sets", False), ("shift", False))),
    "W1A1, one set": Arm((1,), (("two_sets", False),), ablation=True),
    "W1A1, no thresholds": Arm((1,), (("shift", False),), ablation=True),
    "W1A1, frozen scales": Arm((1,), (("learn_scale", False),), ablation=True),
}
RESUMABLE_STEPS = 100  # a shorter training is repeated rather than resumed


@dataclass(frozen=True)
class BiT:
    """steps: of each student in all its stages together; batch in sentences.

    layers: how many of the encoder's six are kept, 0 for all. In all six the noise of 1-bit activations adds up: a
    W1A1 student needs far more steps than minutes allow before it tells sentences apart at all.
    rare_tokens: keep the embedding rows of tokens that no sentence has, most of the model's bytes. ablations: also
    train the method with one part taken away.
    """

    seed: int = 0
    seeds: int = 3
    steps: int = 320
    batch: int = 16
    tokens: int = 32
    learning_rate: float = 1e-3
    scale_rate: float = 1e-3
    layers: int = 3
    rare_tokens: bool = True
    ablations: bool = True
    training_sentences: int = 3000
    held_out_sentences: int = 256


def tiny() -> BiT:
    return BiT(
        seeds=1,
        steps=10,
        batch=16,
        tokens=16,
        learning_rate=1e-3,
        layers=1,
        rare_tokens=False,
        ablations=False,
        training_sentences=96,
        held_out_sentences=48,
    )


def small() -> BiT:
    return BiT()


def paper() -> BiT:
    """An epoch of published length: as many steps as six passes over MNLI at batch 16, scales at their own 1e-4."""
    return BiT(
        layers=0,
        steps=147000,
        tokens=128,
        learning_rate=2e-4,
        scale_rate=1e-4,
        training_sentences=100000,
        held_out_sentences=1000,
    )


CLAIMS = (
    Claim("spearman", DIRECT, ">", against=SIGNS),
    Claim("spearman", "W1A2", ">", against=DIRECT, sizes=("small", "paper")),
    Claim("spearman", "W1A32", ">", against="W1A2", sizes=("small", "paper")),
)
CLOCKED: tuple[str, ...] = ()
HEADLINE: Headline | None = Headline(
    "three layers of MiniLM in bits, weights and activations: similarities correlate at {ours:.2f} with the float "
    "model's, at {signs:.2f} with the sign everywhere; linear layers 32 times smaller",
    {
        name: Cell("bit.csv", {"metric": "spearman", "subject": subject})
        for name, subject in (("ours", STEPWISE), ("signs", SIGNS))
    },
)


def _arms(settings: BiT) -> dict[str, Arm]:
    return {name: arm for name, arm in ARMS.items() if settings.ablations or not arm.ablation}


def plan(settings: BiT) -> Plan:
    layers = settings.layers or 6
    share = settings.batch * settings.tokens / 512
    per_step = 0.05 + (0.08 if settings.rare_tokens else 0.0) + 0.11 * layers * share
    trainings = sum(settings.seeds if arm.repeated else 1 for arm in _arms(settings).values())
    return Plan(
        steps=(
            f"embed {settings.held_out_sentences} held-out sentences with MiniLM-L6 in full precision",
            f"train {trainings} students for {settings.steps} steps of {settings.batch} sentences each",
            "pack each, compare its similarities and its nearest neighbours with those of the full encoder",
        ),
        seconds=15 + trainings * settings.steps * per_step,
        memory_bytes=int(2e9),
        disk_bytes=int(4e8),
        outputs=("spearman.png", "points.json", "student/model.safetensors"),
    )


def run(settings: BiT, output: Path) -> Report:
    run = Run(output, "BiT: MiniLM-L6 in binary, distilled to itself")
    bench = _Bench(settings, output)
    runs: dict[str, list[dict[str, float]]] = {}
    for name, arm in _arms(settings).items():
        runs[name] = run.over_seeds(name, settings.seeds if arm.repeated else 1, partial(bench.measure, name, arm))
        for metric in runs[name][0]:
            run.add(metric, [figures[metric] for figures in runs[name]], name)
    gains = [a["spearman"] - b["spearman"] for a, b in zip(runs[STEPWISE], runs[DIRECT], strict=True)]
    run.add("spearman_gain", gains, "via W1A2 over direct")
    run.add_rows(byte_rows(output / "student"))
    run.note(
        "standard errors are over seeds of the training order, differences paired by seed; arms without one ran once. "
        f"{settings.layers or 'all'} of the six layers"
    )
    run.bars("spearman.png", "spearman", "Spearman correlation with full-precision similarities, held out")
    return run.report


class _Bench:
    """The encoder, its sentences, and its full-precision embeddings."""

    def __init__(self, settings: BiT, output: Path) -> None:
        self.settings, self.output = settings, output
        bench = SentenceBench(
            SentenceSettings(settings.layers, settings.tokens, settings.training_sentences, settings.held_out_sentences)
        )
        self.bench, self.model, self.train, self.held_out = bench, bench.model, bench.train, bench.held_out
        self.model.config.num_hidden_layers = len(self.model.encoder.layer)
        if not settings.rare_tokens:
            self._drop_rare_tokens()

    def _drop_rare_tokens(self) -> None:
        """Keep only the embedding rows of tokens that the sentences have, and number these anew."""
        parts = (self.train, self.held_out)
        used, places = torch.unique(torch.cat([part["input_ids"] for part in parts]), return_inverse=True)
        for part, place in zip(parts, places.split([len(part["input_ids"]) for part in parts]), strict=True):
            part["input_ids"] = place
        table = self.model.embeddings.word_embeddings
        self.model.embeddings.word_embeddings = torch.nn.Embedding.from_pretrained(table.weight.detach()[used], False)
        self.model.config.vocab_size = len(used)
        self.model.config.pad_token_id = None

    def measure(self, name: str, arm: Arm, seed: int) -> dict[str, float]:
        """Train one student, pack it, and compare it with the full encoder on held-out sentences."""
        student = self._distil(arm, self.settings.seed + seed)
        sparsity = {}
        if arm.activations[-1] == 1:
            batch = {name: self.held_out[name][:64] for name in ("input_ids", "attention_mask")}
            sparsity = {"probability_zeros": probability_zeros(student, batch)}
        pack_binary_(student)
        with torch.no_grad():
            embeddings = self.bench.embeddings(student, self.held_out)
        if name == STEPWISE and seed == 0:
            save_binary(student, self._config(arm, arm.activations[-1]), self.output / "student")
        shutil.rmtree(self.output / "training", ignore_errors=True)
        return agreement(embeddings, self.held_out["target"]) | sparsity

    def _config(self, arm: Arm, activation_bits: int) -> Any:
        return BitConfig(activation_bits=activation_bits, **dict(arm.changes))

    def _distil(self, arm: Arm, seed: int) -> Any:
        settings = self.settings
        share = settings.steps // len(arm.activations)
        stages = [Stage((1, bits), share, settings.learning_rate) for bits in arm.activations]
        start = {name: value[:32] for name, value in self.train.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="attention .* switched to eager")
            return distill_in_stages(
                self.model,
                stages,
                lambda stage: BlockBatches(self.train, settings.batch, seed=1000 * seed + stage),
                EncoderDistillation(term=embedding_distance),
                prepare=lambda model, stage: binarize_encoder_(model, self._config(arm, int(stage.bits[1]))),
                groups=lambda model, stage: parameter_groups(
                    model, stage.learning_rate, scale_rate=settings.scale_rate
                ),
                calibration=start,
                teaches="first",
                output=self.output / "training" if settings.steps >= RESUMABLE_STEPS else None,
                seed=seed,
                progress=False,
            ).student

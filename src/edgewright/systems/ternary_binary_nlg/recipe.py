"""TBT (arXiv 2306.01841): text generation with ternary and binary weights, and ternary and binary activations.

A small encoder-decoder learns to rewrite numbers and dates in full precision; then it is quantised and distilled from
itself. Greedy answers count as right only when every token is. Beside them stand what is lost without training,
without a teacher and without the unsigned set; and SmolLM2, whose ternary weights are scaled by four rules.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import edgewright
from edgewright.distillation.language import LanguageDistillation
from edgewright.evaluation.language import model_logits
from edgewright.io.text import load_texts, token_blocks
from edgewright.measure.report import Report
from edgewright.quantization.config import WeightConfig
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import Run, language_rows, row_over_seeds
from edgewright.systems.ternary_binary_nlg.distillation import SequenceLossConfig, SequenceToSequenceDistillation
from edgewright.systems.ternary_binary_nlg.model import ActivationSet, quantize_encoder_decoder_
from edgewright.systems.ternary_binary_nlg.tasks import Rewriting
from edgewright.training.batches import BlockBatches
from edgewright.training.loop import TrainConfig, fit

# subject -> (weight, activation levels, on two sets, with a teacher)
STUDENTS: dict[str, tuple[str, Any, bool, bool]] = {
    "W1.58A8": ("ternary", 8, True, True),
    "W1.58A1.58": ("ternary", "ternary", True, True),
    "W1A8": ("binary", 8, True, True),
    "W1A1.58": ("binary", "ternary", True, True),
    "W1A1": ("binary", "binary", True, True),
    "W1.58A1.58, labels only": ("ternary", "ternary", True, False),
    "W1A1, labels only": ("binary", "binary", True, False),
    "W1A1, signed set only": ("binary", "binary", False, True),
}
UNTRAINED = ("W1.58A8", "W1.58A1.58", "W1A8", "W1A1")
LLM_RULES = {"entropy": "entropy", "absmean (BitNet)": "absmean", "learned (SEQ)": "learned"}
LLM_UNTRAINED = {"entropy, not trained": "entropy", "absmax, not trained": "absmax", "searched, not trained": "mse"}


@dataclass(frozen=True)
class TernaryBinaryNLG:
    """width, layers (of encoder and of decoder): the model. pairs: examples to train on, again and again. llm_*: the
    decoder-only part; llm_steps 0 leaves it out, llm_layers 0 keeps the whole of SmolLM2.
    """

    seed: int = 0
    seeds: int = 2
    width: int = 128
    layers: int = 2
    pairs: int = 20000
    held_out: int = 600
    batch: int = 64
    teacher_steps: int = 800
    steps: int = 300
    teacher_rate: float = 2e-3
    learning_rate: float = 2e-3
    llm_steps: int = 16
    llm_layers: int = 0
    llm_batch: int = 2
    llm_tokens: int = 256
    llm_rate: float = 1e-4
    llm_held_out: int = 8


def tiny() -> TernaryBinaryNLG:
    return TernaryBinaryNLG(
        seeds=1, width=32, layers=1, pairs=100, held_out=12, batch=16, teacher_steps=20, steps=6, llm_steps=0
    )


def small() -> TernaryBinaryNLG:
    return TernaryBinaryNLG()


def paper() -> TernaryBinaryNLG:
    """BART-base's shape, the published batch and about its number of steps, on this task."""
    return TernaryBinaryNLG(
        seeds=3,
        width=768,
        layers=6,
        pairs=200000,
        held_out=10000,
        batch=128,
        teacher_steps=30000,
        steps=30000,
        teacher_rate=3e-4,
        learning_rate=3e-4,
        llm_steps=2000,
        llm_batch=16,
        llm_tokens=1024,
        llm_held_out=64,
    )


LONG = ("small", "paper")
TIE = 0.98  # "not below": both may answer nearly everything
CLAIMS = (
    Claim("cross_entropy", "W1.58A8", "<", against="W1.58A8, not trained"),
    Claim("stored_bytes", "W1.58A8", "<", against="fp32", factor=0.25),
    Claim("stored_bytes", "W1A1", "<", against="W1.58A1.58"),
    *(
        Claim("exact_match", better, ">", against=worse, factor=TIE, sizes=LONG)
        for better, worse in (
            ("W1.58A8", "W1A8"),
            ("W1.58A1.58", "W1A1.58"),
            ("W1.58A8", "W1.58A1.58"),
            ("W1A8", "W1A1.58"),
            ("W1A1.58", "W1A1"),
        )
    ),
    Claim("exact_match", "W1.58A1.58", ">", against="W1.58A1.58, labels only", sizes=LONG),
    Claim("exact_match", "W1A1", ">", against="W1A1, labels only", sizes=LONG),
    Claim("exact_match", "W1A1, signed set only", "<", threshold=0.05, sizes=LONG),
    Claim("kl", "SmolLM2 ternary, entropy", "<", against="SmolLM2 ternary, entropy, not trained", sizes=LONG),
)
CLOCKED: tuple[str, ...] = ()
HEADLINE: Headline | None = Headline(
    "numbers and dates rewritten without a mistake: {full:.1%} in full precision, {ternary:.1%} with ternary weights, "
    "{both:.1%} with ternary activations too, {binary:.1%} all binary; training on labels alone does as well",
    {
        name: Cell("ternary-binary-nlg.csv", {"metric": "exact_match", "subject": subject})
        for name, subject in (("full", "fp32"), ("ternary", "W1.58A8"), ("both", "W1.58A1.58"), ("binary", "W1A1"))
    },
)


def plan(settings: TernaryBinaryNLG) -> Plan:
    trainings = len(STUDENTS) * settings.seeds
    weights = 26 * settings.layers * settings.width**2  # of both stacks: 12 and 16 squares a layer, less what is shared
    per_step = 0.02 + settings.batch * 13 * (weights + 84 * settings.width) * 2.0e-10  # an estimate: 0.2 s at small
    layers = settings.llm_layers or 30
    llm_step = settings.llm_batch * settings.llm_tokens * (0.0035 + 0.0004 * layers)  # as measured for LLM-QAT
    steps = [
        f"train an encoder-decoder of {settings.layers} + {settings.layers} layers, width {settings.width}, "
        f"for {settings.teacher_steps} steps",
        f"quantise it {len(STUDENTS)} ways and train each for {settings.steps} steps, {settings.seeds} seed(s)",
        f"answer {settings.held_out} held-out questions greedily with every one",
    ]
    if settings.llm_steps:
        steps.append(f"SmolLM2 ({layers} layers), ternary by {len(LLM_RULES)} rules, {settings.llm_steps} steps each")
    whole = bool(settings.llm_steps)
    return Plan(
        steps=tuple(steps),
        seconds=6
        + (0.6 * settings.teacher_steps + trainings * settings.steps) * per_step
        + (len(LLM_RULES) * settings.llm_steps * llm_step + 120 if whole else 0),
        memory_bytes=int((4e9 if layers == 30 else 1.5e9) if whole else 7e8 + 60 * weights),
        disk_bytes=int(40 * weights + (2.5e9 if whole else 1e7)),
        outputs=("exact_match.png", "points.json", "teacher.safetensors"),
    )


def run(settings: TernaryBinaryNLG, output: Path) -> Report:
    run = Run(output, "TBT: numbers and dates rewritten by ternary and binary encoder-decoders")
    bench = cache(lambda: Rewriting(settings, output))
    run.add_rows(run.memo("fp32", lambda: bench().judge("fp32", bench().teacher)))
    for name in UNTRAINED:
        subject = f"{name}, not trained"
        run.add_rows(run.memo(subject, lambda: bench().judge(subject, _student(bench(), name))))  # noqa: B023
    for name in STUDENTS:
        seeds = run.over_seeds(name, settings.seeds, lambda seed: _trained(settings, bench(), name, seed))  # noqa: B023
        run.add_rows(map(row_over_seeds, zip(*seeds, strict=True)))
    smollm2 = cache(lambda: _SmolLM2(settings, output))
    for name, rule in {**LLM_UNTRAINED, **LLM_RULES}.items() if settings.llm_steps else ():
        steps = settings.llm_steps if name in LLM_RULES else 0
        run.add_rows(run.memo(f"llm {name}", lambda: smollm2().rows(name, rule, steps)))  # noqa: B023
    run.note("exact_match: share of held-out questions whose greedy answer is right in every token")
    run.note("stored_bytes: codes at 1 or 2 bits, scales, full-precision rest; the head shares the table")
    if settings.llm_steps:
        run.note("SmolLM2: ternary linear layers, 8-bit table; KL in nats per token to the float model")
    run.bars("exact_match.png", "exact_match", "held-out questions answered right, greedy decoding", xlim=(0, 1))
    return run.report


def _student(bench: Rewriting, name: str) -> Any:
    """A quantised copy of the teacher, its elastic scales set by one batch."""
    weight, levels, two_sets, _ = STUDENTS[name]
    model = quantize_encoder_decoder_(copy.deepcopy(bench.teacher), weight, ActivationSet(levels, unsigned=two_sets))  # type: ignore[arg-type]
    with torch.no_grad():
        model(**{part: rows[: bench.settings.batch] for part, rows in bench.data.items()})
    return model


def _trained(settings: TernaryBinaryNLG, bench: Rewriting, name: str, seed: int) -> list[dict[str, Any]]:
    model, folder = _student(bench, name), f"training-{name.replace(' ', '-').replace(',', '')}-{seed}"
    loss = SequenceToSequenceDistillation(None, SequenceLossConfig.labels_only())
    if STUDENTS[name][3]:
        loss = SequenceToSequenceDistillation(bench.teacher, SequenceLossConfig())
    bench.train(model, loss, folder, settings.steps, settings.learning_rate, settings.seed + seed)
    rows = bench.judge(name, model)
    shutil.rmtree(bench.output / folder / "checkpoints", ignore_errors=True)
    return rows


class _SmolLM2:
    """The bundled decoder with ternary linear layers and an 8-bit table, distilled from its float self."""

    def __init__(self, settings: TernaryBinaryNLG, output: Path) -> None:
        self.settings, self.output = settings, output
        self.teacher, tokenizer = edgewright.load("smollm2-135m")
        if settings.llm_layers:
            self.teacher.model.layers = self.teacher.model.layers[: settings.llm_layers]
            self.teacher.config.num_hidden_layers = settings.llm_layers
        self.teacher.eval()
        cut = partial(token_blocks, tokenizer=tokenizer, block_length=settings.llm_tokens, seed=settings.seed)
        self.training = cut(load_texts(None, "calibration"), max_blocks=settings.llm_steps * settings.llm_batch)
        self.held_out = cut(load_texts(None, "evaluation"), max_blocks=settings.llm_held_out)

    def rows(self, name: str, rule: str, steps: int) -> list[dict[str, Any]]:
        """KL to the float model and perplexity on held-out text."""
        weight = WeightConfig("ternary", "row", scale=rule, initial="mse" if rule == "learned" else "paper")
        student = quantize_encoder_decoder_(copy.deepcopy(self.teacher), weight, embedding="int8")
        settings, folder = self.settings, self.output / f"llm-{rule}"
        if steps:
            batches = BlockBatches(self.training, settings.llm_batch, seed=settings.seed)
            config = TrainConfig(steps, settings.llm_rate, seed=settings.seed, checkpoint_every=20)
            loss = LanguageDistillation(self.teacher)
            fit(student, loss, batches, config, output=folder, label=f"SmolLM2, {rule} scales")
        student.eval()
        subject = f"SmolLM2 ternary, {name}"
        rows = language_rows(model_logits(student), self.held_out, model_logits(self.teacher), subject)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return rows

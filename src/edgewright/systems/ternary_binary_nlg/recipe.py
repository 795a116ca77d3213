"""TBT (arXiv 2306.01841): text generation with ternary and binary weights, and ternary and binary activations.

A small encoder-decoder learns to rewrite numbers and dates in full precision; then it is quantised and distilled from
itself. Greedy answers count as right only when every token is. Beside them stand what is lost without training,
without a teacher and without the unsigned set; and SmolLM2, whose ternary weights are scaled by four rules.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import BartConfig, BartForConditionalGeneration

import edgewright
from edgewright.distillation.language import LanguageDistillation
from edgewright.evaluation.language import add_rows, evaluate_language, model_logits
from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_object
from edgewright.io.tensors import load_tensors, save_tensors
from edgewright.io.text import load_texts, token_blocks
from edgewright.measure.plot import plot
from edgewright.measure.report import Report
from edgewright.quantization.api import convert_, quantized_modules
from edgewright.quantization.config import WeightConfig
from edgewright.quantization.stored_size import stored_bytes
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import row_over_seeds
from edgewright.systems.ternary_binary_nlg.distillation import SequenceLossConfig, SequenceToSequenceDistillation
from edgewright.systems.ternary_binary_nlg.model import ActivationSet, tbt_
from edgewright.systems.ternary_binary_nlg.written_numbers import (
    END,
    PADDING,
    SOURCE_LENGTH,
    START,
    TARGET_LENGTH,
    TOKENS,
    decode,
    encode,
    examples,
)
from edgewright.training.batches import BlockBatches
from edgewright.training.loop import TrainConfig, fit

if TYPE_CHECKING:
    from torch import Tensor, nn

Row = dict[str, Any]

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
    decoder-only part; llm_steps 0 leaves it out, llm_layers 0 keeps the whole of SmolLM2."""

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
SHORT = 50  # steps: fewer are repeated after an interruption, which is quicker than keeping checkpoints
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
    """Every figure is kept in points.json when it is measured; the teacher stays in teacher.safetensors."""
    store = output / "points.json"
    points: dict[str, list[Row]] = read_object(store) if store.exists() else {}
    made: dict[str, Any] = {}

    def measured(name: str, bench: Callable[..., Any], measure: str, *arguments: Any) -> list[Row]:
        if name not in points:
            if bench.__name__ not in made:  # a bench is built when the first missing figure needs it
                made[bench.__name__] = bench(settings, output)
            points[name] = getattr(made[bench.__name__], measure)(*arguments)
            write_text(store, json.dumps(points, indent=1) + "\n")
        return points[name]

    report = Report("TBT: numbers and dates rewritten by ternary and binary encoder-decoders")
    rows = list(measured("fp32", _Rewriting, "full_precision"))
    for name in UNTRAINED:
        rows += measured(f"{name}, not trained", _Rewriting, "untrained", name)
    for name in STUDENTS:
        seeds = [measured(f"{name}/{k}", _Rewriting, "trained", name, k) for k in range(settings.seeds)]
        rows += [row_over_seeds(list(group)) for group in zip(*seeds, strict=True)]
    for name, rule in {**LLM_UNTRAINED, **LLM_RULES}.items() if settings.llm_steps else ():
        rows += measured(f"llm {name}", _SmolLM2, "rows", name, rule, settings.llm_steps if name in LLM_RULES else 0)
    for row in rows:
        report.add(**row)
    report.notes.append("exact_match: share of held-out questions whose greedy answer is right in every token")
    report.notes.append("stored_bytes: codes at 1 or 2 bits, steps, full-precision rest; the head shares the table")
    if settings.llm_steps:
        report.notes.append("SmolLM2: ternary linear layers, 8-bit table; KL in nats per token to the float model")
    _plot(report, output / "exact_match.png")
    return report


class _Rewriting:
    """The task, the model trained on it in full precision, and its quantised copies."""

    def __init__(self, settings: TernaryBinaryNLG, output: Path) -> None:
        self.settings, self.output = settings, output
        self.data = encode(examples(settings.pairs, settings.seed))
        self.questions = examples(settings.held_out, settings.seed, held_out=True)
        self.held_out = encode(self.questions)
        self.teacher = self._teacher()

    def _teacher(self) -> Any:
        """The full-precision model: from its file, or trained and put there."""
        settings, path = self.settings, self.output / "teacher.safetensors"
        model = _bart(settings)
        if path.exists():
            model.load_state_dict(load_tensors(path), strict=False)  # tied tables are stored once
            model.tie_weights()
            return model.eval()
        loss = SequenceToSequenceDistillation(None, SequenceLossConfig.labels_only())
        self._fit(model, loss, "teacher", settings.teacher_steps, settings.teacher_rate, settings.seed)
        save_tensors(path, dict(model.named_parameters()))
        shutil.rmtree(self.output / "teacher", ignore_errors=True)
        return model.eval()

    def _fit(self, model: Any, loss: Any, name: str, steps: int, rate: float, seed: int) -> None:
        config = TrainConfig(
            steps, rate, "linear", warmup_steps=steps // 20, checkpoint_every=100, log_every=10, seed=seed
        )
        batches = BlockBatches(self.data, self.settings.batch, seed=seed)
        folder = self.output / name if steps >= SHORT else None
        fit(model, loss, batches, config, output=folder, label=name, progress=folder is not None)

    def student(self, name: str) -> Any:
        """A quantised copy of the teacher, its elastic scales set by one batch."""
        weight, levels, two_sets, _ = STUDENTS[name]
        model = tbt_(copy.deepcopy(self.teacher), weight, ActivationSet(levels, unsigned=two_sets))  # type: ignore[arg-type]
        with torch.no_grad():
            model(**{part: rows[: self.settings.batch] for part, rows in self.data.items()})
        return model

    def full_precision(self) -> list[Row]:
        return self.judge("fp32", self.teacher)

    def untrained(self, name: str) -> list[Row]:
        return self.judge(f"{name}, not trained", self.student(name))

    def trained(self, name: str, seed: int) -> list[Row]:
        settings, folder = self.settings, f"training-{name.replace(' ', '-').replace(',', '')}-{seed}"
        model = self.student(name)
        taught = STUDENTS[name][3]
        loss = SequenceToSequenceDistillation(
            self.teacher if taught else None, SequenceLossConfig() if taught else SequenceLossConfig.labels_only()
        )
        self._fit(model, loss, folder, settings.steps, settings.learning_rate, settings.seed + seed)
        rows = self.judge(name, model)
        shutil.rmtree(self.output / folder / "checkpoints", ignore_errors=True)
        return rows

    def judge(self, subject: str, model: Any) -> list[Row]:
        """Exact match of greedy answers, cross-entropy per token on the right ones, and bytes; of the packed model."""
        model.eval()
        size = stored_bytes(model)["total"]
        if quantized_modules(model):
            convert_(model)
        sources = {name: self.held_out[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            entropy = float(model(**self.held_out).loss)
            answers = decode(model.generate(**sources, max_new_tokens=TARGET_LENGTH, do_sample=False, num_beams=1))
        right = [answer == target for answer, (_, target) in zip(answers, self.questions, strict=True)]
        share, count = sum(right) / len(right), len(right)
        se = (share * (1 - share) / count) ** 0.5
        return [
            {"metric": "exact_match", "value": share, "subject": subject, "se": se, "n": count},
            {"metric": "cross_entropy", "value": entropy, "subject": subject, "n": count, "unit": "nats/token"},
            {"metric": "stored_bytes", "value": float(size), "subject": subject, "unit": "bytes"},
        ]


def _bart(settings: TernaryBinaryNLG) -> Any:
    """A BART of the asked size for the task's tokens, random, eager attention."""
    heads = max(settings.width // 32, 1)
    configure: Any = BartConfig  # whose signature does not name attn_implementation
    config = configure(
        vocab_size=len(TOKENS),
        d_model=settings.width,
        encoder_layers=settings.layers,
        decoder_layers=settings.layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * settings.width,
        decoder_ffn_dim=4 * settings.width,
        max_position_embeddings=SOURCE_LENGTH + 1,
        dropout=0.0,  # examples are plenty
        pad_token_id=PADDING,
        bos_token_id=START,
        eos_token_id=END,
        decoder_start_token_id=START,
        forced_eos_token_id=None,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return BartForConditionalGeneration(config)


class _SmolLM2:
    """The bundled decoder with ternary linear layers and an 8-bit table, distilled from its float self."""

    def __init__(self, settings: TernaryBinaryNLG, output: Path) -> None:
        self.settings, self.output = settings, output
        self.teacher, tokenizer = edgewright.load("smollm2-135m")
        if settings.llm_layers:
            self.teacher.model.layers = self.teacher.model.layers[: settings.llm_layers]
            self.teacher.config.num_hidden_layers = settings.llm_layers
        self.teacher.eval()
        count, seed = settings.llm_steps * settings.llm_batch, settings.seed
        self.train = token_blocks(load_texts(None, "calibration"), tokenizer, settings.llm_tokens, count, seed)
        texts = load_texts(None, "evaluation")
        self.held_out: Tensor = token_blocks(texts, tokenizer, settings.llm_tokens, settings.llm_held_out, seed)

    def rows(self, subject: str, rule: str, steps: int) -> list[Row]:
        """KL to the float model and perplexity on held-out text."""
        subject = f"SmolLM2 ternary, {subject}"
        weight = WeightConfig("ternary", "row", scale=rule, initial="mse" if rule == "learned" else "paper")
        student = tbt_(copy.deepcopy(self.teacher), weight, embedding="int8")
        if steps:
            self._fit(student, rule, steps)
        student.eval()
        candidates = {subject: model_logits(student)}
        part = Report("")
        reference = model_logits(self.teacher)
        add_rows(part, evaluate_language(candidates, self.held_out, reference=reference, progress=False))
        shutil.rmtree(self.output / f"llm-{rule}" / "checkpoints", ignore_errors=True)
        return [
            {"metric": r.metric, "value": r.value, "subject": r.subject, "se": r.se, "n": r.n, "unit": r.unit}
            for r in part.rows
            if r.metric in ("kl", "perplexity", "top1_agreement") and r.subject == subject
        ]

    def _fit(self, student: nn.Module, rule: str, steps: int) -> None:
        settings = self.settings
        batches = BlockBatches(self.train, settings.llm_batch, seed=settings.seed)
        config = TrainConfig(steps, settings.llm_rate, seed=settings.seed, checkpoint_every=20)
        loss = LanguageDistillation(self.teacher)
        fit(student, loss, batches, config, output=self.output / f"llm-{rule}", label=f"SmolLM2, {rule} scales")


def _plot(report: Report, path: Path) -> None:
    rows = [row for row in report.rows if row.metric == "exact_match"]
    names, values, errors = zip(*((row.subject, row.value, row.se or 0) for row in rows), strict=True)
    with plot(path, (7, 4)) as axes:
        axes.barh(names, values, xerr=errors, capsize=3)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("held-out questions answered right, greedy decoding")
        axes.grid(axis="x", alpha=0.25)

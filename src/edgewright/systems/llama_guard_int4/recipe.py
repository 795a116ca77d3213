"""Llama Guard INT4 (arXiv 2411.17713): a guard model made small by a chain of compressions, on SmolLM2-135M.

A teacher learns a moderation task made by a program. Blocks and neurons go, the rest learns from labels and teacher,
in float and then at 4 bits, the output words shrink to legal answers, and the exported file is what gets judged.
Beside the chain, each choice is held against simpler ones at equal steps, on a model of fewer blocks.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

import edgewright
from edgewright.compression import stages as make
from edgewright.compression.chain import ChainResult, run_chain, waterfall
from edgewright.compression.stages import int4_config, train_stage
from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_object
from edgewright.io.tensors import load_tensors, save_tensors
from edgewright.measure.plot import plot
from edgewright.measure.size import parameter_counts
from edgewright.pruning.cut_folder import shipped_bytes
from edgewright.pruning.depth import keep_layers_, lowest_blocks, prune_depth_
from edgewright.pruning.importance import collect
from edgewright.pruning.width import prune_mlp_
from edgewright.quantization.api import quantize_
from edgewright.systems.llama_guard_int4.answers import AnswerLoss, answer_rows, teacher_answers
from edgewright.systems.llama_guard_int4.model import GuardModel
from edgewright.systems.llama_guard_int4.program import export_guard
from edgewright.systems.llama_guard_int4.score import score_guard, score_rows
from edgewright.systems.llama_guard_int4.settings import GuardSettings
from edgewright.systems.llama_guard_int4.task import POLICY, guard_examples
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import over_seeds
from edgewright.training.batches import BlockBatches
from edgewright.training.config import TrainConfig
from edgewright.training.loop import fit

if TYPE_CHECKING:
    from torch import Tensor

    from edgewright.measure.report import Report
    from edgewright.pruning.importance import Importance

SMALL = ("small", "paper")
TOKENS, BLOCK, NEURON = 88, 884_736, 3 * 576  # the longest example; weights of a block's attention and of a neuron


@dataclass(frozen=True)
class LlamaGuardInt4:
    """keep of all 30 blocks and mlp of 1536 neurons stay in the chain; fast: it has the first fast_layers blocks only,
    as the comparisons always have, and keeps fast_keep. compare_steps: steps of every compared training."""

    seed: int = 0
    seeds: int = 2
    fast: bool = False
    keep: int = 22
    mlp: int = 1152
    fast_layers: int = 12
    fast_keep: int = 9
    group: int = 64
    teacher_steps: int = 80
    recovery_steps: int = 40
    qat_steps: int = 24
    compare_steps: int = 16
    batch: int = 8
    learning_rate: float = 1e-4
    calibration: int = 64
    examples: int = 160
    export: Literal["pte", "none"] = "pte"

    @property
    def chain_layers(self) -> int:
        return self.fast_layers if self.fast else 30

    @property
    def chain_keep(self) -> int:
        return self.fast_keep if self.fast else self.keep


def tiny() -> LlamaGuardInt4:
    return LlamaGuardInt4(
        seeds=1, fast=True, fast_layers=3, fast_keep=2, teacher_steps=3, recovery_steps=2, qat_steps=1, compare_steps=1,
        batch=2, calibration=2, examples=5, export="none",
    )  # fmt: skip


def small() -> LlamaGuardInt4:
    return LlamaGuardInt4()


def paper() -> LlamaGuardInt4:
    """The published step counts are not known: an order of magnitude above ours, 1000 prompts measured."""
    return LlamaGuardInt4(
        seeds=3, teacher_steps=1500, recovery_steps=1500, qat_steps=1500, compare_steps=400, calibration=1000,
        examples=2000,
    )  # fmt: skip


CLAIMS = (
    Claim("bytes", "cut", "<", against="recover", factor=0.4),
    Claim("parameters", "prune", "<", against="teacher"),
    Claim("nll", "recovered", "<", against="cut by importance"),
    Claim("nll", "blocks by importance", "<", against="blocks at random", sizes=SMALL),
    Claim("nll", "neurons by norm", "<", against="neurons at random", sizes=SMALL),
    Claim("nll", "recovered", "<", against="recovered, random cut", sizes=SMALL),
    Claim("nll", "recovered", "<", against="recovered, last blocks cut", sizes=SMALL),
    Claim("nll", "recovered", "<", against="recovered, labels only", sizes=SMALL),
    Claim("nll", "int4 trained", "<", against="int4 rounded", sizes=SMALL),
    Claim("f1", "recover", ">", against="prune", sizes=SMALL),
    Claim("f1", "cut", ">", against="teacher", factor=0.95, sizes=SMALL),
)
CLOCKED: tuple[str, ...] = ("latency",)
HEADLINE: Headline | None = Headline(
    "SmolLM2 as a guard, cut and at 4 bits in an ExecuTorch file: F1 {after:.2f}, the whole model {before:.2f}",
    {
        name: Cell("llama-guard-int4.csv", {"metric": "f1", "subject": subject})
        for name, subject in (("after", "export"), ("before", "teacher"))
    },
)


def plan(settings: LlamaGuardInt4) -> Plan:
    """Seconds from arithmetic at 5e10 operations/s, what SmolLM2 trains at on two idle cores; not a measurement."""
    whole, compared = settings.chain_layers * (BLOCK + NEURON * 1536), settings.fast_layers * (BLOCK + NEURON * 1536)
    cut = settings.chain_keep * (BLOCK + NEURON * settings.mlp)
    cut_compared = settings.fast_keep * (BLOCK + NEURON * settings.mlp)
    rows = settings.batch * TOKENS
    step = 6 * rows / 5e10
    teachers = settings.teacher_steps * step * (whole + (0 if settings.fast else compared))
    taught = settings.batch * max(settings.recovery_steps, settings.qat_steps) * TOKENS * 2 * whole / 5e10
    chain = (settings.recovery_steps + 1.3 * settings.qat_steps) * step * cut
    stages = 6 if settings.export == "pte" else 5
    judged = settings.examples * TOKENS * 4 * (whole + (stages - 1) * cut) / 5e10
    compare = settings.seeds * settings.compare_steps * 6.5 * step * cut_compared
    compare += (3 + 7 * settings.seeds) * settings.examples * TOKENS * 2 * cut_compared / 5e10
    updates = settings.teacher_steps * 2 + settings.recovery_steps + settings.qat_steps
    updates += settings.seeds * settings.compare_steps * 6
    return Plan(
        steps=(
            f"teacher: {settings.chain_layers} blocks learn the task in {settings.teacher_steps} steps",
            f"cut to {settings.chain_keep} blocks and {settings.mlp} neurons, recover in {settings.recovery_steps} "
            f"steps, train at 4 bits in {settings.qat_steps}, cut the output words"
            + (", export for ExecuTorch" if settings.export == "pte" else ""),
            f"judge every stage on {settings.examples} messages",
            f"compare each choice at {settings.compare_steps} steps on {settings.fast_layers} blocks, "
            f"{settings.seeds} seed(s)",
        ),
        seconds=8 + teachers + taught + chain + judged + compare + 0.3 * updates + 240 * (settings.export == "pte"),
        memory_bytes=int(2.0e9 if settings.fast else 4.5e9),
        disk_bytes=int(1.5e9 if settings.fast else 3.5e9),
        outputs=("waterfall.png", "comparisons.png", "points.json"),
    )


def run(settings: LlamaGuardInt4, output: Path) -> Report:
    """The chain resumes stage by stage; every other figure is kept in points.json when it is measured."""
    bench = _Bench(settings, output)
    result = bench.chain()
    units = {"bytes": "bytes", "latency": "ms"}
    report = result.report("Llama Guard INT4: the chain on SmolLM2-135M", units)
    store = output / "points.json"
    points: dict[str, dict[str, float]] = read_object(store) if store.exists() else {}
    for name, measure in COMPARISONS.items():
        for seed in range(settings.seeds if name not in UNSEEDED else 1):
            if f"{name}/{seed}" not in points:
                points |= {f"{key}/{seed}": value for key, value in measure(bench, name, seed).items()}
                write_text(store, json.dumps(points, indent=1) + "\n")
    _add_comparisons(report, points)
    waterfall(result, "bytes", "f1", output / "waterfall.png")
    _plot(report, output / "comparisons.png")
    report.notes += [
        f"stages: {settings.examples} test messages that nobody trained on; the teacher has {settings.chain_layers} "
        "blocks; bytes: codes at 4 bits, steps and floats at 16, of an exported file its size",
        f"comparisons: answers' nll among legal words on the same messages, {settings.fast_layers} blocks cut to "
        f"{settings.fast_keep}, {settings.compare_steps} steps each",
    ]
    report.notes += ["no file was exported: the last stage is the packed model"] if settings.export == "none" else []
    return report


class _Bench:
    """Examples, teachers and statistics, each made when it is first needed and kept in the folder of the run."""

    def __init__(self, settings: LlamaGuardInt4, output: Path) -> None:
        self.settings, self.output, self.policy = settings, output, POLICY
        self.model, self.tokenizer = edgewright.load("smollm2-135m")
        self.kept = POLICY.output_vocabulary(self.tokenizer)
        longest = max(settings.teacher_steps, settings.recovery_steps, settings.qat_steps, settings.compare_steps)
        train = guard_examples(max(longest * settings.batch, settings.calibration), "train", settings.seed)
        self.test = guard_examples(settings.examples, "test", settings.seed)
        self.rows, self.test_rows = (
            answer_rows(self.tokenizer, [(POLICY.prompt(e.messages), POLICY.answer(e.categories)) for e in part])
            for part in (train, self.test)
        )
        self._stats: Importance | None = None
        self._teachers: dict[int, Any] = {}

    def teacher(self, layers: int) -> Any:
        """A copy of the first `layers` blocks of SmolLM2, trained on labels."""
        if layers in self._teachers:
            return copy.deepcopy(self._teachers[layers])

        def start() -> Any:
            model = copy.deepcopy(self.model)
            keep_layers_(model, range(layers))
            return model

        config = self.training(self.settings.teacher_steps, self.settings.learning_rate, self.settings.seed)
        stage = train_stage(self.tokenizer, AnswerLoss, lambda: self.batches(self.rows, 0), config, name="teacher")
        trained = run_chain([stage], start, self.output / f"teacher-{layers}").model.eval()
        self._teachers = {layers: trained}  # one at a time in memory
        return copy.deepcopy(trained)

    def taught(self, layers: int) -> dict[str, Tensor]:
        """The rows that students train on, with the teacher's probabilities, made once."""
        path = self.output / f"taught-{layers}.safetensors"
        if not path.exists():
            s = self.settings
            steps = s.compare_steps if layers == s.fast_layers and not s.fast else max(s.recovery_steps, s.qat_steps)
            rows = {name: part[: max(steps, s.compare_steps) * s.batch] for name, part in self.rows.items()}
            data = teacher_answers(self.teacher(layers), self.model, rows, self.kept)
            save_tensors(path, data)
        return load_tensors(path)

    def measure(self, model: Any) -> Importance:
        """Statistics of the fine-tuned model on prompts and answers of the task."""
        count = self.settings.calibration
        tokens, last = self.rows["tokens"][:count], self.rows["places"][:count].amax(1, keepdim=True) + 1
        mask = torch.arange(tokens.shape[1]) <= last
        return collect(model, ({"tokens": t, "mask": m} for t, m in zip(tokens.split(8), mask.split(8), strict=True)))

    def training(self, steps: int, rate: float, seed: int) -> Any:
        return TrainConfig(steps=steps, learning_rate=rate, seed=seed, warmup_steps=min(8, steps // 4))

    def batches(self, rows: dict[str, Tensor], seed: int) -> Any:
        return BlockBatches(rows, self.settings.batch, seed=self.settings.seed + seed)

    def chain(self) -> Any:
        s, layers = self.settings, self.settings.chain_layers
        config = make.int4_config(s.group)
        loss = lambda: AnswerLoss(kl=1.0, kept=self.kept)  # noqa: E731
        data = lambda: self.batches(self.taught(layers), 0)  # noqa: E731
        recovery = self.training(s.recovery_steps, s.learning_rate, s.seed)
        lower = self.training(s.qat_steps, s.learning_rate / 5, s.seed)
        stages = [
            make.prune_stage(self.tokenizer, self.measure, layers=s.chain_keep, mlp=s.mlp, multiple=s.group),
            make.train_stage(self.tokenizer, loss, data, recovery, settings={"loss": "ce + kl"}),
            make.quantize_stage(self.tokenizer, config, loss, data, lower, settings={"loss": "ce + kl"}),
            make.cut_stage(self.tokenizer, self.kept, config.rules[-1].activation),  # type: ignore[arg-type]
        ]
        if s.export == "pte":
            stages.append(make.export_stage(self.write_program, "guard.pte"))
        result = run_chain(stages, lambda: self.teacher(layers), self.output / "chain", evaluate=self.judge)
        figures = {"teacher" if name == "start" else name: part for name, part in result.figures.items()}
        return ChainResult(result.model, figures, result.output)

    def judge(self, model: Any) -> dict[str, float]:
        """Weights, bytes and verdicts of a stage: a model in memory, or the file that was exported."""
        if isinstance(model, Path):
            guard = GuardModel.from_pretrained(model.parent)
            return {"bytes": float(model.stat().st_size), **score_guard(guard, self.test)}
        guard = GuardModel.from_model(model, self.tokenizer, self.policy)
        sizes = {"parameters": float(parameter_counts(model).total), "bytes": float(shipped_bytes(model))}
        return sizes | score_guard(guard, self.test)

    def write_program(self, model: Any, folder: Path) -> None:
        export_guard(model, self.tokenizer, folder, GuardSettings(self.policy))

    # -- comparisons at equal steps, on the first blocks ---------------------------------------------------------------

    def cut(self, blocks: str, neurons: str, seed: int) -> Any:
        """A fresh copy of the small teacher, cut. blocks, neurons: "importance", "random", "last" or "all"."""
        s = self.settings
        model = self.teacher(s.fast_layers)
        self._stats = self._stats or self.measure(model)
        generator = torch.Generator().manual_seed(1000 * s.seed + seed)
        inner = torch.randperm(s.fast_layers - 2, generator=generator)[: s.fast_keep - 2] + 1
        kept = {
            "importance": lowest_blocks(self._stats, s.fast_keep),
            "random": (0, *sorted(inner.tolist()), s.fast_layers - 1),  # first and last stay, as by importance
            "last": tuple(range(s.fast_keep)),
            "all": tuple(range(s.fast_layers)),
        }[blocks]
        prune_depth_(model, keep=kept)
        if neurons != "all":
            scores = self._stats.keep(kept).neurons
            if neurons == "random":
                scores = tuple(torch.rand(len(score), generator=generator) for score in scores)
            prune_mlp_(model, s.mlp, scores, multiple=s.group)
        return model

    def train(self, model: Any, name: str, seed: int, kl: float, rate: float) -> Any:
        s = self.settings
        model.requires_grad_(True)
        rows = self.taught(s.fast_layers)
        loss = AnswerLoss(kl=kl, kept=self.kept)
        fit(model, loss, self.batches(rows, seed), self.training(s.compare_steps, rate, seed), label=name)
        return model.eval()

    def quality(self, model: Any) -> dict[str, float]:
        return score_rows(model, self.test_rows, self.test, self.policy, self.tokenizer)


Measured = dict[str, dict[str, float]]


def _cut_only(blocks: str, neurons: str) -> Callable[[_Bench, str, int], Measured]:
    return lambda bench, name, seed: {name: bench.quality(bench.cut(blocks, neurons, seed))}


def _recovered(blocks: str, neurons: str, kl: float) -> Callable[[_Bench, str, int], Measured]:
    def measure(bench: _Bench, name: str, seed: int) -> Measured:
        model = bench.cut(blocks, neurons, seed)
        return {name: bench.quality(bench.train(model, name, seed, kl, bench.settings.learning_rate))}

    return measure


def _four_bits(bench: _Bench, name: str, seed: int) -> Measured:
    """From one recovered model: as many more steps in float and then rounded, or those steps at 4 bits."""
    rate, config = bench.settings.learning_rate / 5, int4_config(bench.settings.group)
    cut = bench.cut("importance", "importance", seed)
    recovered = bench.train(cut, "recovered", seed, 1.0, bench.settings.learning_rate)
    rounded = quantize_(bench.train(copy.deepcopy(recovered), "int4 rounded", seed, 1.0, rate), config)
    trained = bench.train(quantize_(recovered, config), name, seed, 1.0, rate)
    return {"int4 rounded": bench.quality(rounded), name: bench.quality(trained)}


COMPARISONS: dict[str, Callable[[_Bench, str, int], Measured]] = {
    "uncut": _cut_only("all", "all"),
    "blocks by importance": _cut_only("importance", "all"),
    "blocks at random": _cut_only("random", "all"),
    "last blocks cut": _cut_only("last", "all"),
    "neurons by norm": _cut_only("all", "importance"),
    "neurons at random": _cut_only("all", "random"),
    "cut by importance": _cut_only("importance", "importance"),
    "recovered": _recovered("importance", "importance", 1.0),
    "recovered, labels only": _recovered("importance", "importance", 0.0),
    "recovered, random cut": _recovered("random", "random", 1.0),
    "recovered, last blocks cut": _recovered("last", "importance", 1.0),
    "int4 trained": _four_bits,
}
UNSEEDED = ("uncut", "blocks by importance", "last blocks cut", "neurons by norm", "cut by importance")


def _add_comparisons(report: Report, points: Measured) -> None:
    """Mean over seeds with its standard error; of one value the error over examples."""
    for name in dict.fromkeys(key.rpartition("/")[0] for key in points):
        runs = [part for key, part in points.items() if key.rpartition("/")[0] == name]
        for metric in ("nll", "f1"):
            row = over_seeds([part[metric] for part in runs])
            row["se"] = row["se"] if len(runs) > 1 else runs[0].get(f"{metric}_se")
            report.add(metric, subject=name, unit="nats/token" if metric == "nll" else "", **row)


def _plot(report: Report, path: Path) -> None:
    rows = [row for row in report.rows if row.metric == "nll"]
    names, values, errors = zip(*((row.subject, row.value, row.se or 0) for row in rows), strict=True)
    with plot(path, (6.5, 4)) as axes:
        axes.barh(names, values, xerr=errors, capsize=3)
        axes.invert_yaxis()
        axes.set_xlabel("nll of the right answer (nats per token)")
        axes.grid(axis="x", alpha=0.25)

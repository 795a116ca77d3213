"""The measurements behind the recipe: the chain on SmolLM2-135M, and its choices one by one on its first blocks."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import edgewright
from edgewright.compression import stages as make
from edgewright.compression.chain import ChainResult, run_chain
from edgewright.io.tensors import load_tensors, save_tensors
from edgewright.measure.size import parameter_counts
from edgewright.pruning.cut_folder import shipped_bytes
from edgewright.pruning.depth import keep_layers_, lowest_blocks, prune_depth_
from edgewright.pruning.importance import collect
from edgewright.pruning.width import prune_mlp_
from edgewright.quantization.api import quantize_
from edgewright.systems.llama_guard_int4.answers import (
    AnswerLoss,
    answer_rows,
    score_guard,
    score_rows,
    teacher_answers,
)
from edgewright.systems.llama_guard_int4.model import GuardModel, export_guard
from edgewright.systems.llama_guard_int4.policy import GuardSettings
from edgewright.systems.llama_guard_int4.task import POLICY, guard_examples
from edgewright.training.batches import BlockBatches
from edgewright.training.config import TrainConfig
from edgewright.training.loop import fit

if TYPE_CHECKING:
    from torch import Tensor

    from edgewright.pruning.importance import Importance

CUTS: dict[str, tuple[str, str, float | None]] = {  # blocks, neurons (see `cut`), weight of the KL if it is trained
    "uncut": ("all", "all", None),
    "blocks by importance": ("importance", "all", None),
    "blocks at random": ("random", "all", None),
    "last blocks cut": ("last", "all", None),
    "neurons by norm": ("all", "importance", None),
    "neurons at random": ("all", "random", None),
    "cut by importance": ("importance", "importance", None),
    "recovered": ("importance", "importance", 1.0),
    "recovered, labels only": ("importance", "importance", 0.0),
    "recovered, random cut": ("random", "random", 1.0),
    "recovered, last blocks cut": ("last", "importance", 1.0),
}


class GuardStudy:
    """Examples, teachers and statistics, each made when it is first needed and kept in the folder of the run."""

    def __init__(self, settings: Any, output: Path) -> None:
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
        self._teachers: dict[int, Any] = {}

    @cached_property
    def importance(self) -> Importance:
        """Statistics of the small teacher."""
        return self.statistics(self.teacher(self.settings.fast_layers))

    def teacher(self, layers: int) -> Any:
        """A copy of the first `layers` blocks of SmolLM2, trained on labels."""
        if layers in self._teachers:
            return copy.deepcopy(self._teachers[layers])

        def start() -> Any:
            model = copy.deepcopy(self.model)
            keep_layers_(model, range(layers))
            return model

        config = self.training(self.settings.teacher_steps, self.settings.learning_rate, self.settings.seed)
        stage = make.train_stage(self.tokenizer, AnswerLoss, lambda: self.batches(self.rows, 0), config, name="teacher")
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

    def statistics(self, model: Any) -> Importance:
        """Statistics of the fine-tuned model on prompts and answers of the task."""
        count = self.settings.calibration
        tokens, last = self.rows["tokens"][:count], self.rows["places"][:count].amax(1, keepdim=True) + 1
        mask = torch.arange(tokens.shape[1]) <= last
        return collect(model, ({"tokens": t, "mask": m} for t, m in zip(tokens.split(8), mask.split(8), strict=True)))

    def training(self, steps: int, rate: float, seed: int) -> Any:
        return TrainConfig(steps=steps, learning_rate=rate, seed=seed, warmup_steps=min(8, steps // 4))

    def batches(self, rows: dict[str, Tensor], seed: int) -> Any:
        return BlockBatches(rows, self.settings.batch, seed=self.settings.seed + seed)

    def chain(self) -> ChainResult:
        """The stages, each judged, the teacher first."""
        s, layers = self.settings, self.settings.chain_layers
        config = make.int4_config(s.group)
        loss = lambda: AnswerLoss(kl=1.0, kept=self.kept)  # noqa: E731
        data = lambda: self.batches(self.taught(layers), 0)  # noqa: E731
        recovery = self.training(s.recovery_steps, s.learning_rate, s.seed)
        lower = self.training(s.qat_steps, s.learning_rate / 5, s.seed)
        stages = [
            make.prune_stage(self.tokenizer, self.statistics, layers=s.chain_keep, mlp=s.mlp, multiple=s.group),
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
        s, importance = self.settings, self.importance
        model = self.teacher(s.fast_layers)
        generator = torch.Generator().manual_seed(1000 * s.seed + seed)
        inner = torch.randperm(s.fast_layers - 2, generator=generator)[: s.fast_keep - 2] + 1
        kept = {
            "importance": lowest_blocks(importance, s.fast_keep),
            "random": (0, *sorted(inner.tolist()), s.fast_layers - 1),  # first and last stay, as by importance
            "last": tuple(range(s.fast_keep)),
            "all": tuple(range(s.fast_layers)),
        }[blocks]
        prune_depth_(model, keep=kept)
        if neurons != "all":
            scores = importance.keep(kept).neurons
            if neurons == "random":
                scores = tuple(torch.rand(len(score), generator=generator) for score in scores)
            prune_mlp_(model, s.mlp, scores, multiple=s.group)
        return model

    def train(self, model: Any, label: str, seed: int, kl: float, rate: float) -> Any:
        """Train the model on labels and, by the weight `kl`, on the teacher's probabilities."""
        s = self.settings
        model.requires_grad_(True)
        rows = self.taught(s.fast_layers)
        loss = AnswerLoss(kl=kl, kept=self.kept)
        fit(model, loss, self.batches(rows, seed), self.training(s.compare_steps, rate, seed), label=label)
        return model.eval()

    def quality(self, model: Any) -> dict[str, float]:
        return score_rows(model, self.test_rows, self.test, self.policy, self.tokenizer)

    def compare(self, name: str, seed: int) -> dict[str, float]:
        """Figures of one of CUTS."""
        blocks, neurons, kl = CUTS[name]
        model = self.cut(blocks, neurons, seed)
        return self.quality(model if kl is None else self.train(model, name, seed, kl, self.settings.learning_rate))

    def four_bits(self, seed: int) -> dict[str, dict[str, float]]:
        """From one recovered model: as many more steps in float and then rounded, or those steps at 4 bits."""
        rate, config = self.settings.learning_rate / 5, make.int4_config(self.settings.group)
        cut = self.cut("importance", "importance", seed)
        recovered = self.train(cut, "recovered", seed, 1.0, self.settings.learning_rate)
        rounded = quantize_(self.train(copy.deepcopy(recovered), "int4 rounded", seed, 1.0, rate), config)
        trained = self.train(quantize_(recovered, config), "int4 trained", seed, 1.0, rate)
        return {"int4 rounded": self.quality(rounded), "int4 trained": self.quality(trained)}

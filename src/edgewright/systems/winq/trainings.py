"""Trainings of the recipe: the sentence encoder under WinQ, and the spectrum of its loss afterwards."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from edgewright.data.sentences import SentenceBench, SentenceSettings, embedding_loss
from edgewright.quantization.api import quantize_
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.systems.winq.spectrum import quantized_spectrum
from edgewright.systems.winq.training import WinQ
from edgewright.training.batches import BlockBatches
from edgewright.training.loop import TrainConfig, fit

if TYPE_CHECKING:
    from torch import nn

GRIDS = {"1": "binary", "1.58": "ternary", "2": "seq2", "3": "int3", "4": "int4"}


class Trainings:
    """A slice of the encoder and its sentences, loaded when a figure needs them.

    Args:
        settings: those of the recipe.
        layers: first ones that are kept, 0 for all.
    """

    def __init__(self, settings: Any, layers: int) -> None:
        self.settings, self.layers = settings, layers

    @cached_property
    def sentences(self) -> SentenceBench:
        s = self.settings
        return SentenceBench(SentenceSettings(self.layers, s.tokens, s.training_sentences, s.held_out_sentences))

    def trained(self, width: str, pull: float, strength: float, seed: int) -> dict[str, Any]:
        """Held-out error at the end, its course on the watched sentences, and the log of the resets; JSON values."""
        return self._train(width, pull, strength, seed)[1]

    def spectrum(self, width: str, pull: float, strength: float) -> dict[str, Any]:
        """The fields of the Hessian spectrum after a training, on one batch, as JSON values."""
        settings = self.settings
        student, _ = self._train(width, pull, strength, 0)
        batch = {name: value[: settings.batch] for name, value in self.sentences.train.items()}
        generator = torch.Generator().manual_seed(settings.seed)
        spectrum = quantized_spectrum(
            student, embedding_loss, [batch], settings.probes, settings.lanczos_steps, generator
        )
        return {**vars(spectrum), "ritz": spectrum.ritz.tolist(), "weights": spectrum.weights.tolist()}

    def _train(self, width: str, pull: float, strength: float, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        """strength: multiplies the noise."""
        settings, sentences = self.settings, self.sentences
        student = copy.deepcopy(sentences.model)
        student.embeddings.requires_grad_(False)  # half of all parameters, and none that is quantised
        quantize_(student, QuantConfig(rules=(Rule("encoder.layer.*", WeightConfig(GRIDS[width], initial="mse")),)))
        seed += settings.seed
        winq = WinQ(
            pull=pull,
            every=settings.every,
            sigma=settings.sigma * strength,
            sigma_scale=settings.sigma_scale * strength,
            sigma_mode="relative",
            seed=seed,
        )
        watched = {name: value[: settings.watched_sentences] for name, value in sentences.held_out.items()}
        with winq.attach(student, embedding_loss, settings.steps) as loss_function:
            result = fit(
                student,
                loss_function,
                BlockBatches(sentences.train, settings.batch, seed=seed),
                TrainConfig(steps=settings.steps, learning_rate=settings.learning_rate, seed=seed, log_every=10**6),
                evaluate=lambda model: {"error": float(embedding_loss(model, watched))},
                evaluate_every=settings.watch_every,
                progress=False,
            )
        return student, {
            "error": sentences.error(student),
            "course": [[int(row["step"]), row["eval_error"]] for row in result.history if "eval_error" in row],
            "resets": [vars(reset) for reset in loss_function.log],
            "pull": pull,
        }

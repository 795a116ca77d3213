"""The second test bed: MiniLM learns, under quantisation, to give its own full-precision sentence embeddings.

Sentences come from the documentation text that every Python has; training and judging use different topics. Several
recipes stand on it, because 22 million weights show in minutes what a language model shows in an hour.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

import edgewright
from edgewright.io.text import load_texts
from edgewright.measure.machine import best_device
from edgewright.training.batches import BlockBatches
from edgewright.training.loop import TrainConfig, fit

if TYPE_CHECKING:
    from torch import Tensor, nn

ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class SentenceSettings:
    """layers 0 keeps the whole encoder; sentences are cut or padded to `tokens`."""

    layers: int = 0
    tokens: int = 32
    training_sentences: int = 3000
    held_out_sentences: int = 256


class SentenceBench:
    """The encoder, its sentences, and its full-precision embeddings.

    model: the teacher, in evaluation mode. train, held_out: input_ids and attention_mask [N, tokens], target [N, H].
    """

    def __init__(self, settings: SentenceSettings) -> None:
        self.settings = settings
        self.model: Any
        self.model, self.tokenizer = edgewright.load("minilm-l6", device=best_device())
        if settings.layers:
            self.model.encoder.layer = self.model.encoder.layer[: settings.layers]
        self.train = self.encode(sentences(load_texts(None, "calibration"))[: settings.training_sentences])
        self.held_out = self.encode(sentences(load_texts(None, "evaluation"))[: settings.held_out_sentences])
        with torch.no_grad():
            self.train["target"] = self.embeddings(self.model, self.train)
            self.held_out["target"] = self.embeddings(self.model, self.held_out)

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """Token ids and mask [N, tokens] on the model's device."""
        encoded = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.settings.tokens, return_tensors="pt"
        )
        return {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def embeddings(self, model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        """Unit embeddings [N, H] of encoded sentences, a few at a time."""
        rows = range(0, len(data["input_ids"]), ROWS_AT_ONCE)
        return torch.cat([embed(model, {name: data[name][i : i + ROWS_AT_ONCE] for name in data}) for i in rows])

    def error(self, student: nn.Module) -> float:
        """Mean of 1 - cosine to the full-precision embeddings, on held-out sentences."""
        student.eval()
        with torch.no_grad():
            return float((1 - (self.embeddings(student, self.held_out) * self.held_out["target"]).sum(-1)).mean())

    def distil(
        self,
        student: nn.Module,
        *,
        steps: int,
        batch: int,
        learning_rate: float,
        seed: int,
        loss_function: Any = None,
        **options: Any,
    ) -> Any:
        """Train the student in place towards the target embeddings; `options` go to `edgewright.fit`."""
        return fit(
            student,
            loss_function or embedding_loss,
            BlockBatches(self.train, batch, seed=seed),
            TrainConfig(steps=steps, learning_rate=learning_rate, seed=seed, log_every=10),
            progress=False,
            **options,
        )


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Unit sentence embeddings [B, hidden]: mean over real tokens, as the encoder was trained to be read."""
    states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)  # [B, T, 1]
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def embedding_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean of 1 - cosine between the model's embeddings and `batch["target"]`."""
    return (1 - (embed(model, batch) * batch["target"]).sum(-1)).mean()


def sentences(texts: list[str]) -> list[str]:
    """Sentences of 40 to 200 characters, in the order of the text, each once."""
    found = [" ".join(part.split()) for text in texts for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text)]
    return [sentence for sentence in dict.fromkeys(found) if 40 <= len(sentence) <= 200]

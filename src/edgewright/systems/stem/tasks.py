"""What the recipe's own models share: their shape and their training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import new_decoder
from edgewright.models.decoder.next_token import NextToken
from edgewright.systems.stem.layer import StemConfig, with_stem
from edgewright.systems.stem.training import StemAdamW, stem_groups
from edgewright.training import BlockBatches, TrainConfig, fit
from edgewright.training.optimizer import parameter_groups


def small_decoder(shape: Any, depth: int, layers: str, stem: StemConfig | None, seed: int, **changes: Any) -> Any:
    """A decoder with random weights.

    Args:
        shape: has vocabulary, hidden, intermediate and length.
        layers: which are STEM layers where `stem` is given.
        changes: other fields of its configuration.
    """
    heads = max(2, shape.hidden // 32)
    fields = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": max(256, shape.length),
        **changes,
    }
    config = EdgeDecoderConfig(**fields)
    return new_decoder(config if stem is None else with_stem(config, layers, stem), seed)


def train(model: nn.Module, stem: bool, blocks: Tensor, shape: Any, seed: int, folder: Path) -> list[list[float]]:
    """[[step, loss], ...] of a training that leaves `model` trained.

    Args:
        shape: has steps, batch and learning_rate.
        folder: where it resumes.
    """
    if stem:
        groups = stem_groups(model, shape.learning_rate)
    else:
        groups = parameter_groups(model, 0.1, [{"params": model.parameters(), "lr": shape.learning_rate}])
        groups = [group | {"clip_norm": 1.0, "part": "backbone"} for group in groups]
    config = TrainConfig(shape.steps, warmup_steps=shape.steps // 20, clip_norm=None, seed=seed)
    result = fit(
        NextToken(model),
        lambda m, ids: m(ids),
        BlockBatches(blocks, shape.batch, seed),
        config,
        optimizer=StemAdamW(groups),
        output=folder,
        label=folder.name,
    )
    model.eval()
    return [[row["step"], row["loss"]] for row in result.history]

"""The stages of a chain for decoders from transformers: prune, train, quantise with training, cut, export.

Each function gives a `ChainStage`. They hold no state; what a stage leaves behind is an ordinary folder that
`edgewright.load` (or `load_cut`, after the cut) reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgewright.compression.chain import ChainStage
from edgewright.io.atomic import atomic_directory
from edgewright.io.models import load
from edgewright.pruning.cut_folder import load_cut, save_checkpoint, save_cut
from edgewright.pruning.depth import lowest_blocks, prune_depth_
from edgewright.pruning.importance import Importance
from edgewright.pruning.unembedding import prune_unembedding_
from edgewright.pruning.width import prune_mlp_
from edgewright.quantization.api import convert_, quantize_
from edgewright.quantization.config import ActivationConfig, QuantConfig, Rule, WeightConfig
from edgewright.quantization.packed_inputs import attach_input_quantizers_
from edgewright.training.config import TrainConfig
from edgewright.training.loop import fit

Exporter = Callable[[Any, Path], object]


def prune_stage(
    tokenizer: Any,
    measure: Callable[[Any], Importance],
    *,
    layers: int,
    mlp: int,
    multiple: int = 1,
    protect: tuple[int, ...] = (0, -1),
    name: str = "prune",
) -> ChainStage:
    """Blocks and neurons, both chosen from one `measure(model)` of the whole model; the statistics are kept beside."""

    def run(model: Any, folder: Path) -> Any:
        stats = measure(model)
        stats.save(folder / "importance.safetensors")
        prune_both_(model, stats, layers, mlp, multiple, protect)
        return model

    settings = {"layers": layers, "mlp": mlp, "multiple": multiple, "protect": list(protect)}
    return ChainStage(name, run, *_plain(tokenizer), settings)


def prune_both_(
    model: Any, stats: Importance, layers: int, mlp: int, multiple: int = 1, protect: Sequence[int] = (0, -1)
) -> tuple[int, ...]:
    """Depth and width in place, from statistics of the unpruned model; returns the blocks that stayed."""
    kept = lowest_blocks(stats, layers, protect)
    prune_depth_(model, keep=kept)
    prune_mlp_(model, mlp, stats.keep(kept), multiple=multiple)
    return kept


def train_stage(
    tokenizer: Any,
    loss: Callable[[], Any],
    batches: Callable[[], Any],
    config: TrainConfig,
    *,
    settings: dict[str, Any] | None = None,
    name: str = "recover",
) -> ChainStage:
    """Train all weights; `loss()` and `batches()` are made when the stage runs. settings: what the two stand for."""

    def run(model: Any, folder: Path) -> Any:
        model.requires_grad_(True)
        fit(model, loss(), batches(), config, output=folder / "training", label=name)
        return model.eval()

    return ChainStage(name, run, *_plain(tokenizer), {**config.fixed(), **(settings or {})})


def int4_config(group: int, *, scale: str = "full_range", inputs: bool = True) -> QuantConfig:
    """Int4 groups for all linear layers and the embedding, 8-bit asymmetric inputs per token (8da4w).

    scale: "full_range" is absmax/7.5, torchao's rule; "absmax" is absmax/7. A head tied to the embedding shares its
    codes. Steps are rounded to bfloat16 in every forward, as they are stored.
    """
    weight = WeightConfig("int4", group, scale=scale)
    activation = ActivationConfig(8, symmetric=False) if inputs else None
    return QuantConfig((Rule("*embed_tokens", weight), Rule("*", weight, activation)), skip=(), tied="together")


def quantize_stage(
    tokenizer: Any,
    config: QuantConfig,
    loss: Callable[[], Any],
    batches: Callable[[], Any],
    training: TrainConfig | None,
    *,
    settings: dict[str, Any] | None = None,
    name: str = "int4",
) -> ChainStage:
    """Fake quantisation, training under it, then codes. training None: round to nearest, without training."""
    activation = config.rules[-1].activation
    assert activation is None or isinstance(activation, ActivationConfig)

    def run(model: Any, folder: Path) -> Any:
        quantize_(model, config)
        if training is not None:
            model.requires_grad_(True)
            fit(model, loss(), batches(), training, output=folder / "training", label=name)
        return convert_(model.eval())

    def read(folder: Path) -> Any:
        model = load(folder)[0]
        return model if activation is None else attach_input_quantizers_(model, activation)

    fixed = {"quantization": config.to_dict(), **(training.fixed() if training else {}), **(settings or {})}
    return ChainStage(name, run, lambda model, folder: save_checkpoint(model, tokenizer, folder), read, fixed)


def cut_stage(
    tokenizer: Any,
    kept: Sequence[int],
    activation: ActivationConfig | None,
    *,
    say: Callable[[str], None] | None = None,
    name: str = "cut",
) -> ChainStage:
    """Keep the output rows of `kept`. activation: the inputs of the layers that the stage before quantised."""

    def run(model: Any, folder: Path) -> Any:
        for note in prune_unembedding_(model, kept):
            if say is not None:
                say(note)
        return model

    def read(folder: Path) -> Any:
        model = load_cut(folder)[0]
        return model if activation is None else attach_input_quantizers_(model, activation)

    settings = {"kept": list(kept), "activation": asdict(activation) if activation else None}
    return ChainStage(name, run, lambda model, folder: save_cut(model, tokenizer, folder), read, settings)


def export_stage(
    export: Exporter, file: str, settings: dict[str, Any] | None = None, *, name: str = "export"
) -> ChainStage:
    """`export(model, folder)` writes the files of a runtime; from here on the model is the path of one, `file`."""

    def run(model: Any, folder: Path) -> Path:
        with atomic_directory(folder / "model", ours=True) as temporary:
            export(model, temporary)
        return folder / "model" / file

    return ChainStage(
        name, run, lambda path, folder: None, lambda folder: folder / file, {"file": file, **(settings or {})}
    )


def _plain(tokenizer: Any) -> tuple[Callable[[Any, Path], object], Callable[[Path], Any]]:
    """Save and load of a float model."""
    return lambda model, folder: save_checkpoint(model, tokenizer, folder), lambda folder: load(folder)[0]

"""Folders of R-Sparse models: an ordinary checkpoint that every tool loads dense, the sparse part beside it.

config.json, model.safetensors   the dense model, float or quantised, as `edgewright.load` reads it
rsparse.json                     configuration, hashes of weights and calibration text, and of each layer sparsity,
                                 rho, rank and threshold (null: no input passes it)
rsparse.safetensors              "<layer>.scale" [n]; "<layer>.down" [n, r] and "<layer>.up" [r, m] where r > 0
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgewright.errors import FormatError
from edgewright.io.atomic import atomic_directory
from edgewright.io.json_file import json_value, read_object
from edgewright.io.models import load
from edgewright.io.packed import PackedLinear
from edgewright.io.safetensors_header import check_safetensors
from edgewright.io.tensors import load_tensors, save_tensors
from edgewright.io.typed import from_json
from edgewright.pruning.cut_folder import save_checkpoint
from edgewright.systems.r_sparse.layer import Factors, RSparseLinear, by_input_
from edgewright.systems.r_sparse.model import remove_rsparse, some_sparse_layers
from edgewright.systems.r_sparse.plan import Calibration, Plan, RSparseConfig, uniform_plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DESCRIPTION, TENSORS = "rsparse.json", "rsparse.safetensors"
FORMAT = 1
MAX_TARGETS = 200
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def save_rsparse(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    config: RSparseConfig,
    stats: Calibration,
    plan: Plan | None = None,
) -> Path:
    """Write a sparse model, whole or not at all; `load_rsparse` gives the same bits.

    Args:
        model: as `apply_rsparse` left it.
        tokenizer: saved beside it.
        folder: new or empty.
        config: what `apply_rsparse` was given.
        stats: the same, for the hash of its text.
        plan: the same; None for the configuration's own.

    Returns:
        The folder.

    Raises:
        UsageError: the model is dense.
        OutputError: the folder cannot be written.
    """
    layers = some_sparse_layers(model)
    plan = uniform_plan(layers, config) if plan is None else plan
    tensors: dict[str, Tensor] = {}
    described = {}
    for name, layer in layers.items():
        described[name] = {**asdict(plan[name]), "rank": layer.rank, "threshold": json_value(float(layer.threshold))}
        parts = {"scale": layer.scale, "down": layer.down, "up": layer.up}
        tensors |= {f"{name}.{key}": t.detach().cpu().contiguous() for key, t in parts.items() if t is not None}
    description = {
        "format": FORMAT,
        "config": asdict(config),
        "model": Factors().fingerprint(layer.inner for layer in layers.values()),
        "text": stats.text,
        "layers": described,
    }
    remove_rsparse(model)
    try:
        with atomic_directory(folder) as temporary:
            save_checkpoint(model, tokenizer, temporary)
            save_tensors(temporary / TENSORS, tensors)
            (temporary / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    finally:
        for name, layer in layers.items():
            by_input_(layer.inner)
            model.set_submodule(name, layer)
    return Path(folder)


def is_rsparse(folder: str | Path) -> bool:
    """Whether a folder holds a model that `save_rsparse` wrote."""
    return (Path(folder) / DESCRIPTION).is_file()


def load_rsparse(
    folder: str | Path, device: str | torch.device = "cpu"
) -> tuple[Any, PreTrainedTokenizerBase, RSparseConfig]:
    """What `save_rsparse` wrote.

    Args:
        folder: with the dense checkpoint and both R-Sparse files.
        device: where the model goes.

    Returns:
        (model, tokenizer, configuration).

    Raises:
        FormatError: the folder contradicts itself, or its weights are not those that were calibrated.
        UsageError: it cannot be read.
    """
    folder = Path(folder)
    description, config = _description(folder)
    entries = check_safetensors(folder / TENSORS)
    model, tokenizer = load(folder, device=device)
    inner = {name: _linear(folder, model, name) for name in description["layers"]}
    if Factors().fingerprint(inner.values()) != description["model"]:
        raise FormatError(f"{folder}: its weights are not those that {DESCRIPTION} was made for; sparsify it again")
    expected: dict[str, tuple[int, ...]] = {}
    for name, fields in description["layers"].items():
        n, m, rank = inner[name].in_features, inner[name].out_features, fields["rank"]
        expected[f"{name}.scale"] = (n,)
        if rank:
            expected |= {f"{name}.down": (n, rank), f"{name}.up": (rank, m)}
    if {name: entry.shape for name, entry in entries.items()} != expected:
        odd = sorted({(k, e.shape) for k, e in entries.items()} ^ set(expected.items()))[0][0]
        raise FormatError(f"{folder / TENSORS}: the tensor {odd[:80]!r} does not fit the layers of {DESCRIPTION}")
    tensors = load_tensors(folder / TENSORS)
    for name, tensor in tensors.items():
        if tensor.dtype not in STORED_DTYPES or not torch.isfinite(tensor).all():
            raise FormatError(f"{folder / TENSORS}: {name} must hold finite floats, not {tensor.dtype} with NaN or so")
    for name, fields in description["layers"].items():
        down, up = tensors.get(f"{name}.down"), tensors.get(f"{name}.up")
        limit = fields["threshold"]
        sparse = RSparseLinear(
            inner[name],
            threshold=math.inf if limit is None else limit,
            scale=tensors[f"{name}.scale"].float().to(device),
            down=None if down is None else down.to(device),
            up=None if up is None else up.to(device),
            dense_tokens=None if config.dense_prefill else 1,
            path=config.path,
        )
        model.set_submodule(name, sparse.eval())
    return model, tokenizer, config


def _linear(folder: Path, model: nn.Module, name: str) -> Any:
    try:
        layer: Any = model.get_submodule(name)
    except AttributeError:
        layer = None
    if type(layer) not in (nn.Linear, PackedLinear):
        raise FormatError(f"{folder}: the model has no linear layer {name[:80]!r}")
    return layer


def _description(folder: Path) -> tuple[dict[str, Any], RSparseConfig]:
    path = folder / DESCRIPTION
    data = read_object(path, hint="edgewright sparsify MODEL --output FOLDER writes it")
    if data.get("format") != FORMAT:
        raise FormatError(f"{path} has no format {FORMAT}, the one that this version reads")
    layers = data.get("layers")
    if not isinstance(layers, dict) or not layers or not all(map(_is_layer, layers.values())):
        raise FormatError(f"{path}: every layer needs sparsity, rho, a rank and a threshold, and there must be one")
    settings: Any = data.get("config")
    fits = isinstance(settings, dict) and isinstance(data.get("model"), str)
    if not fits or len(str(settings.get("targets", ""))) > MAX_TARGETS:
        raise FormatError(f"{path} needs a configuration with targets of at most {MAX_TARGETS} characters, and a hash")
    return data, from_json(RSparseConfig, settings, path)


def _is_layer(fields: Any) -> bool:
    if not isinstance(fields, dict) or not {"rank", "threshold"} <= fields.keys():
        return False
    rank, limit = fields["rank"], fields["threshold"]
    number = limit is None or (isinstance(limit, int | float) and not isinstance(limit, bool) and math.isfinite(limit))
    return type(rank) is int and 0 <= rank < 2**31 and number

"""What quantisation did to each layer: bits, level occupancy, codes flipped by training, movement, output error.

before = snapshot(model)            # right after quantize_
...                                 # training
save_report(layer_rows(model, before), "out")
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.io.atomic import atomic_file
from edgewright.measure.plot import plot
from edgewright.quantization.api import quantized_modules


@dataclass(frozen=True)
class LayerRow:
    """One quantised weight.

    Args:
        layer: its name.
        grid: of its codes.
        weights: how many.
        bits_per_weight: of codes and scales.
        occupancy: share of weights on each level, lowest first.
        error: |W_q - W|^2 / |W|^2 of the latent weights.
        flipped: share of codes that differ from the snapshot.
        movement: |W - W0| / |W0| of the latent weights.
    """

    layer: str
    grid: str
    weights: int
    bits_per_weight: float
    occupancy: tuple[float, ...]
    error: float
    flipped: float = 0.0
    movement: float = 0.0


@dataclass(frozen=True)
class WeightSnapshot:
    """Codes and latent weights at one moment, on the CPU."""

    codes: dict[str, Tensor] = field(repr=False)
    weights: dict[str, Tensor] = field(repr=False)


@torch.no_grad()
def snapshot(model: nn.Module) -> WeightSnapshot:
    """Codes (int8) and latent weights (as they are) of every layer under quantisation, for comparing later.

    Args:
        model: under quantisation.

    Raises:
        UsageError: a model that is not.
    """
    codes, weights = {}, {}
    for name, module in quantized_modules(model):
        if module.quantizer is not None:
            codes[name] = module.quantizer.pack(module.weight).codes.cpu()
            weights[name] = module.weight.detach().cpu().clone()
    if not codes:
        raise UsageError("the model has no weight under quantisation; call quantize_ first")
    return WeightSnapshot(codes, weights)


@torch.no_grad()
def layer_rows(model: nn.Module, since: WeightSnapshot | None = None) -> list[LayerRow]:
    """A row for every weight under quantisation.

    Args:
        model: under quantisation.
        since: compared with; None: nothing.

    Returns:
        In model order. bits_per_weight counts the grid's bits and 16 bits a scale; what a file needs follows from its
        block type (the exporter's table has that).

    Raises:
        UsageError: a model that is not under quantisation.
    """
    rows = []
    for name, module in quantized_modules(model):
        if module.quantizer is None:
            continue
        packed = module.quantizer.pack(module.weight)
        latent = module.weight.detach().float().reshape(packed.codes.shape)
        levels = module.quantizer.quantizer.grid.levels.to(latent.device)
        counts = torch.stack([(packed.codes + packed.offset == level).sum() for level in levels])
        energy = latent.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        flipped = movement = 0.0
        if since is not None:
            flipped = float((packed.codes.cpu() != since.codes[name]).float().mean())
            start = since.weights[name].float().reshape(latent.shape).to(latent.device)
            movement = float((latent - start).norm() / start.norm().clamp_min(torch.finfo(torch.float32).tiny))
        rows.append(
            LayerRow(
                layer=name,
                grid=packed.grid,
                weights=packed.codes.numel(),
                bits_per_weight=module.quantizer.quantizer.grid.bits + 16 * packed.step.numel() / packed.codes.numel(),
                occupancy=tuple((counts / packed.codes.numel()).tolist()),
                error=float((packed.dequantize() - latent).square().sum() / energy),
                flipped=flipped,
                movement=movement,
            )
        )
    if not rows:
        raise UsageError("the model has no weight under quantisation; call quantize_ first")
    return rows


def save_report(rows: Sequence[LayerRow], folder: str | Path) -> None:
    """Write layers.csv and layers.png (error, flipped codes and movement by layer).

    Args:
        rows: of `layer_rows`.
        folder: where.
    """
    folder = Path(folder)
    with atomic_file(folder / "layers.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(asdict(rows[0]))
        for row in rows:
            values = asdict(row) | {"occupancy": " ".join(f"{share:.4f}" for share in row.occupancy)}
            writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in values.values())
    with plot(folder / "layers.png", (8.0, 4.0)) as axes:
        for name in ("error", "flipped", "movement"):
            axes.plot([getattr(row, name) for row in rows], marker=".", linewidth=0.8, label=name)
        axes.set(xlabel="layer, in the order of the model", ylabel="relative size", yscale="symlog")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()

"""How much of a network survives quantisation, layer by layer: signal to quantisation noise of weights and features.

    SQNR = 10 log10( sum W^2 / sum (W - W_q)^2 )   in dB; about 6 dB a bit

The report shows why one step a layer ruins depthwise networks (arXiv 1806.08342, section 3.1.3): folding a batch norm
multiplies each output channel by gamma / sigma, which spreads the channels' ranges over orders of magnitude, and the
widest channel then sets the step for all.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgewright.checks import check, one_of
from edgewright.errors import UsageError
from edgewright.io.atomic import atomic_file
from edgewright.measure.plot import plot
from edgewright.quantization.affine import AffineScheme, fake_quantize
from edgewright.quantization.static.batchnorm import ConvBNQuant2d
from edgewright.quantization.static.config import StaticConfig, quantization
from edgewright.quantization.static.network import quantize_static
from edgewright.quantization.static.observers import ActivationQuantizer

SCHEMES = ("layer_sym", "layer_asym", "channel_sym", "channel_asym")
CEILING = 200.0  # dB shown where there is no noise at all
DEAD = 1e-4  # a channel whose range is this far below the widest one's carries next to nothing


@dataclass(frozen=True)
class WeightRow:
    """One layer under one scheme. kind: "depthwise", "convolution" or "linear".

    sqnr of the whole layer, worst_channel and median_channel over its live output channels, in dB. spread_before and
    spread_after: range of the widest channel over that of the median one, before and after folding. dead_channels:
    those with a range below 1e-4 of the widest one's, left out of the two channel figures.
    """

    layer: str
    kind: str
    scheme: str
    bits: int
    sqnr: float
    worst_channel: float
    median_channel: float
    spread_before: float
    spread_after: float
    channels: int
    dead_channels: int


def scheme_named(name: str, bits: int) -> AffineScheme:
    """The weight quantiser of one of SCHEMES."""
    check("scheme", name, one_of(*SCHEMES))
    granularity, symmetry = name.split("_")
    symmetric = symmetry == "sym"
    return AffineScheme(bits, symmetric, narrow=symmetric, per_channel=granularity == "channel")


def sqnr(signal: Tensor, noisy: Tensor, channels: bool = False) -> Tensor:
    """SQNR in dB of `noisy` against `signal`: 0-dimensional, or one figure for each index of the first dimension."""
    rows = signal.shape[0] if channels else 1
    clean, error = signal.double().reshape(rows, -1), (signal - noisy).double().reshape(rows, -1)
    ratio = clean.square().sum(1) / error.square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    figures = (10 * ratio.log10()).clamp(max=CEILING)
    return figures if channels else figures[0]


@torch.no_grad()
def sqnr_report(
    model: nn.Module,
    example: Any,
    schemes: Sequence[str] = SCHEMES,
    bits: Sequence[int] = (8, 6, 4),
) -> list[WeightRow]:
    """Signal to quantisation noise of the weights of a float model; batch norms are folded first.

    Args:
        model: float, or of `quantize_static`.
        example: an input batch, as for `quantize_static`.
        schemes: of "layer_sym", "layer_asym", "channel_sym", "channel_asym".
        bits: widths.

    Returns:
        A row for every layer, width and scheme, figures in dB.
    """
    rows = []
    for layer in _layers(model, example):
        weight, _ = layer.folded()
        spans, raw = _spans(weight), _spans(layer.weight)
        live = spans > DEAD * spans.max()
        for width in bits:
            for name in schemes:
                scheme = scheme_named(name, width)
                quantised = fake_quantize(weight, *scheme.weight_parameters(weight, layer.name), scheme)
                each = sqnr(weight, quantised, channels=True)[live]
                rows.append(
                    WeightRow(
                        layer=layer.name,
                        kind=_kind(layer),
                        scheme=name,
                        bits=width,
                        sqnr=float(sqnr(weight, quantised)),
                        worst_channel=float(each.min()),
                        median_channel=float(each.median()),
                        spread_before=_spread(raw),
                        spread_after=_spread(spans),
                        channels=len(weight),
                        dead_channels=int((~live).sum()),
                    )
                )
    return rows


@torch.no_grad()
def feature_sqnr(prepared: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """SQNR in dB of each activation of a prepared model against itself in float.

    The noise of an activation is what all layers before it and its own quantiser add.

    Args:
        prepared: of `quantize_static`, traced and calibrated.
        batches: of inputs; signal and noise are summed over all.

    Returns:
        Name of an activation -> dB.

    Raises:
        UsageError: a model that was not traced, or no batch with a signal.
    """
    if not isinstance(prepared, fx.GraphModule):
        raise UsageError("feature_sqnr needs a traced model from quantize_static")
    modules = dict(prepared.named_modules())
    nodes = {n: modules[str(n.target)] for n in prepared.graph.nodes if n.op == "call_module"}
    points = {node: module.name for node, module in nodes.items() if isinstance(module, ActivationQuantizer)}
    energy, noise = dict.fromkeys(points.values(), 0.0), dict.fromkeys(points.values(), 0.0)
    training = prepared.training
    prepared.eval()
    for batch in batches:
        seen = []
        for on in (False, True):
            recorder = _Recorder(prepared, set(points))
            with quantization(prepared, on):
                recorder.run(batch)
            seen.append(recorder.seen)
        for node, name in points.items():
            clean, noisy = seen[0][node].double(), seen[1][node].double()
            energy[name] += float(clean.square().sum())
            noise[name] += float((clean - noisy).square().sum())
    prepared.train(training)
    if not any(energy.values()):
        raise UsageError("feature_sqnr needs at least one batch whose activations are not all zero")
    ratios = {name: torch.tensor(energy[name] / max(noise[name], 1e-300)) for name in energy}
    return {name: min(float(10 * ratio.log10()), CEILING) for name, ratio in ratios.items()}


def save_rows(rows: Sequence[WeightRow], path: str | Path) -> None:
    """The rows as CSV."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(asdict(rows[0]))
        for row in rows:
            writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in asdict(row).values())


def plot_sqnr(rows: Sequence[WeightRow], path: str | Path, bits: int = 8) -> None:
    """SQNR along the depth of the network, one line a scheme; points are depthwise layers, bars reach down to the
    worst channel.
    """
    chosen = [row for row in rows if row.bits == bits]
    layers = list(dict.fromkeys(row.layer for row in chosen))
    with plot(path, (9.0, 4.5)) as axes:
        for scheme in dict.fromkeys(row.scheme for row in chosen):
            line = [row for row in chosen if row.scheme == scheme]
            places = [layers.index(row.layer) for row in line]
            drawn = axes.plot(places, [row.sqnr for row in line], linewidth=1, label=scheme.replace("_", ", "))[0]
            deep = [(p, row) for p, row in zip(places, line, strict=True) if row.kind == "depthwise"]
            if deep:
                x, tops = [p for p, _ in deep], [row.sqnr for _, row in deep]
                axes.vlines(x, [row.worst_channel for _, row in deep], tops, color=drawn.get_color(), alpha=0.35)
                axes.plot(x, tops, "o", markersize=4, color=drawn.get_color())
        axes.set(xlabel="layer, in the order of the network", ylabel=f"weight SQNR at {bits} bits (dB)")
        axes.set_title("points: depthwise layers; bars: down to the worst channel", fontsize=9)
        axes.axhline(0, color="gray", linewidth=0.6)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, ncols=2)


@torch.no_grad()
def plot_channel_ranges(model: nn.Module, example: Any, path: str | Path, layer: str | None = None) -> str:
    """The channels' ranges of one layer before and after folding, beside the 8-bit step that the widest one sets.

    layer None: the depthwise layer whose ranges folding spreads most. Returns the layer's name. A channel below the
    dashed line is narrower than one step: per-layer quantisation makes it zero or one level.
    """
    layers = _layers(model, example)
    if layer is None:
        deep = [candidate for candidate in layers if _kind(candidate) == "depthwise"] or layers
        chosen = max(deep, key=lambda candidate: _spread(_spans(candidate.folded()[0])))
    else:
        check("layer", layer, one_of(*(candidate.name for candidate in layers)))
        chosen = next(candidate for candidate in layers if candidate.name == layer)
    before, after = _spans(chosen.weight), _spans(chosen.folded()[0])
    order = after.argsort()
    step = float(after.max()) / 127
    floor = step / 20  # what lies below is drawn on the edge
    lost = int((after < step / 2).sum())
    with plot(path, (8.0, 4.5)) as axes:
        axes.plot(before[order].clamp_min(floor), ".", markersize=3, label="weights as trained")
        axes.plot(after[order].clamp_min(floor), ".", markersize=3, label="after folding the batch norm")
        axes.axhline(step, color="black", linestyle="--", linewidth=0.8, label="one 8-bit step of the whole layer")
        axes.set(yscale="log", xlabel="output channel, sorted", ylabel="largest |weight| of the channel")
        axes.set_title(
            f"{chosen.name}: {lost} of {len(after)} channels round to zero with one step a layer", fontsize=10
        )
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return chosen.name


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what the given nodes gave."""

    def __init__(self, model: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(model)
        self.wanted = wanted
        self.seen: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted:
            self.seen[n] = result
        return result


def _layers(model: nn.Module, example: Any) -> list[ConvBNQuant2d]:
    if not any(isinstance(module, ConvBNQuant2d) for module in model.modules()):
        model = quantize_static(model, example, StaticConfig(weight_bits=None, activation_bits=None))
    return [module for module in model.modules() if isinstance(module, ConvBNQuant2d)]


def _kind(layer: ConvBNQuant2d) -> str:
    if layer.operation.linear:
        return "linear"
    return "depthwise" if layer.operation.groups > 1 and layer.weight.shape[1] == 1 else "convolution"


def _spans(weight: Tensor) -> Tensor:
    """Largest magnitude of each output channel."""
    return weight.detach().abs().flatten(1).amax(1)


def _spread(spans: Tensor) -> float:
    return float(spans.max() / spans.median().clamp_min(torch.finfo(torch.float32).tiny))

"""Second-order calibration: choose codes column by column so that each rounding error is repaired by later columns.

Source: GPTQ, arXiv 2210.17323 (optimal brain quantisation with a shared inverse Hessian H = X^T X). The model is walked
block by block (`walk`); hidden states wait on disk, so memory does not grow with the number of samples.

deviations: scales minimise the squared error weighted by diag(H) before any column is rounded (static groups), columns
are visited in order of falling diag(H), and the compensated but unrounded weights are kept as latent weights: rounding
them gives exactly the chosen codes, so training under quantisation may start from this solution.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgewright.errors import FormatError, Unsupported, UsageError
from edgewright.measure.memory import release_free_memory
from edgewright.quantization.api import quantize_
from edgewright.quantization.config import QuantConfig, Rule
from edgewright.quantization.fake_quantize import Quantizer
from edgewright.quantization.layers import QuantLinear
from edgewright.quantization.scales import grouped, mse_alpha
from edgewright.quantization.walk import Walk

TOKENS_AT_ONCE = 1024  # of calibration text in one call of a block
COLUMNS_AT_ONCE = 128  # updates inside such a slice are eager, beyond it they are one matrix product


@dataclass(frozen=True)
class LayerError:
    """Output error of one layer: squared error of its outputs relative to their energy, before and after repair."""

    layer: str
    rounded: float
    repaired: float


def gptq_(
    model: nn.Module,
    config: QuantConfig,
    blocks: Tensor,
    *,
    damping: float = 0.01,
    scratch: str | Path | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> list[LayerError]:
    """Put `model` under quantisation, in place, with codes and scales chosen on calibration text.

    GPTQ (arXiv 2210.17323). Linear layers inside the model's block list are calibrated; others selected by `config`
    (embedding, head, stacks of experts) follow their own scale rule. A block that runs several times is calibrated on
    what its first run sees.

    Args:
        model: a transformer with a list of blocks.
        config: which modules, and how.
        blocks: token ids, int64 [samples, length].
        damping: added to diag(H), relative to its mean.
        scratch: folder for the hidden states (samples * length * width * 4 bytes); None: the system's temporary one.
        on_layer: called with (blocks done, blocks in all).

    Returns:
        The error of each calibrated layer.

    Raises:
        UsageError: unusable calibration data, and what `quantize_` refuses.
        Unsupported: a model without a list of blocks or whose hidden states do not go from block to block as they are.
        FormatError: inputs of a layer that are not finite.
    """
    if blocks.ndim != 2 or blocks.shape[0] == 0:
        raise UsageError(f"calibration data of shape {tuple(blocks.shape)}; expected token ids [samples, length]")
    quantize_(model, _with_stored_scales(config))
    layers = transformer_blocks(model)
    was_training = model.training
    model.eval()
    report: list[LayerError] = []
    release_free_memory()
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="edgewright-", dir=scratch) as folder:
        walk = Walk(model, layers, blocks)
        states = _first_inputs(walk, len(blocks), Path(folder) / "hidden")
        calibrated: set[int] = set()
        for call, index in enumerate(walk.order):
            if index not in calibrated:
                report += _calibrate_block(walk, call, states, damping)
                calibrated.add(index)
            if call + 1 < len(walk.order):
                for samples in states.slices:
                    states.write(samples, walk.run(samples, call, states.read(samples)))
            if on_layer is not None:
                on_layer(call + 1, len(walk.order))
    model.train(was_training)
    return report


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of blocks that holds most of a model's parameters.

    Args:
        model: a transformer.

    Raises:
        Unsupported: there is none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise Unsupported(f"{type(model).__name__} has no list of blocks; calibrate it with scale='mse' instead")
    return max(lists, key=lambda module: sum(p.numel() for p in module.parameters()))


def _with_stored_scales(config: QuantConfig) -> QuantConfig:
    """The same rules with scales that are stored, so that a changed weight does not change its scale."""

    def stored(rule: Rule) -> Rule:
        if rule.weight is None or rule.weight.scale in ("learned", "mse") or rule.weight.grid == "int8":
            return rule
        return replace(rule, weight=replace(rule.weight, scale="mse"))

    return replace(config, rules=tuple(stored(rule) for rule in config.rules))


class _States:
    """Hidden states [samples, length, width] in a file, a few samples in memory at a time."""

    def __init__(self, path: Path, samples: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape[1:], dtype, device  # one sample: [length, width]
        self._file = path.open("w+b", buffering=0)
        self._bytes = self.shape.numel() * 4
        together = max(1, TOKENS_AT_ONCE // shape[1])
        self.slices = [range(start, min(start + together, samples)) for start in range(0, samples, together)]

    def write(self, samples: range, states: Tensor) -> None:
        self._file.seek(samples.start * self._bytes)
        self._file.write(states.to(torch.float32).cpu().contiguous().numpy().data)

    def read(self, samples: range) -> Tensor:
        self._file.seek(samples.start * self._bytes)
        values = np.frombuffer(bytearray(self._file.read(len(samples) * self._bytes)), dtype=np.float32)
        return torch.from_numpy(values).reshape(len(samples), *self.shape).to(self.device, self.dtype)


def _first_inputs(walk: Walk, samples: int, path: Path) -> _States:
    """Inputs of the first block for every sample."""
    hidden = walk.first_input(range(1))
    states = _States(path, samples, hidden.shape, hidden.dtype, hidden.device)
    for part in states.slices:
        states.write(part, walk.first_input(part))
    return states


@contextmanager
def _unquantized(modules: list[QuantLinear]) -> Iterator[None]:
    """Run these layers with their float weights: calibration looks at the inputs the original weights would see."""
    kept = [module.quantizer for module in modules]
    for module in modules:
        module.quantizer = None
    try:
        yield
    finally:
        for module, quantizer in zip(modules, kept, strict=True):
            module.quantizer = quantizer


def _calibrate_block(walk: Walk, call: int, states: _States, damping: float) -> list[LayerError]:
    prefix = f"{walk.order[call]}"
    block = walk.layers[walk.order[call]]
    named = [(name, module) for name, module in block.named_modules() if isinstance(module, QuantLinear)]
    named = [(name, module) for name, module in named if module.quantizer is not None]
    if not named:
        return []
    hessians: dict[str, Tensor] = {}
    members: dict[str, list[str]] = {}
    # Layers fed by the same tensor (q, k, v; gate, up) share one Hessian. The tensors are held while a sample runs,
    # for a freed one could give its address to another.
    seen: dict[int, tuple[str, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, positional: tuple[Any, ...]) -> None:
            inputs = positional[0]
            owner, _held = seen.setdefault(inputs.data_ptr(), (name, inputs))
            if name not in members.setdefault(owner, []):
                members[owner].append(name)
            if owner == name:
                flat = inputs.reshape(-1, inputs.shape[-1]).float()  # [tokens, in]
                if owner in hessians:
                    hessians[owner].addmm_(flat.t(), flat)
                else:
                    hessians[owner] = flat.t() @ flat

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in named]
    try:
        with _unquantized([module for _, module in named]):
            for samples in states.slices:
                seen.clear()
                walk.run(samples, call, states.read(samples))
    finally:
        for handle in handles:
            handle.remove()
    modules = dict(named)
    report = []
    for owner, names in members.items():
        hessian = hessians.pop(owner)
        if not torch.isfinite(hessian).all():
            raise FormatError(f"inputs of layer {prefix}.{owner} are not finite; the model overflows on this text")
        inverse = inverse_factor(hessian, damping)
        for name in names:
            rounded, repaired = _calibrate_layer(modules[name], hessian, *inverse)
            report.append(LayerError(f"{prefix}.{name}", rounded, repaired))
    return report


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """What `repair` needs of a Hessian.

    Args:
        hessian: H = X^T X, float32 [in, in].
        damping: added to its diagonal, relative to the mean.

    Returns:
        (order [in], U [in, in]): columns by falling diag(H), and the upper Cholesky factor of the inverse of the
        damped, ordered H.

    Raises:
        FormatError: no factor exists.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    mean = diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    for strength in (damping, 10 * damping, 100 * damping, 1.0):  # few samples: H may be singular in float32
        damped = hessian[order][:, order]
        damped.diagonal().add_(mean * strength)
        factor, failed = torch.linalg.cholesky_ex(damped)
        del damped  # a Hessian of a wide layer is as large as its weight: no copy longer than needed
        if not failed:
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return order, inverse
    raise FormatError("the calibration inputs give a Hessian without a Cholesky factor; use more calibration text")


def _calibrate_layer(module: QuantLinear, hessian: Tensor, order: Tensor, inverse: Tensor) -> tuple[float, float]:
    """Set weight_scale and latent weights of one layer; (relative output error of rounding, of the repaired codes)."""
    quantizer = module.quantizer
    assert quantizer is not None and quantizer.weight_scale is not None
    original = module.weight.detach().float().clone()  # [out, in]
    importance = hessian.diagonal().clamp_min(hessian.diagonal().mean() * 1e-6)
    if quantizer.config.granularity != "tensor":
        rule, grid = quantizer.quantizer, quantizer.quantizer.grid
        weights = grouped(original, quantizer.groups)
        share = importance.reshape(1, quantizer.groups, -1)
        quantizer.weight_scale.copy_(mse_alpha(weights, grid, share, rule.scale_dtype))
    alpha = quantizer.alpha(module.weight)
    latent = repair(original, alpha, quantizer.quantizer, order, inverse)
    module.weight.copy_(latent.to(module.weight.dtype))
    energy = _output_energy(original, hessian).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = _output_energy(quantizer.quantizer.values(original, alpha) - original, hessian)
    repaired = _output_energy(quantizer.quantizer.values(latent, alpha) - original, hessian)
    return float(rounded / energy), float(repaired / energy)


def _output_energy(matrix: Tensor, hessian: Tensor) -> Tensor:
    """Sum over samples of |X matrix^T|^2 = trace(matrix H matrix^T)."""
    return (matrix @ hessian).mul_(matrix).sum()


def repair(weight: Tensor, alpha: Tensor, quantizer: Quantizer, order: Tensor, inverse: Tensor) -> Tensor:
    """Latent weights [out, in] whose rounding is the second-order solution (GPTQ, algorithm 1).

    Args:
        weight: float32 [out, in].
        alpha: clip scales, [out, groups].
        quantizer: grid and storage of scales.
        order, inverse: from `inverse_factor`.

    Returns:
        float32 [out, in]
    """
    grid = quantizer.grid
    columns = weight.shape[1]
    scale = quantizer.scale(alpha).repeat_interleave(columns // alpha.shape[1], dim=1)  # [out, in]
    work = weight[:, order].t().contiguous()  # [in, out]: a column of the weight is contiguous
    scale = scale[:, order].t().contiguous()
    latent = torch.empty_like(work)
    for start in range(0, columns, COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, columns)
        errors = torch.empty(end - start, work.shape[1], device=work.device)
        for column in range(start, end):
            value = work[column]
            latent[column] = value
            code = grid.encode_(value / scale[column])
            error = (value - code.add_(grid.offset).mul_(scale[column])).div_(inverse[column, column])
            errors[column - start] = error
            if column + 1 < end:
                work[column + 1 : end].addr_(inverse[column, column + 1 : end], error, alpha=-1.0)
        if end < columns:
            work[end:].addmm_(inverse[start:end, end:].t(), errors, alpha=-1.0)
    result = torch.empty_like(latent)
    result[order] = latent
    return result.t().contiguous()

"""How much each block and each MLP neuron of a decoder matters, measured in one pass over calibration text.

With X_i [B, T, d] the residual stream entering block i, over real tokens only (ShortGPT, arXiv 2403.03853):
    BI_i = 1 - mean over tokens of <X_i, X_(i+1)> / (|X_i| |X_(i+1)|)
With h = act(gate(x)) * up(x) [B, T, F] the input of the down projection (Minitron, arXiv 2407.14679; Llama Guard 3-1B):
    I_j = mean over sequences of the l2 norm over tokens of h[b, :, j]
Everything kept is a sum, so the statistics of several processes or files add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import FormatError, Unsupported, UsageError
from edgewright.io.tensors import load_tensors, save_tensors

Batch = Tensor | Mapping[str, Tensor]
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class MLPNames:
    """Names of a gated MLP's layers inside a block; `gate` None for an MLP with one input projection."""

    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    gate: str | None = "mlp.gate_proj"

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.up,) if self.gate is None else (self.gate, self.up)


@dataclass(frozen=True)
class Importance:
    """Sums over calibration text, float64.

    cosines: [L] sum over tokens of the cosine between a block's input and output. norms: one [F] a block, the sum over
    sequences of each neuron's norm; empty when neurons were not measured.
    """

    cosines: Tensor
    tokens: int
    norms: tuple[Tensor, ...]
    sequences: int

    @property
    def blocks(self) -> Tensor:
        """BI [L]: 0 for a block that leaves every direction as it was."""
        return 1.0 - self.cosines / self.tokens

    @property
    def neurons(self) -> tuple[Tensor, ...]:
        """I [F] of every block. Raises UsageError when they were not measured."""
        if not self.norms:
            raise UsageError("neurons were not measured; call collect(model, batches, neurons=True)")
        return tuple(norm / self.sequences for norm in self.norms)

    def __add__(self, other: Importance) -> Importance:
        if [n.shape for n in self.norms] != [n.shape for n in other.norms] or len(self.cosines) != len(other.cosines):
            raise UsageError("statistics of models of different shape cannot be added")
        norms = tuple(a + b for a, b in zip(self.norms, other.norms, strict=True))
        return Importance(
            self.cosines + other.cosines, self.tokens + other.tokens, norms, self.sequences + other.sequences
        )

    def keep(self, layers: Iterable[int]) -> Importance:
        """The statistics of some of the blocks, for a model that was cut to them."""
        kept = list(layers)
        norms = tuple(self.norms[i] for i in kept) if self.norms else ()
        return replace(self, cosines=self.cosines[kept], norms=norms)

    def reduced(self) -> Importance:
        """The sum over all processes of torch.distributed; itself where there is only one."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        counts = torch.tensor([self.tokens, self.sequences], dtype=torch.float64)
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        flat = torch.cat([counts, self.cosines, *self.norms]).to(device)
        torch.distributed.all_reduce(flat)
        sizes = [2, len(self.cosines), *(len(norm) for norm in self.norms)]
        total, cosines, *norms = flat.cpu().split(sizes)
        return Importance(cosines, int(total[0]), tuple(norms), int(total[1]))

    def save(self, path: str | Path) -> None:
        """Write the sums as one safetensors file."""
        tensors = {f"norms.{i}": norm for i, norm in enumerate(self.norms)}
        tensors |= {"cosines": self.cosines, "counts": torch.tensor([self.tokens, self.sequences])}
        save_tensors(path, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Importance:
        """What `save` wrote. Raises FormatError for any other file."""
        tensors = load_tensors(path)
        try:
            norms = tuple(tensors[f"norms.{i}"] for i in range(len(tensors) - 2))
            tokens, sequences = tensors["counts"].tolist()
            return cls(tensors["cosines"], tokens, norms, sequences)
        except (KeyError, ValueError) as error:
            raise FormatError(f"{path} holds no importance statistics") from error


def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    blocks: bool = True,
    neurons: bool = True,
    names: MLPNames | None = None,
) -> Importance:
    """Run the unpruned model over `batches` once and return its statistics.

    A batch: token ids [B, T], or a dict with "tokens" [B, T] and "mask" [B, T], true where a token is real; padding is
    neither attended to nor counted. Any decoder with `.model.layers` whose MLPs have the given names will do.
    Raises UsageError when no real token came, Unsupported for a decoder that cannot be pruned this way.
    """
    names = names or MLPNames()
    layers = decoder_layers(model)
    check_prunable(model, names)
    device = next(model.parameters()).device
    tally = _Tally(len(layers))
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), _watched(layers, tally, names if neurons else None, blocks):
            for batch in batches:
                tokens, mask = (batch, None) if isinstance(batch, Tensor) else (batch["tokens"], batch.get("mask"))
                real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
                if not real.any():
                    continue
                tally.begin(real.to(device))
                attention = None if mask is None else real.long().to(device)
                base: Any = model.model
                base(input_ids=tokens.to(device), attention_mask=attention, use_cache=False)
    finally:
        for module in training:
            module.training = True
    if tally.tokens == 0:
        raise UsageError("the calibration text has no real token, only padding or nothing; pass text to measure on")
    return tally.result()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The blocks of a transformers decoder. Raises Unsupported where they are not `model.model.layers`."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise Unsupported(
            f"{type(model).__name__} has no blocks at .model.layers; pruning knows decoders built like Llama, Mistral, "
            "Qwen or SmolLM"
        )
    return layers


def check_prunable(model: nn.Module, names: MLPNames) -> None:
    """Raise Unsupported for experts, parallel attention and MLPs of other names: slicing them would break them."""
    config: Any = getattr(model, "config", None)
    for key in EXPERT_KEYS:
        if (getattr(config, key, None) or 0) > 1:
            raise Unsupported(f"{type(model).__name__} has {key}={getattr(config, key)}: experts cannot be pruned here")
    if getattr(config, "parallel_attn", False) or getattr(config, "use_parallel_residual", False):
        raise Unsupported(f"{type(model).__name__} runs attention and MLP in parallel, which pruning does not know")
    for index, layer in enumerate(decoder_layers(model)):
        for name in (*names.inputs, names.down):
            try:
                module: Any = layer.get_submodule(name)
            except AttributeError:
                raise Unsupported(
                    f"block {index} ({type(layer).__name__}) has no layer {name!r}; say how its MLP is called: "
                    "names=MLPNames(up='mlp.fc1', down='mlp.fc2', gate=None)"
                ) from None
            if not hasattr(module, "in_features"):
                raise Unsupported(f"layer {name!r} of block {index} is a {type(module).__name__}, not a linear layer")


class _Tally:
    """The running sums and the mask of the batch in progress."""

    def __init__(self, layers: int) -> None:
        self.cosines = torch.zeros(layers, dtype=torch.float64)
        self.norms: list[Tensor | None] = [None] * layers
        self.tokens = self.sequences = 0
        self.real = torch.empty(0)
        self.entering: dict[int, Tensor] = {}

    def begin(self, real: Tensor) -> None:
        self.real = real
        self.tokens += int(real.sum())
        self.sequences += int(real.any(1).sum())

    def block(self, index: int, before: Tensor, after: Tensor) -> None:
        """Residual streams [B, T, d]; float64, so that an identity gives a cosine of exactly one."""
        x, y = before[self.real].double(), after[self.real].double()
        lengths = torch.linalg.vecdot(x, x) * torch.linalg.vecdot(y, y)
        self.cosines[index] += (torch.linalg.vecdot(x, y) / lengths.sqrt().clamp_min(1e-300)).sum().cpu()

    def neurons(self, index: int, hidden: Tensor) -> None:
        """hidden: [B, T, F], the input of the down projection."""
        masked = hidden * self.real.unsqueeze(-1)
        norms = torch.linalg.vector_norm(masked, dim=1).double().sum(0).cpu()
        known = self.norms[index]
        self.norms[index] = norms if known is None else known + norms

    def result(self) -> Importance:
        norms = tuple(norm for norm in self.norms if norm is not None)
        return Importance(self.cosines, self.tokens, norms, self.sequences)


@contextmanager
def _watched(layers: nn.ModuleList, tally: _Tally, names: MLPNames | None, blocks: bool) -> Iterator[None]:
    """Hooks on every block and down projection, gone afterwards."""
    handles = []
    try:
        for index, layer in enumerate(layers):
            if blocks:
                handles.append(layer.register_forward_pre_hook(_entering(tally, index), with_kwargs=True))
                handles.append(layer.register_forward_hook(_leaving(tally, index)))
            if names is not None:
                down = layer.get_submodule(names.down)
                handles.append(down.register_forward_pre_hook(lambda _, args, i=index: tally.neurons(i, args[0])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _entering(tally: _Tally, index: int) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tally.entering[index] = args[0] if args else kwargs["hidden_states"]

    return hook


def _leaving(tally: _Tally, index: int) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tally.block(index, tally.entering.pop(index), output if isinstance(output, Tensor) else output[0])

    return hook

"""Attributes that a module, model, optimizer or loss of one package may offer to another one: all of them, here.

A class offers them by having them; nothing is registered. `isinstance` tests for the names alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@runtime_checkable
class HasGGUFForm(Protocol):
    """A model that llama.cpp runs in another form than this one: `export_gguf` writes what the method returns."""

    def for_gguf(self) -> PreTrainedModel:
        """The model that is written: same logits, an architecture that llama.cpp knows."""


@runtime_checkable
class HasExecuTorchForm(Protocol):
    """A model that is traced in another form than this one: `export_executorch` takes what the method returns."""

    def for_executorch(self) -> PreTrainedModel:
        """The model that is traced: same logits."""


@runtime_checkable
class InitializesWeights(Protocol):
    """A layer whose random weights follow another rule than the model's: new models call the method."""

    def init_weights(self, config: Any) -> None:
        """Fill the layer's own parameters from torch's global generator."""


@runtime_checkable
class HasWeightStacks(Protocol):
    """A module whose parameters of three axes, [count, out, in], are stacks of matrices, such as experts.

    weight_stacks: names of those parameters; `quantize_` and `convert_` treat each matrix as a layer's. A module may
    also say `group_axis`: "in" for [count, out, in], the default, or "out" for [count, in, out].
    """

    weight_stacks: tuple[str, ...]


@runtime_checkable
class DiffersByProcess(Protocol):
    """An optimizer whose state is not the same in all processes of a run: checkpoints keep that of each.

    differs_by_process: True where it is so now.
    """

    differs_by_process: bool


@runtime_checkable
class HasSparseParameters(Protocol):
    """A model with tables whose gradients are sparse: row-wise optimizers and checkpoints of rows ask for them."""

    def sparse_parameters(self) -> Iterable[nn.Parameter]:
        """The tables."""


@runtime_checkable
class KeepsState(Protocol):
    """A loss function with state of its own, such as a balancer or a teacher's cache: checkpoints of `fit` keep it."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors and JSON values."""

    def load_state_dict(self, state: Any) -> Any:
        """Put a `state_dict` back."""

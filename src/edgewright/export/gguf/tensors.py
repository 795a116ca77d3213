"""The tensors of a transformers decoder under their GGUF names, in file order, their rows as llama.cpp wants them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgewright.errors import FormatError, Unsupported
from edgewright.export.gguf.families import writer
from edgewright.io.gguf.families import pair_order, placed
from edgewright.io.packed import PackedEmbedding, PackedLinear, PackedStack, PackedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ModelTensor:
    """One tensor of the model. name: in GGUF. path: of the module; attribute: "weight", "bias" or another parameter's.
    heads: how many heads' rows are put into pair order, 0 where rows stay as they are. select: the piece of the
    parameter that the file keeps under this name. whole: the family names this very parameter, whatever holds it.
    """

    name: str
    path: str
    attribute: str
    module: nn.Module
    heads: int = 0
    select: Callable[[Tensor], Tensor] | None = None
    whole: bool = False

    @property
    def parameter(self) -> str:
        return f"{self.path}.{self.attribute}"

    @property
    def is_packed(self) -> bool:
        """Whether the tensor is stored as integer codes."""
        if self.attribute == "weight" and isinstance(self.module, PackedLinear | PackedEmbedding):
            return True
        return isinstance(getattr(self.module, self.attribute, None), PackedStack)

    @property
    def experts(self) -> int:
        """Matrices in a stack of them, 0 for a matrix or vector."""
        stack = getattr(self.module, self.attribute, None)
        return stack.count if isinstance(stack, PackedStack) else 0

    @property
    def packed(self) -> PackedTensor | None:
        """Codes and steps with the rows in file order; None for a float tensor."""
        if not self.is_packed:
            return None
        holder: Any = getattr(self.module, self.attribute) if self.experts else self.module
        packed: PackedTensor = holder.packed
        codes, step = packed.codes.detach().cpu(), packed.step.detach().cpu()
        if self.experts and self.select is not None:  # of the rows of every matrix in the stack
            codes, step = (self.select(part.unflatten(0, (self.experts, -1))).flatten(0, 1) for part in (codes, step))
        if self.heads:
            order = pair_order(codes.shape[0], self.heads)
            codes, step = codes[order], step[order]
        return PackedTensor(codes, step, packed.grid)

    def values(self) -> Array:
        """float32 values with the rows in file order. Raises FormatError naming the tensor for NaN or infinity."""
        packed = self.packed
        if packed is not None:
            return packed.dequantize().numpy()
        value: Tensor = getattr(self.module, self.attribute).detach().cpu().float()
        if not torch.isfinite(value).all():
            raise FormatError(f"the tensor {self.parameter!r} holds NaN or infinity; it cannot be exported")
        if self.select is not None:
            value = self.select(value).contiguous()
        return (value[pair_order(len(value), self.heads)] if self.heads else value).numpy()


def model_tensors(model: PreTrainedModel) -> list[ModelTensor]:
    """All tensors of a model, each once: a head that shares the embedding's table is left out, as llama.cpp expects.

    Raises Unsupported, naming the layer, for a module that would be exported as something it is not.
    """
    tensors = [
        ModelTensor(
            one.name,
            one.path,
            one.part.attribute,
            one.module,
            one.heads,
            None if one.part.half is None else one.part.select,
            one.whole,
        )
        for one in placed(model, writer(model), shares_table(model))
    ]
    for tensor in tensors:
        _check_module(tensor)
    _check_complete(model, tensors)
    return tensors


def shares_table(model: PreTrainedModel) -> bool:
    """Whether the output head computes with the embedding's own table: the same memory, or by the configuration."""
    head: Any = model.get_submodule("lm_head")
    table: Any = model.get_submodule("model.embed_tokens")
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if isinstance(head, PackedLinear) and isinstance(table, PackedEmbedding):
        same = head.codes.data_ptr() == table.codes.data_ptr() or (tied and torch.equal(head.codes, table.codes))
        return same and torch.equal(head.step, table.step)
    if isinstance(head, PackedLinear) or isinstance(table, PackedEmbedding):
        return False
    if head.weight.data_ptr() == table.weight.data_ptr():
        return True
    return tied and head.weight.shape == table.weight.shape and torch.equal(head.weight, table.weight)


def _check_module(tensor: ModelTensor) -> None:
    """Refuse what is no plain layer: it may compute with something else than its `weight`."""
    module, plain = tensor.module, (nn.Linear, nn.Embedding, PackedLinear, PackedEmbedding)
    weight = getattr(module, "weight", None)
    stack = getattr(module, tensor.attribute, None)
    if isinstance(stack, PackedStack) and stack.group_axis != "in":
        raise Unsupported(f"{tensor.path} has groups along its outputs; llama.cpp's types run along the inputs")
    if tensor.attribute == "weight" and type(module) not in plain and isinstance(weight, Tensor) and weight.ndim == 2:
        if tensor.whole:
            return
        raise Unsupported(
            f"layer {tensor.path} is a {type(module).__name__}, which has no place in a GGUF file; quantised "
            "layers have one once they are converted, adapters once they are merged, R-Sparse layers have none"
        )


def _check_complete(model: PreTrainedModel, tensors: list[ModelTensor]) -> None:
    known = {id(getattr(tensor.module, tensor.attribute)) for tensor in tensors if not tensor.is_packed}
    if shares_table(model):
        known.add(id(getattr(model.get_submodule("lm_head"), "weight", None)))
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            raise Unsupported(f"the parameter {name!r} has no place in a GGUF file of {type(model).__name__}")

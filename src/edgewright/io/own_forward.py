"""Layers that extend nn.Linear, nn.Embedding or nn.Conv2d with a forward of their own keep it under other weights.

Gemma's token table multiplies its rows by sqrt(width), BART's positions start at 2, some convolutions standardise their
weight. Such a layer is replaced by an object of a class made for it: the user's class first, then the fake-quantised or
packed layer. Its `super().forward(...)` reaches the quantised layer, and its own `self.weight` is the quantised weight.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import Unsupported
from edgewright.io.packed import PackedConv2d, PackedEmbedding, PackedLinear

BASES = (nn.Linear, nn.Embedding, nn.Conv2d)
REGISTRIES = ("_parameters", "_buffers", "_modules")
OURS = ("quantizer", "input_quantizer", "codes", "step", "grid", "weight")  # of the quantised form, not of the original


def original_class(module: Any) -> Any:
    """The class of a layer before it was quantised."""
    return getattr(type(module), "original", type(module))


def has_own_forward(module: nn.Module) -> bool:
    """Whether the layer computes otherwise than the layer of torch that it extends."""
    original = original_class(module)
    base = next((base for base in BASES if issubclass(original, base)), None)
    names = ("forward", "_conv_forward", "__call__")
    return base is not None and any(getattr(original, n, None) is not getattr(base, n, None) for n in names)


def keeping_forward(module: nn.Module, quantized: nn.Module) -> nn.Module:
    """`quantized`, which was made from the layer `module`, with the forward and the attributes of that layer.

    Returned as it is where the layer has no forward of its own.
    """
    if not has_own_forward(module):
        return quantized
    made: Any = object.__new__(_class(original_class(module), _kind(quantized)))
    _fill(made, vars(module), vars(quantized))
    if not isinstance(quantized, BASES):
        made.dtype = module.weight.dtype
    return made


def original_layer(module: nn.Module, weight: nn.Parameter) -> nn.Module:
    """The float layer of the original class around `weight`, for what `keeping_forward` made."""
    made: nn.Module = object.__new__(original_class(module))
    _fill(made, vars(module), {"_parameters": {"weight": weight}})
    return made


def refuse_own_forwards(model: nn.Module, target: str) -> None:
    """Raise Unsupported naming the first quantised layer with a forward of its own, which `target` would lose."""
    for name, module in model.named_modules():
        if isinstance(module, KeptForward):
            raise Unsupported(
                f"layer {name} is a quantised {original_class(module).__name__}, whose own forward {target} cannot "
                f"express; leave it out: QuantConfig(..., skip=({name!r}, ...)), or call dequantize_(model) first"
            )


class KeptForward:
    """First base of every class made here. While its forward runs, `weight` is the quantised one; else the latent one.

    The classes are made at run time, so that copies and pickles name their parts instead.
    """

    original: type[nn.Module]
    kind: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        vars(self)["_computing"] = True
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            vars(self)["_computing"] = False

    @property
    def latent(self) -> Tensor:
        """The parameter itself, for the quantised layer that `super().forward` of the user's class ends in."""
        weight: Tensor = vars(self)["_parameters"]["weight"]
        return weight

    @property
    def weight(self) -> Tensor:
        module: Any = self
        if "codes" in module._buffers:
            values: Tensor = module.packed.dequantize().to(module.dtype)
            return values.reshape(module.kernel_shape) if isinstance(self, PackedConv2d) else values
        if not vars(self).get("_computing") or module.quantizer is None:
            return self.latent
        weight: Tensor = module.quantizer.values(self.latent, module.quantizer.noise if module.training else None)
        return weight

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if isinstance(dtype := vars(self).get("dtype"), torch.dtype):
            vars(self)["dtype"] = fn(torch.empty(0, dtype=dtype)).dtype
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self.original, self.kind), vars(self)


class _EmbeddingCodes(PackedEmbedding, nn.Embedding):  # type: ignore[misc,override]
    """The order of bases in which a user's `super().forward` meets the packed layer before torch's."""


class _LinearCodes(PackedLinear, nn.Linear):  # type: ignore[misc,override]
    """See `_EmbeddingCodes`."""


class _ConvCodes(PackedConv2d, nn.Conv2d):  # type: ignore[misc,override]
    """See `_EmbeddingCodes`; here the user's class may also override what `forward` ends in."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self._conv_forward(inputs, self.weight.to(inputs.dtype), self.bias)


def _kind(quantized: nn.Module) -> Any:
    kinds: dict[Any, Any] = {PackedEmbedding: _EmbeddingCodes, PackedLinear: _LinearCodes, PackedConv2d: _ConvCodes}
    return kinds.get(type(quantized), type(quantized))


@functools.cache
def _class(original: Any, kind: Any) -> Any:
    members = {"original": original, "kind": kind, "__doc__": f"{original.__name__} with a quantised weight."}
    return type(f"Quantised{original.__name__}", (KeptForward, original, kind), members)


def _empty(original: Any, kind: Any) -> nn.Module:
    made: nn.Module = object.__new__(_class(original, kind))
    return made


def _fill(made: nn.Module, old: dict[str, Any], new: dict[str, Any]) -> None:
    """The state of a module: that of `old` without what quantisation added, then what `new` brings."""
    for key, value in old.items():
        if key not in OURS and key not in REGISTRIES and key != "_computing":
            vars(made)[key] = value.copy() if key.startswith("_") and hasattr(value, "copy") else value
    for key in REGISTRIES:
        vars(made)[key] = {name: value for name, value in old[key].items() if name not in OURS} | new.get(key, {})
    for key, value in new.items():
        if not key.startswith("_"):
            vars(made)[key] = value

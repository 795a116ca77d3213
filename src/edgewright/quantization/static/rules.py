"""Which operation of a traced model has integers at its output at run time, and with whose scale.

Source: arXiv 1806.08342, section 4 and figure 4. A node of a torch.fx graph is one of
    compute     convolution or linear layer: int32 sums, rescaled to a scale of their own
    add         both inputs are rescaled to a scale of its own
    average     mean or average pooling: a sum, rescaled
    cat         all inputs share one scale, the output has it too
    rectify     ReLU or ReLU6: part of the compute or add in front of it
    inherit     moves or selects values (max pooling, reshape, zero padding, dropout): its input's scale
    norm        a batch norm that a layer in front may absorb
    float       everything else: computed in float
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from edgewright.quantization.static.batchnorm import BATCHNORMS

_INHERIT_MODULES = (
    nn.MaxPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Flatten,
    nn.Unflatten,
    nn.Dropout,
    nn.Dropout2d,
    nn.Identity,
    nn.ZeroPad2d,
)
_MODULES: tuple[tuple[tuple[type, ...], str], ...] = (
    ((nn.Conv2d, nn.Linear), "compute"),
    (BATCHNORMS, "norm"),
    ((nn.ReLU, nn.ReLU6), "rectify"),
    ((nn.AvgPool2d, nn.AdaptiveAvgPool2d), "average"),
    (_INHERIT_MODULES, "inherit"),
)
_FUNCTIONS: dict[Any, str] = {
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    torch.cat: "cat",
    torch.concat: "cat",
    F.relu: "rectify",
    torch.relu: "rectify",
    F.relu6: "rectify",
    torch.mean: "average",
    F.avg_pool2d: "average",
    F.adaptive_avg_pool2d: "average",
    torch.flatten: "inherit",
    torch.reshape: "inherit",
    torch.permute: "inherit",
    torch.transpose: "inherit",
    torch.squeeze: "inherit",
    torch.unsqueeze: "inherit",
    F.max_pool2d: "inherit",
    F.dropout: "inherit",
}
_METHODS: dict[str, str] = {
    "add": "add",
    "add_": "add",
    "relu": "rectify",
    "relu_": "rectify",
    "mean": "average",
    "flatten": "inherit",
    "reshape": "inherit",
    "view": "inherit",
    "permute": "inherit",
    "transpose": "inherit",
    "squeeze": "inherit",
    "unsqueeze": "inherit",
    "contiguous": "inherit",
}


def is_tensor(node: Any) -> bool:
    """Whether shape propagation found one floating-point tensor there."""
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return meta is not None and hasattr(meta, "dtype") and meta.dtype.is_floating_point


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The activations that a node reads, in order."""
    return [source for source in node.all_input_nodes if is_tensor(source)]


def kind_of(node: fx.Node, model: nn.Module) -> str:
    """One of the kinds above."""
    kind = _kind_by_target(node, model)
    if kind == "add" and (len(tensor_inputs(node)) != 2 or node.kwargs.get("alpha", 1) != 1):
        return "float"  # x + x, x + 1, x + 2 * y
    if kind == "add" and len({tuple(source.meta["tensor_meta"].shape) for source in tensor_inputs(node)}) != 1:
        return "float"  # broadcasting: not a residual connection
    return kind


def _kind_by_target(node: fx.Node, model: nn.Module) -> str:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            return "float"
        if isinstance(module, nn.ConstantPad2d):
            return "inherit" if module.value == 0 else "float"
        if isinstance(module, nn.AvgPool2d) and (module.divisor_override or _padded(module.padding)):
            return "float"
        return next((kind for kinds, kind in _MODULES if type(module) in kinds), "float")
    if node.op == "call_function":
        if node.target is F.pad:
            mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
            value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
            return "inherit" if mode == "constant" and not value else "float"
        if node.target is F.avg_pool2d and (len(node.args) > 3 or set(node.kwargs) - {"kernel_size", "stride"}):
            return "float"
        return _FUNCTIONS.get(node.target, "float")
    if node.op == "call_method":
        return _METHODS.get(str(node.target), "float")
    return node.op  # placeholder, get_attr, output


def rectified_limit(node: fx.Node, model: nn.Module) -> float | None:
    """Upper end of a "rectify" node: 6 for ReLU6, None for ReLU."""
    if node.op == "call_module":
        return 6.0 if isinstance(model.get_submodule(str(node.target)), nn.ReLU6) else None
    return 6.0 if node.target is F.relu6 else None


def _padded(padding: Any) -> bool:
    return any(padding) if isinstance(padding, tuple) else bool(padding)

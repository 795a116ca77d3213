"""The graph pass between tracing and dividing: packed layers written out, and what XNNPACK would leave made fit for it.

Every operator that stays outside cuts the graph; a delegate is called for each piece, and ExecuTorch's compiler sorts
the whole graph again for each of them. Four rewrites, none of which changes what is computed:

- `dynamic_linear` becomes quantise, dequantise and linear, the pattern of XNNPACK's partitioner. Every layer gets a
  rounding of its own: shared between layers, the partitioner would divide the graph into cycles.
- The mean over the last axis (in every RMS norm) becomes a product with a column of 1 / D, which XNNPACK has.
- A view whose one free size is spelled out gets -1 there, which XNNPACK takes.
- A copy that only repeats a value goes: Cohere's rotary embedding and constants made in a forward leave such ones.
"""

from __future__ import annotations

import operator
from typing import Any

import torch


class RewriteForXnnpack:
    """The pass; called by ExecuTorch with a graph module of its edge dialect."""

    def __call__(self, graph_module: torch.fx.GraphModule) -> Any:
        from executorch.exir.dialects._ops import ops
        from torch.fx.passes.infra.pass_base import PassResult

        edge = ops.edge
        graph = graph_module.graph
        columns: dict[int, Any] = {}
        changed = False
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            with graph.inserting_before(node):
                if "dynamic_linear" in str(node.target):
                    result = _linear(graph, node, edge)
                elif node.target == edge.aten.mean.dim and _over_last_axis(node):
                    result = _mean(graph, node, edge, columns)
                elif node.target == edge.dim_order_ops._clone_dim_order.default and _needless(node):
                    result = node.args[0]
                else:
                    if node.target == edge.aten.view_copy.default:
                        changed |= _free_view(node)
                    continue
            node.replace_all_uses_with(result)
            graph.erase_node(node)
            changed = True
        graph.eliminate_dead_code()
        graph_module.recompile()
        return PassResult(graph_module, changed)


def _needless(clone: Any) -> bool:
    """Whether a copy only repeats a value, in the same layout, for other nodes of the graph."""
    source, value = clone.args[0].meta.get("val"), clone.meta.get("val")
    same = source is not None and value is not None and source.dim_order() == value.dim_order()
    return same and source.dtype == value.dtype and all(user.op != "output" for user in clone.users)


def _linear(graph: torch.fx.Graph, node: Any, edge: Any) -> Any:
    q = edge.quantized_decomposed
    x, codes, step, zero, bias, bits, group = node.args

    def add(target: Any, *args: Any) -> Any:
        return _added(graph, node, target, args)

    both = add(q.choose_qparams_per_token_asymmetric.default, x, torch.int8)
    first, second = add(operator.getitem, both, 0), add(operator.getitem, both, 1)
    whole = add(q.quantize_per_token.default, x, first, second, -128, 127, torch.int8)
    rounded = add(q.dequantize_per_token.default, whole, first, second, -128, 127, torch.int8, torch.float32)
    if bits == 4:
        arguments = (codes, step, zero, -8, 7, torch.int8, group, torch.float32)
        weight = add(q.dequantize_per_channel_group.default, *arguments)
    else:
        weight = add(q.dequantize_per_channel.default, codes, step, zero, 0, -128, 127, torch.int8)
    return add(edge.aten.linear.default, rounded, weight, *([] if bias is None else [bias]))


def _over_last_axis(node: Any) -> bool:
    """Whether a mean is one of float32 [1, T, D] over D that keeps the axis."""
    x, axes = node.args[0].meta["val"], list(node.args[1])
    keeps = len(node.args) > 2 and bool(node.args[2])
    plain = x.dim() == 3 and x.shape[0] == 1 and isinstance(x.shape[2], int) and x.dtype == torch.float32
    return plain and keeps and axes in ([-1], [2]) and node.kwargs.get("dtype") in (None, torch.float32)


def _mean(graph: torch.fx.Graph, node: Any, edge: Any, columns: dict[int, Any]) -> Any:
    width = int(node.args[0].meta["val"].shape[2])
    if width not in columns:
        columns[width] = _added(graph, node, edge.aten.full.default, ([1, width, 1], 1.0 / width))
    return _added(graph, node, edge.aten.bmm.default, (node.args[0], columns[width]))


def _free_view(node: Any) -> bool:
    sizes = list(node.args[1])
    free = [i for i, size in enumerate(sizes) if isinstance(size, torch.fx.Node)]
    if len(free) != 1:
        return False
    shape = node.meta["val"].shape
    if not all(i == free[0] or isinstance(size, int) for i, size in enumerate(shape)):
        return False
    sizes = [-1 if i == free[0] else int(size) for i, size in enumerate(shape)]
    node.args = (node.args[0], sizes)
    return True


def _added(graph: torch.fx.Graph, beside: Any, target: Any, args: tuple[Any, ...]) -> Any:
    """A new node with the value that tracing would have given it, and the module path of the node it stands for."""
    node = graph.call_function(target, args)
    node.meta = {key: value for key, value in beside.meta.items() if key not in ("val", "tensor_meta", "spec")}
    values = torch.fx.map_arg(args, lambda argument: argument.meta["val"])
    with beside.meta["val"].fake_mode:
        node.meta["val"] = target(*values)
    return node

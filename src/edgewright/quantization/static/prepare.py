"""From a float network to its prepared copy: trace, fold batch norms, put activation quantisers into the graph."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from edgewright.errors import UsageError
from edgewright.quantization.static.batchnorm import BATCHNORMS, ConvBNQuant2d
from edgewright.quantization.static.config import StaticConfig, StaticReport, quantization
from edgewright.quantization.static.observers import ActivationQuantizer, RangeObserver
from edgewright.quantization.static.rules import is_tensor, kind_of, rectified_limit, tensor_inputs

# Folding multiplies in another order than batch norm does; over a deep network float32 differs by about 1e-5.
FOLD_TOLERANCE = 1e-3
OWN_SCALE = ("compute", "add", "average")
BATCHNORM_FIELDS = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "running_mean",
    "running_var": "running_var",
    "num_batches_tracked": "num_batches_tracked",
}


def prepare(model: nn.Module, inputs: tuple[Any, ...], config: StaticConfig) -> nn.Module:
    """The prepared copy of a float model, compared with it on `inputs` in float. See `quantize_static`."""
    copied = copy.deepcopy(model).eval()
    report = StaticReport()
    prepared: nn.Module
    with torch.no_grad():
        expected = copied(*inputs)
        try:
            prepared = fx.symbolic_trace(copied)
            ShapeProp(prepared).propagate(*inputs)
        except Exception as error:  # whatever the model's own control flow makes of a tracer
            report.traced = False
            report.notices.append(f"torch.fx cannot trace the model ({error}); prepared by the names of its modules")
            prepared = copy.deepcopy(copied)
            _prepare_by_name(prepared, config, report)
        else:
            _prepare_graph(prepared, config, report)
    if not report.layers:
        raise UsageError("the model has no convolution or linear layer to quantise")
    if not any(bn for _, bn in report.layers):
        report.notices.append("no batch norm was found to fold; the model may be folded already")
    prepared.meta = {**getattr(prepared, "meta", {}), "static_report": report}  # type: ignore[assignment]
    _accept_float_checkpoints(prepared, report)
    _compare(prepared, inputs, expected)
    for module in prepared.modules():
        module.training = model.training
    return prepared


def _prepare_graph(model: fx.GraphModule, config: StaticConfig, report: StaticReport) -> None:
    _fold(model, config, report)
    if config.activation_bits is not None:
        points = _points(model, report)
        for node, where in points.items():
            _insert(model, node, where, config, report)
        _share_scales(model, config)
        for node in model.graph.nodes:
            if node.meta.get("kind") == "compute":
                layer: Any = model.get_submodule(str(node.target))
                quantizer = _quantizer_of(node.args[0], model)
                layer.inputs = [] if quantizer is None else [quantizer]
    model.graph.lint()
    model.delete_all_unused_submodules()
    model.recompile()


def _fold(model: fx.GraphModule, config: StaticConfig, report: StaticReport) -> None:
    """Replace layers by ConvBNQuant2d, each with the batch norm that directly follows it; list what cannot fold."""
    uses: dict[str, int] = {}
    for node in model.graph.nodes:
        if node.op == "call_module":
            uses[str(node.target)] = uses.get(str(node.target), 0) + 1
    for node in list(model.graph.nodes):
        kind = kind_of(node, model)
        if kind == "norm" and not node.meta.get("folded"):
            source = node.args[0]
            report.left_float.append(f"{node.target}: a batch norm behind {source}, not directly behind a layer")
        elif kind == "float" and is_tensor(node):
            report.left_float.append(f"{_name(node)}: {_operation_name(node, model)} is computed in float")
        if kind != "compute":
            continue
        name = str(node.target)
        if config.skips(name):
            report.left_float.append(f"{name}: skipped by {config.skip}")
            continue
        layer: Any = model.get_submodule(name)
        if uses[name] > 1:
            report.left_float.append(f"{name}: used {uses[name]} times")
            continue
        bn_node = _batchnorm_behind(node, model, uses)
        bn: Any = None if bn_node is None else model.get_submodule(str(bn_node.target))
        model.set_submodule(name, ConvBNQuant2d(layer, bn, config.weight_scheme, config.bn, name))
        node.meta["kind"] = "compute"
        report.layers.append((name, "" if bn_node is None else str(bn_node.target)))
        if bn_node is not None:
            bn_node.meta["folded"] = True
            bn_node.replace_all_uses_with(node)
            model.graph.erase_node(bn_node)


def _batchnorm_behind(node: fx.Node, model: nn.Module, uses: dict[str, int]) -> fx.Node | None:
    follower = next(iter(node.users), None)
    if follower is None or len(node.users) > 1 or kind_of(follower, model) != "norm" or uses[str(follower.target)] > 1:
        return None
    bn: Any = model.get_submodule(str(follower.target))
    flat = isinstance(bn, nn.BatchNorm1d)
    dimensions = len(node.meta["tensor_meta"].shape)
    fits = bn.running_mean is not None and dimensions == (2 if flat else 4)
    return follower if fits else None


def _points(model: fx.GraphModule, report: StaticReport) -> dict[fx.Node, str]:
    """Nodes behind which integers exist, in the order of the graph, each with what it is."""
    points: dict[fx.Node, str] = {}
    integer: dict[fx.Node, bool] = {}  # codes at the node's output
    kinds = {node: node.meta.get("kind") or kind_of(node, model) for node in model.graph.nodes}
    skipped = {name for name in (line.partition(":")[0] for line in report.left_float)}
    for node in model.graph.nodes:
        kind = kinds[node]
        if kind == "compute" and str(node.target) in skipped:
            kind = kinds[node] = "float"
        sources = tensor_inputs(node)
        if kind in (*OWN_SCALE, "cat") and is_tensor(node):
            if kind != "compute" and not any(integer[source] for source in sources):
                kinds[node] = "float"  # between float operations: no reason for integers
                integer[node] = False
                continue
            for source in sources:  # all that it reads must be integers, from where the values come from
                while kinds[source] == "inherit" and not integer[source]:
                    integer[source] = True
                    source = tensor_inputs(source)[0]
                if not integer[source]:
                    points[source], integer[source] = "input" if source.op == "placeholder" else "float", True
        if kind in OWN_SCALE:
            follower = next(iter(node.users), None)
            fused = follower is not None and len(node.users) == 1 and kinds[follower] == "rectify"
            if not fused:
                points[node] = kind
            integer[node] = not fused
            if fused:
                kinds[follower] = "rectified"  # type: ignore[index]
        elif kind == "rectified":
            points[node], integer[node] = kind, True
        elif kind == "rectify" and integer[sources[0]] and rectified_limit(node, model) is not None:
            points[node], integer[node] = kind, True  # 6 is no code of its input's scale
        elif kind in ("rectify", "inherit"):
            integer[node] = bool(sources) and integer[sources[0]]
        else:
            integer[node] = kind == "cat"
    return {node: points[node] for node in model.graph.nodes if node in points}


def _insert(model: fx.GraphModule, node: fx.Node, where: str, config: StaticConfig, report: StaticReport) -> None:
    """A quantiser behind `node`; float operations keep reading what no integer kernel made."""
    limit = rectified_limit(node, model) if where in ("rectified", "rectify") else None
    fixed = (0.0, limit) if limit is not None and config.relu6_fixed else None
    name = _name(node)
    scheme = config.input_scheme if where == "input" else config.activation_scheme
    assert scheme is not None
    target = f"quantizers.{node.name}"
    model.add_submodule(target, ActivationQuantizer(name, scheme, config.observer, fixed))
    with model.graph.inserting_after(node):
        inserted = model.graph.call_module(target, (node,))
    inserted.meta = {**node.meta, "kind": "quantizer"}
    only = None
    if where in ("input", "float"):
        only = {user for user in node.users if _wants_integers(user, model)}
    node.replace_all_uses_with(inserted, lambda user: user is not inserted and (only is None or user in only))
    report.activations.append(name)


def _wants_integers(node: fx.Node, model: nn.Module) -> bool:
    kind = node.meta.get("kind") or kind_of(node, model)
    if kind in (*OWN_SCALE, "cat"):
        return True
    return kind in ("inherit", "rectify") and any(_wants_integers(user, model) for user in node.users)


def _share_scales(model: fx.GraphModule, config: StaticConfig) -> None:
    """Give all inputs of a concatenation one observer."""
    for node in model.graph.nodes:
        if node.meta.get("kind") == "quantizer" or kind_of(node, model) != "cat":
            continue
        sources = [_quantizer_of(source, model) for source in tensor_inputs(node)]
        quantizers = [source for source in sources if source is not None]
        if not quantizers:
            continue
        ranges = {quantizer.observer.fixed for quantizer in quantizers}
        shared = quantizers[0].observer
        if len(ranges) > 1:
            shared = RangeObserver(f"{_name(node)} (shared)", config.observer)
        replaced = [quantizer.observer for quantizer in quantizers]
        for module in model.modules():  # also those that shared one of these with another concatenation
            if isinstance(module, ActivationQuantizer) and any(module.observer is old for old in replaced):
                module.observer = shared


def _quantizer_of(node: fx.Node, model: nn.Module) -> ActivationQuantizer | None:
    """The quantiser whose codes a node carries, through operations that only move them."""
    while True:
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ActivationQuantizer):
            return module
        sources = tensor_inputs(node)
        if not sources or kind_of(node, model) not in ("inherit", "rectify", "cat"):
            return None
        node = sources[0]


def _prepare_by_name(model: nn.Module, config: StaticConfig, report: StaticReport) -> None:
    """Without a graph: a layer absorbs the batch norm that is its next sibling, and its own input is quantised."""
    for parent_name, parent in list(model.named_modules()):
        children = list(parent.named_children())
        for i, (child_name, child) in enumerate(children):
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if type(child) not in (nn.Conv2d, nn.Linear):
                continue
            if config.skips(name) or getattr(child, "padding_mode", "zeros") != "zeros":
                report.left_float.append(f"{name}: skipped")
                continue
            bn_name, bn = children[i + 1] if i + 1 < len(children) else ("", None)
            if not isinstance(bn, BATCHNORMS) or bn.num_features != child.weight.shape[0] or bn.running_mean is None:
                bn = None
            layer = ConvBNQuant2d(child, bn, config.weight_scheme, config.bn, name)
            setattr(parent, child_name, layer)
            if config.activation_scheme is not None:
                quantizer = ActivationQuantizer(f"{name} (input)", config.activation_scheme, config.observer)
                layer.inputs = [quantizer]
                pair = nn.Sequential()
                pair.add_module("input_quantizer", quantizer)
                pair.add_module("layer", layer)
                setattr(parent, child_name, pair)
                report.activations.append(quantizer.name)
            if bn is not None:
                setattr(parent, bn_name, nn.Identity())
            report.layers.append((name, "" if bn is None else (f"{parent_name}.{bn_name}" if parent_name else bn_name)))
    report.left_float.append("everything between layers: the model could not be traced")


def _accept_float_checkpoints(model: nn.Module, report: StaticReport) -> None:
    """Let `load_state_dict` take the float model's checkpoint: names are translated, ranges and counters stay."""
    suffix = "" if report.traced else ".layer"
    inner = {
        name: f"{name}{suffix}" if isinstance(model.get_submodule(name), nn.Sequential) else name
        for name, _ in report.layers
    }
    names = {f"{name}.{key}": f"{inner[name]}.{key}" for name, _ in report.layers for key in ("weight", "bias")}
    for name, bn in report.layers:
        if bn:
            names |= {f"{bn}.{key}": f"{inner[name]}.{own}" for key, own in BATCHNORM_FIELDS.items()}
    model.register_load_state_dict_pre_hook(_Translate(names))


class _Translate:
    """A load_state_dict hook that survives copying of the model."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def __call__(self, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        moved = {
            new: state.pop(prefix + old) for old, new in self.names.items() if prefix + old in state and old != new
        }
        state.update({prefix + new: value for new, value in moved.items()})
        if not any(".clock." in key or key.startswith(f"{prefix}clock.") for key in state):  # a float checkpoint
            for key, value in module.state_dict().items():
                if "clock." in key or "observer." in key:
                    state.setdefault(prefix + key, value)


def _compare(prepared: nn.Module, inputs: Sequence[Any], expected: Any) -> None:
    if not isinstance(expected, Tensor):
        return
    with torch.no_grad(), quantization(prepared, False):
        result = prepared.eval()(*inputs)
    scale = float(expected.abs().max()) or 1.0
    difference = float((result - expected).abs().max()) / scale
    if not difference <= FOLD_TOLERANCE:
        raise UsageError(
            f"the prepared copy differs from the model by {difference:.2g} of its largest output before anything is "
            "quantised; its batch norms do not follow their layers, leave them out with StaticConfig(skip=(...))"
        )


def _name(node: fx.Node) -> str:
    """A node for people: the path of its module where it has one, else its name in the graph."""
    return str(node.target) if node.op == "call_module" else node.name


def _operation_name(node: fx.Node, model: nn.Module) -> str:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__
    return getattr(node.target, "__name__", str(node.target))

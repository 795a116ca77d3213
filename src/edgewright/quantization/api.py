"""`quantize_` and `convert_`: one call puts a model under quantisation, one call turns it into packed integer weights.

config = QuantConfig.weights("int4", granularity=32)
quantize_(model, config)      # linear layers become fake-quantised: train, calibrate or evaluate
convert_(model)               # they become packed layers: exactly the values that were trained
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from edgewright.errors import Unsupported, UsageError
from edgewright.io.expert_stacks import foreign_stacks, put_stack, stack_axis
from edgewright.io.own_forward import has_own_forward, keeping_forward, original_layer
from edgewright.io.packed import PackedConv2d, PackedEmbedding, PackedLinear, PackedStack
from edgewright.protocols import HasWeightStacks
from edgewright.quantization.config import QuantConfig, Rule
from edgewright.quantization.coverage import warn_left_out
from edgewright.quantization.kv_cache import attach_kv_quantization
from edgewright.quantization.layers import (
    QuantConv2d,
    QuantEmbedding,
    QuantLinear,
    QuantStack,
    WeightQuantizer,
    WeightStack,
)

QUANTIZABLE = (nn.Linear, nn.Embedding, nn.Conv2d)
QUANTIZED = (QuantLinear, QuantEmbedding, QuantConv2d, QuantStack)
PACKED = (PackedLinear, PackedEmbedding, PackedConv2d, PackedStack)


M = TypeVar("M", bound=nn.Module)


def quantize_(model: M, config: QuantConfig) -> M:
    """Replace, in place, the modules that the rules select by fake-quantised ones; returns the model.

    A layer whose class has a forward of its own keeps it (`io.own_forward`). Nothing is changed unless the whole
    configuration fits. `coverage(model)` of `quantization.coverage` tells what is quantised then and what is not; where
    the pattern "*" cannot reach a hundredth of the weights there is a UserWarning.

    Args:
        model: any module with linear, embedding or convolution layers.
        config: which modules, and how.

    Returns:
        The model.

    Raises:
        UsageError: a pattern that matches nothing, a group that does not divide a row, a tied weight without a
            decision.
        Unsupported: a layer that would lose something.
        FormatError: a NaN or infinite weight.
    """
    layers = quantizable_layers(model)
    selected = _select(model, layers, config)
    quantizers = _quantizers(model, layers, selected, config)
    for name, rule in selected.items():
        _replace(
            model, name, keeping_forward(layers[name], _fake_quantized(layers[name], quantizers.get(name), rule, name))
        )
    warn_left_out(model, config)
    if config.kv is not None:
        attach_kv_quantization(model, config.kv)
    return model


@torch.no_grad()
def convert_(model: M) -> M:
    """Replace, in place, fake-quantised modules by packed ones holding integer codes; returns the model.

    The packed weights equal the fake-quantised ones bit for bit. Modules that shared a weight share its codes.

    Args:
        model: that went through `quantize_`.

    Returns:
        The model.

    Raises:
        UsageError: a model without fake-quantised modules.
        FormatError: a NaN or infinite weight.
    """
    tables: dict[int, nn.Module] = {}
    for name, module in _modules_of(model, QUANTIZED, "convert_ needs a model that went through quantize_"):
        packed = module.packed()
        packed = keeping_forward(module, packed) if packed is not module else packed
        quantizer = module.quantizer
        if quantizer is not None:
            first = tables.setdefault(id(quantizer), packed)
            if first is not packed:
                packed.codes, packed.step = first.codes, first.step
        packed.train(module.training)
        _replace(model, name, packed)
    return model


@torch.no_grad()
def dequantize_(model: M) -> M:
    """Replace, in place, packed or fake-quantised modules by ordinary float ones with the same values.

    Args:
        model: that went through `quantize_`.

    Returns:
        The model.

    Raises:
        UsageError: a model without quantised modules.
    """
    shared: dict[int, nn.Parameter] = {}
    for name, module in _modules_of(model, QUANTIZED + PACKED, "there is nothing to dequantise"):
        if isinstance(module, PACKED):
            key, values = module.codes.data_ptr(), module.weight
        elif module.quantizer is not None:
            key, values = module.weight.data_ptr(), module.quantizer.values(module.weight).detach()
        else:
            key, values = module.weight.data_ptr(), module.weight.detach()
        weight = shared.setdefault(key, nn.Parameter(values.clone()))
        stack = isinstance(module, (QuantStack, PackedStack))
        _replace(model, name, weight if stack else _plain(module, weight))
    return model


def quantized_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """Every fake-quantised module.

    Args:
        model: any module.

    Returns:
        (name, module) in model order; empty for a plain model.
    """
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QUANTIZED)]


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained clip scales: they take no weight decay and may take their own learning rate.

    Args:
        model: under quantisation.

    Returns:
        Each once.
    """
    found = {
        id(module.weight_scale): module.weight_scale
        for module in model.modules()
        if isinstance(module, WeightQuantizer) and isinstance(module.weight_scale, nn.Parameter)
    }
    return list(found.values())


def quantizable_layers(model: nn.Module) -> dict[str, Any]:
    """Everything that can be quantised: layers, and the stacks of matrices that modules name as theirs.

    Args:
        model: any module.

    Returns:
        Name -> module, in model order.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, QUANTIZABLE) and not isinstance(module, PACKED):
            found[name] = module
        if isinstance(module, HasWeightStacks):
            for stack in module.weight_stacks:
                if isinstance(weight := getattr(module, stack), nn.Parameter):
                    found[_child(name, stack)] = WeightStack(weight, getattr(module, "group_axis", "in"))
            continue
        for stack in foreign_stacks(module):
            found[_child(name, stack)] = WeightStack(getattr(module, stack), str(stack_axis(module)), foreign=True)
    return found


def _child(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _select(model: nn.Module, layers: dict[str, Any], config: QuantConfig) -> dict[str, Rule]:
    if quantized_modules(model):
        raise UsageError("the model is under quantisation already; call convert_ or dequantize_ before quantize_")
    names = list(layers)
    for rule in config.rules:
        if not any(fnmatchcase(name, rule.pattern) for name in names):
            raise UsageError(
                f"pattern {rule.pattern!r} matches no linear, embedding or convolution layer; "
                f"the model has names such as {', '.join(names[:3]) or 'none'}"
            )
    selected: dict[str, Rule] = {}
    for name in names:
        chosen = config.rule_for(name)
        if chosen is None or (chosen.weight is None and chosen.activation is None):
            continue
        if chosen.weight is None and isinstance(layers[name], nn.Embedding):
            continue  # an embedding's input is a token id: there is no activation to quantise
        selected[name] = chosen
    for name, chosen in selected.items():
        _check_layer(name, layers[name], chosen)
    if config.rules and not selected:
        raise UsageError(f"every matching layer is skipped by {config.skip}; there is nothing to quantise")
    return selected


def _check_layer(name: str, layer: nn.Module, rule: Rule) -> None:
    """Refuse by name a layer of which quantisation would lose something."""
    kind, reason = type(layer).__name__, ""
    weight = layer._parameters.get("weight")
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        reason = "its owner multiplies with the weight itself, past the layer"
    elif weight is None or not weight.is_floating_point():
        reason = "its weight is no float parameter: it is parametrised, or quantised by another library"
    elif "forward" in vars(layer):
        reason = "its forward was replaced on this one object"
    elif getattr(layer, "max_norm", None) is not None:
        reason = "max_norm changes its table at every look-up"
    elif rule.activation is not None and getattr(layer, "foreign", False):
        kind, reason = "stack of experts", "transformers multiplies with it, and its input cannot be quantised"
    elif rule.activation is not None and has_own_forward(layer):
        reason = "its class has a forward of its own, before which no input can be quantised"
    if reason:
        raise Unsupported(f"layer {name} is a {kind} that cannot be quantised: {reason}; add {name!r} to skip=(...)")


def _quantizers(
    model: nn.Module, layers: dict[str, Any], selected: dict[str, Rule], config: QuantConfig
) -> dict[str, WeightQuantizer]:
    """One WeightQuantizer per weight; tied modules share it or are untied, as the configuration says."""
    owners: dict[int, list[str]] = {}
    for name, module in layers.items():
        owners.setdefault(id(module.weight), []).append(name)
    quantizers: dict[str, WeightQuantizer] = {}
    untie: list[str] = []
    for name, rule in selected.items():
        if rule.weight is None or name in quantizers:
            continue
        weight = layers[name].weight
        partners = [other for other in owners[id(weight)] if other != name]
        quantizer = WeightQuantizer(weight, rule.weight, name, getattr(layers[name], "group_axis", "in"))
        quantizers[name] = quantizer
        if not partners:
            continue
        if config.tied == "refuse":
            raise UsageError(
                f"{name} shares its weight with {', '.join(partners)}; say tied='together' to quantise them as one "
                "table, or tied='untie' to give each its own"
            )
        if config.tied == "untie":
            untie.append(name)
            continue
        for other in partners:
            if other not in selected or selected[other].weight != rule.weight:
                raise UsageError(f"tied='together' needs one rule for {name} and {other}, which share their weight")
            quantizers[other] = quantizer
    for name in untie:
        tied = layers[name]
        tied.weight = nn.Parameter(tied.weight.detach().clone(), requires_grad=tied.weight.requires_grad)
        config_of_model: Any = getattr(model, "config", None)
        if getattr(config_of_model, "tie_word_embeddings", False):
            config_of_model.tie_word_embeddings = False
    return quantizers


def _fake_quantized(module: nn.Module, quantizer: WeightQuantizer | None, rule: Rule, name: str) -> nn.Module:
    if isinstance(module, nn.Linear):
        inputs = rule.activation.build(name, module.in_features) if rule.activation else None
        return QuantLinear(module, quantizer, inputs)
    if isinstance(module, nn.Conv2d):
        inputs = rule.activation.build(name, module.in_channels) if rule.activation else None
        return QuantConv2d(module, quantizer, inputs)
    if isinstance(module, WeightStack):
        inputs = rule.activation.build(name, module.weight.shape[2]) if rule.activation else None
        return QuantStack(module, quantizer, inputs)
    assert isinstance(module, nn.Embedding) and quantizer is not None
    return QuantEmbedding(module, quantizer)


def _plain(module: Any, weight: nn.Parameter) -> nn.Module:
    """The float layer of the class before quantisation around `weight`."""
    if has_own_forward(module):
        return original_layer(module, weight)
    bias = getattr(module, "bias", None)
    plain: nn.Module
    with torch.device("meta"):  # no memory for weights that are replaced at once
        if isinstance(module, (PackedEmbedding, QuantEmbedding)):
            plain = nn.Embedding(module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx)
        elif isinstance(module, (PackedConv2d, QuantConv2d)):
            plain = _plain_convolution(module)
            weight = nn.Parameter(weight.detach().reshape(plain.weight.shape))
        else:
            plain = nn.Linear(module.in_features, module.out_features, bias is not None)
    plain.weight = weight
    if not isinstance(plain, nn.Embedding):
        plain.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return plain.train(module.training)


def _plain_convolution(module: Any) -> nn.Conv2d:
    packed = isinstance(module, PackedConv2d)
    rows, columns, *kernel = module.kernel_shape if packed else module.weight.shape
    groups = module.conv_groups if packed else module.groups
    return nn.Conv2d(
        columns * groups,
        rows,
        (kernel[0], kernel[1]),
        module.stride,
        module.padding,
        module.dilation,
        groups,
        bias=module.bias is not None,
    )


def _modules_of(model: nn.Module, kinds: tuple[type, ...], complaint: str) -> list[tuple[str, Any]]:
    found = [
        (name, module) for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, kinds)
    ]
    if not found:
        raise UsageError(f"no quantised layer found: {complaint}")
    return found


def _replace(model: nn.Module, name: str, module: nn.Module | nn.Parameter) -> None:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    held = getattr(owner, child)
    stacked = held.ndim == 3 if isinstance(held, nn.Parameter) else isinstance(held, QuantStack | PackedStack)
    if stacked and not isinstance(owner, HasWeightStacks):
        put_stack(owner, child, module)
        return
    if isinstance(held, nn.Parameter):
        delattr(owner, child)  # a parameter gives its name to a module only when it is gone
    setattr(owner, child, module)


def codes_of(model: nn.Module) -> dict[str, Tensor]:
    """Current integer codes of every fake-quantised weight, for counting flips later.

    Args:
        model: under quantisation.

    Returns:
        Name -> int8 [out, in].
    """
    return {
        name: module.quantizer.pack(module.weight).codes
        for name, module in quantized_modules(model)
        if module.quantizer is not None
    }

"""Routed experts of transformers, whose weights are stacks of matrices held as parameters, under quantised weights.

A stack's place in its owner is taken by a module that gives the whole stack when it is called (`QuantStack`,
`PackedStack`). The owner's own forward, whichever of transformers' experts implementations runs it, then finds a tensor
under the old name: the owner becomes an object of a class made for it, with the user's class behind.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

# What transformers' decorator `use_experts_implementation` tells about a class: how its stacks lie in memory.
TRANSPOSED = "is_transposed"


def stack_axis(owner: nn.Module) -> str | None:
    """Along which axis of a stack the inputs run: "in" for [E, out, in], "out" for [E, in, out], None if unknown.

    Known from the decorator; where a class or a version has none, from the shapes of the two stacks of gated experts
    (Llama 4, LongCat) and from the sizes that a module of one stack names (JetMoe; Granite before it was decorated).
    """
    transposed = vars(owner).get(TRANSPOSED)
    if transposed is None:
        return _axis_of_pair(owner) or _axis_of_one(owner)
    return "out" if transposed else "in"


def _shape(owner: nn.Module, name: str) -> tuple[int, ...]:
    """[E, rows, columns] of a stack, as a parameter or under quantisation; () if there is none."""
    held = owner._parameters.get(name)
    shape = getattr(owner._modules.get(name), "stack_shape", ()) if held is None else held.shape
    return tuple(shape) if len(shape) == 3 else ()


def _axis_of_pair(owner: nn.Module) -> str | None:
    """gate_up_proj takes H inputs to 2 I outputs, down_proj I to H: no other layout has the same two shapes."""
    up, down = _shape(owner, "gate_up_proj"), _shape(owner, "down_proj")
    if not up or not down:
        return None
    if up[1:] == (2 * down[2], down[1]):
        return "in"
    return "out" if up[1:] == (down[2], 2 * down[1]) else None


def _axis_of_one(owner: nn.Module) -> str | None:
    sizes = [getattr(owner, name, None) for name in ("num_experts", "output_size", "input_size")]
    return "in" if None not in sizes and _shape(owner, "weight") == tuple(sizes) else None


def foreign_stacks(owner: nn.Module) -> list[str]:
    """Names of the owner's parameters that are stacks of matrices in a layout that is known."""
    if stack_axis(owner) is None:
        return []
    return [n for n, p in owner.named_parameters(recurse=False) if p.ndim == 3 and p.is_floating_point()]


def put_stack(owner: nn.Module, name: str, stack: nn.Module | nn.Parameter) -> None:
    """Put a quantised stack (or the parameter again) where the owner has `name`."""
    original: Any = getattr(type(owner), "original", type(owner))
    if isinstance(getattr(owner, name), nn.Parameter):
        dtype = getattr(owner, name).dtype
        delattr(owner, name)
        owner.register_module(name, None)  # the name of a property is not free for add_module
        vars(owner).setdefault("stack_dtypes", {})[name] = dtype
    if isinstance(stack, nn.Parameter):
        del owner._modules[name]
        vars(owner)["stack_dtypes"].pop(name)
        left = tuple(vars(owner)["stack_dtypes"])
        owner.__class__ = _class(original, left) if left else original
        owner.register_parameter(name, stack)
        return
    owner._modules[name] = stack
    owner.__class__ = _class(original, tuple(vars(owner)["stack_dtypes"]))


class StackOwner:
    """First base of every class made here. While its forward runs a stack is a tensor, made once; else its module."""

    original: type[nn.Module]
    stacks: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        vars(self)["_values"] = {}
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            del vars(self)["_values"]

    def _stack(self, name: str) -> Any:
        module, values = vars(self)["_modules"][name], vars(self).get("_values")
        if values is None:
            return module
        if name not in values:
            values[name] = module().to(vars(self)["stack_dtypes"][name])
        value: Tensor = values[name]
        return value

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kinds: dict[str, torch.dtype] = vars(self)["stack_dtypes"]
        vars(self)["stack_dtypes"] = {name: fn(torch.empty(0, dtype=kind)).dtype for name, kind in kinds.items()}
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self.original, self.stacks), vars(self)


@functools.cache
def _class(original: Any, stacks: tuple[str, ...]) -> Any:
    members: dict[str, Any] = {
        name: property(lambda self, name=name: self._stack(name))  # type: ignore[misc]
        for name in stacks
    }
    members |= {"original": original, "stacks": stacks, "__doc__": f"{original.__name__} with quantised stacks."}
    return type(f"Quantised{original.__name__}", (StackOwner, original), members)


def _empty(original: Any, stacks: tuple[str, ...]) -> nn.Module:
    made: nn.Module = object.__new__(_class(original, stacks))
    return made

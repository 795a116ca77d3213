"""No unpickler runs while the guard is on, but torch's restricted one, which makes tensors and calls nothing."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._weights_only_unpickler as restricted

NAMES = ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler")


@dataclass
class Seen:
    """violations: what ran though it must not. files: given to torch.load; unpickled: of them by the restricted one."""

    violations: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    unpickled: int = 0


_active: list[Seen] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Every unpickler of Python, in C or not, under whatever name, says so when it looks for a class or function."""
    if event == "pickle.find_class" and _active:
        _active[-1].violations.append(f"an unpickler looked for {arguments[0]}.{arguments[1]}")


_hooked = False


@contextmanager
def guard() -> Iterator[Seen]:
    """Refuse unpicklers until the block ends; torch.load must be called with weights_only=True.

    What is refused raises AssertionError, and stands in `violations` for callers that turn all exceptions into others.
    """
    global _hooked
    if not _hooked:
        sys.addaudithook(_watch)
        _hooked = True
    seen, load, unpickle = Seen(), torch.load, restricted.Unpickler.load

    def refuse(*args: Any, **kwargs: Any) -> Any:
        seen.violations.append("pickle was called")
        raise AssertionError(seen.violations[-1])

    def load_weights(file: Any, *args: Any, **kwargs: Any) -> Any:
        seen.files.append(str(file))
        if kwargs.get("weights_only") is not True or kwargs.get("pickle_module") is not None:
            seen.violations.append(f"torch.load read {file} without weights_only=True")
            raise AssertionError(seen.violations[-1])
        return load(file, *args, **kwargs)

    def unpickle_weights(self: Any) -> Any:
        seen.unpickled += 1
        return unpickle(self)

    changes: list[tuple[Any, str, Callable[..., Any]]] = [(pickle, name, refuse) for name in NAMES]
    changes += [(torch, "load", load_weights), (torch.serialization, "load", load_weights)]
    changes += [(restricted.Unpickler, "load", unpickle_weights)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    _active.append(seen)
    try:
        yield seen
    finally:
        _active.remove(seen)
        for owner, name, value in before:
            setattr(owner, name, value)

"""Running one block of a transformer at a time, each with the arguments that the model itself gives it.

Sliding and full layers get other masks and rotary embeddings, some models hand each block an input of its own, and any
of it may differ from sample to sample. So nothing is recorded: to run block k, the model's own forward runs with the
blocks before it standing still, block k gets the hidden states that belong there, and the forward ends. What that costs
is the token table, the masks and the rotary embedding; memory does not grow with blocks or samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import Unsupported


class _Stop(Exception):
    """Leaves the model's forward once a block has run."""


class Walk:
    """The blocks of a model in the order in which its forward runs them.

    Args:
        model: a transformer.
        layers: its list of blocks.
        blocks: token ids, int64 [samples, length].

    Attributes:
        order: index into `layers` of each run; blocks that run twice are there twice.

    Raises:
        Unsupported: a block gets something else than the hidden states of the one before it, or gives more than hidden
            states.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList, blocks: Tensor) -> None:
        self.model, self.layers, self.blocks = model, layers, blocks
        self.order: list[int] = []
        self.tuples: list[bool] = []
        self._learn()

    def run(self, samples: range, call: int, hidden: Tensor) -> Tensor:
        """Output [B, T, width] of run number `call` for these samples, with `hidden` [B, T, width] as its input."""
        result: list[Tensor] = []

        def block(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
            result.append(_hidden(forward(*args, **kwargs)))
            raise _Stop

        self._forward(samples, call, block)
        return result[0]

    def first_input(self, samples: range) -> Tensor:
        """Input [B, T, width] of the first block for these samples."""
        result: list[Tensor] = []

        def block(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result.append(args[0] if args else kwargs["hidden_states"])
            raise _Stop

        self._forward(samples, 0, block)
        return result[0]

    def _forward(self, samples: range, call: int, block: Any) -> None:
        """The model's forward up to run number `call`, which `block` stands for; the runs before it do nothing."""
        runs = iter(range(len(self.order)))

        def replacement(layer: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            number = next(runs)
            if number == call:
                return block(forward, args, kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden,) if self.tuples[number] else hidden

        with _replaced(self.layers, replacement):
            self._call(samples)

    def _call(self, samples: range) -> None:
        device = next(self.model.parameters()).device
        # a cache kept between samples would mix them
        options = {"use_cache": False} if hasattr(getattr(self.model, "config", None), "use_cache") else {}
        try:
            self.model(self.blocks[samples.start : samples.stop].to(device), **options)
        except _Stop:
            pass

    @torch.no_grad()
    def _learn(self) -> None:
        """One whole forward of the first sample: which blocks run, in which order, and how their outputs travel."""
        index = {id(layer): i for i, layer in enumerate(self.layers)}
        last: Tensor | None = None

        def replacement(layer: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal last
            hidden = args[0] if args else kwargs.get("hidden_states")
            where = f"block {index[id(layer)]} of {type(self.model).__name__}"
            if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[0] != 1:
                shape = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
                raise Unsupported(f"{where} takes {shape} instead of hidden states [samples, length, width]; {_OTHER}")
            if last is not None and hidden is not last and not torch.equal(hidden, last):
                raise Unsupported(f"{where} does not take the output of the block before it as it is; {_OTHER}")
            output = forward(*args, **kwargs)
            if isinstance(output, tuple) and any(part is not None for part in output[1:]):
                raise Unsupported(f"{where} gives more than hidden states to the next one; {_OTHER}")
            last = _hidden(output)
            self.order.append(index[id(layer)])
            self.tuples.append(isinstance(output, tuple))
            return output

        with _replaced(self.layers, replacement):
            self._call(range(1))
        if not self.order:
            raise Unsupported(f"{type(self.model).__name__} did not run its list of blocks; {_OTHER}")


_OTHER = "calibrate it with scale='mse' instead (compress: --method mse)"


@contextmanager
def _replaced(layers: nn.ModuleList, replacement: Any) -> Iterator[None]:
    """Let `replacement(layer, forward, args, kwargs)` stand for the forward of every block."""
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _standing_for(layer, layer.forward, replacement)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own  # type: ignore[method-assign]


def _standing_for(layer: nn.Module, own: Any, replacement: Any) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return replacement(layer, own, args, kwargs)

    return forward


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output

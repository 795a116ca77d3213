"""Full checkpoints of a state: tensors by name, split over processes or not, and a tree of everything else.

What is the same on every process is written by the first; of a split tensor each writes its part; and each may have a
tree of its own. Any number of processes can read tensors, under any split.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from edgewright.errors import FormatError
from edgewright.training.checkpoint.capture import Captured, keep, keep_tree
from edgewright.training.checkpoint.chain import choose, dense_places
from edgewright.training.checkpoint.files import Files
from edgewright.training.checkpoint.ranks import Ranks
from edgewright.training.checkpoint.shards import DTYPES, read_tensors, whole_shape
from edgewright.training.checkpoint.tree import TAGS, decode_state, describe
from edgewright.training.checkpoint.writer import InThread, Saved, WriteRequest, publish


def capture_state(
    step: int, tensors: Mapping[str, Tensor], state: Any, own: Any, ranks: Ranks, copy: bool = True
) -> Captured:
    """What this process will write.

    Args:
        step: in the name of the checkpoint.
        tensors: by name; of those that are split each process gives its part, and the first with a whole one writes it.
        state: a tree that is the same on every process.
        own: a tree of this process alone.
        ranks: the processes.
        copy: whether tensors get memory of their own, so that training can go on before they are written.

    Returns:
        Tensors on the CPU and the trees as JSON, for `save_state`.

    Raises:
        UsageError: a value that a checkpoint cannot hold, with its place in the tree.
    """
    captured = Captured(step, copy=copy)
    held = [set(names) for names in ranks.gather(list(tensors))]
    for name, tensor in tensors.items():
        keep(captured, name, tensor, mine=next(r for r, names in enumerate(held) if name in names) == ranks.rank)
    captured.tree["state"] = keep_tree(captured, state, "state", ranks.first)
    captured.tree["rank"] = keep_tree(captured, own, f"rank.{ranks.rank}", True)
    return captured


def save_state(files: Files, ranks: Ranks, captured: Captured, unique: str = "", keep: int = 1) -> Saved:
    """Write and commit a checkpoint; older ones but `keep` - 1 are deleted then. Every process calls.

    Args:
        files: of the root.
        ranks: the processes.
        captured: see `capture_state`.
        unique: hex digits of which the first eight end the name; drawn where none are given.
        keep: how many checkpoints stay.

    Returns:
        Name, size and times of the checkpoint.

    Raises:
        OutputError: the disk refused; nothing is left of the checkpoint.
    """
    request = WriteRequest(unique or ranks.agree(uuid.uuid4().hex), keep=keep, hint=False)
    return publish(files, ranks, InThread(), request, captured, set()).saved


class SavedState:
    """The newest checkpoint of a root that is intact, or the one named; every byte of it was verified.

    Args:
        files: of the root.
        identity: ckpt-<step>-<8 hex digits>; None for the newest.

    Raises:
        UsageError: the root holds no checkpoint.
        FormatError: it is damaged, of another version, or none of a whole state.
    """

    def __init__(self, files: Files, identity: str | None = None) -> None:
        self.files = files
        self.manifest = choose(files, identity)[0][-1]
        if self.manifest.records or "state" not in self.manifest.state:
            raise FormatError(f"{self.manifest.id} is a checkpoint of changed rows, not of a whole state")
        self._places = dense_places(files, self.manifest, self.manifest.dense)

    @property
    def names(self) -> set[str]:
        """Names of all tensors, those of the trees included."""
        return set(self._places)

    def describe(self, name: str) -> str:
        """Dtype and shape of a whole tensor, as in "float32[64, 128]"; "absent" for one that is not there."""
        return describe(self._empty(name, "meta")) if name in self._places else "absent"

    def state(self) -> Any:
        """The tree that all processes share; split tensors are `Part`s, to be read where they belong."""
        return self._decoded(self.manifest.state["state"])

    def own(self, rank: int) -> Any:
        """The tree of process `rank` of those that wrote. Raises FormatError where there was none."""
        ranks = self.manifest.state["ranks"]
        if not 0 <= rank < len(ranks):
            raise FormatError(f"{self.manifest.id} was written by {len(ranks)} processes; there is no process {rank}")
        return self._decoded(ranks[rank])

    def new(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as `like`, split as they are, in memory of their own, with the saved values.

        Raises FormatError for one that is not there, or is of another shape or dtype.
        """
        for name, tensor in like.items():
            if (was := self.describe(name)) != describe(tensor):
                raise FormatError(f"{self.manifest.id} has {name[:80]!r} as {was}, here it is {describe(tensor)}")
        return self._filled({name: torch.empty_like(tensor.detach()) for name, tensor in like.items()})

    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Fill `targets`, split or whole; nothing is changed where this raises FormatError."""
        values = self.new(targets)
        with torch.no_grad():
            for name, value in values.items():
                targets[name].copy_(value)

    def _decoded(self, tree: Any) -> Any:
        return decode_state(tree, self._filled({name: self._empty(name) for name in _tensors_in(tree)}))

    def _filled(self, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        if targets:
            read_tensors(self.files, self.manifest.id, {name: self._places[name] for name in targets}, targets)
        return targets

    def _empty(self, name: str, device: str = "cpu") -> Tensor:
        places = self._places[name]
        return torch.empty(whole_shape(name, places), dtype=DTYPES[places[0].entry.dtype], device=device)


def _tensors_in(tree: Any) -> Iterator[str]:
    """Keys of the whole tensors of a tree."""
    if isinstance(tree, dict):
        if TAGS[0] in tree:
            yield tree[TAGS[0]]
        else:
            for value in tree.values():
                yield from _tensors_in(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _tensors_in(value)

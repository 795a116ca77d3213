"""From a root back to a live model: the newest checkpoint that verifies, or the one that is named. Listings for people.

Everything is read, verified and compared with the model first; the model, the optimizers and the reader are changed
only then. That needs memory for one more copy of the state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import FormatError, UsageError
from edgewright.systems.check_n_run.config import RestoreInfo
from edgewright.systems.check_n_run.tables import leaves
from edgewright.training import snapshot
from edgewright.training.checkpoint.capture import RowShard
from edgewright.training.checkpoint.chain import (
    Catalogue,
    TableRows,
    catalogue,
    check_chain,
    choose,
    dense_places,
    latest,
    orphans,
    replay,
)
from edgewright.training.checkpoint.files import Files, open_files
from edgewright.training.checkpoint.manifest import ROWS, Manifest
from edgewright.training.checkpoint.ranks import Ranks
from edgewright.training.checkpoint.records import decode_ids
from edgewright.training.checkpoint.shards import DTYPES, Place, read_file, read_tensors, whole_shape
from edgewright.training.checkpoint.tree import TAGS, decode_state
from edgewright.training.distributed import is_split

# A group of an optimizer, its options, and (the optimizer's state, parameter, its entries) of each parameter.
Fill = tuple[dict[str, Any], dict[str, Any], list[tuple[Any, Tensor, dict[str, Any]]]]


class RestorePlan:
    """What a restore will do, all of it read and checked; `apply` does it."""

    def __init__(
        self,
        files: Files,
        chain: list[Manifest],
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        reader: Any,
        shards: Sequence[RowShard],
        rank: int,
        world: int,
    ) -> None:
        self.tip, self.model, self.reader, self.world = chain[-1], model, reader, world
        tensors = snapshot.model_tensors(model)
        given = {id(shard.parameter) for shard in shards}
        self.rows: list[RowShard] = list(shards)
        self.rows += [
            RowShard(tensor, name)
            for name, tensor in tensors.items()
            if name in self.tip.tables and id(tensor) not in given
        ]
        self.dense = {
            name: tensor for name, tensor in tensors.items() if name not in self.tip.tables and id(tensor) not in given
        }
        places = dense_places(files, self.tip, self.tip.dense)
        self._compare(places)
        self.leaves = list(leaves(optimizers))
        self._compare_optimizers()
        targets: dict[str, Tensor] = {}
        for name, tensor in self.dense.items():
            targets[f"model.{name}"] = torch.empty_like(tensor.detach(), device=None if is_split(tensor) else "cpu")
        targets |= self._optimizer_targets(places, world, rank)
        read_tensors(files, self.tip.id, {name: places[name] for name in targets}, targets)
        self.values = targets
        parts: dict[str, tuple[int, int]] = {}
        for shard in self.rows:  # several parts of one table are read as what spans them
            first, count = parts.get(shard.name, (shard.first, 0))
            low, high = min(first, shard.first), max(first + count, shard.first + len(shard.parameter))
            parts[shard.name] = low, high - low
        self.tables = replay(files, chain, parts)
        ranks = self.tip.state["ranks"]
        own = decode_state(ranks[rank], targets) if rank < len(ranks) and world == len(ranks) else None
        self.random: Any = None if own is None else own["random"]
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if self.random is not None:
            snapshot.check_random_state(self.tip.id, self.device, self.random)
        self.position = self._position(own, ranks)
        self.fills = list(self._plan_fills())

    def _compare(self, places: dict[str, list[Place]]) -> None:
        """Raise UsageError naming every table and tensor that is another in the model."""
        wrong = []
        held = {shard.name: shard for shard in self.rows}
        for name, table in self.tip.tables.items():
            shard = held.get(name)
            was = f"{table.dtype}{[table.rows, *table.shape]}"
            if shard is None:
                now = "absent"
            else:
                kind = str(shard.parameter.dtype).removeprefix("torch.")
                now = f"{kind}{[shard.total, *shard.parameter.shape[1:]]}"
            if was != now and not (shard is None and self.tip.world > 1):
                wrong.append(f"table {name} was {was}, now {now}")
        wrong += [f"table {name} is not in it" for name in held if name not in self.tip.tables]
        saved = {name.removeprefix("model.") for name in places if name.startswith("model.")}
        for name in sorted(saved | set(self.dense)):
            was, now = "absent", "absent"
            if name in saved:
                parts = places[f"model.{name}"]
                shape = whole_shape(name, parts)
                was = f"{str(DTYPES[parts[0].entry.dtype]).removeprefix('torch.')}{shape}"
            if name in self.dense:
                tensor = self.dense[name]
                now = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            if was != now:
                wrong.append(f"tensor {name} was {was}, now {now}")
        if wrong:
            raise UsageError(f"{self.tip.id} is of another model: {'; '.join(wrong[:8])}")

    def _compare_optimizers(self) -> None:
        saved = [entry["class"] for entry in self.tip.state["optimizers"]]
        now = [type(leaf).__name__ for leaf in self.leaves]
        groups = [len(entry["groups"]) for entry in self.tip.state["optimizers"]]
        few = len(now) if self.tip.world > 1 or self.world > 1 else len(saved)  # a process without tables has fewer
        if now and (saved[:few] != now or groups[:few] != [len(leaf.param_groups) for leaf in self.leaves]):
            raise UsageError(
                f"{self.tip.id} was saved with the optimizers {', '.join(saved)} ({groups} groups), here are "
                f"{', '.join(now)}: give the same ones in the same order, or none"
            )

    def _optimizer_targets(self, places: dict[str, list[Place]], world: int, rank: int) -> dict[str, Tensor]:
        """Memory for the tensors of optimizers and of this process, split like their parameters where those are."""
        names = {shard.name: shard.parameter for shard in self.rows} | self.dense
        split: dict[str, Tensor] = {}
        for entry in self.tip.state["optimizers"] if self.leaves else ():
            for name, labels in entry["state"].items():
                parameter = names.get(name)
                for value in labels.values():
                    tag = next((value[t] for t in TAGS if isinstance(value, dict) and t in value), None)
                    if tag is not None and parameter is not None and is_split(parameter):
                        split[tag] = parameter
        targets = {}
        for name, parts in places.items():
            _, _, place = name.partition(" ")
            mine = world == self.tip.world and place.startswith(f"rank.{rank}.")
            if not (mine or (self.leaves and place.startswith("opt."))):
                continue
            if name in split and len(parts[0].entry.shape) == split[name].ndim:
                targets[name] = torch.zeros_like(split[name]).detach()
            else:
                targets[name] = torch.empty(whole_shape(name, parts), dtype=DTYPES[parts[0].entry.dtype])
        return targets

    def _position(self, own: Any, ranks: list[Any]) -> Any:
        if self.reader is None:
            return None
        position = own["reader"] if own is not None else ranks[0]["reader"]
        if own is None and any(entry["reader"] != position for entry in ranks):
            raise UsageError(
                f"{self.tip.id} was saved by {self.tip.world} processes, whose readers stood at different places: give "
                "no reader, and place yours yourself"
            )
        if position is None:
            raise UsageError(f"{self.tip.id} was saved without a reader, so that its position is unknown; give none")
        return position

    def place_reader(self) -> None:
        """Put the reader where it was. It comes first: of all live objects it alone can still refuse."""
        if self.reader is None:
            return
        try:
            self.reader.load_state_dict(self.position)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise FormatError(
                f"{self.tip.id} holds a position that the reader does not take ({error!r:.200})"
            ) from error

    def apply(self, generator: torch.Generator | None) -> None:
        """Change the live objects; everything that this takes is there and fits."""
        with torch.no_grad():
            for name, tensor in self.dense.items():
                tensor.copy_(self.values[f"model.{name}"])
            for shard in self.rows:
                shard.parameter.copy_(_slice(self.tables[shard.name], shard).values)
            for group, options, entries in self.fills:
                _fill(group, options, entries)
        if self.random is not None:
            if generator is not None and self.random["generator"] is None:
                generator = None
            snapshot.restore_random_state(self.device, generator, self.random)

    def _plan_fills(self) -> Iterator[Fill]:
        """What goes into each group of the optimizers: its options, and of each parameter the entries of its state."""
        names = {id(tensor): name for name, tensor in self.dense.items()}
        shards = {id(shard.parameter): shard for shard in self.rows}
        for leaf, entry in zip(self.leaves, self.tip.state["optimizers"], strict=False):
            for group, saved in zip(leaf.param_groups, entry["groups"], strict=True):
                options = decode_state(saved, self.values)
                for name, value in options.items():
                    if not snapshot.option_fits(value, group.get(name)):
                        raise FormatError(
                            f"{self.tip.id}: the option {name[:40]!r} of {entry['class'][:40]} does not fit"
                        )
                entries = []
                for parameter in group["params"]:
                    shard = shards.get(id(parameter))
                    labels = entry["state"].get(names.get(id(parameter), "") if shard is None else shard.name, {})
                    found = {}
                    for label, value in labels.items():
                        if shard is not None and isinstance(value, dict) and ROWS in value:
                            found[label] = _slice(self.tables[shard.name], shard).state[label].clone()
                        else:
                            found[label] = decode_state(value, self.values)
                    odd = [n for n, value in found.items() if not snapshot.state_fits(leaf, n, value, parameter)]
                    if odd:
                        raise FormatError(f"{self.tip.id}: the optimizer's {odd[0][:40]!r} is of another kind")
                    if missing := snapshot.missing_state(leaf, found):
                        raise FormatError(f"{self.tip.id}: the optimizer has no {missing[0]!r} of a parameter")
                    entries.append((leaf.state, parameter, found))
                yield group, options, entries


def _fill(group: dict[str, Any], options: dict[str, Any], entries: list[Any]) -> None:
    """Options and state in place: a pair of optimizers, or a schedule, goes on holding the same groups."""
    for name, value in options.items():
        if isinstance(value, Tensor) and isinstance(group.get(name), Tensor):
            group[name].copy_(value)
        else:
            group[name] = value
    for state, parameter, found in entries:
        before = state.get(parameter, {})
        if found:
            state[parameter] = {n: _placed(value, n, before, parameter, group) for n, value in found.items()}
        else:
            state.pop(parameter, None)


def _slice(table: TableRows, shard: RowShard) -> TableRows:
    start = shard.first - table.first
    part = slice(start, start + len(shard.parameter))
    return TableRows(shard.first, table.values[part], {name: state[part] for name, state in table.state.items()})


def _placed(value: Any, label: str, before: Any, parameter: Tensor, group: dict[str, Any]) -> Any:
    """An entry where it belongs: in the memory that it had, or where torch's optimizers keep such a thing."""
    if not isinstance(value, Tensor) or is_split(value):
        return value
    old = before.get(label)
    if isinstance(old, Tensor) and old.shape == value.shape and old.dtype == value.dtype:
        return old.copy_(value)
    counts = label == "step" and not (group.get("capturable") or group.get("fused"))
    return value.to("cpu" if counts else parameter.device)


def restore(
    root: str | Path | Files,
    model: nn.Module,
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    reader: Any = None,
    *,
    generator: torch.Generator | None = None,
    shards: Sequence[RowShard] = (),
    identity: str | None = None,
    timeout: float = 600.0,
    group: Any = None,
) -> RestoreInfo:
    """Put the newest usable checkpoint of `root`, or the one named, into the live objects.

    Random states are put back where as many processes restore as saved. Whatever is raised, nothing has been changed
    then.

    Args:
        root: a folder or an fsspec URL.
        model: gets parameters and buffers.
        optimizers: get their state; None leaves theirs as it is.
        reader: gets its position; None leaves it.
        generator: gets its state.
        shards: where tables are split over processes, the part of each that lies here.
        identity: the checkpoint; default: the newest that can be used.
        timeout: seconds that processes wait for each other.
        group: process group; default: all processes.

    Returns:
        What was restored; give it to the next DiffCheckpointer as `restored`.

    Raises:
        UsageError: no checkpoint, or one of another model, whose tables and tensors are named.
        FormatError: another format version, or none that can be used, with the reason for each.
    """
    files, ranks = open_files(root), Ranks(timeout, group)
    try:
        optimizer_list = (
            [] if optimizers is None else [optimizers] if isinstance(optimizers, torch.optim.Optimizer)
            else list(optimizers)
        )  # fmt: skip
        chosen: Any = None
        error: BaseException | None = None
        if ranks.first:
            try:
                chosen = choose(files, identity)
            except Exception as caught:
                error = caught
        ranks.together(error)
        chain, skipped = ranks.agree(chosen)
        try:
            plan = RestorePlan(files, chain, model, optimizer_list, reader, shards, ranks.rank, ranks.world)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as caught:
            error = FormatError(f"{chain[-1].id} does not hold what its manifest claims ({caught!r:.200})")
        except Exception as caught:
            error = caught
        ranks.together(error)
        try:
            plan.place_reader()
        except Exception as caught:
            error = caught
        ranks.together(error)
        plan.apply(generator)
    finally:
        ranks.close()
    tip = chain[-1]
    return RestoreInfo(
        tip.step, tip.id, tuple(link.id for link in chain), tip.bits, tip.restores + 1, skipped, plan.random is not None
    )


def changed_rows(files: Files, chain: list[Manifest], shards: Sequence[RowShard]) -> list[Tensor]:
    """Of each shard, the rows (counted from its first) that the differences of a chain hold."""
    masks = [torch.zeros(len(shard.parameter), dtype=torch.bool) for shard in shards]
    for link in chain[1:]:
        for record in link.records:
            tensors = None
            for shard, mask in zip(shards, masks, strict=True):
                if shard.name == record["table"]:
                    tensors = read_file(files, link.id, record["file"]) if tensors is None else tensors
                    ids = decode_ids(record, tensors, shard.total) - shard.first
                    mask[ids[(ids >= 0) & (ids < len(mask))]] = True
    return [mask.nonzero().squeeze(1) for mask in masks]


@dataclass(frozen=True)
class Entry:
    """One folder of a root. ratio: bytes against the full checkpoint it builds upon; status: "usable" or why not."""

    id: str
    kind: str
    step: int
    bits: int | None
    rows: int
    raw_rows: int
    bytes: int
    ratio: float
    status: str

    @property
    def usable(self) -> bool:
        return self.status == "usable"


@dataclass(frozen=True)
class Listing:
    """entries newest first; latest: what the file LATEST says; orphans: folders that are no checkpoints."""

    entries: tuple[Entry, ...]
    latest: str | None
    orphans: tuple[str, ...]


def inspect_dir(root: str | Path | Files, content: bool = False) -> Listing:
    """List the checkpoints of a root.

    Args:
        root: a folder or an fsspec URL.
        content: read every file and compare its sha256 too, not its size alone.

    Returns:
        Every checkpoint, newest first, usable or why not; what LATEST says; orphans of killed processes.
    """
    files = open_files(root)
    known = catalogue(files)
    verified: set[str] = set()
    entries = [_entry(files, known, manifest, verified, content) for manifest in known.found]
    entries += [
        Entry(name, "?", 0, None, 0, 0, 0, 0.0, reason) for name, reason in sorted(known.broken.items(), reverse=True)
    ]
    return Listing(tuple(entries), latest(files), tuple(orphans(files, float("inf"))))


def find(path: str | Path) -> tuple[Files, str]:
    """(root, id) of a checkpoint's folder, local or behind a URL."""
    text = str(path).rstrip("/")
    root, _, identity = text.rpartition("/")
    return open_files(root or "."), identity


def load_model(files: Files, identity: str | None = None) -> tuple[list[Manifest], dict[str, Tensor]]:
    """(chain, the model's tensors by name, in float) of a checkpoint, every byte of its chain verified.

    identity None: the newest that can be used. Raises UsageError, FormatError.
    """
    chain, _ = choose(files, identity)
    tip = chain[-1]
    tensors = {name: table.values for name, table in replay(files, chain).items()}
    names = [name for name in tip.dense if name.startswith("model.")]
    places = dense_places(files, tip, names)
    targets = whole_targets(places)
    read_tensors(files, tip.id, places, targets)
    return chain, tensors | {name.removeprefix("model."): tensor for name, tensor in targets.items()}


def whole_targets(places: dict[str, list[Place]]) -> dict[str, Tensor]:
    """Memory for whole tensors whose parts lie at `places`."""
    result = {}
    for name, parts in places.items():
        result[name] = torch.empty(whole_shape(name, parts), dtype=DTYPES[parts[0].entry.dtype])
    return result


def need_checkpoints(files: Files, listing: Listing) -> None:
    """Raise UsageError where a root holds nothing."""
    if not listing.entries:
        raise UsageError(f"{files} holds no checkpoint; they are folders called ckpt-<step>-<id>")


def _entry(files: Files, known: Catalogue, manifest: Manifest, verified: set[str], content: bool) -> Entry:
    try:
        check_chain(files, known, manifest, verified, content)
        status = "usable"
    except FormatError as error:
        status = str(error)
    base = known.get(manifest.base)
    ratio = manifest.data_bytes / base.data_bytes if base is not None and base.data_bytes else 1.0
    size = manifest.data_bytes + len(manifest.encode()[0])
    return Entry(
        manifest.id, manifest.kind, manifest.step, manifest.bits, manifest.rows, manifest.raw_rows, size, ratio, status
    )

"""What lies in a root, for people: every checkpoint with its size, its rows and whether it can be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgewright.errors import FormatError, UsageError
from edgewright.systems.check_n_run.chain import Catalogue, catalogue, check_chain, dense_places, replay
from edgewright.systems.check_n_run.commit import latest, leftovers
from edgewright.systems.check_n_run.files import Files
from edgewright.systems.check_n_run.manifest import Manifest
from edgewright.systems.check_n_run.recovery import choose
from edgewright.systems.check_n_run.shards import DTYPES, Place, read_tensors, whole_shape
from edgewright.systems.check_n_run.url_files import open_files


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
    """entries newest first; latest: what the file LATEST says; leftovers: folders that are no checkpoints."""

    entries: tuple[Entry, ...]
    latest: str | None
    leftovers: tuple[str, ...]


def inspect_dir(root: str | Path | Files, content: bool = False) -> Listing:
    """The checkpoints of a root. content: read every file and compare its sha256 too, not its size alone."""
    files = open_files(root)
    known = catalogue(files)
    proved: set[str] = set()
    entries = [_entry(files, known, manifest, proved, content) for manifest in known.found]
    entries += [
        Entry(name, "?", 0, None, 0, 0, 0, 0.0, reason) for name, reason in sorted(known.broken.items(), reverse=True)
    ]
    return Listing(tuple(entries), latest(files), tuple(leftovers(files, float("inf"))))


def find(path: str | Path) -> tuple[Files, str]:
    """(root, id) of a checkpoint's folder, local or behind a URL."""
    text = str(path).rstrip("/")
    root, _, identity = text.rpartition("/")
    return open_files(root or "."), identity


def load_model(files: Files, identity: str | None = None) -> tuple[list[Manifest], dict[str, Tensor]]:
    """(chain, the model's tensors by name, in float) of a checkpoint, every byte of its chain proved.

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
        raise UsageError(f"{files} holds no checkpoint; a DiffCheckpointer writes them as ckpt-<step>-<id>")


def _entry(files: Files, known: Catalogue, manifest: Manifest, proved: set[str], content: bool) -> Entry:
    try:
        check_chain(files, known, manifest, proved, content)
        status = "usable"
    except FormatError as error:
        status = str(error)
    base = known.get(manifest.base)
    ratio = manifest.data_bytes / base.data_bytes if base is not None and base.data_bytes else 1.0
    size = manifest.data_bytes + len(manifest.encode()[0])
    return Entry(
        manifest.id, manifest.kind, manifest.step, manifest.bits, manifest.rows, manifest.raw_rows, size, ratio, status
    )

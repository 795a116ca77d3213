"""Folders of shards that can be continued: a manifest says what they hold, another configuration is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edgewright.errors import FormatError, UsageError
from edgewright.io.atomic import write_text
from edgewright.io.hashing import blake2b
from edgewright.io.json_file import read_object
from edgewright.io.run_folder import difference
from edgewright.measure.progress import ProgressBar

MANIFEST = "manifest.json"
FINGERPRINT_SAMPLES = 4096


def claim_shards(folder: str | Path, kind: str, settings: dict[str, Any]) -> Path:
    """Make `folder` the home of a run with these settings, or check that it is one already.

    Raises UsageError naming the first setting that differs; OutputError when the folder cannot be written.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; give a folder for the {kind}")
        write_text(folder / MANIFEST, json.dumps({"kind": kind, **settings}, indent=1) + "\n")
        return folder
    if other := difference(read_manifest(folder, kind), {"kind": kind, **settings}):
        raise UsageError(f"{folder} was made with {other}: use the old setting to go on, or another folder")
    return folder


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The settings of a folder. Raises UsageError when it is not a folder of this kind."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(f"{folder} is no {kind}: it has no {MANIFEST}")
    try:
        found = read_object(path)
    except (FormatError, UsageError) as error:
        raise UsageError(f"{error}; use another folder") from error
    if found.get("kind") != kind:
        raise UsageError(f"{path} does not describe a {kind}; use another folder")
    return found


def shard_paths(folder: Path, count: int, suffix: str) -> list[Path]:
    return [folder / f"shard-{index:05d}.{suffix}" for index in range(count)]


def fingerprint(model: nn.Module) -> str:
    """Short digest of names, shapes and some values of all tensors: tells models apart, withstands no adversary."""
    parts: list[str | Tensor] = []
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLES)][:FINGERPRINT_SAMPLES]
        parts += [f"{name} {tuple(tensor.shape)} {tensor.dtype}", sample]
    return blake2b(*parts, size=12)


@contextmanager
def track(label: str, total: int, shown: bool) -> Iterator[Callable[[int, bool], None]]:
    """Progress in tokens, of at most `total`, with speed and time left.

    Yields advance(tokens, worked); tokens that were there already (worked=False) do not count into the speed.
    """
    began = time.monotonic()
    worked_on = 0
    with ProgressBar(label, total, shown=shown) as bar:

        def advance(tokens: int, worked: bool) -> None:
            nonlocal worked_on
            worked_on += tokens if worked else 0
            bar.advance(tokens, f"{worked_on / max(time.monotonic() - began, 1e-9):,.0f} tokens/s")

        yield advance

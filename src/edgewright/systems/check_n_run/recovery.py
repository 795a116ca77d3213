"""From a root back to a live model: the newest checkpoint that proves good, or the one that is named.

Everything is read, proved and compared with the model first; the model, the optimizers and the reader are changed only
then. That needs memory for one more copy of the state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import FormatError, UsageError
from edgewright.systems.check_n_run.chain import catalogue, check_chain, newest
from edgewright.systems.check_n_run.config import RestoreInfo
from edgewright.systems.check_n_run.files import Files
from edgewright.systems.check_n_run.manifest import Manifest
from edgewright.systems.check_n_run.placing import Placing
from edgewright.systems.check_n_run.ranks import Ranks
from edgewright.systems.check_n_run.records import decode_ids
from edgewright.systems.check_n_run.shards import read_file
from edgewright.systems.check_n_run.tables import RowShard
from edgewright.systems.check_n_run.url_files import open_files


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
    """Put the newest usable checkpoint of `root`, or the one called `identity`, into the live objects.

    Without optimizers or reader theirs is left out. Random states are put back where as many processes restore as
    saved. Give what comes back to the next DiffCheckpointer as `restored`. Raises UsageError (no checkpoint, or of
    another model: tables and tensors are named), FormatError (another format version; none can be used, with the
    reason for each). Then nothing has been changed.
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
            plan = Placing(files, chain, model, optimizer_list, reader, shards, ranks.rank, ranks.world)
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


def choose(files: Files, identity: str | None) -> tuple[list[Manifest], dict[str, str]]:
    """(chain, what was skipped and why) of the newest usable checkpoint, or of the one named. Raises as `restore`."""
    known = catalogue(files)
    if known.other_version is not None and identity not in known.digests:
        raise known.other_version
    if identity is not None:
        manifest = known.get(identity)
        if manifest is None:
            reason = known.broken.get(identity)
            names = ", ".join(m.id for m in known.found[:5]) or "none"
            raise FormatError(reason) if reason else UsageError(f"{files} holds no {identity}; it holds {names}")
        return check_chain(files, known, manifest), {}
    chain, skipped = newest(files, known)
    if chain is None and not skipped:
        raise UsageError(f"{files} holds no checkpoint; a DiffCheckpointer writes them as ckpt-<step>-<id>")
    if chain is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(skipped.items(), reverse=True)[:5])
        raise FormatError(f"no checkpoint of {files} can be used: {reasons}")
    return chain, skipped

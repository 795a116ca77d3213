"""The measurements behind the recipe: checkpoint bytes by policy, quality after restores, errors of few-bit rows."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgewright.io.row_ranges import quantize_rows
from edgewright.systems.check_n_run.checkpointer import DiffCheckpointer
from edgewright.systems.check_n_run.config import POLICIES, CheckpointConfig
from edgewright.systems.check_n_run.recovery import restore
from edgewright.systems.dlrm.clicks import ClickLoss
from edgewright.systems.dlrm.metrics import evaluate
from edgewright.systems.dlrm.model import DLRM, DLRMConfig
from edgewright.systems.dlrm.movielens import CROSSES, TABLES, movielens_100k
from edgewright.systems.dlrm.optimizers import dlrm_optimizer
from edgewright.training.checkpoint.files import LOCK
from edgewright.training.checkpoint.records import RANGE

if TYPE_CHECKING:
    from torch import Tensor

    from edgewright.systems.dlrm.clicks import ClickData

STORED: tuple[int | str, ...] = ("none", 4)  # bits of the comparison of policies
LOCK_BYTES = 28  # of the file LOCK, whose own length depends on the process number and the host name
METHODS = ("symmetric", "minmax", "adaptive", "k-means")


class Study:
    """Trainings of a DLRM on MovieLens 100k; `settings` are the recipe's."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @cached_property
    def timed(self) -> ClickData:
        """Nearly everything in the order of time."""
        return movielens_100k("time", train=0.97, valid=0.01).train.tables(list(self.settings.tables))

    @cached_property
    def random(self) -> list[ClickData]:
        """[to train on, to judge by], plain tables."""
        split = movielens_100k("random", seed=self.settings.seed)
        parts = [part.tables([name for name in TABLES if name not in CROSSES]) for part in (split.train, split.test)]
        samples = self.settings.quality_samples
        return [part.rows(slice(0, samples)) for part in parts] if samples else parts

    def sizes(self, dim: int, root: Path) -> dict[str, Any]:
        """One training with a checkpointer for every policy and storage, in folders of `root`; sizes in bytes."""
        settings, data = self.settings, self.timed
        model, optimizer, step = self._training(data, dim, settings.seed)
        batches = data.batches(settings.batch, settings.seed, shuffled=False)
        shutil.rmtree(root, ignore_errors=True)
        writers: dict[str, DiffCheckpointer] = {}
        for policy in POLICIES:
            for bits in STORED:
                config = CheckpointConfig(policy=policy, bits=bits, method="minmax", keep=1, expected_restores=4)  # type: ignore[arg-type]
                name = f"{policy}, {'float' if bits == 'none' else f'{bits} bits'}"
                # the reader's state would be the same bytes in all of them
                writers[name] = DiffCheckpointer(root / name, model, optimizer, config=config)
        policies: dict[str, Any] = {name: {"bytes": [], "held": [], "kinds": [], "stalls": []} for name in writers}
        since_last, since_base = [], []
        total = sum(data.schema.sizes)
        ever = None
        for _ in range(settings.intervals):
            for _ in range(settings.events // settings.batch):
                step(next(batches))
            masks = [bits.mask() for bits in writers["full, float"].tracker.last]
            ever = masks if ever is None else [a | b for a, b in zip(ever, masks, strict=True)]
            since_last.append(sum(int(mask.sum()) for mask in masks) / total)
            since_base.append(sum(int(mask.sum()) for mask in ever) / total)
            for name, writer in writers.items():
                writer.steps += settings.events // settings.batch
                writer.save(now=True)
                saved, lists = writer.history[-1], policies[name]
                lists["bytes"].append(saved.bytes)
                lists["kinds"].append(saved.kind)
                lists["stalls"].append(saved.stall_seconds)
                lists["held"].append(held_bytes(root / name))
        for writer in writers.values():
            writer.close()
        shutil.rmtree(root, ignore_errors=True)
        return {"policies": policies, "since_last": since_last, "since_base": since_base}

    def quality(self, bits: int, restores: int, seed: int) -> dict[str, float]:
        """Test figures after a training that was restored `restores` times, evenly spread, at `bits` bits."""
        settings, (train, test) = self.settings, self.random
        model, optimizer, step = self._training(train, settings.quality_dim, seed)
        batches = train.batches(settings.quality_batch, seed)
        steps = max(1, round(settings.epochs * len(train) / settings.quality_batch))
        stops = {round(steps * (number + 1) / (restores + 1)) for number in range(restores)}
        config = CheckpointConfig(policy="one-shot", bits=bits or "none", expected_restores=1e9, nbins=25, ratio=0.6)  # type: ignore[arg-type]
        info = None
        with tempfile.TemporaryDirectory() as root:
            for number in range(1, steps + 1):
                step(next(batches))
                if number in stops:
                    writer = DiffCheckpointer(root, model, optimizer, reader=batches, config=config, restored=info)
                    writer.tracker.mark_all()  # rows changed before this writer came to be
                    writer.save(now=True)
                    writer.close()
                    info = restore(root, model, optimizer, batches)
        figures = evaluate(model, test)
        return {"ne": figures.ne, "auc": figures.auc, "logloss": figures.logloss}

    def row_errors(self) -> dict[str, float]:
        """Relative error of trained rows by method and bits, on 512 users."""
        settings, (train, _) = self.settings, self.random
        model, _, step = self._training(train, settings.quality_dim, settings.seed)
        batches = train.batches(settings.quality_batch, settings.seed)
        for _ in range(max(1, len(train) // settings.quality_batch)):
            step(next(batches))
        rows = model.tables[0].weight.detach()[:512]
        return {f"{method}, {bits} bits": row_error(rows, bits, method) for bits in (2, 3, 4) for method in METHODS}

    def _training(self, data: ClickData, dim: int, seed: int) -> tuple[Any, Any, Callable[[Any], None]]:
        """(model, optimizer, what trains on a batch)."""
        settings, schema = self.settings, data.schema
        widths = (settings.hidden, dim), (settings.hidden, 1)
        model = DLRM(DLRMConfig(len(schema.dense), schema.sizes, dim, *widths, table_names=schema.tables), seed)
        optimizer, loss = dlrm_optimizer(model, settings.dense_lr, settings.sparse_lr), ClickLoss(schema.slots)

        def step(batch: Any) -> None:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()

        return model, optimizer, step


def held_bytes(folder: Path) -> int:
    """Bytes of all files of a root of checkpoints, the lock counted as LOCK_BYTES."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return sum(LOCK_BYTES if file.name == LOCK else file.stat().st_size for file in files)


def row_error(rows: Tensor, bits: int, method: str) -> float:
    """|W - W_hat| / |W| (Frobenius) of rows W [n, d] stored at `bits` bits by one of METHODS."""
    if method == "k-means":
        restored = kmeans_rows(rows, bits)
    else:
        nbins, ratio = RANGE
        name = "greedy" if method == "adaptive" else method
        restored = quantize_rows(rows, bits, name, nbins, ratio).dequantize()
    return float((restored - rows).norm() / rows.norm())


def kmeans_rows(rows: Tensor, bits: int, iterations: int = 15) -> Tensor:
    """Every row [n, d] with 2^bits levels of its own (Lloyd from equal steps): the paper's bound, too slow to use.

    No layout stores it here: its levels alone would take 2^bits floats a row.
    """
    low, high = rows.aminmax(dim=1, keepdim=True)
    levels = low + (high - low) * torch.linspace(0, 1, 2**bits)  # [n, k]
    for _ in range(iterations):
        nearest = (rows.unsqueeze(2) - levels.unsqueeze(1)).abs().argmin(2)  # [n, d]
        count = torch.zeros_like(levels).scatter_add_(1, nearest, torch.ones_like(rows))
        total = torch.zeros_like(levels).scatter_add_(1, nearest, rows)
        levels = torch.where(count > 0, total / count.clamp_min(1), levels)
    nearest = (rows.unsqueeze(2) - levels.unsqueeze(1)).abs().argmin(2)
    return levels.gather(1, nearest)

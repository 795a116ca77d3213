"""The bond between a run and its output folder: when to start afresh, where to go on, what a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import CheckFailed, EdgewrightError, FormatError, UsageError
from edgewright.protocols import DiffersByProcess, KeepsState
from edgewright.training import run_checkpoint as checkpoint, sharded, snapshot
from edgewright.training.background import Background
from edgewright.training.checkpoint.tree import check_state, describe
from edgewright.training.distributed import is_split
from edgewright.training.metrics import MetricsLog
from edgewright.training.sharded_parts import new_parts

RESUME = ("auto", "never", "must")


@dataclass
class Position:
    """How far a run got: whole updates, then micro steps into the next one with what they gave so far."""

    step: int = 0
    micro: int = 0
    losses: list[float | Tensor] = field(default_factory=list)
    metrics: list[dict[str, float | Tensor]] = field(default_factory=list)


def steps_lost(output: str | Path) -> tuple[int | None, int]:
    """(step that the run in `output` goes on from, or None; steps that it had done beyond and does again)."""
    path = checkpoint.latest_checkpoint(output)
    step = None if path is None else checkpoint.step_of(path)
    done = MetricsLog.last_step(Path(output) / "metrics.csv")
    return step, max(0, done - (step or 0))


class Keeper:
    """Saves and restores one run. `folder` None keeps nothing.

    `settings` is everything outside the model that shapes the result; a resume under other settings is refused.
    A loss function with `state_dict()` and `load_state_dict()` is kept with the run, unless it is an nn.Module.
    In a distributed run every process calls `save` and `restore`; the first one writes, each keeps its random state,
    its gradients within an accumulated step, and the state of an optimizer that says `differs_by_process`.
    """

    def __init__(
        self,
        folder: Path | None,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Any,
        loss_function: Any,
        device: torch.device,
        generator: torch.Generator | None,
        scaler: torch.amp.GradScaler | None,
        accelerator: Any,
        settings: Mapping[str, Any],
    ) -> None:
        self.folder, self._saved = folder, None if folder is None else checkpoint.latest_checkpoint(folder)
        self._background = Background()
        self._writing: Path | None = None
        self._model, self._optimizer, self._batches = model, optimizer, batches
        stateful = isinstance(loss_function, KeepsState) and not isinstance(loss_function, nn.Module)
        self._loss_function = loss_function if stateful else None
        self._device, self._generator, self._scaler = device, generator, scaler
        self._accelerator, self._settings = accelerator, settings
        self._frozen: dict[str, int] = {}
        if folder is not None:
            inside = {id(parameter) for parameter in model.parameters()}
            if any(id(p) not in inside for group in optimizer.param_groups for p in group["params"]):
                raise UsageError(
                    "the optimizer holds parameters that are not in the model, so a checkpoint would miss them; "
                    "put all of them into one nn.Module"
                )
            check_state(dict(settings), "settings")
            check_state(optimizer.state_dict()["param_groups"], "optimizer")
            self._frozen = snapshot.frozen_checksums(model)

    def restore(self, policy: str) -> Position:
        """Go on from the last checkpoint or clear the folder for a fresh start, as `policy` (RESUME) says."""
        if policy not in RESUME:
            raise UsageError(f"resume={policy!r} is unknown; use one of {', '.join(RESUME)}")
        path = self.saved if policy != "never" else None
        if path is None:
            if policy == "must":
                where = f"there is no checkpoint in {self.folder}" if self.folder else "no output folder is given"
                raise UsageError(f"resume='must', but {where}; use resume='auto' to begin")
            self.clear()
            return Position()
        with damage(path):
            return self._restore(path)

    def _restore(self, path: Path) -> Position:
        """Read and compare everything; then change the live objects, those that may still refuse before the model."""
        state = checkpoint.read_state(path)
        difference = snapshot.first_difference(state["settings"], dict(self._settings))
        if difference:
            name, was, now = difference
            raise UsageError(
                f"cannot resume from {path}: {name} was {was!r}, now {now!r}; use the old value, another output "
                "folder, or resume='never' to start again"
            )
        if wrote := state.get("own"):
            if wrote != self._accelerator.num_processes:
                raise UsageError(
                    f"cannot resume from {path}: each of {wrote} processes wrote a state of its own, and here are "
                    f"{self._accelerator.num_processes}; start {wrote} processes, or resume='never' to begin again"
                )
            state |= checkpoint.read_own(path, self._accelerator.process_index)
        names = checkpoint.model_names(path)
        snapshot.check_model(path, self._model, names, state["shapes"], state["frozen"])
        live = snapshot.model_tensors(self._model)
        values = checkpoint.read_model(path, live)
        for name in values:
            if is_split(live[name]):
                raise UsageError(f"cannot resume from {path}: model tensor {name!r} was whole, now it is split")
        parts = {checkpoint.PART + name: live[name] for name in names - values.keys()}
        held = sharded.fill_optimizer(self._optimizer, state["optimizer"])
        read = new_parts(path / sharded.FOLDER, parts | held)
        with torch.no_grad():
            for key, tensor in held.items():
                tensor.copy_(read[key])
        values |= {name.removeprefix(checkpoint.PART): read[name] for name in parts}
        snapshot.check_gradients(path, self._model, state["gradients"])
        random = state["random"][self._accelerator.process_index]
        snapshot.check_random_state(path, self._device, random)
        if self._generator is not None and random["generator"] is None:
            raise UsageError("cannot resume: generator was absent, now one is given")
        saved = state.get("loss_function")
        if (saved is None) != (self._loss_function is None):
            was, is_now = ("absent", "there") if saved is None else ("there", "absent")
            raise UsageError(f"cannot resume from {path}: the loss function's own state was {was}, now it is {is_now}")
        snapshot.check_optimizer(path, self._optimizer, state["optimizer"])
        position = _position(path, state)

        snapshot.restore_batches(self._batches, state["batches"])
        if self._loss_function is not None:
            self._loss_function.load_state_dict(saved)
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])
        snapshot.restore_optimizer(self._optimizer, state["optimizer"])
        self._frozen = state["frozen"]
        with torch.no_grad():
            for name, value in values.items():
                live[name].copy_(value)
        snapshot.restore_gradients(self._model, state["gradients"])
        snapshot.restore_random_state(self._device, self._generator, random)
        if self.folder is not None and self._accelerator.is_main_process:
            # A kill may have come between writing this checkpoint and removing the one before.
            checkpoint.remove_checkpoints(self.folder, keep=path)
        return position

    @property
    def saved(self) -> Path | None:
        """The last checkpoint that was written whole. Waits for one under way; raises OutputError where that failed."""
        error = self._background.wait()
        path, self._writing = self._writing, None
        if error is not None:
            raise error
        if path is not None:
            self._saved = path
        return self._saved

    def finish(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Wait for a checkpoint under way, as the end of a `with` block; its failure does not hide another error."""
        try:
            self.saved  # noqa: B018
        except Exception:
            if error is None:
                raise

    def save(self, position: Position, behind: bool = False) -> Path | None:
        """Write the checkpoint for `position`, then remove the older ones. The folder, or None when none is kept.

        behind: copy the state now and write while training goes on; what is split over processes is written now.
        """
        if self.folder is None:
            return None
        saved = self.saved
        path = checkpoint.checkpoint_path(self.folder, position.step, position.micro)
        random = [snapshot.random_state(self._device, self._generator)]
        if self._accelerator.use_distributed:
            from accelerate.utils import gather_object

            random = gather_object(random)
        split = sharded.is_sharded(self._model)
        own = self._own(position, split)
        together = split or own is not None
        if (self._accelerator.is_main_process or together) and path != saved:
            losses = [float(loss) for loss in position.losses]
            if not all(math.isfinite(loss) for loss in losses):
                raise CheckFailed(f"the loss is {losses} at step {position.step + 1}: not saved, {saved} is kept")
            state = {
                "step": position.step,
                "micro": position.micro,
                "losses": losses,
                "metrics": [{name: float(value) for name, value in part.items()} for part in position.metrics],
                "settings": dict(self._settings),
                "batches": snapshot.batches_state(self._batches),
                "loss_function": None if self._loss_function is None else self._loss_function.state_dict(),
                "random": random,
                "scaler": None if self._scaler is None else self._scaler.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "gradients": snapshot.gradients(self._model),
                "frozen": self._frozen,
                "shapes": {n: describe(t) for n, t in snapshot.model_tensors(self._model).items()},
                "own": self._accelerator.num_processes if own else 0,
                **dict.fromkeys(own or ()),  # each process writes those itself
            }
            tensors = snapshot.changing_tensors(self._model, self._frozen)
            if behind and not together:
                self._write_behind(path, tensors, state)
                return path
            checkpoint.write_checkpoint(path, tensors, state, self._accelerator, own)
            if self._accelerator.is_main_process:
                checkpoint.remove_checkpoints(self.folder, keep=path)
        if behind and not together:  # the first process writes; nobody waits
            self._writing = path
            return path
        self._accelerator.wait_for_everyone()
        self._saved = path
        return path

    def _own(self, position: Position, split: bool) -> dict[str, Any] | None:
        """What this process has and the others do not; None, on all of them, where that is nothing."""
        own: dict[str, Any] = {}
        if self._accelerator.num_processes > 1:
            if isinstance(self._optimizer, DiffersByProcess) and self._optimizer.differs_by_process:
                own["optimizer"] = self._optimizer.state_dict()
            if position.micro and not split:  # not yet averaged
                own["gradients"] = snapshot.gradients(self._model)
        return own or None

    def _write_behind(self, path: Path, tensors: Mapping[str, Tensor], state: Any) -> None:
        folder, tensors, state = self.folder, snapshot.copied(tensors), snapshot.copied(state)
        assert folder is not None

        def write() -> None:
            checkpoint.write_checkpoint(path, tensors, state)
            checkpoint.remove_checkpoints(folder, keep=path)

        self._writing = path
        self._background.start(write)

    def clear(self) -> None:
        """Remove every checkpoint of the run."""
        self.saved  # noqa: B018  (wait for one under way)
        if self.folder is not None and self._accelerator.is_main_process:
            checkpoint.remove_checkpoints(self.folder)
        self._accelerator.wait_for_everyone()
        self._saved = None


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """What a damaged checkpoint makes our code and `load_state_dict` of others raise, as one FormatError."""
    try:
        yield
    except EdgewrightError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise checkpoint.damaged(path, error) from error


def _position(path: Path, state: Mapping[str, Any]) -> Position:
    counts, losses, metrics = (state["step"], state["micro"]), state["losses"], state["metrics"]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise FormatError(f"checkpoint {path} is damaged: its step is {counts[0]!r:.40}, micro step {counts[1]!r:.40}")
    if not len(losses) == len(metrics) == counts[1]:
        raise FormatError(
            f"checkpoint {path} is damaged: it has {len(losses)} losses and {len(metrics)} metrics of "
            f"{str(counts[1])[:40]} micro steps"
        )
    numbers = [*losses, *(value for part in metrics for value in part.values())]
    if not all(isinstance(value, float | int | Tensor) for value in numbers):
        raise FormatError(f"checkpoint {path} is damaged: a loss or metric is no number")
    return Position(*counts, losses, metrics)

"""A run and its output folder: when to start afresh, where to go on, what a checkpoint holds.

`output/checkpoints/` is a root of the checkpoint engine with one checkpoint, `ckpt-<step>-<micro step in hex>`: the
second number counts the micro steps of a step that was interrupted within accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.checks import check, one_of
from edgewright.errors import CheckFailed, EdgewrightError, FormatError, OutputError, UsageError
from edgewright.protocols import DiffersByProcess, KeepsState
from edgewright.training import sharded, snapshot
from edgewright.training.background import Background
from edgewright.training.checkpoint.chain import checkpoint_id, clean, clear, collect
from edgewright.training.checkpoint.files import LocalFiles, output_error
from edgewright.training.checkpoint.manifest import ID
from edgewright.training.checkpoint.ranks import Ranks
from edgewright.training.checkpoint.tree import check_state, describe
from edgewright.training.checkpoint.whole import SavedState, capture_state, save_state
from edgewright.training.metrics import MetricsLog

RESUME = ("auto", "never", "must")
FOLDER = "checkpoints"
MODEL = "model."  # before the names of the model's tensors in a checkpoint
TIMEOUT = 1800.0  # seconds that processes wait for each other


@dataclass
class TrainProgress:
    """How far a run got: whole updates, then micro steps into the next one with what they gave so far."""

    step: int = 0
    micro: int = 0
    losses: list[float | Tensor] = field(default_factory=list)
    metrics: list[dict[str, float | Tensor]] = field(default_factory=list)


def checkpoint_path(output: str | Path, step: int, micro: int = 0) -> Path:
    """The folder of the checkpoint of a run at this place."""
    return Path(output) / FOLDER / checkpoint_id(step, f"{micro:08x}")


def latest_checkpoint(output: str | Path) -> Path | None:
    """The checkpoint of a run that got furthest, or None."""
    root = Path(output) / FOLDER
    found = [name for name in LocalFiles(root).names("") if ID.fullmatch(name)]
    return max((root / name for name in found), key=_place, default=None)


def step_of(path: Path) -> int:
    """The step of a checkpoint folder, by its name."""
    return _place(path)[0]


def _place(path: Path) -> tuple[int, int]:
    _, step, micro = path.name.split("-")
    return int(step), int(micro, 16)


def steps_lost(output: str | Path) -> tuple[int | None, int]:
    """(step that the run in `output` goes on from, or None; steps that it had done beyond and does again)."""
    path = latest_checkpoint(output)
    step = None if path is None else step_of(path)
    done = MetricsLog.last_step(Path(output) / "metrics.csv")
    return step, max(0, done - (step or 0))


class RunCheckpointer:
    """Saves and restores one run. `folder` None keeps nothing.

    `settings` is everything outside the model that shapes the result; a resume under other settings is refused.
    A loss function with `state_dict()` and `load_state_dict()` is kept with the run, unless it is an nn.Module.
    In a distributed run every process calls `save` and `restore`; each writes its part of split tensors, its random
    state, its gradients within an accumulated step, and the state of an optimizer that says `differs_by_process`.
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
        self.folder, self._saved = folder, None if folder is None else latest_checkpoint(folder)
        self._background = Background()
        self._writing: Path | None = None
        self._model, self._optimizer, self._batches = model, optimizer, batches
        stateful = isinstance(loss_function, KeepsState) and not isinstance(loss_function, nn.Module)
        self._loss_function = loss_function if stateful else None
        self._device, self._generator, self._scaler = device, generator, scaler
        self._accelerator, self._settings = accelerator, settings
        self._frozen: dict[str, int] = {}
        if folder is None:
            return
        inside = {id(parameter) for parameter in model.parameters()}
        if any(id(p) not in inside for group in optimizer.param_groups for p in group["params"]):
            raise UsageError(
                "the optimizer holds parameters that are not in the model, so a checkpoint would miss them; "
                "put all of them into one nn.Module"
            )
        check_state(dict(settings), "settings")
        check_state(optimizer.state_dict()["param_groups"], "optimizer")
        self._frozen = snapshot.frozen_checksums(model)
        self._files = LocalFiles(folder / FOLDER)
        self._ranks = Ranks(TIMEOUT)

    def restore(self, policy: str) -> TrainProgress:
        """Go on from the last checkpoint or clear the folder for a fresh start, as `policy` (RESUME) says."""
        check("resume", policy, one_of(*RESUME))
        path = self.saved if policy != "never" else None
        if path is None:
            if policy == "must":
                where = f"there is no checkpoint in {self.folder}" if self.folder else "no output folder is given"
                raise UsageError(f"resume='must', but {where}; use resume='auto' to begin")
            self.clear()
            return TrainProgress()
        with damage(path):
            return self._restore(path, SavedState(self._files, path.name))

    def _restore(self, path: Path, saved: SavedState) -> TrainProgress:
        """Read and compare everything; then change the live objects, those that may still refuse before the model."""
        state = saved.state()
        difference = snapshot.first_difference(state["settings"], dict(self._settings))
        if difference:
            name, was, now = difference
            raise UsageError(
                f"cannot resume from {path}: {name} was {was!r}, now {now!r}; use the old value, another output "
                "folder, or resume='never' to start again"
            )
        state |= saved.own(self._accelerator.process_index)
        names = {name.removeprefix(MODEL) for name in saved.names if name.startswith(MODEL)}
        snapshot.check_model(path, self._model, names, state["shapes"], state["frozen"])
        live = snapshot.model_tensors(self._model)
        if unknown := names - live.keys():
            raise FormatError(f"its tensor {min(unknown)[:80]!r} is none of the model")
        parts = sharded.fill_optimizer(self._optimizer, state["optimizer"])
        values = saved.new({MODEL + name: live[name] for name in names} | parts)
        with torch.no_grad():
            for key, tensor in parts.items():
                tensor.copy_(values[key])
        snapshot.check_gradients(path, self._model, state["gradients"])
        random = state["random"]
        snapshot.check_random_state(path, self._device, random)
        if self._generator is not None and random["generator"] is None:
            raise UsageError("cannot resume: generator was absent, now one is given")
        loss = state["loss_function"]
        if (loss is None) != (self._loss_function is None):
            was, is_now = ("absent", "there") if loss is None else ("there", "absent")
            raise UsageError(f"cannot resume from {path}: the loss function's own state was {was}, now it is {is_now}")
        snapshot.check_optimizer(path, self._optimizer, state["optimizer"])
        position = _position(path, state)

        snapshot.restore_batches(self._batches, state["batches"])
        if self._loss_function is not None:
            self._loss_function.load_state_dict(loss)
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])
        snapshot.restore_optimizer(self._optimizer, state["optimizer"])
        self._frozen = state["frozen"]
        with torch.no_grad():
            for name in names:
                live[name].copy_(values[MODEL + name])
        snapshot.restore_gradients(self._model, state["gradients"])
        snapshot.restore_random_state(self._device, self._generator, random)
        if self._ranks.first:  # a kill may have come between writing this checkpoint and deleting the one before
            with suppress(OSError):
                clean(self._files, math.inf)
                collect(self._files, 1, {path.name})
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
        finally:
            if self.folder is not None:
                self._ranks.close()

    def save(self, position: TrainProgress, behind: bool = False) -> Path | None:
        """Write the checkpoint for `position`, then delete the older ones. The folder, or None when none is kept.

        behind: copy the state now and write while training goes on.
        """
        if self.folder is None:
            return None
        saved = self.saved
        path = checkpoint_path(self.folder, position.step, position.micro)
        if path == saved:
            return path
        losses, error = [float(loss) for loss in position.losses], None
        if not all(math.isfinite(loss) for loss in losses):
            error = CheckFailed(f"the loss is {losses} at step {position.step + 1}: not saved, {saved} is kept")
        self._ranks.together(error)
        state: dict[str, Any] = {
            "step": position.step,
            "micro": position.micro,
            "losses": losses,
            "metrics": [{name: float(value) for name, value in part.items()} for part in position.metrics],
            "settings": dict(self._settings),
            "batches": snapshot.batches_state(self._batches),
            "loss_function": None if self._loss_function is None else self._loss_function.state_dict(),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "gradients": snapshot.gradients(self._model),
            "frozen": self._frozen,
            "shapes": {name: describe(tensor) for name, tensor in snapshot.model_tensors(self._model).items()},
        }
        own: dict[str, Any] = {"random": snapshot.random_state(self._device, self._generator)}
        own |= {name: state.pop(name) for name in self._own(position)}
        tensors = {MODEL + name: t for name, t in snapshot.changing_tensors(self._model, self._frozen).items()}
        captured = capture_state(position.step, tensors, state, own, self._ranks, copy=behind)
        unique = f"{position.micro:08x}{position.step:08x}"

        def write() -> None:
            save_state(self._files, self._ranks, captured, unique)

        if behind:
            self._writing = path
            self._background.start(write)
        else:
            write()
            self._saved = path
        return path

    def _own(self, position: TrainProgress) -> list[str]:
        """The parts of the state that processes do not share."""
        if self._ranks.world == 1:
            return []
        own = isinstance(self._optimizer, DiffersByProcess) and self._optimizer.differs_by_process
        unaveraged = position.micro and not sharded.is_sharded(self._model)
        return [*(["optimizer"] if own else []), *(["gradients"] if unaveraged else [])]

    def clear(self) -> None:
        """Delete every checkpoint of the run."""
        self.saved  # noqa: B018  (wait for one under way)
        self._saved = None
        if self.folder is None:
            return
        error: OutputError | None = None
        if self._ranks.first:
            try:
                clear(self._files)
            except OSError as caught:
                error = output_error(self._files, caught)
            with suppress(OSError):
                self._files.root.rmdir()  # only when empty
        self._ranks.together(error)


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """What a damaged checkpoint makes our code and `load_state_dict` of others raise, as one FormatError."""
    try:
        yield
    except FormatError as error:
        raise error if f"{path} " in str(error) else damaged(path, error) from error
    except EdgewrightError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> FormatError:
    """The sentence for a checkpoint that cannot be read."""
    reason = str(error) if isinstance(error, OSError | FormatError) else f"{type(error).__name__}: {error}"
    return FormatError(
        f"checkpoint {path} is damaged ({' '.join(reason.split())[:300]}): remove that folder, or pass resume='never'"
    )


def _position(path: Path, state: Mapping[str, Any]) -> TrainProgress:
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
    return TrainProgress(*counts, losses, metrics)

"""The best state of a student so far, in memory and, where a run can be resumed, on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from edgewright.errors import FormatError
from edgewright.io.tensors import read_tensors, save_tensors

STATE = "best.safetensors"


class Best:
    """Keeps the state dict with the highest (or lowest) value offered; the first of equal ones stays.

    The value and its companions travel in the file's metadata, so that state and value cannot part.

    Args:
        folder: where the state is also written; None keeps it in memory alone.
        higher_is_better: of the values.
        fresh: forget what an earlier run left in the folder.

    Raises:
        FormatError: a damaged file of an earlier run.
    """

    def __init__(self, folder: Path | None, higher_is_better: bool = True, fresh: bool = True) -> None:
        self._path = None if folder is None else folder / STATE
        self._sign = 1.0 if higher_is_better else -1.0
        self._state: dict[str, Tensor] = {}
        self.value = math.nan
        self.metrics: dict[str, float] = {}
        if fresh:
            self.clear()
        elif self._path is not None and self._path.exists():
            self._read(self._path)

    def offer(self, value: float, metrics: dict[str, float], model: nn.Module) -> bool:
        """Take the model's state when it is the best so far.

        Args:
            value: by which states are compared; NaN is never the best.
            metrics: kept with it.
            model: whose state is copied.

        Returns:
            Whether it was taken.
        """
        if math.isnan(value) or (self._state and self._sign * value <= self._sign * self.value):
            return False
        self.value, self.metrics = value, dict(metrics)
        # Clones are separate storages, which the file format wants where the model ties weights.
        self._state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        if self._path is not None:
            record = json.dumps({"value": self.value, "metrics": self.metrics})
            save_tensors(self._path, self._state, {"best": record})
        return True

    def restore(self, model: nn.Module) -> dict[str, float]:
        """Put the best state into a model, where there is one.

        Args:
            model: of the same make.

        Returns:
            The metrics of that state.
        """
        if self._state:
            with torch.no_grad():
                model.load_state_dict(self._state)
        return self.metrics

    def clear(self) -> None:
        """Remove the file; what is in memory stays."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        self._state, texts = read_tensors(path)
        try:
            record = json.loads(texts.get("best", "{}"))
            self.value, self.metrics = float(record.get("value", math.nan)), dict(record.get("metrics", {}))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(f"{path} does not say how good its state is: {error}; remove it") from error

"""What one compression is asked to do, checked before any work starts."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgewright.checks import check, number, one_of, optional, whole
from edgewright.errors import UsageError
from edgewright.io.atomic import write_text
from edgewright.io.run_folder import holds_run
from edgewright.io.temporaries import sweep

METHODS = ("rtn", "mse", "gptq", "qat")
WIDTHS = (1.0, 1.58, 2.0, 3.0, 4.0, 8.0)
DEFAULT_STEPS = 24
MARKER = "settings.json"
VISION_MODELS = ("efficientnet-lite0",)  # bundled image classifiers, which compression/vision.py compresses


@dataclass(frozen=True)
class TrainingBudget:
    """How long to train: a number of optimizer steps, or minutes that become steps once a step has been timed."""

    steps: int | None = DEFAULT_STEPS
    minutes: float | None = None

    @classmethod
    def parse(cls, text: str) -> TrainingBudget:
        """ "40" is steps, "4m", "4min" or "4 minutes" is minutes. Raises UsageError for anything else."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(m|min|minutes?)?\s*", text)
        if match is None or float(match[1]) <= 0 or (match[2] is None and "." in match[1]):
            raise UsageError(f"budget {text!r}: give optimizer steps such as 40, or minutes such as 4m")
        return cls(None, float(match[1])) if match[2] else cls(int(match[1]))


@dataclass(frozen=True)
class CompressSettings:
    """Everything that decides the bits of the result.

    Args:
        model: a name, folder or file that `load` takes.
        bits: of the weights: 1, 1.58, 2, 3 or 4.
        method: the way to the shipped file, one of METHODS.
        baselines: other methods shown beside it.
        budget: how long to train.
        data: text to train and calibrate on; None: the model trains on what it writes itself and calibrates on the
            built-in text.
        kv: width of the runtime's key-value cache, 4, 8 or None for float16.
        layout: of the file's types, see `export.gguf.layout`.
        learning_rate: None: by width, see `rate`.
        block_length: tokens of a block.
        batch_size: blocks of a training step.
        calibration_blocks: for calibration.
        evaluation_blocks: for the figures of the report.
        benchmark: measure speed too.
        seed: of training and data.
        lenient: mark tensors that cannot have the type that the layout wants in the table instead of ending the run.

    Raises:
        UsageError: a value that is out of range.
    """

    model: str
    bits: float = 4.0
    method: str = "qat"
    baselines: tuple[str, ...] = ("rtn", "mse", "gptq")
    budget: TrainingBudget = TrainingBudget()
    data: str | None = None
    kv: int | None = None
    layout: str = "auto"
    learning_rate: float | None = None
    block_length: int = 256
    batch_size: int = 2
    calibration_blocks: int = 32
    evaluation_blocks: int = 12
    benchmark: bool = True
    seed: int = 0
    lenient: bool = False

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            widths = ", ".join(f"{width:g}" for width in WIDTHS)
            raise UsageError(f"--bits {self.bits:g} is not supported; choose one of {widths}")
        for method in (self.method, *self.baselines):
            check("method", method, one_of(*METHODS))
        if self.kv not in (None, 4, 8):
            raise UsageError(f"--kv {self.kv} is not supported; choose 4 or 8, or leave it out for a float16 cache")
        for name in ("block_length", "batch_size", "calibration_blocks", "evaluation_blocks"):
            check(name, getattr(self, name), whole(1))
        check("learning_rate", self.learning_rate, optional(number(above=0)), "for example 2e-5")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)

    @property
    def rate(self) -> float:
        """The learning rate: the given one, or what short runs at this width did best with (docs/log.md)."""
        return self.learning_rate or (2e-5 if self.bits >= 3 else 1e-4)

    @property
    def wanted(self) -> tuple[str, ...]:
        """All methods to run, in the order of METHODS."""
        return tuple(method for method in METHODS if method == self.method or method in self.baselines)


def check_claim(output: Path, settings: CompressSettings) -> None:
    """Raise UsageError where the folder holds something else than this run: a run never mixes with other files."""
    # a setting younger than the folder had its default then
    holds_run(output, MARKER, settings.to_dict(), "run of compress", defaults=CompressSettings("").to_dict())


def claim(output: Path, settings: CompressSettings) -> None:
    """Write into the folder whose run it is, and clear away what killed processes have left in it."""
    sweep(output)
    if not (output / MARKER).exists():
        write_text(output / MARKER, json.dumps(settings.to_dict(), indent=2) + "\n")

"""Measurements of a model under one assignment of options to units, each taken once and kept in a file.

A measurement depends on the model's weights, the data, the gate (but for its budget), the calibration and the
assignment; the SHA-256 of all that is its file's name. A search that is started again reads what is there, and so do
other processes: under torch.distributed each rank takes its share of a list, with one folder for all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edgewright.errors import FormatError, UsageError
from edgewright.io.atomic import write_text
from edgewright.io.hashing import sha256, tensors_hash
from edgewright.io.json_file import read_object
from edgewright.measure.timing import alternate
from edgewright.systems.low_precision_recsys.calibration import Histogram, correct_biases, histograms
from edgewright.systems.low_precision_recsys.examples import Examples, logits
from edgewright.systems.low_precision_recsys.gate import AccuracyGate, Judgement
from edgewright.systems.low_precision_recsys.units import REFERENCE, Range, build, find_units, swapped

Assignment = Mapping[str, str]  # unit -> option; a unit that is missing stays fp32
TIMED = 7  # runs of a unit whose median is its time


class Bench:
    """A model, what it is judged on, and every measurement that was taken.

    calibration: batches of the model's arguments, for fixed ranges and corrected biases. log: folder of the
    measurements, None to keep them in memory only. ranges: of inputs, unit -> (step, zero point), where they are known.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Examples,
        gate: AccuracyGate,
        calibration: Sequence[tuple[Any, ...]],
        log: str | Path | None = None,
        bias_correction: bool = False,
        ranges: Mapping[str, Range] | None = None,
        built: dict[tuple[str, str], nn.ModuleDict] | None = None,
    ) -> None:
        self.model, self.examples, self.gate = model, examples, gate
        self.calibration, self.bias_correction = list(calibration), bias_correction
        self.units = find_units(model)
        self.log = None if log is None else Path(log) / "measurements"
        self._reference: Tensor | None = None
        self.built = {} if built is None else built
        self._seen: dict[str, Any] = {}
        self._given = dict(ranges or {})
        self._ranges = dict(self._given)
        self._histograms: dict[str, Histogram] | None = None
        self._about: list[Any] | None = None

    @classmethod
    def unjudged(cls, model: nn.Module, calibration: Sequence[tuple[Any, ...]]) -> Bench:
        """A bench that builds and calibrates and has nothing to judge by."""
        return cls(model, Examples(calibration, torch.zeros(1)), AccuracyGate(), calibration)

    @property
    def reference(self) -> Tensor:
        """The float model's logits, float32 [N]."""
        if self._reference is None:
            self._reference = logits(self.model, self.examples)
        return self._reference

    @property
    def histograms(self) -> dict[str, Histogram]:
        """What flows into the linear units during calibration."""
        if self._histograms is None:
            self._histograms = histograms(self.model, self.units, self.calibration)
        return self._histograms

    def range_of(self, unit: str) -> Range:
        """Step and zero point of a unit's input. Raises UsageError for a layer that calibration never ran."""
        if unit not in self._ranges:
            if unit not in self.histograms:
                raise UsageError(f"the calibration batches never reach {unit}; its input has no range")
            self._ranges[unit] = self.histograms[unit].parameters()
        return self._ranges[unit]

    def modules(self, unit: str, option: str) -> nn.ModuleDict:
        """The modules of a unit under an option, built once."""
        key = unit, option
        if key not in self.built:
            ranges = self.range_of(unit) if option.startswith("int8-static") else None
            part = build(self.model, self.units[unit], option, ranges)
            if self.bias_correction and self.units[unit].kind == "linear":
                targets = {path.replace("/", "."): module for path, module in part.items()}
                correct_biases(self.model, targets, self.calibration)
            self.built[key] = part
        return self.built[key]

    def parts(self, assignment: Assignment) -> list[nn.ModuleDict]:
        """The modules of every unit that leaves fp32."""
        return [self.modules(unit, option) for unit, option in self.changed(assignment).items()]

    def changed(self, assignment: Assignment) -> dict[str, str]:
        """The units that leave fp32, in the model's order. Raises UsageError for a unit that it does not have."""
        if unknown := sorted(set(assignment) - set(self.units)):
            raise UsageError(f"the model has no unit {unknown[0]!r}; its units: {', '.join(self.units)}")
        return {name: assignment[name] for name in self.units if assignment.get(name, REFERENCE) != REFERENCE}

    def measure(self, assignment: Assignment) -> Judgement:
        """The model under an assignment beside the float model."""
        changed = self.changed(assignment)

        def take() -> dict[str, Any]:
            with swapped(self.model, *self.parts(changed)):
                found = logits(self.model, self.examples)
            return self.gate.judge(found, self.reference, self.examples).to_dict()

        return Judgement.from_dict(self._kept({"judgement of": changed}, take))

    def passes(self, assignment: Assignment) -> bool:
        """Whether the gate lets the assignment through."""
        return self.gate.passes(self.measure(assignment))

    def milliseconds(self, unit: str, option: str) -> float:
        """Time of a unit's modules on the inputs of the first batch, median of 7; kept like any measurement."""

        def take() -> dict[str, Any]:
            place = self.units[unit].paths[0]
            calls: list[tuple[Any, ...]] = []
            layer = self.model.get_submodule(place)
            handle = layer.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
            try:
                with torch.no_grad():
                    self.model.eval()(*self.examples.batches[0])
            finally:
                handle.remove()
            module = layer if option == REFERENCE else self.modules(unit, option)[place.replace(".", "/")]
            module.eval()
            with torch.no_grad():
                times = alternate({"unit": lambda: [module(*inputs) for inputs in calls]}, TIMED, 2)["unit"]
            return {"milliseconds": 1e3 * median(times.samples)}

        return float(self._kept({"time of": {unit: option}}, take)["milliseconds"])

    def nbytes(self, assignment: Assignment) -> int:
        """Bytes of all units by arithmetic, and of what is no unit as it is."""
        return self.other_bytes + sum(u.nbytes(assignment.get(name, REFERENCE)) for name, u in self.units.items())

    @property
    def other_bytes(self) -> int:
        """Bytes of parameters that belong to no unit; they stay float."""
        mine = {
            id(p)
            for unit in self.units.values()
            for path in unit.paths
            for p in self.model.get_submodule(path).parameters(recurse=False)
        }
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if id(p) not in mine)

    def spread(self, assignments: Sequence[Assignment]) -> None:
        """Measure a list; under torch.distributed with a log folder, each rank its share."""
        many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and self.log is not None
        rank, world = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
        for assignment in assignments[rank::world]:
            self.measure(assignment)
        if many:
            dist.barrier()

    def _kept(self, what: dict[str, Any], take: Any) -> dict[str, Any]:
        if self._about is None:
            tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
            batches = Examples(self.calibration, torch.zeros(1)).digest() if self.calibration else ""
            ranges = sorted(self._given.items())
            self._about = [tensors_hash(tensors), self.examples.digest(), self.gate.identity, batches, ranges]
            self._about.append(self.bias_correction)
        key = sha256(json.dumps([self._about, what]))[:40]
        if key not in self._seen:
            path = None if self.log is None else self.log / f"{key}.json"
            if path is not None and path.exists():
                found = read_object(path)
                if found.get("what") != what or not isinstance(found.get("result"), dict):
                    raise FormatError(f"{path} is no measurement of this search; remove it and search again")
                self._seen[key] = found["result"]
            else:
                self._seen[key] = take()
                if path is not None:
                    write_text(path, json.dumps({"what": what, "result": self._seen[key]}, indent=1) + "\n")
        return self._seen[key]

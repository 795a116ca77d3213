"""A click model that `edgewright train dlrm` wrote, at the precisions that a search finds behind the accuracy gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from edgewright.errors import FormatError, UsageError
from edgewright.io.json_file import read_object
from edgewright.io.run_folder import claim_folder
from edgewright.systems.dlrm.criteo import read_chunks
from edgewright.systems.dlrm.model import CONFIG, DLRM, MODEL_TYPE
from edgewright.systems.dlrm.vocabulary import Vocabulary
from edgewright.systems.low_precision_recsys import AccuracyGate, apply_recipe, search, uniform_recipe
from edgewright.systems.low_precision_recsys.choices import choices_report
from edgewright.systems.low_precision_recsys.export import export_quantized

if TYPE_CHECKING:
    from edgewright.measure.report import Report
    from edgewright.systems.dlrm.clicks import ClickData

BUDGET = 5e-4  # of normalised entropy
FILES = {"onnx": "model.onnx", "pte": "model.pte", "executorch": "model.pte"}


def click_folder(model: str) -> Path | None:
    """The folder with a click model's config.json: `model` itself or its model/; None where there is none."""
    for folder in (Path(model), Path(model) / "model"):
        try:
            if read_object(folder / CONFIG).get("model_type") == MODEL_TYPE:
                return folder
        except (UsageError, FormatError):
            continue
    return None


def compress_clicks(
    folder: Path,
    log: str | Path,
    output: Path,
    *,
    budget: float = BUDGET,
    targets: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Search, apply, save and report; the report is in `output` as well, beside model/ and the files asked for.

    log: rows that the model was not trained on, in the layout of its vocabulary; the earlier half is searched on, the
    later half confirms and is what the report tells. The same call goes on where it was stopped.
    """
    if unknown := [name for name in targets if name not in FILES]:
        raise UsageError(f"--to {unknown[0]}: a click model is written as {', '.join(FILES)}")
    claim_folder(output, "compress")
    model = DLRM.from_pretrained(folder).eval()
    early, late = read_clicks(folder, log).split(0.5)
    say(f"{len(early)} rows to search on, {len(late)} to confirm with")
    gate = AccuracyGate(budget=budget)
    recipe = search(model, early, gate, log=output / "search", confirm=late, say=say)
    recipe.save(output / "recipe.json")
    low = apply_recipe(model, recipe)
    low.save_pretrained(output / "model")
    recipes = {"searched": recipe, "all int8": uniform_recipe(model, "int8", "int8-dynamic")}
    recipes["all int4"] = uniform_recipe(model, "int4-greedy", "int8-dynamic")
    report = choices_report(model, late, recipes, gate, calibration=early.rows(slice(0, 4096)), title=folder.name)
    report.settings.update({"model": str(folder), "data": str(log), "budget": budget})
    units = ", ".join(f"{name} {option}" for name, option in recipe.assignment.items())
    report.notes += [f"searched: {units}", *recipe.about["notes"]]
    for name in dict.fromkeys(FILES[target] for target in targets):
        done = export_quantized(low, output / name, "onnx" if name.endswith(".onnx") else "executorch", reference=model)
        distance = done.checks["original"]["relative_error"]
        report.notes.append(
            f"{name}: {done.bytes / 1e6:.2f} MB, {done.notes[-1]}; its answers differ from the float ones by "
            f"{distance:.3g} of their spread"
        )
    report.save(output)
    return report


def read_clicks(folder: Path, log: str | Path) -> ClickData:
    """A click log as the model's own vocabulary reads it. Raises UsageError for fewer than four rows."""
    vocabulary = Vocabulary.from_pretrained(folder)
    parts = [vocabulary.encode(chunk) for chunk in read_chunks(log, vocabulary.layout)]
    if sum(len(part) for part in parts) < 4:
        raise UsageError(f"{log} has too few rows to judge a model by; give some thousands that it was not trained on")
    dense, ids, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("dense", "ids", "labels"))
    return dataclasses.replace(parts[0], dense=dense, ids=ids, labels=labels)

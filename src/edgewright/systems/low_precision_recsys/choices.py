"""One report for several recipes of a model: memory, latency, and what each loses, on the same examples."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgewright.measure.report import Report
from edgewright.measure.timing import alternate
from edgewright.systems.dlrm.clicks import ClickData
from edgewright.systems.low_precision_recsys.examples import Examples, as_examples, calibration_batches, logits
from edgewright.systems.low_precision_recsys.gate import AccuracyGate, Judgement
from edgewright.systems.low_precision_recsys.model import QuantRecipe, apply_recipe

RUNS = 30  # timed calls of every choice
TIMED_SAMPLES = 256  # of a call, where the data can be cut


def choices_report(
    model: nn.Module,
    data: ClickData | Examples,
    recipes: Mapping[str, QuantRecipe],
    gate: AccuracyGate,
    *,
    calibration: Any = None,
    slices: Mapping[str, Tensor] | None = None,
    runs: int = RUNS,
    title: str = "precisions of one model",
) -> Report:
    """A row for the float model and for every recipe: bytes, loss of NE with its upper end, loss of AUC, latency.

    calibration: batches for fixed ranges, by default the first of `data`. slices: parts of clicks that are judged
    separately too. Latency is that of the first 256
    clicks (of Examples, their first batch); all choices take turns. runs=0 leaves it out.
    """
    examples = as_examples(data, slices=slices)
    batches = calibration_batches(examples if calibration is None else calibration)
    reference = logits(model, examples)
    models: dict[str, nn.Module] = {"fp32": model}
    report = Report(title)
    add_judgement(report, "fp32", gate.judge(reference, reference, examples), gate)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    report.add("bytes", size, subject="fp32", unit="bytes")
    report.add("share", 100.0, subject="fp32", unit="%")
    for name, recipe in recipes.items():
        quantized = apply_recipe(model, recipe, batches, refreshed=True)
        add_judgement(report, name, gate.judge(logits(quantized, examples), reference, examples), gate)
        report.add("bytes", quantized.nbytes, subject=name, unit="bytes")
        report.add("share", 100 * quantized.nbytes / size, subject=name, unit="%")
        models[name] = quantized
    if runs:
        few = data.rows(slice(0, TIMED_SAMPLES)) if isinstance(data, ClickData) else examples
        add_latency(report, models, as_examples(few).batches[0], runs)
    return report


def add_judgement(report: Report, subject: str, found: Judgement, gate: AccuracyGate) -> None:
    """The rows of one judgement, changes of NE in percent."""
    report.add("delta_ne", 100 * found.delta, subject=subject, n=found.n, unit="%")
    report.add("delta_ne_upper", 100 * found.upper, subject=subject, n=found.groups, unit="%")
    report.add("passes", float(gate.passes(found)), subject=subject)
    report.add("auc_loss", -found.auc_delta, subject=subject, n=found.n)
    report.add("calibration", found.calibration, subject=subject, n=found.n)
    report.add("max_logit_difference", found.max_logit_difference, subject=subject, n=found.n)
    for name, (delta, upper) in found.slices.items():
        report.add(f"delta_ne, {name}", 100 * delta, subject=subject, unit="%")
        report.add(f"delta_ne_upper, {name}", 100 * upper, subject=subject, unit="%")


@torch.no_grad()
def add_latency(report: Report, models: Mapping[str, nn.Module], batch: tuple[Any, ...], runs: int = RUNS) -> None:
    """Median and 99th percentile of a call with this batch, in milliseconds; the models take turns."""
    was = {name: model.training for name, model in models.items()}
    cases = {name: partial(model.eval(), *batch) for name, model in models.items()}
    for name, taken in alternate(cases, runs, warmup=3).items():
        p50, p99 = np.percentile(taken.samples, [50, 99])
        report.add("latency_p50", 1e3 * float(p50), subject=name, n=runs, unit="ms")
        report.add("latency_p99", 1e3 * float(p99), subject=name, n=runs, unit="ms")
    for name, model in models.items():
        model.train(was[name])

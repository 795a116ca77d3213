"""What cutting the output layer saves: prefill and decoding of SmolLM2 with its whole head and with a guard's 11 rows.

Both sides take turns in one process, in PyTorch (float32) and as exported 8da4w programs. The head is 28.3 of the 134.5
million multiply-adds of a decoded token, so 21 % less time is the most that the cut can give where time is arithmetic.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edgewright
from edgewright.compression.stages import int4_config
from edgewright.measure.report import Report
from edgewright.measure.timing import alternate, paired_ratio
from edgewright.pruning.cut_folder import shipped_bytes
from edgewright.pruning.unembedding import prune_unembedding_
from edgewright.systems.llama_guard_int4.model import ModelPredictor, ProgramPredictor
from edgewright.systems.llama_guard_int4.task import POLICY, guard_examples
from results import save

DECODED = 16
CONTEXT = 256


def main(repeats: int = 9, programs: bool = True) -> None:
    model, tokenizer = edgewright.load("smollm2-135m")
    prompt = tokenizer(POLICY.prompt(guard_examples(1, "test")[0].messages))["input_ids"]
    kept = POLICY.output_vocabulary(tokenizer)
    report = Report("The cut output layer of a guard: SmolLM2-135M, whole head and 11 rows")
    cut = copy.deepcopy(model)
    prune_unembedding_(cut, kept)
    _measure(report, "float32", {"whole": ModelPredictor(model), "cut": ModelPredictor(cut)}, prompt, repeats)
    if programs:
        from edgewright.export.executorch.exporter import export_executorch

        packed = edgewright.convert_(edgewright.quantize_(copy.deepcopy(model), int4_config(64)))
        packed_cut = copy.deepcopy(packed)
        prune_unembedding_(packed_cut, kept)
        with tempfile.TemporaryDirectory() as folder:
            predictors: dict[str, Any] = {}
            for name, each in {"whole": packed, "cut": packed_cut}.items():
                path = Path(folder) / f"{name}.pte"
                export_executorch(each, tokenizer, path, context=CONTEXT)
                subject = f"8da4w .pte, {name} head"
                report.add("bytes", path.stat().st_size, subject=subject, unit="bytes")
                report.add("arithmetic_bytes", shipped_bytes(each), subject=subject, unit="bytes")
                predictors[name] = ProgramPredictor(path)
            _measure(report, "8da4w .pte", predictors, prompt, repeats)
    report.notes.append(
        f"{len(prompt)} tokens of prompt, {DECODED} decoded one by one; ± is half the interquartile range"
    )
    report.print_table()
    print(save(report, "llama-guard-int4-head"))


def _measure(report: Report, kind: str, predictors: dict[str, Any], prompt: list[int], repeats: int) -> None:
    """Milliseconds a prompt token and a decoded token of both heads, and the ratio of the two."""
    for metric, count, run in (("prefill", len(prompt), _prefill), ("decode", DECODED, _decode)):
        cases = {name: run(predictor, prompt) for name, predictor in predictors.items()}
        times = alternate(cases, repeats=repeats, warmup=2)
        for name, seconds in times.items():
            one = seconds.map(lambda x, n=count: 1e3 * x / n, "ms/token")
            report.add(metric, one.median, subject=f"{kind}, {name} head", se=one.spread, n=one.n, unit="ms/token")
        ratio = paired_ratio(times["cut"], times["whole"])
        report.add(f"{metric}_ratio", ratio.median, subject=f"{kind}, cut head", se=ratio.spread, n=ratio.n)


def _prefill(predictor: Any, prompt: list[int]) -> Callable[[], object]:
    return lambda: predictor.start(prompt)


def _decode(predictor: Any, prompt: list[int]) -> Callable[[], object]:
    predictor.start(prompt)

    def run() -> None:
        predictor.crop(len(prompt))  # every repeat decodes the same places
        for token in prompt[:DECODED]:
            predictor.follow([token])

    return run


if __name__ == "__main__":
    main(programs="--eager-only" not in sys.argv[1:])

"""Llama Guard INT4 (arXiv 2411.17713): a guard model made small by a chain of compressions, on SmolLM2-135M.

A teacher learns a moderation task made by a program. Blocks and neurons go, the rest learns from labels and teacher,
in float and then at 4 bits, the output words shrink to legal answers, and the exported file is what gets judged.
Beside the chain, each choice is held against simpler ones at equal steps, on a model of fewer blocks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from edgewright.compression.chain import waterfall
from edgewright.measure.report import Report
from edgewright.systems.llama_guard_int4.study import CUTS, GuardStudy
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import Run

SMALL = ("small", "paper")
TOKENS, BLOCK, NEURON = 88, 884_736, 3 * 576  # the longest example; weights of a block's attention and of a neuron


@dataclass(frozen=True)
class LlamaGuardInt4:
    """keep of all 30 blocks and mlp of 1536 neurons stay in the chain; fast: it has the first fast_layers blocks only,
    as the comparisons always have, and keeps fast_keep. compare_steps: steps of every compared training.
    """

    seed: int = 0
    seeds: int = 2
    fast: bool = False
    keep: int = 22
    mlp: int = 1152
    fast_layers: int = 12
    fast_keep: int = 9
    group: int = 64
    teacher_steps: int = 80
    recovery_steps: int = 40
    qat_steps: int = 24
    compare_steps: int = 16
    batch: int = 8
    learning_rate: float = 1e-4
    calibration: int = 64
    examples: int = 160
    export: Literal["pte", "none"] = "pte"

    @property
    def chain_layers(self) -> int:
        return self.fast_layers if self.fast else 30

    @property
    def chain_keep(self) -> int:
        return self.fast_keep if self.fast else self.keep


def tiny() -> LlamaGuardInt4:
    return LlamaGuardInt4(
        seeds=1, fast=True, fast_layers=3, fast_keep=2, teacher_steps=3, recovery_steps=2, qat_steps=1, compare_steps=1,
        batch=2, calibration=2, examples=5, export="none",
    )  # fmt: skip


def small() -> LlamaGuardInt4:
    return LlamaGuardInt4()


def paper() -> LlamaGuardInt4:
    """The published step counts are not known: an order of magnitude above ours, 1000 prompts measured."""
    return LlamaGuardInt4(
        seeds=3, teacher_steps=1500, recovery_steps=1500, qat_steps=1500, compare_steps=400, calibration=1000,
        examples=2000,
    )  # fmt: skip


CLAIMS = (
    Claim("bytes", "cut", "<", against="recover", factor=0.4),
    Claim("parameters", "prune", "<", against="teacher"),
    Claim("nll", "recovered", "<", against="cut by importance"),
    Claim("nll", "blocks by importance", "<", against="blocks at random", sizes=SMALL),
    Claim("nll", "neurons by norm", "<", against="neurons at random", sizes=SMALL),
    Claim("nll", "recovered", "<", against="recovered, random cut", sizes=SMALL),
    Claim("nll", "recovered", "<", against="recovered, last blocks cut", sizes=SMALL),
    Claim("nll", "recovered", "<", against="recovered, labels only", sizes=SMALL),
    Claim("nll", "int4 trained", "<", against="int4 rounded", sizes=SMALL),
    Claim("f1", "recover", ">", against="prune", sizes=SMALL),
    Claim("f1", "cut", ">", against="teacher", factor=0.95, sizes=SMALL),
)
CLOCKED: tuple[str, ...] = ("latency",)
HEADLINE: Headline | None = Headline(
    "SmolLM2 as a guard, cut and at 4 bits in an ExecuTorch file: F1 {after:.2f}, the whole model {before:.2f}",
    {
        name: Cell("llama-guard-int4.csv", {"metric": "f1", "subject": subject})
        for name, subject in (("after", "export"), ("before", "teacher"))
    },
)


def plan(settings: LlamaGuardInt4) -> Plan:
    """Seconds from arithmetic at 5e10 operations/s, what SmolLM2 trains at on two idle cores; not a measurement."""
    whole, compared = settings.chain_layers * (BLOCK + NEURON * 1536), settings.fast_layers * (BLOCK + NEURON * 1536)
    cut = settings.chain_keep * (BLOCK + NEURON * settings.mlp)
    cut_compared = settings.fast_keep * (BLOCK + NEURON * settings.mlp)
    rows = settings.batch * TOKENS
    step = 6 * rows / 5e10
    teachers = settings.teacher_steps * step * (whole + (0 if settings.fast else compared))
    taught = settings.batch * max(settings.recovery_steps, settings.qat_steps) * TOKENS * 2 * whole / 5e10
    chain = (settings.recovery_steps + 1.3 * settings.qat_steps) * step * cut
    stages = 6 if settings.export == "pte" else 5
    judged = settings.examples * TOKENS * 4 * (whole + (stages - 1) * cut) / 5e10
    compare = settings.seeds * settings.compare_steps * 6.5 * step * cut_compared
    compare += (3 + 7 * settings.seeds) * settings.examples * TOKENS * 2 * cut_compared / 5e10
    updates = settings.teacher_steps * 2 + settings.recovery_steps + settings.qat_steps
    updates += settings.seeds * settings.compare_steps * 6
    return Plan(
        steps=(
            f"teacher: {settings.chain_layers} blocks learn the task in {settings.teacher_steps} steps",
            f"cut to {settings.chain_keep} blocks and {settings.mlp} neurons, recover in {settings.recovery_steps} "
            f"steps, train at 4 bits in {settings.qat_steps}, cut the output words"
            + (", export for ExecuTorch" if settings.export == "pte" else ""),
            f"judge every stage on {settings.examples} messages",
            f"compare each choice at {settings.compare_steps} steps on {settings.fast_layers} blocks, "
            f"{settings.seeds} seed(s)",
        ),
        seconds=8 + teachers + taught + chain + judged + compare + 0.3 * updates + 240 * (settings.export == "pte"),
        memory_bytes=int(2.0e9 if settings.fast else 4.5e9),
        disk_bytes=int(1.5e9 if settings.fast else 3.5e9),
        outputs=("waterfall.png", "comparisons.png", "points.json"),
    )


def run(settings: LlamaGuardInt4, output: Path) -> Report:
    """The chain resumes stage by stage."""
    run = Run(output, "Llama Guard INT4: the chain on SmolLM2-135M")
    study = GuardStudy(settings, output)
    chain = study.chain()
    run.add_rows(asdict(row) for row in chain.report("", {"bytes": "bytes", "latency": "ms"}).rows)
    for name, (blocks, neurons, kl) in CUTS.items():
        repeated = kl is not None or "random" in (blocks, neurons)
        _add(run, name, run.over_seeds(name, settings.seeds if repeated else 1, partial(study.compare, name)))
    four_bits = run.over_seeds("int4", settings.seeds, study.four_bits)
    for name in four_bits[0]:
        _add(run, name, [point[name] for point in four_bits])
    waterfall(chain, "bytes", "f1", output / "waterfall.png")
    run.bars("comparisons.png", "nll", "nll of the right answer (nats per token)")
    run.note(
        f"stages: {settings.examples} test messages that nobody trained on; the teacher has {settings.chain_layers} "
        "blocks; bytes: codes at 4 bits, steps and floats at 16, of an exported file its size"
    )
    run.note(
        f"comparisons: answers' nll among legal words on the same messages, {settings.fast_layers} blocks cut to "
        f"{settings.fast_keep}, {settings.compare_steps} steps each"
    )
    if settings.export == "none":
        run.note("no file was exported: the last stage is the packed model")
    return run.report


def _add(run: Run, name: str, points: list[dict[str, float]]) -> None:
    """Mean over seeds with its standard error; of one value the error over examples."""
    for metric, unit in (("nll", "nats/token"), ("f1", "")):
        error = {"se": points[0].get(f"{metric}_se")} if len(points) == 1 else {}
        run.add(metric, [point[metric] for point in points], name, unit, **error)

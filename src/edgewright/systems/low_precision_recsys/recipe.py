"""Low-precision click models (arXiv 2105.12676) on MovieLens 100k: which precision passes a budget of 0.05 %?

A DLRM is trained in the order of time, searched on its validation part and judged on the last fifth of the ratings.
Beside the search stand blanket precisions. Two planted faults show whether debugger and search find them, and a model
that is refreshed while the data shift shows what the monitor says.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgewright.measure.plot import plot
from edgewright.measure.report import Report
from edgewright.systems.low_precision_recsys.study import BLANKET, PERIODS, PrecisionStudy
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import Run, row_over_seeds


@dataclass(frozen=True)
class LowPrecisionSettings:
    """samples 0: all of them, otherwise the first ones of every part. runs: timed calls of every choice.

    plant: how much larger the planted channel and the planted values are. periods: refreshes of the model; the data's
    dense features are scaled by `shift` in the third, a table gets heavy tails in the last.
    """

    seed: int = 0
    seeds: int = 3
    samples: int = 0
    crosses: bool = True
    dim: int = 16
    hidden: int = 64
    epochs: float = 2.0
    batch: int = 256
    dense_lr: float = 1e-3
    sparse_lr: float = 0.02
    budgets: tuple[float, ...] = (0.0005, 0.005)
    resamples: int = 1000
    plant: float = 100.0
    shift: float = 3.0
    drift_budget: float = 0.002
    runs: int = 30


def tiny() -> LowPrecisionSettings:
    return LowPrecisionSettings(
        seeds=1,
        samples=2000,
        crosses=False,
        epochs=1.0,
        sparse_lr=0.05,
        budgets=(0.005,),
        resamples=100,
        runs=2,
        drift_budget=0.05,
    )


def small() -> LowPrecisionSettings:
    return LowPrecisionSettings()


def paper() -> LowPrecisionSettings:
    """Ten seeds. The published models are not public: `search` takes any DLRM that `edgewright train` wrote."""
    return LowPrecisionSettings(seeds=10, runs=100)


LARGE = ("small", "paper")
CLAIMS = (
    Claim("delta_ne_upper", "int8 tables", "<", threshold=0.05, sizes=LARGE),
    Claim("table_error", "all int4 greedy", "<", against="all int4 min-max"),
    Claim("delta_ne_upper", "all int2", ">", threshold=0.05, sizes=LARGE),
    Claim("share", "searched at 0.05 %", "<", threshold=30.0, sizes=LARGE),
    Claim("delta_ne_upper", "searched at 0.05 %", "<", threshold=0.05, sizes=LARGE),
    Claim("share", "searched at 0.5 %", "<", threshold=30.0),
    Claim("delta_ne_upper", "searched at 0.5 %", "<", threshold=0.5),
    Claim("rank", "linear layer, planted", "<", threshold=1.5, sizes=LARGE),
    Claim("rank", "table, planted", "<", threshold=1.5, sizes=LARGE),
    Claim("bits", "linear layer, planted", ">", against="linear layer, as trained", sizes=LARGE),
    Claim("bits", "table, planted", ">", against="table, as trained", sizes=LARGE),
    Claim("state", "drift 3, features scaled", ">", threshold=0.5),
    Claim("state", "drift 3, features scaled", "<", threshold=1.5),
    Claim("state", "drift 4, heavy-tailed table", ">", threshold=1.5, sizes=LARGE),
    Claim("state", "drift 4, heavy-tailed table", "<", threshold=2.5, sizes=LARGE),
)
CLOCKED: tuple[str, ...] = ("latency_p50", "latency_p99")
HEADLINE: Headline | None = Headline(
    "search under a gate of 0.05 % of normalised entropy keeps {share:.0f} % of a DLRM's bytes (change "
    "{change:+.2f} %); int8 everywhere {int8:.0f} %",
    {
        "share": Cell("low-precision-recsys.csv", {"metric": "share", "subject": "searched at 0.05 %"}),
        "change": Cell("low-precision-recsys.csv", {"metric": "delta_ne", "subject": "searched at 0.05 %"}),
        "int8": Cell("low-precision-recsys.csv", {"metric": "share", "subject": "all int8"}),
    },
)


def plan(settings: LowPrecisionSettings) -> Plan:
    samples = settings.samples or 72_000
    steps = settings.epochs * samples / settings.batch
    searches = settings.seeds * len(settings.budgets) + 3
    return Plan(
        steps=(
            f"DLRM on ratings in order of time, {settings.seeds} seed(s), {settings.epochs:g} epochs",
            f"{len(BLANKET)} blanket precisions and searches at "
            + ", ".join(f"{100 * budget:g} %" for budget in settings.budgets)
            + ": bytes, loss of NE and AUC, latency, on the last fifth",
            f"a linear layer and a table with values {settings.plant:g} times larger: debugger and search",
            f"{len(PERIODS)} refreshes, one with features x {settings.shift:g}, one with a heavy-tailed table: monitor",
        ),
        seconds=5 + 0.015 * steps * (settings.seeds + 1) + searches * (3 + samples / 2000),  # an estimate
        memory_bytes=int(1.2e9),
        disk_bytes=int(3e7),
        outputs=("choices.png", "points.json", "model/model.safetensors", "recipe.json", "monitor/history.csv"),
    )


def run(settings: LowPrecisionSettings, output: Path) -> Report:
    """Searches keep every measurement in a folder."""
    run = Run(output, "A DLRM on MovieLens 100k at low precision")
    study = PrecisionStudy(settings, output)
    seeds = run.over_seeds("choices", range(settings.seed, settings.seed + settings.seeds), study.choices)
    run.add_rows(row_over_seeds(rows) for rows in zip(*seeds, strict=True))
    for part in ("linear layer", "table"):
        run.add_rows(run.memo(f"planted/{part}", partial(study.planted, part)))
    run.add_rows(run.memo("drift", study.drift))
    run.note(
        "± is over seeds; delta_ne: growth of normalised entropy over the float model's on the same examples, upper: "
        "end of the one-sided 95 % interval, users drawn whole; share: of the float model's bytes"
    )
    run.note(
        "state: 0 OK, 1 recalibrated, 2 fallback, 3 blocked; rank: place in the debugger's list, 1 is the worst; "
        "bits: what the search at the first budget gave the faulty unit"
    )
    _plot(run.report, output / "choices.png")
    return run.report


def _plot(report: Report, path: Path) -> None:
    shares = {row.subject: row.value for row in report.rows if row.metric == "share" and "drift" not in row.subject}
    with plot(path, (8, 5)) as axes:
        for name, share in shares.items():
            value, upper = report.value("delta_ne", name), report.value("delta_ne_upper", name)
            colour = "tab:red" if name.startswith("searched") else "tab:blue"
            axes.errorbar(share, value, yerr=[[0], [max(upper - value, 0)]], fmt="o", capsize=3, color=colour)
            axes.annotate(name, (share, value), xytext=(5, 5), textcoords="offset points", fontsize=8)
        axes.axhline(0.05, color="black", linestyle="--", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks([12.5, 25, 50, 100], ["12.5", "25", "50", "100"])
        axes.set_xlabel("bytes (% of the float model)")
        axes.set_ylabel("growth of normalised entropy (%), bar to its upper end")
        axes.grid(alpha=0.25)

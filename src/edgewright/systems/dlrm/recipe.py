"""DLRM (arXiv 1906.00091) on MovieLens 100k: does it order clicks better than popularity, factors and a linear model?

Two splits. In order of time the last fifth of the ratings is the test: most of its users are new. At random the test's
users are known, which is where tables can show what they hold. Four stars or more are a click.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.measure.report import Report
from edgewright.systems.dlrm.metrics import FactorizationMachine, Popularity, evaluate, fit_logistic_regression
from edgewright.systems.dlrm.model import DLRM, DLRMConfig
from edgewright.systems.dlrm.movielens import CROSSES, TABLES, Split, movielens_100k
from edgewright.systems.dlrm.optimizers import ClickTraining, train_clicks
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import Run, row_over_seeds

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class DLRMSettings:
    """samples 0: all of them, otherwise the first ones of every part. The tables' rows start from the same seeds.

    Rates come from a pilot of one seed, where they had the lowest log-loss on the validation part; that part also picks
    the weights and the penalty that are judged.
    """

    seed: int = 0
    seeds: int = 3
    samples: int = 0
    dim: int = 16
    hidden: int = 64
    dropout: tuple[float, float] = (0.2, 0.3)
    epochs: float = 7.0
    batch: int = 256
    dense_lr: float = 2e-3
    sparse_lr: float = 0.02
    factor_lr: float = 0.03
    penalties: tuple[float, ...] = (0.5, 1.0, 2.0, 5.0, 10.0)
    iterations: int = 100
    splits: tuple[str, ...] = ("time", "random")
    crosses: tuple[bool, ...] = (False, True)


def tiny() -> DLRMSettings:
    return DLRMSettings(
        seeds=1,
        samples=6000,
        epochs=2.0,
        sparse_lr=0.05,
        penalties=(1.0, 5.0),
        iterations=15,
        splits=("random",),
        crosses=(False,),
    )


def small() -> DLRMSettings:
    return DLRMSettings()


def paper() -> DLRMSettings:
    """Ten seeds. The published size is a terabyte of click logs: `edgewright train dlrm --data` reads its layout."""
    return DLRMSettings(seeds=10)


CLAIMS = (
    Claim("auc", "dlrm, random", ">", against="popularity, random", sizes=("small", "paper")),
    Claim("ne", "dlrm, random", "<", threshold=1.0),
    Claim("auc", "dlrm, random", ">", threshold=0.783, sizes=("small", "paper")),
    Claim("auc", "dlrm, random", ">", against="logistic regression, random", sizes=("small", "paper")),
    Claim("auc", "dlrm, random", ">", against="matrix factorisation, random", sizes=("small", "paper")),
    Claim("auc", "dlrm, time", ">", against="popularity, time", sizes=("small", "paper")),
    Claim("auc", "dlrm, time", ">", against="matrix factorisation, time", sizes=("small", "paper")),
    Claim("auc", "dlrm, time", ">", against="logistic regression, time", factor=0.999, sizes=("small", "paper")),
    Claim("ne", "dlrm, time", "<", against="logistic regression, time", factor=1.005, sizes=("small", "paper")),
)
CLOCKED: tuple[str, ...] = ()
HEADLINE: Headline | None = Headline(
    "AUC {ours:.3f} on MovieLens 100k split at random, logistic regression {linear:.3f}; in order of time {later:.3f} "
    "and {linear_later:.3f}",
    {
        "ours": Cell("dlrm.csv", {"metric": "auc", "subject": "dlrm, random"}),
        "linear": Cell("dlrm.csv", {"metric": "auc", "subject": "logistic regression, random"}),
        "later": Cell("dlrm.csv", {"metric": "auc", "subject": "dlrm, time"}),
        "linear_later": Cell("dlrm.csv", {"metric": "auc", "subject": "logistic regression, time"}),
    },
)
METRICS = ("auc", "logloss", "ne", "calibration")


def plan(settings: DLRMSettings) -> Plan:
    samples = settings.samples or 72_000
    steps = settings.epochs * samples / settings.batch
    runs = settings.seeds * len(settings.splits) * (3 + len(settings.crosses))
    return Plan(
        steps=(
            "ratings in order of time, split " + " and ".join(settings.splits),
            "popularity; logistic regression on one-hot features at its optimum, its penalty by the validation part",
            f"matrix factorisation, factorisation machine and DLRM (dot and cat), {settings.seeds} seed(s) each, "
            f"{settings.epochs:g} epochs of {samples} samples, the best weights by the validation part",
            "AUC, log-loss, normalised entropy and calibration on the test",
        ),
        seconds=5 + 0.01 * steps * runs,  # an estimate: a step of 256 samples takes 10 ms
        memory_bytes=int(1.2e9),
        disk_bytes=int(3e7),
        outputs=("auc.png", "points.json", "model/model.safetensors"),
    )


def run(settings: DLRMSettings, output: Path) -> Report:
    """model/ is the first DLRM of the first split."""
    run = Run(output, "DLRM on MovieLens 100k, four stars or more as a click")
    bench = cache(partial(_Bench, settings, output))
    for split in settings.splits:
        for name, (count, measure) in _cases(settings).items():
            seeds = range(settings.seed, settings.seed + count)
            points = run.over_seeds(f"{name}/{split}", seeds, lambda seed: measure(bench(split), seed))  # noqa: B023
            for metric in METRICS:
                row = {"metric": metric, "subject": f"{name}, {split}", "unit": "nats" if metric == "logloss" else ""}
                rows = [{**row, "value": p[metric], "se": p.get(f"{metric}_se"), "n": p["n"]} for p in points]
                run.add_rows([row_over_seeds(rows)])
    run.note(
        "± is over seeds where there are several, otherwise over the samples of the test; ne: log-loss over the "
        "entropy of the base rate; calibration: mean prediction over mean label"
    )
    run.bars("auc.png", "auc", "area under the ROC curve, test part", xlim=(0.5, None))
    return run.report


def _cases(settings: DLRMSettings) -> dict[str, tuple[int, Callable[[_Bench, int], Any]]]:
    """Name -> (seeds, what measures it on a split)."""
    seeds = settings.seeds
    cases: dict[str, tuple[int, Callable[[_Bench, int], Any]]] = {
        "popularity": (1, lambda bench, seed: bench.popularity()),
        "logistic regression": (1, lambda bench, seed: bench.regression(False)),
        "matrix factorisation": (seeds, lambda bench, seed: bench.factors(seed, ("user", "item"))),
        "factorisation machine": (seeds, lambda bench, seed: bench.factors(seed, None)),
        "dlrm": (seeds, lambda bench, seed: bench.dlrm(seed, "dot", False)),
        "dlrm, cat": (seeds, lambda bench, seed: bench.dlrm(seed, "cat", False)),
    }
    if True in settings.crosses:
        cases["logistic regression, with crosses"] = (1, lambda bench, seed: bench.regression(True))
        cases["dlrm, with crosses"] = (seeds, lambda bench, seed: bench.dlrm(seed, "dot", True))
    return cases


class _Bench:
    """One split of the data and what is trained on it."""

    def __init__(self, settings: DLRMSettings, output: Path, split: str) -> None:
        self.settings, self.name, self.output = settings, split, output
        data = movielens_100k(split, seed=settings.seed)
        if settings.samples:
            data = Split(*(part.rows(slice(0, settings.samples)) for part in data))
        self.whole: Split = data
        plain = [name for name in TABLES if name not in CROSSES]
        self.plain: Split = Split(*(part.tables(plain) for part in data))

    def popularity(self) -> dict[str, Any]:
        return self.figures(Popularity(self.plain.train), self.plain)

    def regression(self, crosses: bool) -> dict[str, Any]:
        """On ids alone, as it is commonly run: with the counts its log-loss on later samples is worse."""
        data = Split(*(part.without_dense() for part in (self.whole if crosses else self.plain)))
        models = [fit_logistic_regression(data.train, p, self.settings.iterations) for p in self.settings.penalties]
        return self.figures(min(models, key=lambda model: evaluate(model, data.valid).logloss), data)

    def factors(self, seed: int, tables: tuple[str, ...] | None) -> dict[str, Any]:
        """Matrix factorisation where two tables are named (and dense features left out), else over all tables."""
        data = self.plain
        if tables:
            parts = [part.tables(tables) for part in data]
            data = Split(*parts)
        dense = 0 if tables else data.train.dense.shape[1]
        model = FactorizationMachine(dense, data.train.schema.sizes, self.settings.dim, seed)
        self.train(model, data, seed, self.settings.factor_lr, "matrix" if tables else "machine")
        return self.figures(model, data)

    def dlrm(self, seed: int, interaction: str, crosses: bool) -> dict[str, Any]:
        settings, data = self.settings, self.whole if crosses else self.plain
        schema = data.train.schema
        config = DLRMConfig(
            len(schema.dense),
            schema.sizes,
            settings.dim,
            (settings.hidden, settings.dim),
            (settings.hidden, 1),
            interaction=interaction,
            dropout=settings.dropout,
            table_names=schema.tables,
        )
        model = DLRM(config, seed)
        self.train(model, data, seed, settings.sparse_lr, f"dlrm-{interaction}{'-crosses' if crosses else ''}")
        if seed == settings.seed and interaction == "dot" and not crosses and self.name == settings.splits[0]:
            model.save_pretrained(self.output / "model")
        return self.figures(model, data)

    def train(self, model: nn.Module, data: Split, seed: int, rate: float, name: str) -> None:
        settings = self.settings
        train_clicks(
            model,
            data.train,
            data.valid,
            ClickTraining(
                settings.epochs, settings.batch, settings.dense_lr, rate, schedule="constant", evaluations=4, seed=seed
            ),
            output=self.output / f"training-{self.name}" / f"{name}-{seed}",
        )

    def figures(self, model: nn.Module, data: Split) -> dict[str, Any]:
        return asdict(evaluate(model, data.test))

"""The scaling law of mixtures of experts: loss from active parameters, training tokens and sparsity.

Source: MobileMoE, arXiv 2605.27358.
    Loss(N, D, E) = A Eh^delta N^(alpha + gamma ln Eh) + B Eh^omega D^(beta + zeta ln Eh) + c
    1 / Eh = 1 / (E - 1 + (1 / E_start - 1 / E_max)^-1) + 1 / E_max,   E_start = 1, so that Eh(1) = 1
N: active parameters, D: training tokens, both in billions (the paper states no units; no other gives its losses).
E = 1 is a dense model, and at any fixed E the form is Chinchilla's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgewright.errors import MissingPackage, UsageError
from edgewright.measure.plot import plot

NAMES = ("A", "delta", "alpha", "gamma", "B", "omega", "beta", "zeta", "c")
E_START = 1.0
FEWEST_POINTS = 12
MOST = 20.0  # exponents above it are cut: a search may pass there, a law cannot end there
HUBER = 0.01  # residuals in nats beyond which a point pulls only linearly
Points = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # N, D, E, loss


@dataclass(frozen=True)
class ScalingLaw:
    """The nine coefficients, and what they were fitted to, if that is known. rmse: of that fit, nats per token."""

    A: float
    delta: float
    alpha: float
    gamma: float
    B: float
    omega: float
    beta: float
    zeta: float
    c: float
    E_max: float = 32.0
    rmse: float = math.nan
    points: Points | None = field(default=None, repr=False, compare=False)

    @classmethod
    def published(cls) -> ScalingLaw:
        """The paper's coefficients: E up to 32, N of 0.3 to 0.9 billion, D of 100 to 500 billion tokens."""
        return cls(0.2388, 0.0906, -0.2833, 0.0387, 0.6019, 1.0593, -0.3210, -0.3684, 1.9730, 32.0, 0.0076)

    def loss(self, N: Any, D: Any, E: Any = 1.0) -> Any:
        """Predicted loss in nats per token; N and D in billions, arrays broadcast. A float for floats."""
        values = _predict(np.array([getattr(self, name) for name in NAMES]), *_checked(N, D, E), self.E_max)
        return float(values) if values.ndim == 0 else values

    def optimal_E(self, N: float, D: float) -> float:
        """The sparsity of least predicted loss at these active parameters and tokens, from 1 to E_max."""
        grid = np.geomspace(1.0, self.E_max, 2001)
        return float(grid[int(np.argmin(self.loss(N, D, grid)))])

    @classmethod
    def fit(cls, table: Any, E_max: float = 32.0, *, starts: int = 64, seed: int = 0) -> ScalingLaw:
        """Least squares with Huber loss from many starts, the best kept.

        table: columns "N", "D" (billions), "E" and "loss": a data frame or a mapping of sequences. Raises UsageError
        for fewer than 12 points, a single E, and numbers that are not positive and finite.
        """
        points = _points(table)
        if len(points[0]) < FEWEST_POINTS:
            raise UsageError(f"a law of nine coefficients needs {FEWEST_POINTS} points or more, got {len(points[0])}")
        if len(set(points[2].tolist())) < 2:
            raise UsageError(f"every point has E={points[2][0]:g}; the law needs two sparsities or more")
        if not E_max >= points[2].max() or E_max <= 1:
            raise UsageError(f"E_max={E_max:g} must be above 1 and at least the largest E, {points[2].max():g}")
        solutions = [_solve(start, points, E_max) for start in _starts(starts, points[3], seed)]
        best = min(solutions, key=lambda solution: solution[1])[0]
        return cls._of(best, points, E_max)

    @classmethod
    def _of(cls, values: np.ndarray, points: Points, E_max: float) -> ScalingLaw:
        error = _predict(values, *points[:3], E_max) - points[3]
        rmse = float(np.sqrt(np.mean(error**2)))
        return cls(**dict(zip(NAMES, map(float, values), strict=True)), E_max=E_max, rmse=rmse, points=points)

    def ci(
        self, level: float = 0.95, repeats: int = 100, seed: int = 0, at: Sequence[tuple[float, float, float]] = ()
    ) -> dict[Any, tuple[float, float]]:
        """Bootstrap intervals of the coefficients, and of the predicted loss at each (N, D, E) of `at`.

        Points are drawn again with replacement, each draw fitted from this law. Raises UsageError without points.
        """
        if self.points is None:
            raise UsageError("this law has no points to draw from; intervals need ScalingLaw.fit(table)")
        if not 0 < level < 1 or repeats < 2:
            raise UsageError(f"level={level}, repeats={repeats}: level lies between 0 and 1, repeats from 2 up")
        generator = np.random.default_rng(seed)
        start = np.array([getattr(self, name) for name in NAMES])
        draws: list[np.ndarray] = []
        while len(draws) < repeats:
            chosen = generator.integers(len(self.points[0]), size=len(self.points[0]))
            if len(set(self.points[2][chosen].tolist())) > 1:
                N, D, E, loss = (column[chosen] for column in self.points)
                draws.append(_solve(start, (N, D, E, loss), self.E_max)[0])
        table: dict[Any, list[float]] = {name: [float(d[i]) for d in draws] for i, name in enumerate(NAMES)}
        for place in at:
            table[place] = [float(_predict(d, *_checked(*place), self.E_max)) for d in draws]
        tails = ((1 - level) / 2, (1 + level) / 2)
        return {key: (float(np.quantile(v, tails[0])), float(np.quantile(v, tails[1]))) for key, v in table.items()}

    def plot(self, path: str | Path, N: float = 0.3, D: Sequence[float] = (100, 200, 500)) -> Path:
        """Predicted loss over sparsity at N billion active parameters, one line an amount of tokens; points as dots."""
        grid = np.geomspace(1.0, self.E_max, 200)
        with plot(path) as axes:
            for tokens in D:
                line = axes.plot(grid, self.loss(N, tokens, grid), label=f"{tokens:g} billion tokens")[0]
                if self.points is not None:
                    here = np.isclose(self.points[0], N) & np.isclose(self.points[1], tokens)
                    axes.plot(self.points[2][here], self.points[3][here], "o", color=line.get_color())
            axes.set_xscale("log", base=2)
            axes.set_xlabel("sparsity E (total over active feed-forward)")
            axes.set_ylabel(f"predicted loss at {N:g} billion active parameters (nats per token)")
            axes.legend()
            axes.grid(alpha=0.25)
        return Path(path)


def effective_experts(E: Any, E_max: float = 32.0) -> Any:
    """Eh: sparsity as the loss feels it, 1 at E = 1 and levelling off towards E_max."""
    first = 1.0 / (1.0 / E_START - 1.0 / E_max)
    return 1.0 / (1.0 / (np.asarray(E, dtype=float) - 1.0 + first) + 1.0 / E_max)


def _predict(values: np.ndarray, N: np.ndarray, D: np.ndarray, E: np.ndarray, E_max: float) -> np.ndarray:
    return sum(_terms(values, N, D, np.log(effective_experts(E, E_max)))) + values[8]  # type: ignore[return-value]


def _terms(values: np.ndarray, N: np.ndarray, D: np.ndarray, ln: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two power laws at ln = log(Eh)."""
    A, delta, alpha, gamma, B, omega, beta, zeta, _ = values
    model = A * np.exp(np.minimum(delta * ln + (alpha + gamma * ln) * np.log(N), MOST))
    return model, B * np.exp(np.minimum(omega * ln + (beta + zeta * ln) * np.log(D), MOST))


def _checked(N: Any, D: Any, E: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    columns = tuple(np.asarray(value, dtype=float) for value in (N, D, E))
    for name, column, least in zip("NDE", columns, (0.0, 0.0, 1.0), strict=True):
        bad = ~np.isfinite(column) | (column < least) | (column == 0)
        if bad.any():
            wrong = np.atleast_1d(column)[np.atleast_1d(bad)][0]
            raise UsageError(f"{name}={wrong:g}: N and D are billions and positive, E is 1 or more")
    return columns  # type: ignore[return-value]


def _points(table: Any) -> Points:
    try:
        N, D, E, loss = (np.asarray(table[name], dtype=float).ravel() for name in ("N", "D", "E", "loss"))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the table needs numeric columns N, D, E and loss ({error})") from None
    if len({len(column) for column in (N, D, E, loss)}) != 1:
        raise UsageError(f"the columns N, D, E, loss have {len(N)}, {len(D)}, {len(E)}, {len(loss)} entries")
    if not (np.isfinite(loss) & (loss > 0)).all():
        raise UsageError("the column loss holds numbers that are not positive and finite")
    return (*_checked(N, D, E), loss)


def _starts(count: int, loss: np.ndarray, seed: int) -> list[np.ndarray]:
    """A, B log-uniform in [1e-2, 10]; exponents in [-1.5, 0], gamma and zeta in [-0.5, 0.5], c below the least loss."""
    draw = np.random.default_rng(seed).uniform
    starts = []
    for _ in range(count):
        amount, exponent, slope = (lambda: 10 ** draw(-2, 1)), (lambda: draw(-1.5, 0)), (lambda: draw(-0.5, 0.5))
        sparse = (draw(-0.5, 1.5), draw(-0.5, 1.5))
        part = [amount(), sparse[0], exponent(), slope(), amount(), sparse[1], exponent(), slope()]
        starts.append(np.array([*part, draw(0, float(loss.min()))]))
    return starts


def _solve(start: np.ndarray, points: Points, E_max: float) -> tuple[np.ndarray, float]:
    """(coefficients, cost) of one local minimum; A and B are searched as logarithms, so that they stay positive."""
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise MissingPackage("fitting a scaling law needs scipy: pip install scipy") from None
    N, D, E, loss = points
    ln = np.log(effective_experts(E, E_max))

    def unpack(x: np.ndarray) -> np.ndarray:
        values = x.copy()
        values[[0, 4]] = np.exp(np.clip(x[[0, 4]], -30, 10))
        return values

    def residuals(x: np.ndarray) -> np.ndarray:
        values = unpack(x)
        return sum(_terms(values, N, D, ln)) + values[8] - loss  # type: ignore[return-value]

    def slopes(x: np.ndarray) -> np.ndarray:
        model, data = _terms(unpack(x), N, D, ln)
        ones, ln_n, ln_d = np.ones_like(ln), np.log(N), np.log(D)
        parts = [model * f for f in (ones, ln, ln_n, ln * ln_n)] + [data * f for f in (ones, ln, ln_d, ln * ln_d)]
        return np.stack([*parts, ones], axis=1)

    x = start.copy()
    x[[0, 4]] = np.log(np.maximum(start[[0, 4]], 1e-12))
    found = least_squares(residuals, x, slopes, loss="huber", f_scale=HUBER, x_scale="jac", max_nfev=300)
    return unpack(found.x), float(found.cost)

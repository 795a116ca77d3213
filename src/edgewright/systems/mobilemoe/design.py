"""Shapes of mixtures of experts: the published ones, the scaling law, and the best for a device by predicted loss.

Source: MobileMoE, arXiv 2605.27358. Minimise Loss(N_active, D, E) subject to
    inference 2 N_active FLOPs a token,  training 6 N_active D FLOPs,
    memory = b_w / 8 * N_total + b_kv / 8 * 2 T L G h     (T context, L layers, G key heads of width h)
Active parameters are everything that a token touches: attention, router, norms, chosen and shared experts, and the
tied table once, as the head (the looked-up row is not counted again).

The scaling law, from active parameters N and training tokens D in billions (the paper states no units; no other gives
its losses) and sparsity E:
    Loss(N, D, E) = A Eh^delta N^(alpha + gamma ln Eh) + B Eh^omega D^(beta + zeta ln Eh) + c
    1 / Eh = 1 / (E - 1 + (1 / E_start - 1 / E_max)^-1) + 1 / E_max,   E_start = 1, so that Eh(1) = 1
E = 1 is a dense model, and at any fixed E the form is Chinchilla's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgewright.checks import check, number, one_of, whole
from edgewright.errors import MissingPackage, UsageError
from edgewright.measure.plot import plot
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.systems.mobilemoe.layer import MoEConfig

WIDTHS = range(256, 2049, 64)
ASPECTS = (32, 40, 48)  # width over layers; the paper's three models lie near 40
SPARSITIES = (1, 2, 4, 8, 16, 32)
GRANULARITY = 8
HEAD = 64
NAMES = ("A", "delta", "alpha", "gamma", "B", "omega", "beta", "zeta", "c")
E_START = 1.0
FEWEST_POINTS = 12
MOST = 20.0  # exponents above it are cut: a search may pass there, a law cannot end there
HUBER = 0.01  # residuals in nats beyond which a point pulls only linearly
Points = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # N, D, E, loss


class Shape(NamedTuple):
    """hidden, executed layers, query heads; the rest follows: heads of 64, 4 key heads, feed-forward 4 * hidden."""

    hidden: int
    layers: int
    heads: int
    total: int  # parameters at the published vocabulary, head and table shared
    active: int  # parameters that a token touches: router and table included


VOCABULARY = 128_256
SHAPES = {
    "s": Shape(768, 20, 12, 1_263_373_056, 272_468_736),
    "m": Shape(1024, 26, 16, 2_818_388_992, 528_299_008),
    "l": Shape(1280, 32, 20, 5_325_702_400, 921_683_200),
}


def mobilemoe(size: str = "s", vocab_size: int = VOCABULARY, **changes: Any) -> EdgeDecoderConfig:
    """The configuration of MobileMoE S, M or L: E = 8, granularity 8, one shared expert in every layer.

    Args:
        size: "s", "m" or "l", of arXiv 2605.27358, architecture table.
        vocab_size: the published one where nothing is said.
        changes: further fields of EdgeDecoderConfig.

    Returns:
        The configuration, for `new_decoder`.

    Raises:
        UsageError: another size.
    """
    check("size", size.lower(), one_of(*SHAPES))
    shape = SHAPES[size.lower()]
    moe = MoEConfig.split(4 * shape.hidden, experts=8, granularity=8)
    return EdgeDecoderConfig(
        **{**decoder_fields(shape.hidden, shape.layers, shape.heads, 4, moe, vocab_size), **changes}
    )


def mobilemoe_config(name: str, layer_sharing: bool = False, **changes: Any) -> EdgeDecoderConfig:
    """The configuration of "moe-S", "moe-M" or "moe-L". Raises UsageError for another name, or for shared layers."""
    if layer_sharing:
        raise UsageError(f"{name} shares no layers; leave --share out, or take one of MobileLLM's shapes")
    return mobilemoe(name.partition("-")[2], **changes)


def decoder_fields(
    hidden: int, layers: int, heads: int, key_heads: int, moe: MoEConfig | None, vocab_size: int
) -> dict[str, Any]:
    """Fields of an EdgeDecoderConfig in MobileMoE's manner: queries and keys normalised, base 5e5, 8192 positions.

    moe None is the dense model of the same block.
    """
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": 64,
        "ffn_types": "mlp" if moe is None else "moe",
        "moe": None if moe is None else asdict(moe),
        "qk_norm": "l2",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "max_position_embeddings": 8192,
    }


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
        check("number of points", len(points[0]), whole(FEWEST_POINTS))
        check("number of sparsities E", len(set(points[2].tolist())), whole(2))
        check("E_max", E_max, number(float(points[2].max()), above=1))
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
        check("level", level, number(above=0, below=1))
        check("repeats", repeats, whole(2))
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
    solution = least_squares(residuals, x, slopes, loss="huber", f_scale=HUBER, x_scale="jac", max_nfev=300)
    return unpack(solution.x), float(solution.cost)


@dataclass(frozen=True)
class MoEPlan:
    """One candidate of `design_under_budget`.

    Args:
        hidden: width of the residual stream.
        layers: of the decoder.
        heads: of attention.
        key_heads: of keys and values.
        E: experts before they are cut; 1 is dense.
        vocab: rows of the token table.
        n_total: parameters.
        n_active: parameters that a token meets.
        memory_bytes: of weights and cache at the context.
        flops_per_token: 2 * n_active.
        loss: predicted, nats per token.
    """

    hidden: int
    layers: int
    heads: int
    key_heads: int
    E: int
    vocab: int
    n_total: int
    n_active: int
    memory_bytes: int
    flops_per_token: int
    loss: float

    @property
    def moe(self) -> MoEConfig | None:
        return MoEConfig.split(4 * self.hidden, self.E, GRANULARITY) if self.E > 1 else None

    def config(self) -> EdgeDecoderConfig:
        """The candidate as a model that can be built."""
        fields = decoder_fields(self.hidden, self.layers, self.heads, self.key_heads, self.moe, self.vocab)
        return EdgeDecoderConfig(**fields)

    def text(self) -> str:
        """The candidate as a line for people."""
        return (
            f"d={self.hidden} L={self.layers} E={self.E}: {self.n_total / 1e6:.0f}M parameters, "
            f"{self.n_active / 1e6:.0f}M active, {self.memory_bytes / 1e9:.2f} GB, "
            f"{self.flops_per_token / 1e6:.0f} MFLOPs a token, predicted loss {self.loss:.4f}"
        )


def moe_parameters(config: EdgeDecoderConfig) -> tuple[int, int]:
    """(total, active) parameters of a decoder of attention with plain or sparse feed-forwards, all layers stored."""
    hidden, head = config.hidden_size, config.head_dim
    assert isinstance(config.ffn_types, list) and head is not None
    total = active = config.vocab_size * hidden + hidden
    if not config.tie_word_embeddings:
        total += config.vocab_size * hidden
    moe = MoEConfig(**config.moe or {}) if "moe" in config.ffn_types else None
    for layer, kind in enumerate(config.ffn_types):
        if kind not in ("mlp", "moe"):
            raise UsageError(f"layer {layer} has ffn_types={kind!r}; only 'mlp' and 'moe' are counted here")
        heads, groups = (config.of_layer(name, layer) for name in ("num_attention_heads", "num_key_value_heads"))
        width = config.of_layer("intermediate_size", layer)
        both = _layer(hidden, head, heads, groups, moe if kind == "moe" else None, width)
        extra = 2 * head if config.qk_norm == "rms" else 0
        if config.qkv_bias:
            extra += head * (heads + 2 * groups)
        total, active = total + both[0] + extra, active + both[1] + extra
    return total, active


def _layer(hidden: int, head: int, heads: int, groups: int, moe: MoEConfig | None, width: int) -> tuple[int, int]:
    """(total, active) parameters of one layer: attention, two norms, feed-forward."""
    common = 2 * hidden * head * (heads + groups) + 2 * hidden
    if moe is None:
        common += 3 * hidden * width
        return common, common
    common += 3 * hidden * moe.shared_size + moe.num_experts * hidden
    one = 3 * hidden * moe.expert_size
    return common + moe.num_experts * one, common + moe.top_k * one


def moe_memory(
    config: EdgeDecoderConfig, context: int, weight_bits: float = 4.5, kv_bits: float = 8.0
) -> tuple[float, float]:
    """(bytes of weights, bytes of key-value cache). weight_bits 4.5: codes of 4 with a 16-bit scale for 32 of them."""
    keys = sum(config.of_layer("num_key_value_heads", layer) for layer in range(config.num_hidden_layers or 0))
    cache = kv_bits / 8 * 2 * context * keys * (config.head_dim or 0)
    return weight_bits / 8 * moe_parameters(config)[0], cache


def design_under_budget(
    memory_gb: float,
    flops_per_token: float,
    context: int = 8192,
    vocab: int = 128_256,
    weight_bits: float = 4.5,
    kv_bits: float = 8.0,
    tokens: float = 500e9,
    train_flops: float | None = None,
    law: ScalingLaw | None = None,
    count: int = 10,
) -> list[MoEPlan]:
    """The best shapes for a device by predicted loss.

    Args:
        memory_gb: for weights and cache, in 1e9 bytes.
        flops_per_token: 2 * active parameters.
        context: tokens in the cache.
        vocab: tokens of the table; the default is the published models'.
        weight_bits: a weight; 4.5 is codes of 4 with a 16-bit scale for 32 of them.
        kv_bits: a number of the cache.
        tokens: of the training.
        train_flops: of the training; each candidate then gets as many tokens as that pays for.
        law: the published one by default, which was fitted at 0.3 to 0.9 billion active parameters; smaller ones are
            an extrapolation.
        count: plans wanted.

    Returns:
        Plans, the least predicted loss first.

    Raises:
        UsageError: nothing fits, with the closest candidates, or a number that is not positive.
    """
    numbers = {"memory_gb": memory_gb, "flops_per_token": flops_per_token, "context": context, "vocab": vocab}
    numbers |= {"weight_bits": weight_bits, "kv_bits": kv_bits, "tokens": tokens, "count": count}
    numbers |= {} if train_flops is None else {"train_flops": train_flops}
    for name, value in numbers.items():
        check(name, value, number(above=0))
    law = law or ScalingLaw.published()
    plans = [_plan(*shape, context, vocab, weight_bits, kv_bits, tokens, train_flops, law) for shape in _shapes()]
    fitting = [p for p in plans if p.memory_bytes <= memory_gb * 1e9 and p.flops_per_token <= flops_per_token]
    if not fitting:
        excess = {id(p): max(p.memory_bytes / memory_gb / 1e9, p.flops_per_token / flops_per_token) for p in plans}
        closest = sorted(plans, key=lambda p: (excess[id(p)], p.loss))[:3]
        names = "; ".join(p.text() for p in closest)
        raise UsageError(
            f"no shape fits {memory_gb:g} GB and {flops_per_token / 1e6:g} MFLOPs a token at a context of {context} "
            f"and a vocabulary of {vocab}; the closest: {names}"
        )
    return sorted(fitting, key=lambda p: (p.loss, p.memory_bytes))[:count]


def _shapes() -> Iterator[tuple[int, int, int]]:
    """(width, layers, E), each once."""
    for hidden in WIDTHS:
        for layers in dict.fromkeys(max(4, round(hidden / aspect)) for aspect in ASPECTS):
            for sparsity in SPARSITIES:
                yield hidden, layers, sparsity


def _plan(
    hidden: int,
    layers: int,
    E: int,
    context: int,
    vocab: int,
    weight_bits: float,
    kv_bits: float,
    tokens: float,
    train_flops: float | None,
    law: ScalingLaw,
) -> MoEPlan:
    heads = hidden // HEAD
    groups = math.gcd(heads, 4)
    moe = MoEConfig.split(4 * hidden, E, GRANULARITY) if E > 1 else None
    once = int(vocab) * hidden + hidden
    total, active = (once + layers * part for part in _layer(hidden, HEAD, heads, groups, moe, 4 * hidden))
    memory = weight_bits / 8 * total + kv_bits / 8 * 2 * context * layers * groups * HEAD
    billions = (tokens if train_flops is None else train_flops / (6 * active)) / 1e9
    loss = law.loss(active / 1e9, billions, min(E, law.E_max))
    return MoEPlan(
        hidden, layers, heads, groups, E, int(vocab), total, active, math.ceil(memory), 2 * active, float(loss)
    )

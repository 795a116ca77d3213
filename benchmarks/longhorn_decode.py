"""Longhorn at work: a token's time and memory at every context beside attention's, and its scan beside other ways.

Decoding: our decoder with 8 blocks of width 512, once Longhorn, once attention with feed-forwards of equal parameters.
Caches stand at a context of 16 to 8192 tokens; the models take turns, a sample is the mean of several tokens.
Scan: the chunked scan against the loop of steps, and beside mambapy's parallel scan over the same decays and inputs
(without what Longhorn's makes them from), each alone and with its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from edgewright.io.transformers_names import cache_of, with_cache
from edgewright.measure.plot import plot
from edgewright.measure.report import Report
from edgewright.measure.timing import alternate, paired_ratio
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import new_decoder
from edgewright.models.decoder.state_cache import StateCache, snapshot
from edgewright.systems.longhorn.scan import longhorn_scan, longhorn_step, step_size
from edgewright.systems.longhorn.tasks import feed_forward_width
from results import ROOT, save

WIDTH, LAYERS, VOCABULARY = 512, 8, 4096
CONTEXTS = (16, 64, 256, 1024, 4096, 8192)
TOKENS = 8  # a sample
PIECE = 1024  # of a context, taken in at once
SHAPES = {"one row of 1024": (1, 1024, 512, 16), "8 rows of 256": (8, 256, 256, 16)}  # B, T, d, m


def model_of(kind: str) -> Any:
    shape = EdgeDecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=feed_forward_width(WIDTH),
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
        mixers=kind,
        ffn_types="none" if kind == "longhorn" else "mlp",
        max_position_embeddings=2 * CONTEXTS[-1],
    )
    return new_decoder(shape).eval()


def standing_at(model: Any, context: int) -> StateCache:
    """A cache that has taken in `context` tokens."""
    ids = torch.randint(VOCABULARY, (1, context), generator=torch.Generator().manual_seed(context))
    cache = None
    with torch.no_grad():
        for piece in ids.split(PIECE, 1):
            cache = cache_of(model(piece, use_cache=True, logits_to_keep=1, **with_cache(cache)))
    assert cache is not None
    return cache


def decode(model: Any, cache: Any) -> Callable[[], None]:
    token = torch.ones(1, 1, dtype=torch.long)

    def run() -> None:
        with torch.no_grad():
            for _ in range(TOKENS):
                model(token, use_cache=True, **with_cache(cache))

    return run


def decoding(report: Report, contexts: tuple[int, ...], repeats: int) -> None:
    models = {"Longhorn": model_of("longhorn"), "attention": model_of("full_attention")}
    for name, model in models.items():
        report.add("parameters", sum(p.numel() for p in model.parameters()), subject=name)
    curves: dict[str, list[float]] = {name: [] for name in models}
    for context in contexts:
        caches = {name: standing_at(model, context) for name, model in models.items()}
        for name, cache in caches.items():
            report.add("cache", snapshot(cache).bytes / 1e6, subject=f"{name} at {context}", unit="MB")
        times = alternate({n: decode(models[n], caches[n]) for n in models}, repeats=repeats, warmup=1)
        for name, time in times.items():
            token = time.map(lambda seconds: seconds / TOKENS * 1e3)
            report.add("token", token.median, subject=f"{name} at {context}", se=token.spread, n=token.n, unit="ms")
            curves[name].append(token.median)
        ratio = paired_ratio(times["attention"], times["Longhorn"])
        report.add("attention_over_longhorn", ratio.median, subject=f"at {context}", se=ratio.spread, n=ratio.n)
    for name, curve in curves.items():
        report.add("growth", curve[-1] / curve[0], subject=f"{name}, {contexts[0]} to {contexts[-1]}", unit="x")
    with plot(ROOT / "docs" / "images" / "longhorn_decode.png", (6.5, 4)) as axes:
        for name, curve in curves.items():
            axes.plot(contexts, curve, marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens before")
        axes.set_ylabel("ms a token")
        axes.legend()


def step_loop(x: Any, k: Any, q: Any, beta: Any) -> Any:
    S, outputs = torch.zeros(x.shape[0], x.shape[2], k.shape[2]), []
    for t in range(x.shape[1]):
        y, S = longhorn_step(x[:, t], k[:, t], q[:, t], beta[:, t], None, S)
        outputs.append(y)
    return torch.stack(outputs, 1)


def mambapy_scan(x: Any, k: Any, q: Any, beta: Any) -> Any:
    from mambapy.pscan import pscan

    delta = step_size(beta, k)
    decay = 1 - delta[..., None] * (k * k)[..., None, :]
    states = pscan(decay, (delta * x)[..., None] * k[..., None, :])
    return (states @ q[..., None]).squeeze(-1)


def scanning(report: Report, repeats: int) -> None:
    ways: dict[str, Callable[..., Any]] = {
        "chunked scan": lambda *t: longhorn_scan(*t)[0],
        "loop of steps": step_loop,
    }
    try:
        import mambapy.pscan  # noqa: F401

        ways["mambapy's scan"] = mambapy_scan
    except ImportError:
        report.notes.append("mambapy is not installed: pip install mambapy")
    for shape, (B, T, d, m) in SHAPES.items():
        g = torch.Generator().manual_seed(0)
        given = [torch.randn(B, T, n, generator=g) for n in (d, m, m)] + [torch.rand(B, T, d, generator=g)]
        wanted = ways["loop of steps"](*given)
        for name, way in ways.items():
            error = float((way(*given) - wanted).norm() / wanted.norm())
            report.add("error", error, subject=f"{name}, {shape}")
        for metric in ("forward", "with_gradient"):
            for tensor in given:
                tensor.requires_grad_(metric == "with_gradient")

            def work(way: Callable[..., Any], given: Any = given, metric: str = metric) -> None:
                y = way(*given)
                if metric == "with_gradient":
                    torch.autograd.grad(y.sum(), given)

            times = alternate({name: lambda way=way: work(way) for name, way in ways.items()}, repeats, warmup=1)
            for name, time in times.items():
                taken = time.map(lambda seconds: seconds * 1e3)
                report.add(metric, taken.median, subject=f"{name}, {shape}", se=taken.spread, n=taken.n, unit="ms")
                if name != "chunked scan":
                    ratio = paired_ratio(time, times["chunked scan"])
                    report.add(
                        f"{metric}_over_ours", ratio.median, subject=f"{name}, {shape}", se=ratio.spread, n=ratio.n
                    )


def main(contexts: tuple[int, ...] = CONTEXTS, repeats: int = 7) -> None:
    report = Report("Longhorn: a token at every context, and the scan")
    decoding(report, contexts, repeats)
    scanning(report, repeats)
    report.print_table()
    print(save(report, "longhorn-decode"))

"""WinQ (arXiv 2605.17471): does pulling latents to the grid and noise in the gradient make low-bit training faster?

A sentence encoder learns, under quantisation at 1 and 2 bits, to give its own full-precision embeddings: as it is, with
resets, with noise, and with both, over several seeds on the same batches. The pull and the amount of noise are swept on
a slice of the encoder, and the Hessian spectrum is taken there after training at several widths.

deviation: runs of hundreds of steps instead of 240 000, and noise relative to the size of each layer's weights: the
published absolute one is made for weights of about 0.02.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch

from edgewright.data.sentences import SentenceBench, SentenceSettings, embedding_loss
from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_object
from edgewright.measure.plot import plot
from edgewright.measure.report import Report
from edgewright.quantization.api import quantize_
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import over_seeds
from edgewright.systems.winq.probe import quantized_spectrum
from edgewright.systems.winq.spectrum import NEAR_ZERO, Spectrum, plot_spectra
from edgewright.systems.winq.training import WinQ
from edgewright.training.batches import BlockBatches
from edgewright.training.loop import TrainConfig, fit

if TYPE_CHECKING:
    from torch import nn

GRIDS = {"1": "binary", "1.58": "ternary", "2": "seq2", "3": "int3", "4": "int4"}
# Variant -> (with resets, with noise); the order of the table.
VARIANTS = {"plain": (False, False), "reset": (True, False), "noise": (False, True), "both": (True, True)}
TOO_MUCH = 4.0  # times the best noise: must be worse


@dataclass(frozen=True)
class WinQRecipe:
    """steps, batch (sentences) and learning_rate of each training; layers of the comparison (0: the whole encoder) and
    slice_layers of sweeps and spectra; sigma and sigma_scale relative to mean |W| and mean |alpha|, times `sigmas` in
    the sweep; watched sentences are looked at every watch_every steps; probes and lanczos_steps of the spectra."""

    seed: int = 0
    seeds: int = 3
    widths: tuple[str, ...] = ("1", "2")
    steps: int = 120
    batch: int = 16
    tokens: int = 32
    learning_rate: float = 3e-4
    layers: int = 3
    training_sentences: int = 3000
    held_out_sentences: int = 256
    watched_sentences: int = 64
    watch_every: int = 10
    pull: float = 0.4
    every: float = 0.25
    sigma: float = 0.05
    sigma_scale: float = 0.01
    slice_layers: int = 2
    sweep_width: str = "1"
    sweep_seeds: int = 2
    pulls: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    sigmas: tuple[float, ...] = (0.3, 1.0, 4.0)
    spectra: tuple[str, ...] = ("1 bit", "2 bit", "2 bit, WinQ", "4 bit")
    probes: int = 4
    lanczos_steps: int = 30


def tiny() -> WinQRecipe:
    return WinQRecipe(
        seeds=1,
        widths=("1",),
        steps=6,
        batch=4,
        tokens=16,
        learning_rate=1e-3,
        layers=1,
        training_sentences=64,
        held_out_sentences=32,
        watched_sentences=16,
        watch_every=3,
        slice_layers=1,
        sweep_seeds=1,
        pulls=(),
        sigmas=(1.0,),
        spectra=("1 bit", "4 bit"),
        probes=1,
        lanczos_steps=4,
    )


def small() -> WinQRecipe:
    return WinQRecipe()


def paper() -> WinQRecipe:
    """Epochs instead of a taste, five seeds, the official probe; published runs have 240 000 steps at 1B weights."""
    return WinQRecipe(
        seeds=5,
        steps=6000,
        batch=64,
        tokens=64,
        learning_rate=1e-4,
        layers=0,
        training_sentences=100000,
        held_out_sentences=1000,
        watch_every=100,
        slice_layers=0,
        sweep_seeds=3,
        probes=20,
        lanczos_steps=60,
    )


# The paper's effect first, then what must hold whatever the length of the run.
CLAIMS = (
    Claim("embedding_error", "1 bit, both", "<", against="1 bit, plain", sizes=("small", "paper")),
    Claim("loss_change", "resets", "<", threshold=1e-4),
    Claim("distance_error", "resets", "<", threshold=1e-5),
    Claim("sweep_error", "4 x the best noise", ">", against="the best noise", sizes=("small", "paper")),
    Claim("near_zero", "1 bit", ">", against="4 bit", sizes=("small", "paper")),
)
CLOCKED: tuple[str, ...] = ()
HEADLINE: Headline | None = Headline(
    "a reset moves no code and no loss; 120 steps at 1 bit are too few to gain: 1 - cosine {both:.3f} with resets "
    "and noise, {plain:.3f} without",
    {name: Cell("winq.csv", {"metric": "embedding_error", "subject": f"1 bit, {name}"}) for name in ("both", "plain")},
)


def plan(settings: WinQRecipe) -> Plan:
    layers, sliced = settings.layers or 6, settings.slice_layers or 6
    per_step = 0.08 * settings.batch * settings.tokens / 512  # measured: 0.08 s a layer at 16 x 32 on two cores
    runs = len(settings.widths) * len(VARIANTS) * settings.seeds
    looks = settings.steps / settings.watch_every * settings.watched_sentences / settings.batch / 3
    swept = (1 + len(settings.pulls) + len(settings.sigmas) + 1) * settings.sweep_seeds
    products = len(settings.spectra) * settings.probes * settings.lanczos_steps
    seconds = runs * (settings.steps + looks) * layers * per_step
    seconds += (swept + len(settings.spectra)) * settings.steps * sliced * per_step + products * 2 * sliced * per_step
    return Plan(
        steps=(
            f"train the encoder ({layers} layers) at {' and '.join(settings.widths)} bit, {' / '.join(VARIANTS)}, "
            f"{settings.seeds} seed(s) each: {runs} runs of {settings.steps} steps",
            f"sweep pull and noise at {settings.sweep_width} bit on its first {sliced} layers: {swept} runs",
            f"Hessian spectra there after training: {'; '.join(settings.spectra)}, {settings.probes} probes of "
            f"{settings.lanczos_steps} steps",
        ),
        seconds=15 + seconds,
        memory_bytes=int(1.3e9 + 4 * 1.8e6 * sliced * settings.lanczos_steps),
        disk_bytes=int(1e8),
        outputs=("convergence.png", "sweep.png", "spectrum.png", "points.json"),
    )


def run(settings: WinQRecipe, output: Path) -> Report:
    """Every point is kept in points.json when it is done, so a second call goes on after the last one."""
    store = output / "points.json"
    points: dict[str, Any] = read_object(store) if store.exists() else {}

    def kept(key: str, measure: Callable[[], Any]) -> Any:
        if key not in points:
            points[key] = measure()
            write_text(store, json.dumps(points, indent=1) + "\n")
        return points[key]

    report = Report("WinQ: MiniLM-L6 distilled to itself, with resets and noise")
    whole = _Bench(settings, settings.layers)
    main = {
        f"{width} bit, {variant}": [
            kept(
                f"{width} bit, {variant}/{seed}",
                partial(whole.trained, width, seed, *_strength(settings, variant)),
            )
            for seed in range(settings.seeds)
        ]
        for width in settings.widths
        for variant in VARIANTS
    }
    _add_comparison(report, settings, main)
    sliced = whole if settings.slice_layers == settings.layers else _Bench(settings, settings.slice_layers)
    sweep = _sweep(report, settings, sliced, kept)
    spectra = {
        subject: _spectrum_of(kept(f"spectrum {subject}", partial(sliced.spectrum, subject)))
        for subject in settings.spectra
    }
    for subject, spectrum in spectra.items():
        _add_spectrum(report, subject, spectrum)
    _add_resets(report, settings, [point for point in [*sum(main.values(), []), *sweep] if point["resets"]])
    report.notes.append(
        "standard errors are over seeds, which fix the batches, so `gain` compares runs pair by pair; steps_to_target "
        "counts to the plain run's last watched error and is the whole run where that was not reached"
    )
    _plot_convergence(settings, main, output / "convergence.png")
    _plot_sweep(report, output / "sweep.png")

    plot_spectra(spectra, output / "spectrum.png")
    return report


def _strength(settings: WinQRecipe, variant: str) -> tuple[float, float]:
    """(pull, multiple of sigma) of a variant."""
    resets, noise = VARIANTS[variant]
    return settings.pull * resets, 1.0 * noise


class _Bench:
    """A slice of the encoder and its sentences, loaded when the first missing point needs them."""

    def __init__(self, settings: WinQRecipe, layers: int) -> None:
        self.settings, self.layers = settings, layers
        self._sentences: SentenceBench | None = None

    @property
    def sentences(self) -> SentenceBench:
        if self._sentences is None:
            s = self.settings
            chosen = SentenceSettings(self.layers, s.tokens, s.training_sentences, s.held_out_sentences)
            self._sentences = SentenceBench(chosen)
        return self._sentences

    def trained(self, width: str, seed: int, pull: float, strength: float) -> dict[str, Any]:
        """Held-out error at the end, its course on the watched sentences, and the log of the resets."""
        return self._train(width, seed, pull, strength)[1]

    def spectrum(self, subject: str) -> dict[str, Any]:
        """The Hessian spectrum after a training ("1 bit", "2 bit, WinQ"), on one batch, as JSON values."""
        settings = self.settings
        variant = "both" if subject.endswith(", WinQ") else "plain"
        student, _ = self._train(subject.partition(" ")[0], 0, *_strength(settings, variant))
        batch = {name: value[: settings.batch] for name, value in self.sentences.train.items()}
        generator = torch.Generator().manual_seed(settings.seed)
        found = quantized_spectrum(student, embedding_loss, [batch], settings.probes, settings.lanczos_steps, generator)
        return {
            **{
                name: getattr(found, name)
                for name in ("gradient_norm", "relative_gradient", "parameters", "error_ratio")
            },
            "ritz": found.ritz.tolist(),
            "weights": found.weights.tolist(),
        }

    def _train(self, width: str, seed: int, pull: float, strength: float) -> tuple[nn.Module, dict[str, Any]]:
        settings, sentences = self.settings, self.sentences
        student = copy.deepcopy(sentences.model)
        student.embeddings.requires_grad_(False)  # half of all parameters, and none that is quantised
        quantize_(student, QuantConfig(rules=(Rule("encoder.layer.*", WeightConfig(GRIDS[width], initial="mse")),)))
        seed += settings.seed
        winq = WinQ(
            pull=pull,
            every=settings.every,
            sigma=settings.sigma * strength,
            sigma_scale=settings.sigma_scale * strength,
            sigma_mode="relative",
            seed=seed,
        )
        watched = {name: value[: settings.watched_sentences] for name, value in sentences.held_out.items()}
        with winq.attach(student, embedding_loss, settings.steps) as loss_function:
            result = fit(
                student,
                loss_function,
                BlockBatches(sentences.train, settings.batch, seed=seed),
                TrainConfig(steps=settings.steps, learning_rate=settings.learning_rate, seed=seed, log_every=10**6),
                evaluate=lambda model: {"error": float(embedding_loss(model, watched))},
                evaluate_every=settings.watch_every,
                progress=False,
            )
        return student, {
            "error": sentences.error(student),
            "course": [[int(row["step"]), row["eval_error"]] for row in result.history if "eval_error" in row],
            "resets": [
                [entry.distance_before, entry.distance_after, entry.loss_before, entry.loss_after, entry.flipped]
                for entry in loss_function.log
            ],
            "pull": pull,
        }


def _add_comparison(report: Report, settings: WinQRecipe, main: dict[str, list[dict[str, Any]]]) -> None:
    for subject, runs in main.items():
        plain = main[subject.partition(", ")[0] + ", plain"]
        report.add("embedding_error", subject=subject, unit="1 - cosine", **over_seeds([r["error"] for r in runs]))
        gains = [1 - ours["error"] / theirs["error"] for ours, theirs in zip(runs, plain, strict=True)]
        if runs is not plain:
            report.add("gain", subject=subject, **over_seeds(gains))
        needed, reached = [], []
        for ours, theirs in zip(runs, plain, strict=True):
            target = theirs["course"][-1][1]
            first = next((step for step, error in ours["course"] if error <= target), None)
            reached.append(first is not None)
            needed.append(float(first or settings.steps))
        report.add("steps_to_target", subject=subject, **over_seeds(needed))
        report.add("target_reached", mean(reached), subject=subject, n=len(reached))


def _sweep(report: Report, settings: WinQRecipe, bench: _Bench, kept: Callable[..., Any]) -> list[dict[str, Any]]:
    """Errors by pull without noise, and by noise without resets; then four times the best noise."""
    every: list[dict[str, Any]] = []

    def point(subject: str, pull: float, strength: float) -> float:
        runs = [
            kept(f"sweep {subject}/{s}", partial(bench.trained, settings.sweep_width, s, pull, strength))
            for s in range(settings.sweep_seeds)
        ]
        every.extend(runs)
        row = over_seeds([run["error"] for run in runs])
        report.add("sweep_error", subject=subject, unit="1 - cosine", **row)
        return float(row["value"])

    point("neither", 0.0, 0.0)
    for pull in settings.pulls:
        point(f"pull {pull:g}", pull, 0.0)
    errors = {strength: point(f"noise {strength:g}x", 0.0, strength) for strength in settings.sigmas}
    best = min(errors, key=errors.__getitem__)
    point("4 x the best noise", 0.0, TOO_MUCH * best)
    row = report.row("sweep_error", f"noise {best:g}x")
    report.add("sweep_error", row.value, subject="the best noise", se=row.se, n=row.n, unit=row.unit)
    report.notes.append(f"of the noises {', '.join(f'{s:g}x' for s in settings.sigmas)} the best was {best:g}x")
    return every


def _add_resets(report: Report, settings: WinQRecipe, runs: list[dict[str, Any]]) -> None:
    """The worst of all resets: change of the same batch's loss, departure of the distance from its law."""
    resets = [(run["pull"], *reset) for run in runs for reset in run["resets"]]
    changes = [abs(after - before) / before for _, _, _, before, after, _ in resets]
    errors = [abs(after / before - (1 - pull)) for pull, before, after, *_ in resets]
    report.add("loss_change", max(changes), subject="resets", n=len(resets), unit="relative")
    report.add("distance_error", max(errors), subject="resets", n=len(resets))
    flips = [flipped for *_, flipped in resets if flipped is not None]
    report.add("flipped_between", mean(flips), subject="resets", n=len(flips), unit="share of codes")


def _spectrum_of(point: dict[str, Any]) -> Spectrum:
    tensors = {name: torch.tensor(point[name], dtype=torch.float64) for name in ("ritz", "weights")}
    return Spectrum(**{**point, **tensors})


def _add_spectrum(report: Report, subject: str, spectrum: Spectrum) -> None:
    share, se = spectrum.mass(spectrum.ritz.abs() < NEAR_ZERO * spectrum.magnitude)
    report.add("near_zero", share, subject=subject, se=se, n=len(spectrum.ritz), unit="share of eigenvalues")
    for name in ("negative", "lambda_min", "lambda_max", "relative_gradient", "error_ratio"):
        report.add(name, getattr(spectrum, name), subject=subject)


def _plot_convergence(settings: WinQRecipe, main: dict[str, list[dict[str, Any]]], path: Path) -> None:
    colours = dict(zip(VARIANTS, ("0.4", "C0", "C1", "C3"), strict=True))
    lines = dict(zip(settings.widths, ("-", "--", ":", "-.", "-"), strict=False))
    with plot(path, (7.0, 4.0)) as axes:
        for subject, runs in main.items():
            width, _, variant = subject.partition(" bit, ")
            steps = [step for step, _ in runs[0]["course"]]
            errors = [mean(run["course"][i][1] for run in runs) for i in range(len(steps))]
            axes.plot(steps, errors, color=colours[variant], linestyle=lines[width], label=subject)
        axes.set(xlabel="step", ylabel="1 - cosine to full precision, held out", yscale="log")
        axes.grid(which="both", alpha=0.25)
        axes.legend(fontsize="small")


def _plot_sweep(report: Report, path: Path) -> None:
    rows = [row for row in report.rows if row.metric == "sweep_error" and row.subject != "the best noise"]
    with plot(path, (6.5, 0.6 + 0.3 * len(rows))) as axes:
        errors = [row.se or 0 for row in rows]
        axes.errorbar([row.value for row in rows], [row.subject for row in rows], xerr=errors, fmt="o")
        axes.invert_yaxis()
        axes.set_xlabel("1 - cosine to full precision, held out")
        axes.grid(axis="x", alpha=0.25)

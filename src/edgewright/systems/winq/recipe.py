"""WinQ (arXiv 2605.17471): does pulling latents to the grid and noise in the gradient make low-bit training faster?

A sentence encoder learns, under quantisation at 1 and 2 bits, to give its own full-precision embeddings: as it is, with
resets, with noise, and with both, over several seeds on the same batches. The pull and the amount of noise are swept on
a slice of the encoder, and the Hessian spectrum is taken there after training at several widths.

deviation: runs of hundreds of steps instead of 240 000, and noise relative to the size of each layer's weights: the
published absolute one is made for weights of about 0.02.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from edgewright.measure.report import Report
from edgewright.systems.recipe import Cell, Claim, Headline, Plan
from edgewright.systems.run import Run
from edgewright.systems.winq.spectrum import NEAR_ZERO, Spectrum, plot_spectra
from edgewright.systems.winq.trainings import Trainings

# Variant -> (with resets, with noise); the order of the table.
VARIANTS = {"plain": (False, False), "reset": (True, False), "noise": (False, True), "both": (True, True)}
TOO_MUCH = 4.0  # times the best noise: must be worse
BEST = "the best noise"


@dataclass(frozen=True)
class WinQRecipe:
    """steps, batch (sentences) and learning_rate of each training; layers of the comparison (0: the whole encoder) and
    slice_layers of sweeps and spectra; sigma and sigma_scale relative to mean |W| and mean |alpha|, times `sigmas` in
    the sweep; watched sentences are looked at every watch_every steps; probes and lanczos_steps of the spectra.
    """

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
    run = Run(output, "WinQ: MiniLM-L6 distilled to itself, with resets and noise")
    whole = Trainings(settings, settings.layers)
    sliced = whole if settings.slice_layers == settings.layers else Trainings(settings, settings.slice_layers)
    runs = {
        f"{width} bit, {variant}": run.over_seeds(
            f"{width} bit, {variant}", settings.seeds, partial(whole.trained, width, *_strength(settings, variant))
        )
        for width in settings.widths
        for variant in VARIANTS
    }
    _compare(settings, run, runs)
    sweep = _sweep(settings, run, sliced)
    spectra = {subject: _spectrum(settings, run, sliced, subject) for subject in settings.spectra}
    _resets(run, [point for point in [*sum(runs.values(), []), *sweep] if point["resets"]])
    run.note(
        "standard errors are over seeds, which fix the batches, so `gain` compares runs pair by pair; steps_to_target "
        "counts to the plain run's last watched error and is the whole run where that was not reached"
    )
    courses = {subject: [point["course"] for point in points] for subject, points in runs.items()}
    curves = {
        subject: ([step for step, _ in course[0]], [mean(e for _, e in row) for row in zip(*course, strict=True)])
        for subject, course in courses.items()
    }
    run.lines("convergence.png", curves, "step", "1 - cosine to full precision, held out", yscale="log")
    swept = [row.subject for row in run.report.rows if row.metric == "sweep_error" and row.subject != BEST]
    run.bars("sweep.png", "sweep_error", "1 - cosine to full precision, held out", swept)
    plot_spectra(spectra, output / "spectrum.png")
    return run.report


def _strength(settings: WinQRecipe, variant: str) -> tuple[float, float]:
    """(pull, multiple of sigma) of a variant."""
    resets, noise = VARIANTS[variant]
    return settings.pull * resets, 1.0 * noise


def _compare(settings: WinQRecipe, run: Run, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Every variant beside the plain run of its width, seed by seed."""
    for subject, points in runs.items():
        plain = runs[subject.partition(", ")[0] + ", plain"]
        pairs = list(zip(points, plain, strict=True))
        run.add("embedding_error", [point["error"] for point in points], subject, "1 - cosine")
        if points is not plain:
            run.add("gain", [1 - point["error"] / reference["error"] for point, reference in pairs], subject)
        reached = [
            next((step for step, error in point["course"] if error <= reference["course"][-1][1]), None)
            for point, reference in pairs
        ]
        run.add("steps_to_target", [float(step or settings.steps) for step in reached], subject)
        run.add("target_reached", mean(step is not None for step in reached), subject, n=len(reached))


def _sweep(settings: WinQRecipe, run: Run, bench: Trainings) -> list[dict[str, Any]]:
    """Errors by pull without noise, and by noise without resets; then four times the best noise. Returns the runs."""
    every: list[dict[str, Any]] = []

    def point(subject: str, pull: float, strength: float) -> float:
        measure = partial(bench.trained, settings.sweep_width, pull, strength)
        points = run.over_seeds(f"sweep {subject}", settings.sweep_seeds, measure)
        every.extend(points)
        run.add("sweep_error", [point["error"] for point in points], subject, "1 - cosine")
        return run.report.value("sweep_error", subject)

    point("neither", 0.0, 0.0)
    for pull in settings.pulls:
        point(f"pull {pull:g}", pull, 0.0)
    errors = {strength: point(f"noise {strength:g}x", 0.0, strength) for strength in settings.sigmas}
    best = min(errors, key=errors.__getitem__)
    point("4 x the best noise", 0.0, TOO_MUCH * best)
    row = run.report.row("sweep_error", f"noise {best:g}x")
    run.add("sweep_error", row.value, BEST, row.unit, se=row.se, n=row.n)
    run.note(f"of the noises {', '.join(f'{s:g}x' for s in settings.sigmas)} the best was {best:g}x")
    return every


def _resets(run: Run, points: list[dict[str, Any]]) -> None:
    """The worst of all resets: change of the same batch's loss, departure of the distance from its law."""
    resets = [{**reset, "pull": point["pull"]} for point in points for reset in point["resets"]]
    changes = [abs(reset["loss_after"] - reset["loss_before"]) / reset["loss_before"] for reset in resets]
    errors = [abs(r["distance_after"] / r["distance_before"] - (1 - r["pull"])) for r in resets]
    flips = [reset["flipped"] for reset in resets if reset["flipped"] is not None]
    run.add("loss_change", max(changes), "resets", "relative", n=len(resets))
    run.add("distance_error", max(errors), "resets", n=len(resets))
    run.add("flipped_between", mean(flips), "resets", "share of codes", n=len(flips))


def _spectrum(settings: WinQRecipe, run: Run, bench: Trainings, subject: str) -> Spectrum:
    """The Hessian spectrum after a training ("1 bit", "2 bit, WinQ")."""
    strength = _strength(settings, "both" if subject.endswith(", WinQ") else "plain")
    point = run.memo(f"spectrum {subject}", lambda: bench.spectrum(subject.partition(" ")[0], *strength))
    tensors = {name: torch.tensor(point[name], dtype=torch.float64) for name in ("ritz", "weights")}
    spectrum = Spectrum(**{**point, **tensors})
    share, se = spectrum.mass(spectrum.ritz.abs() < NEAR_ZERO * spectrum.magnitude)
    run.add("near_zero", share, subject, "share of eigenvalues", se=se, n=len(spectrum.ritz))
    for name in ("negative", "lambda_min", "lambda_max", "relative_gradient", "error_ratio"):
        run.add(name, getattr(spectrum, name), subject)
    return spectrum

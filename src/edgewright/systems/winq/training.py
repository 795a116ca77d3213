"""WinQ: faster training under quantisation by pulling latent weights to their grid now and then, and by noise.

Source: "WinQ: Accelerating Quantization-Aware Training of Language Models Around Saddle Points", arXiv 2605.17471.
With latent weights W, clip scales alpha, quantiser Q and fresh U ~ N(0, sigma^2), V ~ N(0, sigma_scale^2):
    training    forward with Q(W + U; alpha + V); the straight-through gradient there goes to W and alpha unchanged
    reset       W <- (1 - pull) W + pull Q(W; alpha), without noise; alpha and the optimizer's moments stay
The segment from W to Q(W) lies in one cell of a scalar grid, so a reset moves no code and leaves the loss where it was.

The paper calls the weight on Q(W) alpha; the official script's alpha is the weight on W. Here it is `pull`: 0.4 is the
paper's best, 0.8 reproduces the script.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from edgewright.checks import check, check_fields, number, one_of, whole
from edgewright.errors import UsageError
from edgewright.io.hashing import mixed_seed
from edgewright.measure.report import Report
from edgewright.quantization.noise import Noise
from edgewright.systems.winq.latents import Latent, PackedCodes, interpolate_, latent_weights
from edgewright.training import snapshot

# Where a standard deviation stops doing anything useful, in scales of the grid.
TOO_MUCH, TOO_LITTLE = 0.2, 0.001
USUAL = 0.05  # the published sigma over the published size of the weights, 0.001 / 0.02


@dataclass(frozen=True)
class WinQ:
    """Settings of both parts (WinQ, arXiv 2605.17471); `pull=0` or `sigma=sigma_scale=0` switches one off.

    Args:
        pull: weight on the quantised values in a reset, 0 to 1: the paper's alpha, best about 0.4. The official
            script's alpha=0.2 is the weight on the latents, so it means pull=0.8.
        every: a float in (0, 1] is a fraction of the run, an int a number of optimizer steps; no reset on the last.
        sigma: standard deviation of the noise on weights, tuned for weights of about 0.02.
        sigma_scale: the same on clip scales.
        sigma_mode: "absolute", or "relative": they multiply the layer's mean |W| and mean |alpha|, measured at the
            start and after every reset.
        trigger: "schedule" follows `every`; "plateau" resets when the mean loss of `window` steps is less than
            `tolerance` (relative) below that of the `window` before.
        window: steps, at least 1.
        tolerance: at least 0.
        frozen_noise: one draw serves until the next reset.
        count_flips: log how many codes moved between resets; keeps a copy of the codes, 2 to 8 bits a weight.
        seed: of the noise.

    Raises:
        UsageError: a setting out of its range.
    """

    pull: float = 0.4
    every: float | int = 0.25
    sigma: float = 1e-3
    sigma_scale: float = 1e-3
    sigma_mode: Literal["absolute", "relative"] = "absolute"
    trigger: Literal["schedule", "plateau"] = "schedule"
    window: int = 50
    tolerance: float = 0.01
    frozen_noise: bool = False
    count_flips: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        hint = (
            "it is the weight on the quantised values (the paper's alpha, default 0.4; the official script's alpha=0.2 "
            "is the weight on the latents, so it means pull=0.8)"
        )
        check("WinQ pull", self.pull, number(0, 1), hint)
        rule = number(above=0, most=1) if isinstance(self.every, float) else whole(1)
        check("WinQ every", self.every, rule, "a fraction such as 0.25, or steps")
        rules = {
            "sigma": number(0),
            "sigma_scale": number(0),
            "sigma_mode": one_of("absolute", "relative"),
            "trigger": one_of("schedule", "plateau"),
            "window": whole(1),
            "tolerance": number(0),
            "seed": whole(0),
        }
        check_fields(self, rules)

    def reset_steps(self, steps: int) -> tuple[int, ...]:
        """Numbers of finished optimizer steps after which there is a reset; empty with the plateau trigger.

        Args:
            steps: of the run.

        Raises:
            UsageError: `every` is a number of steps beyond the run's.
        """
        if self.trigger == "plateau" or self.pull == 0:
            return ()
        if isinstance(self.every, float):
            times = (round(i * self.every * steps) for i in range(1, steps + 1))
            return tuple(dict.fromkeys(step for step in times if 0 < step < steps))
        if self.every > steps:
            raise UsageError(f"every={self.every} steps, but the run has {steps}; use a smaller number or every=0.25")
        return tuple(range(self.every, steps, self.every))

    def attach(
        self,
        model: nn.Module,
        loss_function: Callable[[nn.Module, Any], Any] | None,
        steps: int,
        accumulation: int = 1,
        *,
        optimizer: Any = None,
        latents: Sequence[Latent] | None = None,
    ) -> WinQRun:
        """WinQ on a run of `steps` updates over `accumulation` batches each; the result stands for the loss function.

        with WinQ().attach(model, loss_function, config.steps) as loss:
            fit(model, loss, batches, config)

        Args:
            model: under quantisation (`quantize_`).
            loss_function: (model, batch) -> loss; None: for a loop that calls `begin` itself.
            steps: optimizer steps of the run.
            accumulation: batches of a step.
            optimizer: one that quantises by itself (`parq.QuantOptimizer`): its latents are reset.
            latents: what to act on instead of the model's own layers.

        Raises:
            UsageError: nothing in the model trains under quantisation, or noise without layers of `quantize_`.
        """
        latents = list(latents) if latents is not None else latent_weights(model, optimizer)
        if (self.sigma or self.sigma_scale) and all(latent.quantizer is None for latent in latents):
            raise UsageError(
                "noise needs layers of quantize_, which this model does not have; use WinQ(sigma=0, sigma_scale=0) "
                "with an optimizer that quantises by itself"
            )
        return WinQRun(self, latents, loss_function, steps, accumulation)

    def suggest(self, model: nn.Module) -> Report:
        """Mean |W|, mean |alpha|, mean scale and sigma / scale of every layer, with notes where sigma is far off.

        Args:
            model: under quantisation (`quantize_`).

        Returns:
            Rows "weight", "alpha", "scale" and "sigma_per_scale" of every layer.

        Raises:
            UsageError: nothing in the model trains under quantisation.
        """
        report = Report(f"WinQ noise, sigma={self.sigma:g} ({self.sigma_mode})")
        sizes = []
        for latent in latent_weights(model):
            assert latent.quantizer is not None
            size, alpha = latent.sizes()
            scale = alpha / latent.quantizer.quantizer.grid.scales_per_alpha
            ratio = self.sigma * (size if self.sigma_mode == "relative" else 1.0) / scale
            sizes.append(size)
            for metric, value in (("weight", size), ("alpha", alpha), ("scale", scale), ("sigma_per_scale", ratio)):
                report.add(metric, value, subject=latent.name)
            if ratio > TOO_MUCH:
                report.notes.append(f"{latent.name}: sigma is {ratio:.2g} scales; above {TOO_MUCH} it is destructive")
            elif 0 < ratio < TOO_LITTLE:
                report.notes.append(f"{latent.name}: sigma is {ratio:.2g} scales; below {TOO_LITTLE} it does nothing")
        typical = sorted(sizes)[len(sizes) // 2]
        report.notes.append(
            f"the published ratio to mean |W| is {USUAL:g}: here sigma={USUAL * typical:.2g}, "
            f"or sigma={USUAL:g} with sigma_mode='relative'"
        )
        return report

    def hf_callback(self) -> Any:
        """A transformers.TrainerCallback that does the same inside `Trainer`; its `run` has the log afterwards."""
        winq = self
        if winq.trigger == "plateau":
            raise UsageError("trigger='plateau' needs every loss, which Trainer does not give; use trigger='schedule'")

        class WinQCallback(TrainerCallback):
            run: WinQRun
            micro = 0

            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                optimizer = getattr(kwargs.get("optimizer"), "optimizer", kwargs.get("optimizer"))
                accumulation = args.gradient_accumulation_steps
                self.run = winq.attach(kwargs["model"], None, state.max_steps, accumulation, optimizer=optimizer)

            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.micro = 0
                self.run.begin(state.global_step)

            def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.micro += 1
                self.run.begin(state.global_step, self.micro)

            def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.run.detach()

        return WinQCallback()


@dataclass(frozen=True)
class Reset:
    """One reset: distance |W - Q(W)| / |W| before and after, and shares of codes that moved: `flipped` since the one
    before (None: unknown), `moved` by the reset itself (zero unless scales follow the weights); the loss of one batch,
    in evaluation mode, before and after (None where no loss function was given).
    """

    step: int
    distance_before: float
    distance_after: float
    flipped: float | None
    moved: float
    loss_before: float | None = None
    loss_after: float | None = None


class WinQRun:
    """WinQ at work on one run; call it as the loss function it was given, once for every micro-batch.

    Everything follows from the position in the run and from `state_dict`, which `fit` keeps in its checkpoints, so a
    resumed run repeats the same noise and resets. `log` has one `Reset` each. Leaving the `with` block ends the noise.
    """

    def __init__(
        self,
        winq: WinQ,
        latents: list[Latent],
        loss_function: Callable[[nn.Module, Any], Any] | None,
        steps: int,
        accumulation: int,
    ) -> None:
        self.winq, self.latents, self.loss_function = winq, latents, loss_function
        self.steps, self.accumulation = steps, accumulation
        self.resets = winq.reset_steps(steps)
        self.log: list[Reset] = []
        self._position = 0  # micro-batches so far
        self._losses: list[float] = []  # of whole steps, for the plateau trigger
        self._partial: list[float] = []  # of the micro-batches of this step
        self._sizes: dict[str, tuple[float, float]] = {}
        self._codes: dict[str, PackedCodes] = {}
        if not self.resets and winq.trigger == "schedule" and winq.pull > 0:
            warnings.warn(f"every={winq.every!r} puts the only reset on the last step; it is left out", stacklevel=3)

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """What the loss function gives, after the reset that is due and under the noise of this micro-batch."""
        if self.loss_function is None:
            raise UsageError("attach(model, loss_function, steps) was given no loss function; give it, or call begin()")
        step, micro = divmod(self._position, self.accumulation)
        self.begin(step, micro, lambda: self._loss_value(model, batch))
        result = self.loss_function(model, batch)
        self._position += 1
        if self.winq.trigger == "plateau":
            self._remember(result[0] if isinstance(result, tuple) else result)
        return result

    def begin(self, step: int, micro: int = 0, measure: Callable[[], float] | None = None) -> None:
        """Before the forward pass of micro-batch `micro` of step `step` (from 0): a reset that is due, then the noise.

        For loops of your own that have no loss function of (model, batch).

        Args:
            step: of the optimizer.
            micro: within the step.
            measure: gives the loss for the log.

        Raises:
            UsageError: the run is over.
        """
        if step >= self.steps:
            raise UsageError(f"this WinQ was attached for {self.steps} steps, which are over; attach it again")
        if self.winq.count_flips and not self._codes:
            self._codes = {latent.name: latent.codes() for latent in self.latents if latent.quantizer is not None}
        if micro == 0 and (step in self.resets or self._plateau()):
            self.reset(step, measure)
        self._arm(step, micro)

    @torch.no_grad()
    def reset(self, step: int, measure: Callable[[], float] | None = None) -> Reset:
        """Pull every latent weight to its quantised value now.

        Args:
            step: for the log.
            measure: gives the loss for the log, before and after.

        Returns:
            The entry of the log.
        """
        loss_before = measure() if measure else None
        gap_before = gap_after = energy = moved = flipped = total = 0.0
        for latent in self.latents:
            with torch.autocast(latent.weight.device.type, enabled=False):
                energy += float(latent.weight.float().square().sum())
                codes = latent.codes() if latent.quantizer is not None else None
                gap_before += latent.gap()
                interpolate_(latent.weight, latent.values, self.winq.pull, latent.rotation)
                gap_after += latent.gap()
            if codes is not None:
                after = latent.codes()
                total += latent.weight.numel()
                moved += codes.differing(after)
                if latent.name in self._codes:
                    flipped += codes.differing(self._codes[latent.name])
                    self._codes[latent.name] = after
        energy = max(energy, 1e-30) ** 0.5
        entry = Reset(
            step,
            gap_before**0.5 / energy,
            gap_after**0.5 / energy,
            flipped / total if self._codes and total else None,
            moved / total if total else 0.0,
            loss_before,
            measure() if measure else None,
        )
        if not self.log and any(latent.dynamic for latent in self.latents):
            warnings.warn(
                "scales recomputed from the weights (absmax, absmean, entropy) change with a reset: "
                f"{entry.moved:.2%} of the codes moved; learned scales keep every code",
                stacklevel=2,
            )
        self.log.append(entry)
        self._losses.clear()
        self._sizes.clear()
        return entry

    def detach(self) -> None:
        """End the noise. The layers keep their weights, scales and everything else."""
        for latent in self.latents:
            if latent.quantizer is not None:
                latent.quantizer.noise = None

    def __enter__(self) -> WinQRun:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """JSON values and tensors; `fit` saves them with the run."""
        return {
            "settings": dataclasses.asdict(self.winq) | {"steps": self.steps, "accumulation": self.accumulation},
            "position": self._position,
            "losses": list(self._losses),
            "partial": list(self._partial),
            "sizes": {name: list(pair) for name, pair in self._sizes.items()},
            "codes": {name: codes.data for name, codes in self._codes.items()},
            "log": [dataclasses.asdict(entry) for entry in self.log],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Args:
            state: of a run with the same settings.

        Raises:
            UsageError: the settings are others.
        """
        difference = snapshot.first_difference(dict(state["settings"]), self.state_dict()["settings"])
        if difference:
            name, was, now = difference
            raise UsageError(f"cannot resume: WinQ's {name} was {was!r}, now {now!r}; use the old value")
        self._position = int(state["position"])
        self._losses, self._partial = list(state["losses"]), list(state["partial"])
        self._sizes = {name: (pair[0], pair[1]) for name, pair in state["sizes"].items()}
        width = {latent.name: latent.code_width for latent in self.latents}
        self._codes = {name: PackedCodes(data, width[name]) for name, data in state["codes"].items()}
        self.log = [Reset(**entry) for entry in state["log"]]

    def _arm(self, step: int, micro: int) -> None:
        """Give every layer the description of its noise for this micro-batch.

        deviation: a layer that runs twice within one micro-batch meets the same noise, which is what makes gradient
        checkpointing recompute the same activations.
        """
        winq = self.winq
        if not (winq.sigma or winq.sigma_scale):
            return
        if winq.sigma_mode == "relative" and not self._sizes:
            self._sizes = {latent.name: latent.sizes() for latent in self.latents if latent.quantizer is not None}
        place = (len(self.log), 0) if winq.frozen_noise else (step, micro)
        for index, latent in enumerate(self.latents):
            if latent.quantizer is None:
                continue
            size, scale = self._sizes.get(latent.name, (1.0, 1.0))
            latent.quantizer.noise = Noise(
                mixed_seed(winq.seed, _rank(), *place, index),
                winq.sigma * size,
                winq.sigma_scale * scale,
                latent.quantizer.config.granularity == "tensor",
            )

    def _loss_value(self, model: nn.Module, batch: Any) -> float:
        assert self.loss_function is not None
        device = self.latents[0].weight.device
        with snapshot.preserved_random_state(device), snapshot.preserved_modes(model, False), torch.no_grad():
            result = self.loss_function(model, batch)
        return float(result[0] if isinstance(result, tuple) else result)

    def _remember(self, loss: Tensor) -> None:
        self._partial.append(float(loss.detach()))
        if len(self._partial) < self.accumulation:
            return
        mean = torch.tensor(sum(self._partial) / len(self._partial), dtype=torch.float64)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # every process must see the same plateau, or their weights part ways
            mean = mean.float().to(loss.device)
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        self._losses.append(float(mean))
        self._losses = self._losses[-2 * self.winq.window :]
        self._partial.clear()

    def _plateau(self) -> bool:
        window = self.winq.window
        if self.winq.trigger != "plateau" or self.winq.pull == 0 or len(self._losses) < 2 * window:
            return False
        earlier, later = sum(self._losses[:window]), sum(self._losses[window:])
        return earlier - later < self.winq.tolerance * abs(earlier)


def _rank() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0

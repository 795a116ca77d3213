"""WinQ: the reset and the noise to the letter, resume to the same bits, refusals."""

from __future__ import annotations

import copy
import math
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from edgewright.errors import UsageError
from edgewright.io.hashing import mixed_seed
from edgewright.quantization.api import codes_of, convert_, quantize_, quantized_modules
from edgewright.quantization.config import ActivationConfig, QuantConfig, Rule, WeightConfig
from edgewright.quantization.elastic import ElasticConfig
from edgewright.quantization.fake_quantize import Quantizer, fake_quantize, fake_quantized_linear
from edgewright.quantization.grids import GRIDS, grid_named
from edgewright.quantization.kv_cache import hadamard
from edgewright.quantization.noise import Noise
from edgewright.systems.winq.latents import Latent, PackedCodes, interpolate_, latent_weights
from edgewright.systems.winq.training import WinQ
from edgewright.training import BlockBatches, TrainConfig, TrainingInterrupted, fit
from tests.processes import ROOT, rendezvous

STILL = {"sigma": 0.0, "sigma_scale": 0.0}
WIDE = {"sigma": 0.05, "sigma_scale": 0.05, "sigma_mode": "relative"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def student(grid: str = "seq2", **settings) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    settings = {"initial": "mse", **settings}
    return quantize_(model, QuantConfig(rules=(Rule("*", WeightConfig(grid, **settings)),)))


def data(batch: int = 8) -> BlockBatches:
    x, y = torch.randn(40, 16, generator=generator(1)), torch.randn(40, 4, generator=generator(2))
    return BlockBatches({"x": x, "y": y}, batch, seed=3)


def loss_function(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def train(model: nn.Module, winq: WinQ | None, steps: int = 12, accumulation: int = 1, **options):
    config = TrainConfig(steps, 1e-2, accumulation=accumulation, **options.pop("config", {}))
    if winq is None:
        return None, fit(model, loss_function, data(), config, progress=False, **options)
    with winq.attach(model, loss_function, steps, accumulation) as run:
        return run, fit(model, run, data(), config, progress=False, **options)


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    theirs_state = theirs.state_dict()
    return all(torch.equal(value, theirs_state[name]) for name, value in ours.state_dict().items())


# -- the reset ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("granularity", ["row", "tensor", 16])
@pytest.mark.parametrize("pull", [0.2, 0.4, 0.8, 1.0])
def test_a_reset_shrinks_every_distance_by_the_pull_and_moves_no_code(grid: str, granularity, pull: float) -> None:
    weight = torch.randn(24, 64, generator=generator()) * 0.05
    layer = nn.Linear(64, 24)
    layer.weight = nn.Parameter(weight.clone())
    model = nn.Sequential(layer)
    quantize_(model, QuantConfig(rules=(Rule("*", WeightConfig(grid, granularity, initial="mse")),)))
    quantized = model[0].quantizer.values(weight).detach()  # type: ignore[call-arg]
    codes, scale = codes_of(model)["0"], model[0].quantizer.weight_scale.clone()
    entry = WinQ(pull=pull, **STILL).attach(model, None, 100).reset(7)
    after = model[0].weight.detach()
    assert torch.equal(model[0].quantizer.values(after), quantized) and torch.equal(codes_of(model)["0"], codes)  # type: ignore[call-arg]
    assert torch.equal(model[0].quantizer.weight_scale, scale)
    gap = (after - quantized).abs() - (1 - pull) * (weight - quantized).abs()
    assert gap.abs().max() < 1e-6
    assert entry.moved == 0 and entry.distance_after == pytest.approx((1 - pull) * entry.distance_before, abs=1e-6)
    assert entry.distance_before == pytest.approx(float((weight - quantized).norm() / weight.norm()), rel=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_weights_on_the_border_of_their_cell_stay_in_it(grid: str) -> None:
    """Rounding is where codes could flip: weights at and one bit beside every threshold, many pulls."""
    quantizer = Quantizer(grid_named(grid))
    scale = quantizer.scale(torch.tensor([[0.0371]]))
    borders = torch.cat([(grid_named(grid).levels + 0.5) * scale[0, 0], torch.zeros(1)])
    beside = [torch.nextafter(borders, torch.full_like(borders, side)) for side in (-9.0, 9.0)]
    weight = torch.cat([borders, *beside]).reshape(1, -1)
    alpha = torch.tensor([[0.0371]])
    codes = quantizer.encode(weight, alpha)[0]
    for pull in torch.linspace(0.01, 1, 100).tolist():
        moved = interpolate_(weight.clone(), lambda w: quantizer.values(w, alpha), pull)
        assert torch.equal(quantizer.encode(moved, alpha)[0], codes), pull


def test_a_reset_leaves_the_loss_and_the_moments_where_they_were() -> None:
    run, _ = train(student(), WinQ(pull=0.4, every=3, **STILL))
    assert [entry.step for entry in run.log] == [3, 6, 9]
    for entry in run.log:
        assert entry.loss_after == entry.loss_before  # the quantised weights are the same bits
        assert entry.distance_after == pytest.approx(0.6 * entry.distance_before, rel=1e-5)
    model = student()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_function(model, next(data())).backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    WinQ(**STILL).attach(model, None, 9).reset(1)
    after = optimizer.state_dict()
    for index, entries in before["state"].items():
        assert all(torch.equal(value, after["state"][index][name]) for name, value in entries.items())


def test_convolutions_are_reset_and_embeddings_are_not() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 8), "conv": nn.Conv2d(4, 6, 3), "norm": nn.LayerNorm(8)})
    quantize_(model, QuantConfig(rules=(Rule("*", WeightConfig("seq2", initial="mse")),), skip=()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = WinQ(**WIDE).attach(model, None, 100)
    run.reset(1)
    run.begin(2)
    assert [latent.name for latent in run.latents] == ["conv"] and model["embed"].quantizer.noise is None
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["conv.weight"]
    x = torch.randn(2, 4, 5, 5, generator=generator())
    assert not torch.equal(model["conv"].train()(x), model["conv"].eval()(x))


def test_a_head_that_shares_the_embeddings_table_is_left_alone(tiny_llama) -> None:
    quantize_(tiny_llama, QuantConfig(rules=(Rule("*", WeightConfig("int4", 32)),), skip=(), tied="together"))
    names = [latent.name for latent in latent_weights(tiny_llama)]
    assert len(names) == 14 and not any("embed" in name or "head" in name for name in names)


def test_bfloat16_weights_keep_the_law_to_a_hundredth() -> None:
    model = student().to(torch.bfloat16)
    entry = WinQ(pull=0.4, **STILL).attach(model, None, 100).reset(1)
    assert model[0].weight.dtype == torch.bfloat16
    assert entry.distance_after == pytest.approx(0.6 * entry.distance_before, rel=1e-2)


def test_the_rotated_reset() -> None:
    quantizer, alpha = Quantizer(grid_named("seq2")), torch.full((8, 1), 0.1)
    weight = torch.randn(8, 32, generator=generator()) * 0.05

    def values(matrix: torch.Tensor) -> torch.Tensor:
        return quantizer.values(matrix, alpha)

    plain = interpolate_(weight.clone(), values, 0.4)
    assert torch.equal(interpolate_(weight.clone(), values, 0.4, torch.eye(32)), plain)
    rotation = hadamard(32)
    rotated = interpolate_(weight.clone(), values, 0.4, rotation)
    before, after = weight @ rotation.t(), rotated @ rotation.t()
    target = values(before)
    # float32 products of 32 terms: a few units in the last place
    torch.testing.assert_close(after - target, 0.6 * (before - target), rtol=0, atol=1e-6)
    assert float(rotated.norm()) == pytest.approx(float(after.norm()), rel=1e-6)
    assert float((rotated - target @ rotation).norm()) == pytest.approx(0.6 * float((before - target).norm()), rel=1e-5)

    layer = nn.Linear(32, 8, bias=False)
    latent = Latent("rotated", layer.weight, values, rotation=rotation)
    entry = WinQ(pull=0.4, **STILL).attach(layer, None, 9, latents=[latent]).reset(1)
    assert entry.distance_after == pytest.approx(0.6 * entry.distance_before, rel=1e-4) and entry.flipped is None


def test_scales_that_follow_the_weights_are_warned_about_once() -> None:
    model = student("int4", scale="absmean")
    with torch.no_grad():  # heavy tails are clipped far, so the pull shrinks the mean magnitude and the step with it
        model[0].weight.copy_(torch.randn(32, 16, generator=generator()) ** 5)
    before = codes_of(model)
    run = WinQ(pull=0.4, **STILL).attach(model, None, 100)
    with pytest.warns(UserWarning, match=r"% of the codes moved"):
        entry = run.reset(1)
    after = codes_of(model)
    assert entry.moved == sum(int((after[n] != before[n]).sum()) for n in after) / (16 * 32 + 32 * 4) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.reset(2)


def test_flips_are_counted_between_resets() -> None:
    model = student()
    run = WinQ(pull=0.4, every=5, **STILL).attach(model, None, 20)
    run.begin(0)
    before = codes_of(model)
    with torch.no_grad():
        model[0].weight[:4].neg_()
        after = codes_of(model)
    share = sum(int((after[n] != before[n]).sum()) for n in after) / sum(c.numel() for c in after.values())
    run.begin(5)
    assert run.log[0].flipped == share > 0
    run.begin(10)
    assert run.log[1].flipped == 0
    silent = WinQ(every=5, count_flips=False, **STILL).attach(model, None, 20)
    silent.begin(5)
    assert silent.log[0].flipped is None and silent.state_dict()["codes"] == {}


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_packed_codes_count_differences(width: int) -> None:
    low, high = (0, 1) if width == 1 else (-(2 ** (width - 1)), 2 ** (width - 1) - 1)
    draw = [torch.randint(low, high + 1, (7, 13), generator=generator(seed), dtype=torch.int8) for seed in (0, 1)]
    first, second = (PackedCodes.of(codes, low, width) for codes in draw)
    assert first.data.numel() == math.ceil(91 * width / 8)
    assert first.differing(second) == int((draw[0] != draw[1]).sum()) and first.differing(first) == 0


# -- when ------------------------------------------------------------------------------------------------------------


def test_schedules() -> None:
    assert WinQ(every=0.25).reset_steps(240_000) == (60_000, 120_000, 180_000)
    assert WinQ(every=0.25).reset_steps(10) == (2, 5, 8)
    assert WinQ(every=4).reset_steps(12) == (4, 8) and WinQ(every=5).reset_steps(12) == (5, 10)
    assert WinQ(every=0.25, pull=0).reset_steps(100) == () and WinQ(trigger="plateau").reset_steps(100) == ()
    for every, steps in ((1.0, 10), (10, 10)):
        with pytest.warns(UserWarning, match="last step; it is left out"):
            assert WinQ(every=every).attach(student(), None, steps).resets == ()


def test_plateau() -> None:
    model, losses = student(), [3.0, 2.5, 2.0, 1.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    run = WinQ(trigger="plateau", window=2, tolerance=0.01, **STILL).attach(
        model, lambda model, batch: losses[batch] + 0 * model[0].weight.sum(), len(losses)
    )
    for batch in range(len(losses)):
        run(model, batch)
    # after steps 5..8 (two windows of ones); then four new losses are needed, and .5, .5, .4, .4 is still progress
    assert [entry.step for entry in run.log] == [8, 14]


# -- the noise ---------------------------------------------------------------------------------------------------------


def test_the_noise_is_normal_and_as_wide_as_asked() -> None:
    weight, alpha = torch.zeros(1000, 1000), torch.full((2000, 50), 5.0)
    noise = Noise(mixed_seed(0, 1), 1e-3, 2e-3)
    noisy, scales = noise.perturb(weight, alpha)
    for values, sigma in ((noisy, 1e-3), (scales - 5, 2e-3)):
        values = values.double().flatten()
        n = values.numel()
        # five standard errors of each moment; the clip scales are rounded to float32 around 5
        assert abs(values.std() / sigma - 1) < 5 / math.sqrt(2 * n) + 1e-3 * (sigma > 1e-3)
        assert abs(values.mean()) < 5 * sigma / math.sqrt(n)
        assert abs((values / sigma).pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
    again = Noise(mixed_seed(0, 1), 1e-3, 2e-3).perturb(weight, alpha)
    assert torch.equal(again[0], noisy) and torch.equal(again[1], scales)
    other = Noise(mixed_seed(0, 2), 1e-3, 2e-3).perturb(weight, alpha)[0]
    correlation = float((other * noisy).mean() / 1e-6)
    assert abs(correlation) < 5e-3


def test_a_weight_longer_than_a_window_and_one_scale_for_all() -> None:
    noisy, scales = Noise(3, 1.0, 0.5, shared_scale=True).perturb(torch.zeros(1100, 4000), torch.ones(1100, 1))
    assert abs(float(noisy.std()) - 1) < 5e-3 and scales.unique().numel() == 1
    tops, rest = noisy.view(-1)[: 1 << 21], noisy.view(-1)[1 << 21 : 1 << 22]
    assert abs(float((tops * rest).mean())) < 5e-3


def test_scales_keep_their_sign_and_stay_away_from_zero() -> None:
    alpha = torch.tensor([[2e-5], [-2e-5], [0.0]]).repeat(200, 1)
    _, moved = Noise(0, 0.0, 1e-2).perturb(torch.zeros(600, 4), alpha)
    assert (moved[0::3] >= 1e-5).all() and (moved[1::3] <= -1e-5).all() and (moved[2::3] >= 1e-5).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_are_those_of_the_perturbed_operands(grid: str, dtype: torch.dtype) -> None:
    """Oracle: noise added by hand, gradients of the noiseless rule at the perturbed point."""
    quantizer, noise = Quantizer(grid_named(grid)), Noise(5, 0.02, 0.01)
    weight, x = (
        torch.randn(6, 16, generator=generator()).to(dtype),
        torch.randn(3, 16, generator=generator(1)).to(dtype),
    )
    alpha = 0.3 + torch.rand(6, 2, generator=generator(2))
    bias, upstream = torch.zeros(6, dtype=dtype), torch.randn(3, 6, generator=generator(3)).to(dtype)
    noisy, moved = noise.perturb(weight, alpha)

    def gradients(w: torch.Tensor, a: torch.Tensor, noise: Noise | None, fused: bool):
        w, a, i = w.clone().requires_grad_(), a.clone().requires_grad_(), x.clone().requires_grad_()
        if fused:
            out = fake_quantized_linear(i, w, a, bias, quantizer, noise)
        else:
            out = nn.functional.linear(i, fake_quantize(w, a, quantizer, noise=noise).to(dtype), bias)
        out.backward(upstream)
        return out, i.grad, w.grad, a.grad

    for fused in (True, False):
        ours = gradients(weight, alpha, noise, fused)
        theirs = gradients(noisy, moved, None, fused)
        assert ours[2].dtype == dtype
        for mine, reference in zip(ours, theirs, strict=True):
            if fused or dtype == torch.float32:
                assert torch.equal(mine, reference.to(mine.dtype))
            else:  # the oracle's own product is rounded to bfloat16 in another place
                torch.testing.assert_close(mine.float(), reference.float(), rtol=2e-2, atol=2e-2)


def test_a_weight_that_noise_carries_out_of_the_range_gets_no_gradient() -> None:
    """x = .985 lies inside the range of .99, the same weight with noise does not."""
    quantizer, alpha = Quantizer(grid_named("seq2"), scale_dtype=None), torch.ones(1, 1)
    weight = torch.full((1, 64), 0.985, requires_grad=True)
    noise = Noise(1, 0.02, 0.0)
    outside = noise.perturb(weight.detach(), alpha)[0].abs() > 0.99
    assert 0 < outside.sum() < 64
    fake_quantize(weight, alpha, quantizer, noise=noise).sum().backward()
    assert torch.equal(weight.grad == 0, outside)
    weight.grad = None
    fake_quantize(weight, alpha, quantizer).sum().backward()
    assert (weight.grad == 1).all()


def test_noise_comes_in_train_mode_only_fresh_for_each_micro_batch_and_goes_with_the_run() -> None:
    model, x = student(), torch.randn(5, 16, generator=generator())
    quiet = model.eval()(x)
    with WinQ(**WIDE).attach(model, None, 10, accumulation=2) as run:
        run.begin(0, 0)
        assert torch.equal(model.eval()(x), quiet)
        first = model.train()(x)
        assert torch.equal(model(x), first)  # the same micro-batch: what checkpointing recomputes
        assert not torch.equal(first, quiet)
        run.begin(0, 1)
        second = model(x)
        run.begin(1, 0)
        third = model(x)
        run.begin(0, 0)
        assert torch.equal(model(x), first)
        assert not torch.equal(first, second) and not torch.equal(second, third) and not torch.equal(first, third)
        frozen = WinQ(frozen_noise=True, every=5, **WIDE).attach(model, None, 10)
        frozen.begin(0)
        kept = model(x)
        frozen.begin(4)
        assert torch.equal(model(x), kept)
        seeds = {latent.quantizer.noise.seed for latent in frozen.latents}
        frozen.begin(5)
        assert len(seeds) == 2 and not seeds & {latent.quantizer.noise.seed for latent in frozen.latents}
        packed = convert_(copy.deepcopy(model))
        assert torch.equal(packed[0].weight, model[0].quantizer.values(model[0].weight))
    assert all(module.quantizer.noise is None for _, module in quantized_modules(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_recompute_the_same_activations(reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = student().train()
        x = torch.randn(5, 16, generator=generator()).requires_grad_()
        run = WinQ(**WIDE).attach(model, None, 10)
        run.begin(3)
        seen: list[torch.Tensor] = []
        hook = model[0].register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.detach().clone()))
        out = checkpoint(model, x, use_reentrant=reentrant, preserve_rng_state=False) if checkpointed else model(x)
        out.square().sum().backward()
        hook.remove()
        assert len(seen) == 1 + checkpointed and all(torch.equal(seen[0], other) for other in seen)
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_relative_noise_follows_the_size_of_the_layer() -> None:
    model = student()
    run = WinQ(sigma=0.05, sigma_scale=0.01, sigma_mode="relative").attach(model, None, 10)
    run.begin(0)
    for _, module in quantized_modules(model):
        assert module.quantizer.noise.sigma == pytest.approx(0.05 * float(module.weight.detach().abs().mean()))
        scale = module.quantizer.weight_scale.detach().abs().mean()
        assert module.quantizer.noise.sigma_scale == pytest.approx(0.01 * float(scale))


# -- in a run ----------------------------------------------------------------------------------------------------------


def test_without_pull_and_noise_the_run_is_the_plain_one_bit_for_bit() -> None:
    plain, switched_off = student(), student()
    train(plain, None)
    run, _ = train(switched_off, WinQ(pull=0, **STILL))
    assert run.log == [] and same(plain, switched_off)


@pytest.mark.parametrize("winq", [WinQ(every=4, **WIDE), WinQ(trigger="plateau", window=2, tolerance=0.5, **WIDE)])
@pytest.mark.parametrize("at", [1, 7, 8, 9, 16, 17, 23])
def test_a_resumed_run_repeats_noise_and_resets_to_the_bit(winq: WinQ, at: int, tmp_path) -> None:
    whole = student()
    whole_run, _ = train(whole, winq, accumulation=2, output=tmp_path / "whole")
    calls = [0]

    def interrupting(model, batch):
        calls[0] += model.training  # the two looks at a reset's batch do not count
        if calls[0] == at and model.training:
            signal.raise_signal(signal.SIGINT)
        return loss_function(model, batch)

    cut = student()
    config = TrainConfig(12, 1e-2, accumulation=2)
    with pytest.raises(TrainingInterrupted), winq.attach(cut, interrupting, 12, 2) as run:
        fit(cut, run, data(), config, output=tmp_path / "cut", progress=False)
    resumed = student()
    run, _ = train(resumed, winq, accumulation=2, output=tmp_path / "cut")
    assert same(whole, resumed) and run.log == whole_run.log and len(run.log) >= 2
    assert (tmp_path / "cut/metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()


def test_a_resume_under_other_settings_is_refused(tmp_path) -> None:
    settings = {"config": {"checkpoint_every": 2}, "output": tmp_path}
    train(student(), WinQ(every=4, **WIDE), **settings)
    with pytest.raises(UsageError, match="WinQ's every was 4, now 5"):
        train(student(), WinQ(every=5, **WIDE), **settings)
    with pytest.raises(UsageError, match="own state was there, now it is absent"):
        train(student(), None, **settings)


def test_a_bare_loop_does_the_same_as_fit() -> None:
    winq = WinQ(every=4, **WIDE)
    ours, theirs = student(), student()
    train(ours, winq, config={"clip_norm": None, "schedule": "constant"})
    optimizer, batches = torch.optim.AdamW(theirs.train().parameters(), lr=1e-2, weight_decay=0, fused=True), data()
    run = winq.attach(theirs, loss_function, 12)
    for _ in range(12):
        optimizer.zero_grad()
        run(theirs, next(batches)).backward()
        optimizer.step()
    run.detach()
    assert same(ours, theirs)
    with pytest.raises(UsageError, match="12 steps, which are over"):
        run(theirs, next(batches))


def test_the_callback_of_transformers_trainer(tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = student()

        def forward(self, x, y):
            return {"loss": loss_function(self.inner, {"x": x, "y": y})}

    rows = [
        {"x": torch.randn(16, generator=generator(i)), "y": torch.randn(4, generator=generator(i))} for i in range(32)
    ]
    states = []
    for times in range(2):
        model, callback = Wrapped(), WinQ(every=2, **WIDE).hf_callback()
        arguments = TrainingArguments(
            str(tmp_path / str(times)),
            max_steps=6,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
        assert [entry.step for entry in callback.run.log] == [2, 4]
        assert all(module.quantizer.noise is None for _, module in quantized_modules(model))
        states.append(model)
    assert same(*states)
    with pytest.raises(UsageError, match="plateau"):
        WinQ(trigger="plateau").hf_callback()


@pytest.mark.parametrize(
    ("weight", "inputs"),
    [
        (WeightConfig("int4", scale="absmax"), ActivationConfig(8)),  # LLM-QAT
        (WeightConfig("binary", scale="absmean", center=True), ElasticConfig("binary")),  # BiT
        (WeightConfig("ternary", scale="entropy"), ElasticConfig("ternary")),  # TBT
        (WeightConfig("seq2", scale="mse"), None),  # a fixed scale
    ],
)
def test_other_kinds_of_layers_train_with_it(weight: WeightConfig, inputs) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    quantize_(model, QuantConfig(rules=(Rule("*", weight, inputs),)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run, result = train(model, WinQ(every=4, **WIDE))
    assert len(run.log) == 2 and math.isfinite(result.loss)
    assert all(entry.distance_after < entry.distance_before for entry in run.log)


def test_latents_that_an_optimizer_keeps_are_reset_there() -> None:
    from edgewright.systems.parq.model import quantized_groups
    from edgewright.systems.parq.optimizer import QuantOptimizer
    from edgewright.systems.parq.proximal import ProxHard

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    groups = quantized_groups(model, QuantConfig.weights("ternary"))
    optimizer = QuantOptimizer(torch.optim.AdamW(groups, lr=1e-2), ProxHard())
    run = WinQ(pull=0.4, every=3, **STILL).attach(model, loss_function, 9, optimizer=optimizer)
    batches = data()
    for _ in range(3):
        optimizer.zero_grad()
        run(model, next(batches)).backward()
        optimizer.step()
    before = {p: latent.clone() for p, latent in optimizer.latents.items()}
    hard = {p: values.clone() for p, values in optimizer.hard_tensors().items()}
    run(model, next(batches))
    assert [entry.step for entry in run.log] == [3] and len(before) == 2
    for p, latent in optimizer.latents.items():
        torch.testing.assert_close(latent - hard[p], 0.6 * (before[p] - hard[p]), rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match="noise needs layers of quantize_"):
        WinQ().attach(model, None, 9, optimizer=optimizer)


TWO_PROCESSES = """
import os, sys, torch
from tests.systems.winq.test_training import student, data, loss_function, WIDE
from edgewright.systems.winq.training import WinQ
from edgewright.training import TrainConfig, fit
from edgewright.io.hashing import bit_sum

torch.set_num_threads(1)
torch.randn(2, requires_grad=True)
children = []
for rank in range(2):
    child = os.fork()
    if child == 0:
        os.environ |= {{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}}
        os.environ |= {{**{place!r}, "OMP_NUM_THREADS": "1"}}
        model = student()
        with WinQ(trigger="plateau", window=2, tolerance=0.5, **WIDE).attach(model, loss_function, 12) as run:
            fit(model, run, data(), TrainConfig(12, 1e-2), progress=False)
            seeds = [latent.quantizer.noise.seed for latent in run.latents]
        sums = [bit_sum(value) for value in model.state_dict().values()]
        with open({folder!r} + "/" + str(rank), "w") as file:
            print(sums, [entry.step for entry in run.log], file=file)
            print(seeds, file=file)
        torch.distributed.destroy_process_group()
        os._exit(0)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
"""


def test_processes_draw_their_own_noise_and_keep_the_same_weights(tmp_path) -> None:
    script = TWO_PROCESSES.format(place=rendezvous(), folder=str(tmp_path))
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)
    first, second = ((tmp_path / str(rank)).read_text().splitlines() for rank in range(2))
    assert first[0] == second[0] and not first[0].endswith("[]") and first[1] != second[1]


# -- advice and refusals -----------------------------------------------------------------------------------------------


def test_suggest() -> None:
    model = student()
    report = WinQ(sigma=1e-3).suggest(model)
    weight, alpha = model[0].weight.detach(), model[0].quantizer.weight_scale.detach()
    assert report.value("weight", "0") == pytest.approx(float(weight.abs().mean()))
    assert report.value("scale", "0") == pytest.approx(float(alpha.mean()) / 2)
    assert report.value("sigma_per_scale", "0") == pytest.approx(1e-3 / report.value("scale", "0"))
    assert len(report.notes) == 1 and "sigma_mode='relative'" in report.notes[0]
    assert "destructive" in WinQ(sigma=0.5).suggest(model).notes[0]
    assert "does nothing" in WinQ(sigma=1e-6).suggest(model).notes[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pull": 1.5}, "the paper's alpha.*official script's alpha=0.2.*pull=0.8"),
        ({"pull": -0.1}, "a number from 0 to 1"),
        ({"sigma": -1e-3}, "WinQ sigma=-0.001; it must be a number at least 0"),
        ({"sigma_scale": -1.0}, "sigma_scale"),
        ({"every": 0}, "every=0"),
        ({"every": -0.5}, "every=-0.5"),
        ({"every": 1.5}, "above 0 and at most 1; a fraction such as 0.25, or steps"),
        ({"sigma_mode": "percent"}, "absolute, relative"),
        ({"trigger": "often"}, "schedule, plateau"),
        ({"window": 0}, "window"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_cannot_work(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WinQ(**settings)


def test_runs_that_cannot_work() -> None:
    with pytest.raises(UsageError, match="every=50 steps, but the run has 10"):
        WinQ(every=50).attach(student(), None, 10)
    with pytest.raises(UsageError, match="no linear or convolution layer is under quantisation"):
        WinQ().attach(nn.Linear(4, 4), None, 10)
    with pytest.raises(UsageError, match="packed integers"):
        WinQ().attach(convert_(student()), None, 10)
    frozen = student()
    frozen.requires_grad_(False)
    with pytest.raises(UsageError, match="no quantised weight that trains"):
        WinQ().attach(frozen, None, 10)
    run = WinQ().attach(student(), None, 10)
    with pytest.raises(UsageError, match="no loss function"):
        run(student(), None)

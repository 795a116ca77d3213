"""The optimizer of PARQ: torchao step for step, the bare optimizer while nothing anneals, resume, processes."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from edgewright.errors import UsageError
from edgewright.quantization.config import QuantConfig
from edgewright.systems.parq.lsbq import LSBQ, Uniform
from edgewright.systems.parq.model import on_target, quantized_groups
from edgewright.systems.parq.optimizer import QuantOptimizer
from edgewright.systems.parq.proximal import ProxBinaryRelax, ProxHard, ProxPARQ, ProxSoft
from edgewright.training import BlockBatches, TrainConfig, TrainingInterrupted, fit
from tests.processes import run_script
from tests.systems.parq import toys as toy
from tests.systems.parq.toys import STEPS, adamw, batch, flat, groups_of, network, parq, sgd, train

ANNEALING = (3, 45)
SETTINGS = [
    ("LSBQuantizer", 1, lambda where: LSBQ(1, granularity=where, scale_dtype="float32")),
    ("LSBQuantizer", 2, lambda where: LSBQ(2, granularity=where)),
    ("LSBQuantizer", 0, lambda where: LSBQ(0, granularity=where, scale_dtype="float32")),
    ("UnifQuantizer", 1, lambda where: Uniform("binary", "mean", where, "float32")),
    ("UnifQuantizer", 2, lambda where: Uniform("seq2", "mean", where, "float32")),
    ("UnifQuantizer", 4, lambda where: Uniform("half4", "mean", where, "float32")),
    ("MaxUnifQuantizer", 4, lambda where: Uniform("symmetric4", "max", where, "float32")),
    ("TernaryUnifQuantizer", 0, lambda where: Uniform("ternary", "max", where, "float32")),
]
MAPS = {
    "ProxHardQuant": ((), ProxHard()),
    "ProxPARQ": (ANNEALING, ProxPARQ(*ANNEALING)),
    "ProxBinaryRelax": (ANNEALING, ProxBinaryRelax(*ANNEALING)),
}


@pytest.mark.parametrize("peer_map", MAPS)
@pytest.mark.parametrize(("quantizer", "bits", "targets"), SETTINGS)
@pytest.mark.parametrize("where", ["row", "tensor"])
def test_step_for_step_equal_to_torchao(peer_map, quantizer, bits, targets, where):
    optim = importlib.import_module("torchao.prototype.parq.optim")
    quant = importlib.import_module("torchao.prototype.parq.quant")
    arguments, prox = MAPS[peer_map]
    theirs, mine = network(), network()
    peer = optim.QuantOptimizer(
        sgd(groups_of(theirs, "quant_bits", bits)),
        getattr(quant, quantizer)(),
        getattr(optim, peer_map)(*arguments),
        quant_per_channel=where == "row",
    )
    expected = train(theirs, peer)
    found = train(mine, parq(mine, targets(where), prox, sgd))
    assert len(found) == STEPS == 50
    for step, (ours, reference) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-6, msg=lambda text, t=step: f"step {t}: {text}")


@pytest.mark.parametrize("base", [adamw, sgd])
@pytest.mark.parametrize(
    ("prox", "options", "until"),
    [
        (ProxPARQ(30, 40), {}, 30),
        (ProxBinaryRelax(30, 40), {"quant_shrink": True}, 30),
        (ProxHard(), {"warmup_steps": 20, "anneal_weight_decay": 1.0}, 20),
    ],
)
def test_bit_for_bit_the_bare_optimizer_before_it_begins(base, prox, options, until):
    plain, quantised = network(), network()
    expected = train(plain, base(groups_of(plain, "ignored", None)))
    found = train(quantised, parq(quantised, LSBQ(1), prox, base, **options))
    equal = [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
    assert all(equal[:until]) and not any(equal[until + 1 :])


def test_hard_map_with_sgd_is_binary_connect():
    model, manual = network(), network()
    found = train(
        model,
        parq(model, LSBQ(1, scale_dtype="float32"), ProxHard(), lambda g: torch.optim.SGD(g, lr=0.1), quant_period=1),
    )
    latent = [p.detach().clone() for p in manual.parameters()]
    for step in range(STEPS):
        x, y = batch(step)
        manual.zero_grad()
        (manual(x) - y).square().mean().backward()
        with torch.no_grad():
            for u, p in zip(latent, manual.parameters(), strict=True):
                u -= 0.1 * p.grad
                sign = torch.where(u >= 0, 1.0, -1.0)
                p.copy_(u.abs().mean(1, keepdim=True) * sign if u.ndim > 1 else u)
        # two orders of the same products in float32
        torch.testing.assert_close(found[step], flat(manual), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prox", [ProxPARQ(5, 30), ProxBinaryRelax(5, 30), ProxSoft(5, 30), ProxHard()])
@pytest.mark.parametrize(
    "targets", [LSBQ(1), LSBQ(0, optimal=True), LSBQ(2), Uniform("seq2"), Uniform("int4", "mse", 4)]
)
def test_all_weights_are_on_the_grid_at_the_end(prox, targets):
    model = network()
    optimizer = parq(model, targets, prox)
    train(model, optimizer, 0, 20)
    if not isinstance(prox, ProxHard):
        assert on_target(optimizer) < 0.99 and optimizer.inverse_slope > 0
    train(model, optimizer, 20, 40)
    assert on_target(optimizer) == 1.0 and optimizer.inverse_slope == 0.0
    now = flat(model)
    with optimizer.hard_weights():
        assert torch.equal(flat(model), now)
    size = 4 if targets.granularity == 4 else model[0].weight.shape[1]
    for row in model[0].weight.detach().reshape(-1, size):
        assert row.unique().numel() <= (16 if isinstance(targets, Uniform) and targets.grid == "int4" else 4)


def test_targets_keep_their_rhythm_and_come_from_the_latents():
    model = network()
    optimizer = parq(model, LSBQ(1, scale_dtype="float32"), ProxPARQ(0, 200), quant_period=7, warmup_steps=3)
    weight, seen = model[0].weight, []
    for step in range(30):
        train(model, optimizer, step, step + 1)
        if step >= 3:
            seen.append(optimizer.targets[weight].values.clone())
        if step >= 3 and (step - 3) % 7 == 0:
            torch.testing.assert_close(seen[-1], optimizer.latents[weight].abs().mean(1, keepdim=True), rtol=0, atol=0)
    changed = [i for i in range(1, len(seen)) if not torch.equal(seen[i], seen[i - 1])]
    assert changed == [7, 14, 21]


@pytest.mark.parametrize("options", [{}, {"warmup_steps": 12, "quant_shrink": True, "anneal_weight_decay": 0.5}])
@pytest.mark.parametrize("prox", [ProxPARQ(*ANNEALING), ProxHard()])
@pytest.mark.parametrize("base", [adamw, sgd, lambda groups: torch.optim.SGD(groups, lr=0.05)])
@pytest.mark.parametrize("cut", [2, 13, 29])
def test_saved_and_resumed_is_uninterrupted(options, prox, base, cut, tmp_path):
    whole, first = network(), network()
    expected = train(whole, parq(whole, Uniform("seq2"), prox, base, **options))
    optimizer = parq(first, Uniform("seq2"), prox, base, **options)
    train(first, optimizer, 0, cut)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    second = network(seed=9)
    resumed = parq(second, Uniform("seq2"), prox, base, **options)
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert torch.equal(flat(second), flat(first))
    found = train(second, resumed, cut)
    assert all(torch.equal(a, b) for a, b in zip(found, expected[cut:], strict=True))


def test_a_copy_goes_its_own_way():
    model = network()
    optimizer = parq(model, LSBQ(1), ProxPARQ(0, 20))
    train(model, optimizer, 0, 5)
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    assert torch.equal(train(model, optimizer, 5, 9)[-1], train(copied, copied_optimizer, 5, 9)[-1])


def test_memory_stays_where_it_is_and_blocks_put_everything_back():
    model = network()
    optimizer = parq(model, LSBQ(1), ProxPARQ(0, 40))
    places = [p.data_ptr() for p in model.parameters()]
    train(model, optimizer, 0, 20)
    now = flat(model)
    with optimizer.latent_weights():
        latent = flat(model)
        with pytest.raises(UsageError, match="do not nest"), optimizer.hard_weights():
            pass
        with pytest.raises(UsageError, match="leave the block"):
            optimizer.step()
    with pytest.raises(ZeroDivisionError), optimizer.hard_weights():
        hard = flat(model)
        _ = 1 / 0
    assert torch.equal(flat(model), now) and [p.data_ptr() for p in model.parameters()] == places
    assert not torch.equal(latent, now) and not torch.equal(hard, now)
    assert all(latent.data_ptr() != p.data_ptr() for p, latent in optimizer.latents.items())


def test_channels_last_weights_are_mapped_like_others():
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            conv = nn.Conv2d(4, 6, 3)
        conv = conv.to(memory_format=memory_format)
        optimizer = parq(conv, Uniform("seq2"), ProxPARQ(0, 6), sgd)
        for step in range(5):
            conv.weight.grad = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(step)).contiguous(
                memory_format=memory_format
            )
            optimizer.step()
        results.append(conv.weight.detach().contiguous())
    assert torch.equal(*results)


def test_a_closure_sees_the_quantised_point():
    models = network(), network()
    optimizers = [parq(model, LSBQ(1), ProxPARQ(0, 10)) for model in models]

    def closure():
        optimizers[1].zero_grad()
        x, y = batch(closure.step)
        loss = (models[1](x) - y).square().mean()
        loss.backward()
        return loss

    for closure.step in range(8):
        train(models[0], optimizers[0], closure.step, closure.step + 1)
        assert optimizers[1].step(closure) > 0
        assert torch.equal(flat(models[0]), flat(models[1]))


def test_schedulers_change_the_base_optimizer():
    model = network()
    optimizer = parq(model, LSBQ(1), ProxHard())
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
    for step in range(10):
        train(model, optimizer, step, step + 1)
        scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert optimizer.param_groups[0]["cumulative_lr"] == pytest.approx(sum(1e-2 * (1 - 0.09 * t) for t in range(10)))


def test_weight_decay_falls_with_the_slope():
    model, prox = network(), ProxPARQ(0, 10)
    optimizer = parq(model, LSBQ(1), prox, anneal_weight_decay=0.5)
    for step in range(12):
        train(model, optimizer, step, step + 1)
        kept = 0.5 + 0.5 * prox.inverse_slope(step)
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.01 * kept)
    assert optimizer.param_groups[1]["weight_decay"] == 0.01


# -- with the package's loop, transformers, several devices ------------------------------------------------------------


def fitted(folder: Path | None, interrupt_at: int = 0, checkpoint_every: int = 0) -> tuple[nn.Module, QuantOptimizer]:
    model = network()
    optimizer = QuantOptimizer(
        adamw(quantized_groups(model, {"*": LSBQ(0, optimal=True)})), ProxPARQ(4, 18), quant_period=3
    )
    generator = torch.Generator().manual_seed(5)
    data = {"x": torch.randn(40, 12, generator=generator), "y": torch.randn(40, 7, generator=generator)}
    calls = [0]

    def loss_function(model, rows):
        calls[0] += 1
        if calls[0] == interrupt_at:
            import signal

            signal.raise_signal(signal.SIGINT)
        return (model(rows["x"]) - rows["y"]).square().mean(), {"inverse_slope": optimizer.inverse_slope}

    config = TrainConfig(24, 1e-2, schedule="linear", accumulation=2, checkpoint_every=checkpoint_every)
    fit(model, loss_function, BlockBatches(data, 8), config, optimizer=optimizer, output=folder, progress=False)
    return model, optimizer


@pytest.mark.parametrize("interrupt_at", [3, 22, 45])  # before the map, amid it, after it
def test_fit_resumes_to_the_same_bits(tmp_path, interrupt_at):
    whole, expected = fitted(tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        fitted(tmp_path / "cut", interrupt_at)
    found, optimizer = fitted(tmp_path / "cut")
    assert torch.equal(flat(found), flat(whole)) and on_target(optimizer) == 1.0
    for p, q in zip(optimizer.latents, expected.latents, strict=True):
        assert torch.equal(optimizer.latents[p], expected.latents[q])
    logs = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1] and "inverse_slope" in logs[0]


def test_trainer_of_transformers(tiny_llama, tmp_path):
    from transformers import Trainer, TrainingArguments

    def run(folder, stop=None, resume=None):
        model = copy.deepcopy(tiny_llama)
        groups = quantized_groups(model, QuantConfig.weights("seq2", 32, scale="absmean"))
        optimizer = QuantOptimizer(torch.optim.AdamW(groups, lr=1e-3), ProxPARQ(1, 6), quant_period=2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 8)
        rows = torch.randint(0, 256, (16, 8), generator=torch.Generator().manual_seed(0))
        arguments = TrainingArguments(
            str(folder), max_steps=8, save_steps=4, per_device_train_batch_size=2, report_to=[], disable_tqdm=True,
            logging_steps=8, use_cpu=True, max_grad_norm=1.0,
        )  # fmt: skip
        trainer = Trainer(
            model,
            arguments,
            train_dataset=[{"input_ids": r, "labels": r} for r in rows],
            optimizers=(optimizer, scheduler),
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, optimizer

    whole, optimizer = run(tmp_path / "whole")
    assert on_target(optimizer) == 1.0 and optimizer.steps == 8
    resumed, again = run(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert again.steps == 8 and torch.equal(flat(resumed), flat(whole))


def test_two_processes_with_shards_equal_one(tmp_path):
    run_script(toy.__file__, tmp_path)
    for name, targets in toy.SHARDED.items():
        model = network()
        optimizer = parq(model, targets, ProxPARQ(2, 10), sgd)
        train(model, optimizer, 0, 12)
        saved = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        # gradients and sums are added in another order
        torch.testing.assert_close(saved["whole"], flat(model), rtol=0, atol=2e-6)
        with optimizer.latent_weights():
            torch.testing.assert_close(saved["latent"], flat(model), rtol=0, atol=2e-6)

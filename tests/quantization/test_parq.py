"""The optimizer of PARQ: torchao step for step, the bare optimizer while nothing anneals, resume, conversion."""

from __future__ import annotations

import copy
import importlib
import itertools
from pathlib import Path

import pytest
import quantization.parq_toys as toy
import torch
from processes import run_script
from quantization.parq_toys import STEPS, adamw, batch, flat, groups_of, network, parq, sgd, train
from torch import nn

from edgewright.errors import Unsupported, UsageError
from edgewright.io.packed import PackedConv2d, PackedEmbedding, PackedLinear
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.quantization.lsbq import LSBQ, Uniform
from edgewright.quantization.parq import QuantOptimizer
from edgewright.quantization.parq_model import convert_parq_, on_target, quantized_groups
from edgewright.quantization.parq_plots import plot_inverse_slope, plot_on_target, plot_weights, weight_histogram
from edgewright.quantization.proximal import ProxBinaryRelax, ProxHard, ProxPARQ, ProxSoft
from edgewright.training import BlockBatches, TrainConfig, TrainingInterrupted, fit

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
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    assert torch.equal(train(model, optimizer, 5, 9)[-1], train(twin, twin_optimizer, 5, 9)[-1])


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


# -- with the house's loop, transformers, several devices --------------------------------------------------------------


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


# -- groups and conversion ---------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """An embedding tied to the head, a convolution, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 16)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.LayerNorm(16)
        self.mix = nn.Linear(64, 16)
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        image = self.table(tokens).reshape(-1, 1, 4, 4)
        return self.head(self.norm(self.mix(self.conv(image).flatten(1))))


def mixed(targets, steps: int = 8, skip=()) -> tuple[Mixed, QuantOptimizer]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixed()
    optimizer = QuantOptimizer(
        adamw(
            quantized_groups(model, targets, skip=skip)
            if isinstance(targets, dict)
            else quantized_groups(model, targets)
        ),
        ProxPARQ(0, 6),
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(10)).square().mean().backward()
        optimizer.step()
    return model, optimizer


EXPORTABLE = [
    LSBQ(1),
    LSBQ(0, granularity="tensor"),
    LSBQ(0, optimal=True, scale_dtype="float32"),
    Uniform("seq2"),
    Uniform("symmetric4", "max"),
    Uniform("int4", "mse"),
    Uniform("int8", "range", "tensor"),
]


@pytest.mark.parametrize(
    "targets", EXPORTABLE, ids=lambda t: f"{type(t).__name__} {getattr(t, 'bits', None) or getattr(t, 'grid', 0)}"
)
def test_converted_equals_the_trained_weights_bit_for_bit(targets):
    model, optimizer = mixed({"*": targets})
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(torch.arange(10))
    convert_parq_(model, optimizer)
    assert isinstance(model.table, PackedEmbedding) and isinstance(model.head, PackedLinear)
    assert isinstance(model.conv, PackedConv2d) and isinstance(model.mix, PackedLinear)
    assert model.table.codes is model.head.codes
    for name in ("table", "conv", "mix"):
        layer = model.get_submodule(name)
        assert layer.codes.dtype == torch.int8
        assert torch.equal(layer.weight.reshape(trained[f"{name}.weight"].shape), trained[f"{name}.weight"])
    with torch.no_grad():
        assert torch.equal(model(torch.arange(10)), expected)


def test_one_config_with_module_swap_training(tiny_llama):
    config = QuantConfig(
        rules=(Rule("*mlp*", WeightConfig("ternary", 32, scale="absmean")), Rule("*_proj", WeightConfig("int4")))
    )
    groups = quantized_groups(tiny_llama, config, weight_decay=0.1, lr=1e-3)
    names = [[name for name, _ in group["params"]] for group in groups]
    assert sum(len(part) for part in names) == len(list(tiny_llama.parameters()))
    kinds = {group.get("targets"): part for group, part in zip(groups, names, strict=True)}
    assert (
        all("mlp" in name for name in kinds[Uniform("ternary", "absmean", 32)])
        and len(kinds[Uniform("int4", "mse")]) == 8
    )
    decays = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    assert decays["model.norm.weight"] == 0.0 and decays["model.embed_tokens.weight"] == 0.1
    optimizer = QuantOptimizer(torch.optim.AdamW(groups), ProxHard())
    tokens = torch.arange(24).reshape(2, 12)
    tiny_llama(tokens, labels=tokens).loss.backward()
    optimizer.step()
    with torch.no_grad():
        trained = tiny_llama(tokens).logits
        assert torch.equal(convert_parq_(tiny_llama, optimizer)(tokens).logits, trained)


def test_converting_amid_the_annealing_warns_and_packs_hard_weights():
    model, optimizer = mixed({"*": LSBQ(1)}, steps=4)
    with optimizer.hard_weights():
        hard = model.mix.weight.detach().clone()
    with pytest.warns(UserWarning, match="annealing ends at step 6, this is step 4"):
        convert_parq_(model, optimizer)
    assert torch.equal(model.mix.weight, hard)


@pytest.mark.parametrize("targets", [LSBQ(2), Uniform("half4")])
def test_targets_without_an_integer_grid_are_not_converted(targets):
    model, optimizer = mixed({"mix": LSBQ(1), "conv": targets})
    before = dict(model.named_parameters())
    with pytest.raises(UsageError, match=r"conv.weight.*no integer grid.*Uniform\('seq2'\)"):
        convert_parq_(model, optimizer)
    assert dict(model.named_parameters()).keys() == before.keys()


def test_parameters_of_no_packed_layer_are_not_converted():
    attention = nn.MultiheadAttention(8, 2)
    optimizer = QuantOptimizer(sgd([{"params": [attention.in_proj_weight], "targets": LSBQ(1)}]), ProxHard())
    attention.in_proj_weight.grad = torch.ones_like(attention.in_proj_weight)
    optimizer.step()
    with pytest.raises(Unsupported, match="in_proj_weight"):
        convert_parq_(attention, optimizer)


def test_a_bias_by_row_has_one_row():
    bias = nn.Parameter(torch.randn(9, generator=torch.Generator().manual_seed(0)))
    optimizer = QuantOptimizer(sgd([{"params": [bias], "targets": LSBQ(1)}]), ProxHard())
    bias.grad = torch.zeros(9)
    optimizer.step()
    assert bias.detach().abs().unique().numel() == 1


def test_plots_are_written(tmp_path):
    seen = {steps: mixed({"*": LSBQ(0)}, steps)[1] for steps in (4, 8)}
    histograms = {f"step {steps}": weight_histogram(optimizer) for steps, optimizer in seen.items()}
    assert all(float(shares.sum()) == pytest.approx(1) for shares, _ in histograms.values())
    assert (histograms["step 8"][0] > 0).sum() == 3 < (histograms["step 4"][0] > 0).sum()
    plot_weights(histograms, tmp_path / "weights.png")
    plot_on_target({"ternary": {steps: on_target(optimizer) for steps, optimizer in seen.items()}}, tmp_path / "on.png")
    plot_inverse_slope({"parq": ProxPARQ(2, 9), "relax": ProxBinaryRelax(2, 9)}, 12, tmp_path / "slope.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("weights.png", "slope.png", "on.png"))


# -- bad inputs --------------------------------------------------------------------------------------------------------


def matrices(dtype=torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(6, 10, dtype=dtype))]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: QuantOptimizer(torch.optim.LBFGS(matrices()), ProxHard()), "LBFGS cannot be wrapped"),
        (lambda: QuantOptimizer(sgd(matrices()), ProxHard()), "no parameter group has 'targets'"),
        (lambda: parq(network(), LSBQ(1), ProxHard(), quant_period=0), "quant_period=0"),
        (lambda: parq(network(), LSBQ(1), ProxHard(), warmup_steps=-1), "warmup_steps=-1"),
        (lambda: parq(network(), LSBQ(1), ProxHard(), anneal_weight_decay=2.0), "anneal_weight_decay=2.0"),
        (
            lambda: parq(network(), LSBQ(1, granularity=7), ProxHard()),
            "rows of 12 weights do not divide into blocks of 7",
        ),
        (lambda: parq(network().half(), LSBQ(1), ProxHard()), "is float16.*TrainConfig"),
        (lambda: parq(network().bfloat16(), LSBQ(1), ProxHard()), "is bfloat16"),
        (lambda: quantized_groups(network(), {"5": LSBQ(1)}), "pattern '5' matches no"),
        (lambda: quantized_groups(network(), {"0": LSBQ(1, granularity=7)}), "layer 0: its rows of 12"),
        (lambda: quantized_groups(network(), {"*": LSBQ(1)}, skip=("*",)), "nothing is selected"),
    ],
)
def test_bad_settings_say_what_is_allowed(build, words):
    with pytest.raises(UsageError, match=words):
        build()


def test_a_name_is_in_the_message_where_groups_have_names():
    groups = [{"params": [("layer.weight", p) for p in matrices()], "targets": LSBQ(1, granularity=4)}]
    with pytest.raises(UsageError, match="parameter layer.weight: its rows of 10"):
        QuantOptimizer(sgd(groups), ProxHard())


def test_checkpoints_that_do_not_fit_are_refused_before_anything_changes():
    model = network()
    optimizer = parq(model, LSBQ(1), ProxPARQ(0, 20))
    train(model, optimizer, 0, 5)
    good, before = optimizer.state_dict(), flat(model)
    bare = sgd(groups_of(network(), "ignored", None)).state_dict()
    without = {
        **good,
        "state": {k: {n: v for n, v in e.items() if n != "parq_latent"} for k, e in good["state"].items()},
    }
    small = nn.Sequential(nn.Linear(12, 3), nn.Linear(3, 7))
    other = parq(small, LSBQ(1), ProxPARQ(0, 20))
    train(small, other, 0, 2)
    for state, words in [
        (bare, "bare one without latent weights"),
        (without, "parameter 0 has no latent weights in the saved optimizer, which did 5 steps"),
        ({**good, "param_groups": good["param_groups"][:1]}, "1 parameter groups, this one 2"),
        (parq(network(), LSBQ(0), ProxPARQ(0, 20)).state_dict(), "saved with targets"),
        (parq(network(), LSBQ(1), ProxPARQ(0, 30)).state_dict(), "'anneal_end': 30"),
        (other.state_dict(), r"parameter 0 was saved as \[3, 12\], now it is \[20, 12\]"),
    ]:
        with pytest.raises(UsageError, match=words):
            optimizer.load_state_dict(state)
    assert torch.equal(flat(model), before) and optimizer.steps == 5
    optimizer.load_state_dict(good)
    assert torch.equal(flat(model), before)


def test_no_two_settings_share_a_name():
    names = [str(t.to_dict()) for t in EXPORTABLE]
    assert all(a != b for a, b in itertools.combinations(names, 2))

"""The loop itself: what it optimises, what it records, what it leaves untouched, what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgewright.errors import CheckFailed, UsageError
from edgewright.training import BlockBatches, TrainConfig, fit, learning_rate_scale
from tests.training.training_toy import Plain, Toy, cross_entropy, data, seeded, toy_run


def run(model: nn.Module, loss_function=cross_entropy, batches=None, **changes):
    outside = {"optimizer", "output", "evaluate", "evaluate_every", "generator", "resume"}
    extra = {name: changes.pop(name) for name in outside & changes.keys()}
    config = TrainConfig(**{"steps": 5, "learning_rate": 1e-2, **changes})
    return fit(model, loss_function, data() if batches is None else batches, config, progress=False, **extra)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_equals_a_plain_pytorch_loop(accumulation: int, schedule: str) -> None:
    """Oracle: the same run written out with torch alone, to the bit."""
    ours, theirs = seeded(Plain), seeded(Plain)
    result = run(
        ours, accumulation=accumulation, schedule=schedule, warmup_steps=2, steps=6, clip_norm=0.3, weight_decay=0.1
    )
    weights, biases = [p for p in theirs.parameters() if p.ndim > 1], [p for p in theirs.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    batches = data()
    for step in range(6):
        losses = []
        for _ in range(accumulation):
            losses.append(cross_entropy(theirs, next(batches)))
            (losses[-1] / accumulation).backward()
        norm = torch.nn.utils.clip_grad_norm_([*weights, *biases], 0.3)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * learning_rate_scale(schedule, step, 6, 2)
        optimizer.step()
        optimizer.zero_grad()
        row = result.history[step]
        assert (row["step"], row["learning_rate"]) == (step + 1, optimizer.param_groups[0]["lr"])
        assert row["loss"] == sum(loss.item() for loss in losses) / accumulation
        assert row["gradient_norm"] == float(norm)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
        assert mine.grad is None


def test_same_seed_same_bits_and_other_seed_other_bits() -> None:
    first, second = toy_run(None), toy_run(None)
    assert all(torch.equal(value, second[0][name]) for name, value in first[0].items())
    assert first[1].history == second[1].history
    assert toy_run(None, seed=1)[1].history != first[1].history


def test_learns() -> None:
    model, generator = nn.Linear(6, 3), torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator)
    blocks = {"x": x, "y": (x @ torch.randn(6, 3, generator=generator)).argmax(1)}
    result = run(model, batches=BlockBatches(blocks, 16), steps=80, learning_rate=0.1)
    assert result.loss < 0.25 * result.history[0]["loss"]


def test_frozen_parameters_stay_and_training_ones_move() -> None:
    model = seeded(Toy)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run(model, weight_decay=0.5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_leaves_random_state_modes_rates_and_data_as_they_were() -> None:
    model = seeded(Toy)
    model.hidden.eval()
    modes = [module.training for module in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = data()
    rows = {name: value.clone() for name, value in batches.blocks.items()}
    state = torch.get_rng_state()
    run(model, batches=batches, optimizer=optimizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert optimizer.param_groups[0].keys() == torch.optim.SGD(model.parameters(), lr=0.5).param_groups[0].keys()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert all(torch.equal(value, rows[name]) for name, value in batches.blocks.items())


def test_every_group_keeps_its_own_rate_under_the_schedule() -> None:
    model = seeded(Plain)
    seen: list[list[float]] = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    first, last = model.layers[0].parameters(), model.layers[2].parameters()
    optimizer = Spy([{"params": first, "lr": 1.0}, {"params": last, "lr": 0.25}])
    result = run(model, optimizer=optimizer, learning_rate=None, steps=4, schedule="linear")
    assert seen == [[1.0, 0.25], [0.75, 0.1875], [0.5, 0.125], [0.25, 0.0625]]
    assert [row["learning_rate"] for row in result.history] == [1.0, 0.75, 0.5, 0.25]


def test_parameter_groups_and_tensor_rates() -> None:
    model = seeded(Plain)
    groups = [{"params": model.layers[0].parameters(), "lr": 1e-3}, {"params": model.layers[2].parameters()}]
    run(model, optimizer=groups)
    rate = torch.tensor(1e-2)
    ours, theirs = seeded(Plain), seeded(Plain)
    run(ours, optimizer=torch.optim.SGD(ours.parameters(), lr=rate))
    run(theirs, optimizer=torch.optim.SGD(theirs.parameters(), lr=float(rate)))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_any_structure_of_batch_reaches_the_loss() -> None:
    def loss_function(model, batch):
        (x, [y]), name = batch
        assert name == "kept"
        return F.cross_entropy(model(x), y)

    batches = [((b["x"], [b["y"]]), "kept") for b, _ in zip(data(), range(5), strict=False)]
    ours, theirs = seeded(Plain), seeded(Plain)
    run(ours, loss_function, batches)  # a list is enough when it is long enough
    run(theirs)
    assert torch.equal(ours.layers[0].weight, theirs.layers[0].weight)


def test_evaluation_disturbs_nothing_and_lands_in_the_csv(tmp_path: Path) -> None:
    def evaluate(model) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        return {"draw": float(torch.rand(())), "step": 1.0}

    with_evaluation, without = seeded(Toy), seeded(Toy)
    result = run(with_evaluation, output=tmp_path, evaluate=evaluate, evaluate_every=2, log_every=3)
    run(without)
    for mine, other in zip(with_evaluation.parameters(), without.parameters(), strict=True):
        assert torch.equal(mine, other)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0] == "step,loss,learning_rate,gradient_norm,eval_draw,eval_step"
    assert [line.split(",")[0] for line in lines[1:]] == ["2", "3", "4", "5"]  # evaluated, logged, evaluated, last
    assert lines[2].endswith(",,")
    assert result.metrics.keys() == {"eval_draw", "eval_step"} and result.history[-1]["eval_step"] == 1.0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_are_means_over_the_accumulation() -> None:
    values = iter([1.0, 2.0, 6.0, torch.tensor(7.0)])
    result = run(seeded(Plain), lambda m, b: (cross_entropy(m, b), {"value": next(values)}), steps=2, accumulation=2)
    assert [row["value"] for row in result.history] == [1.5, 6.5]
    assert result.metrics == {"value": 6.5}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_full_precision(precision: str) -> None:
    kinds = []

    def loss_function(model, batch):
        output = model(batch["x"])
        kinds.append(output.dtype)
        return F.cross_entropy(output, batch["y"])

    half, full = seeded(Plain), seeded(Plain)
    mixed, plain = run(half, loss_function, precision=precision), run(full)
    assert set(kinds) == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert next(half.parameters()).dtype == torch.float32 and "forward" not in vars(half)
    assert mixed.loss == pytest.approx(plain.loss, abs=1e-2)  # bf16 has 8 bits of mantissa


def test_infinite_gradient_stops_before_the_weights_change() -> None:
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.inf

    model = seeded(Plain)
    before = model.layers[0].weight.clone()
    with pytest.raises(
        CheckFailed, match=r"gradient norm is (inf|nan) at step 1 \(learning rate 0.01\); no checkpoint"
    ):
        run(model, lambda m, b: F.cross_entropy(Steep.apply(m(b["x"])), b["y"]))
    assert torch.equal(model.layers[0].weight, before)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 0}, "steps=0; it must be a whole number from 1 up"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"schedule": "cosin"}, "schedule='cosin' is unknown; use cosine, linear, constant"),
        ({"warmup_steps": 5}, "warmup_steps=5; it must be a whole number from 0 to 4"),
        ({"accumulation": 0}, "accumulation=0"),
        ({"clip_norm": 0.0}, "clip_norm=0.0; it must be a number above 0, or None"),
        ({"precision": "int8"}, "precision='int8'; it must be one of no, bf16, fp16"),
        ({"device": "warp:9"}, "device='warp:9' cannot be used here"),
        ({"learning_rate": None}, "learning_rate is missing"),
        ({"evaluate_every": 2}, "evaluate_every=2 needs a function"),
    ],
)
def test_settings_that_cannot_work(settings, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        run(seeded(Plain), **settings)


def test_loss_functions_and_batches_that_cannot_work() -> None:
    with pytest.raises(UsageError, match=r"scalar tensor.*got shape \[4\]"):
        run(seeded(Plain), lambda m, b: m(b["x"]).sum(1))
    with pytest.raises(UsageError, match="scalar tensor.*got float"):
        run(seeded(Plain), lambda m, b: 1.0)
    with pytest.raises(UsageError, match="depends on trained weights"):
        run(seeded(Plain), lambda m, b: torch.zeros(()))
    with pytest.raises(UsageError, match="metric name 'loss' is taken"):
        run(seeded(Plain), lambda m, b: (cross_entropy(m, b), {"loss": 1.0}))
    with pytest.raises(UsageError, match="batches ended in step 3 of 5: the run needs 5 of them"):
        run(seeded(Plain), batches=[next(data())] * 2)
    with pytest.raises(UsageError, match="no trainable parameters"):
        run(seeded(Plain).requires_grad_(False))

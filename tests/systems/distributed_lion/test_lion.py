"""Lion, packed votes and the workers of one process, against slow and obvious versions written here."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.io.bits import pack_codes, pack_planes, pack_trits, unpack_codes, unpack_planes, unpack_trits
from edgewright.systems.distributed_lion.distributed import DistributedLion, lion_groups
from edgewright.systems.distributed_lion.exchange import alternate_votes, count_bits, reply_bits, wire_bytes
from edgewright.systems.distributed_lion.lion import Lion
from edgewright.systems.distributed_lion.simulated import SimulatedLion

SHAPES = ((37, 5), (11,), (1,), (40,))
MASK = 2**64 - 1


def parameters(seed: int = 1) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(make: Callable[[list[nn.Parameter]], Any], steps: int = 200) -> list[nn.Parameter]:
    generator, trained = torch.Generator().manual_seed(0), parameters()
    optimizer = make(trained)
    for _ in range(steps):
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return trained


def splitmix_vote(index: int, step: int) -> int:
    """The rule in Python's whole numbers."""
    mixed = (index ^ (step * 0x9E3779B97F4A7C15)) & MASK
    mixed = (mixed + 0x9E3779B97F4A7C15) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return 1 - 2 * ((mixed ^ (mixed >> 31)) & 1)


# -- Lion --------------------------------------------------------------------------------------------------------------


def test_lion_is_the_paper_in_float64() -> None:
    """Where no sign hangs on rounding, a float64 version steps alike; the bound is 400 roundings of numbers below 4."""
    rate, decay, (b1, b2) = 1e-3, 0.1, (0.9, 0.99)
    ours = train(lambda given: Lion(given, rate, (b1, b2), decay))
    generator = torch.Generator().manual_seed(0)
    values = [p.detach().double().numpy() for p in parameters()]
    momenta = [np.zeros(shape) for shape in SHAPES]
    for _ in range(200):
        for value, momentum in zip(values, momenta, strict=True):
            gradient = torch.randn(value.shape, generator=generator).double().numpy()
            value -= rate * (np.sign(b1 * momentum + (1 - b1) * gradient) + decay * value)
            momentum[...] = b2 * momentum + (1 - b2) * gradient
    for mine, theirs in zip(ours, values, strict=True):
        np.testing.assert_allclose(mine.detach().numpy(), theirs, rtol=0, atol=400 * 2**-23)


def test_every_form_for_one_process_is_lion_bit_for_bit() -> None:
    plain = train(lambda given: Lion(given, 1e-3, weight_decay=0.1, foreach=False))
    for make in (
        lambda given: Lion(given, 1e-3, weight_decay=0.1, foreach=True),
        lambda given: DistributedLion(given, 1e-3, weight_decay=0.1),
        lambda given: SimulatedLion(given, 1, 1e-3, weight_decay=0.1),
    ):
        assert all(map(torch.equal, plain, train(make)))


def test_lion_is_lion_pytorch_bit_for_bit() -> None:
    theirs = importlib.import_module("lion_pytorch")
    plain = train(lambda given: Lion(given, 1e-3, weight_decay=0.1))
    assert all(map(torch.equal, plain, train(lambda given: theirs.Lion(given, lr=1e-3, weight_decay=0.1))))


def test_phase_one_of_the_theorem() -> None:
    """Theorem B.1: the distance to |w x| <= 1 shrinks by (1 - e w) a step, and inside it stays 0."""
    rate, decay, generator = 0.05, 0.5, torch.Generator().manual_seed(0)
    x = nn.Parameter(torch.randn(200, generator=generator) * 20)
    optimizer = SimulatedLion([x], 3, rate, weight_decay=decay)
    before = math.inf
    for _ in range(500):
        for _ in range(3):
            x.grad = torch.randn(200, generator=generator)
            optimizer.keep()
        optimizer.step()
        distance = float((x.detach().abs() - 1 / decay).clamp(min=0).norm())
        assert distance <= (1 - rate * decay) * before + 1e-5  # float32 roundings of values up to 60
        before = distance
    assert before == 0


# -- votes as bytes ----------------------------------------------------------------------------------------------------


def test_packing_keeps_every_vote() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in range(1, 258):
        bits = torch.randint(0, 2, (8 * size,), generator=generator, dtype=torch.uint8)
        assert torch.equal(unpack_codes(pack_codes(bits, 1), 1), bits)
        assert pack_codes(bits, 1).tolist() == np.packbits(bits.numpy(), bitorder="little").tolist()
        trits = torch.randint(-1, 2, (5 * size,), generator=generator).to(torch.int8)
        assert torch.equal(unpack_trits(pack_trits(trits)), trits)


@pytest.mark.parametrize("workers", [*range(1, 10), 300])
def test_counting_is_adding(workers: int) -> None:
    bits = torch.randint(0, 2, (workers, 64), generator=torch.Generator().manual_seed(workers), dtype=torch.uint8)
    assert torch.equal(count_bits(pack_codes(bits, 1)).int(), bits.sum(0).int())


@given(st.integers(1, 9), st.lists(st.integers(0, 2**9 - 1), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_codes_come_back(bits: int, values: list[int]) -> None:
    codes = torch.tensor([value % 2**bits for value in values] + [0] * (-len(values) % 8), dtype=torch.int16)
    assert torch.equal(unpack_planes(pack_planes(codes, bits), bits), codes)


def test_broken_bytes_are_votes_of_nobody() -> None:
    assert unpack_trits(torch.arange(243, 256, dtype=torch.uint8)).abs().sum() == 0


@pytest.mark.parametrize("step", [0, 1, 12345, 2**40])
def test_ties_follow_the_hash(step: int) -> None:
    index = torch.cat([torch.arange(3000), torch.tensor([2**31, 2**40 + 5])])
    assert alternate_votes(index, step).tolist() == [splitmix_vote(int(k), step) for k in index]
    assert abs(alternate_votes(torch.arange(100_000), step).float().mean()) < 4 / 100_000**0.5


# -- many workers in one process ---------------------------------------------------------------------------------------


def reference(workers: int, aggregate: str, ternary: bool, gradients: list[list[Tensor | None]]) -> Tensor:
    """One parameter of six elements, one element at a time; momentum in the roundings of torch's add with alpha."""
    x = torch.linspace(-1, 1, 6)
    momenta = [torch.zeros(6) for _ in range(workers)]
    for step, given_ in enumerate(gradients):
        votes = []
        for momentum, gradient in zip(momenta, given_, strict=True):
            raw = torch.zeros(6) if gradient is None else torch.add(0.9 * momentum, gradient, alpha=1 - 0.9)
            if gradient is not None:
                momentum.copy_(torch.add(0.99 * momentum, gradient, alpha=1 - 0.99))
            signs = [(v > 0) - (v < 0) for v in raw.tolist()]
            votes.append([s if s or ternary else splitmix_vote(k, step) for k, s in enumerate(signs)])
        delta = []
        for k, column in enumerate(zip(*votes, strict=True)):
            total = sum(column)
            if aggregate == "avg":
                delta.append(total / workers)
            else:
                sign = (total > 0) - (total < 0)
                delta.append(float(sign if sign or ternary else splitmix_vote(k, step)))
        x = torch.add(x * (1 - 0.01 * 0.1), torch.tensor(delta), alpha=-0.01)
    return x


@pytest.mark.parametrize("ternary", [True, False])
@pytest.mark.parametrize("aggregate", ["mavo", "avg"])
@pytest.mark.parametrize("workers", [2, 3, 4, 8])
def test_simulated_workers_are_the_algorithm(workers: int, aggregate: str, ternary: bool) -> None:
    generator = torch.Generator().manual_seed(workers)
    gradients: list[list[Tensor | None]] = []
    for step in range(8):
        row: list[Tensor | None] = [torch.randn(6, generator=generator) for _ in range(workers)]
        for gradient in row:
            assert gradient is not None
            gradient[2] = 0
        if step == 3:
            row[0] = None
        gradients.append(row)
    x = nn.Parameter(torch.linspace(-1, 1, 6))
    zero = "ternary" if ternary else "alternate"
    optimizer = SimulatedLion([x], workers, 0.01, weight_decay=0.1, aggregate=aggregate, zero=zero)
    for row in gradients:
        for gradient in row:
            x.grad = None if gradient is None else gradient.clone()
            optimizer.keep()
        optimizer.step()
    assert torch.equal(x.detach(), reference(workers, aggregate, ternary, gradients))


def test_the_majority_is_not_the_sign_of_the_mean() -> None:
    x = nn.Parameter(torch.zeros(1))
    optimizer = SimulatedLion([x], 3, 1.0)
    for value in (1.0, -3.0, 1.5):
        x.grad = torch.tensor([value])
        optimizer.keep()
    optimizer.step()
    assert x.item() == -1.0


@pytest.mark.parametrize("zero", ["ternary", "alternate"])
def test_rows_that_no_token_touches(zero: str) -> None:
    """They stay under ternary votes; under the hash they walk at random, below 3 sqrt(t) steps."""
    table = nn.Parameter(torch.zeros(20, 16))
    optimizer = SimulatedLion([table], 2, 0.01, zero=zero)
    steps = 400
    for _ in range(steps):
        for _ in range(2):
            table.grad = torch.zeros(20, 16)
            table.grad[0] = 1.0
            optimizer.keep()
        optimizer.step()
    moved = table.detach()[1:].abs()
    if zero == "ternary":
        assert moved.max() == 0
    else:
        # 3 sqrt(t) is three standard deviations of one walk; of 304 walks about one goes further
        assert float((moved < 3 * steps**0.5 * 0.01).float().mean()) > 0.98 and moved.max() > 0


def test_tables_are_found() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = DistributedLion(lion_groups(model, 0.1), 1e-3)
    found = dict(zip(optimizer.names(), optimizer.is_ternary(), strict=True))
    assert found == {"0.weight": True, "1.weight": False, "1.bias": False, "2.weight": False, "2.bias": False}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    named = DistributedLion([("model.embed_tokens.weight", nn.Parameter(torch.zeros(2)))], 1e-3)
    assert named.is_ternary() == [True]


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_the_table_of_bytes() -> None:
    found = {
        "fp32": 6_000_000,
        "bf16": 3_000_000,
        "mavo two_phase": 187_500,
        "avg two_phase": 375_000,
        "mavo all_gather": 375_000,
    }
    assert {scheme: wire_bytes(scheme, 10**6, 4) for scheme in found} == found
    assert wire_bytes("mavo two_phase", 10**6, 4, ternary=True) == pytest.approx(300_000)
    ratios = [wire_bytes("fp32", 1, n) / wire_bytes("avg two_phase", 1, n) for n in (2, 3, 8)]
    assert ratios == pytest.approx([64 / 3, 64 / 3, 12.8])
    assert [reply_bits(n, False) for n in (2, 3, 4, 7, 8)] == [2, 2, 3, 3, 4] and reply_bits(4, True) == 4


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Lion, DistributedLion])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": 0.0}, r"lr=0.0; it must be a number above 0"),
        ({"lr": -1e-4}, "lr=-0.0001"),
        ({"lr": math.nan}, "lr=nan"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\); it must be two numbers of at least 0 and below 1"),
        ({"betas": (-0.1, 0.9)}, "betas="),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
    ],
)
def test_settings_that_cannot_work(kind: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        kind(parameters(), **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"aggregate": "mean"}, "aggregate='mean'; it must be one of mavo, avg"),
        ({"zero": "minus"}, "zero='minus'; it must be one of"),
        ({"topology": "ring"}, "topology='ring'; it must be one of"),
        ({"reply": "int4"}, "reply='int4'; it must be one of"),
        ({"bucket_mb": 0}, "bucket_mb=0"),
        ({"clip_local": 0.0}, "clip_local=0.0"),
        ({"momentum_sync_every": -1}, "momentum_sync_every=-1"),
        ({"timeout": math.inf}, "timeout=inf"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        DistributedLion(parameters(), **options)


@pytest.mark.parametrize("kind", [Lion, DistributedLion])
def test_parameters_and_gradients_without_signs(kind: Any) -> None:
    with pytest.raises(UsageError, match="complex64: Lion steps by signs"):
        kind([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(UsageError, match=r"shape \[3, 2\] is not contiguous"):
        kind([nn.Parameter(torch.zeros(2, 3).t())])
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match="sparse=False"):
        kind(table.parameters()).step()


def test_workers_without_gradients() -> None:
    optimizer = SimulatedLion(parameters(), 3)
    with pytest.raises(UsageError, match="0 gradients were kept for 3 workers"):
        optimizer.step()
    with pytest.raises(UsageError, match="workers=0"):
        SimulatedLion(parameters(), 0)

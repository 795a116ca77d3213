"""Allocation: TEAL's ascent against a naive one, calibration block by block, and the search: resume, means."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from edgewright.errors import FormatError, UsageError
from edgewright.systems.r_sparse import allocation as r_sparse_search
from edgewright.systems.r_sparse.allocation import (
    SearchConfig,
    calibrate_sequential,
    search_rho,
    streams,
    teal_greedy,
    teal_path,
)
from edgewright.systems.r_sparse.model import apply_rsparse, evaluate, remove_rsparse, sparse_layers
from edgewright.systems.r_sparse.plan import (
    LayerPlan,
    RSparseConfig,
    calibrate,
    layer_sizes,
    mean_sparsity,
    target_layers,
    uniform_plan,
)
from tests.toy_llama import make_tiny_llama

TOKENS = torch.randint(3, 256, (6, 32), generator=torch.Generator().manual_seed(3))
CONFIG = RSparseConfig(0.5)
SEARCH = SearchConfig(evals=10, population=5, elite=1, quick=2, finalists=2)


@pytest.fixture
def model():
    """Weights large enough that the layers differ in what they cost."""
    found = make_tiny_llama(seed=1)
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if name.endswith("_proj.weight"):
                weight.mul_(5.0 if "mlp" in name else 3.0)
    return found


def naive_teal(model, stats, sparsity, step):
    """Every layer of a block tried at every step, on the whole model's own hooks."""
    plan = {}
    sizes = layer_sizes(target_layers(model, CONFIG))
    with torch.no_grad():
        (flow,) = streams(model, [TOKENS[:2]])
        for index, block in enumerate(model.model.layers):
            target = flow.through(index, block)
            names = [name for name in sizes if name.startswith(f"model.layers.{index}.")]
            total = sum(sizes[name] for name in names)
            level = dict.fromkeys(names, 0.0)

            def error(levels, index=index, block=block, names=names, target=target):
                full = {name: LayerPlan(levels.get(name, 0.0)) for name in sizes}
                apply_rsparse(model, RSparseConfig(0.5, dense_prefill=False, path="reference"), stats, full)
                out = flow.through(index, block)
                for name in sizes:
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, model.get_submodule(name).inner)
                return float((out - target)[:, 1:].double().square().sum())

            while (missing := sparsity - sum(level[n] * sizes[n] for n in names) / total) > 1e-9:
                tries = {}
                for name in names:
                    most = 1 - 1 / model.get_submodule(name).in_features
                    if level[name] < most - 1e-9:
                        raised = level[name] + min(step / len(names), missing) / (sizes[name] / total)
                        tries[name] = {**level, name: min(raised, most)}
                level = min(tries.values(), key=error)
            plan |= level
            flow.hidden = target
    return plan


def test_teal_is_the_naive_ascent(model):
    stats = calibrate(model, [TOKENS], CONFIG)
    found = teal_path(model, [TOKENS[:2]], CONFIG, stats, [0.5], step=0.4, lazy=False)[0.5]
    wanted = naive_teal(model, stats, 0.5, 0.4)
    assert {name: layer.sparsity for name, layer in found.items()} == pytest.approx(wanted)
    assert len(set(wanted.values())) > 2 and not sparse_layers(model)


def test_the_lazy_ascent_is_about_as_good(model):
    """Its allocation and the full one's cost the whole model about the same, and less than a uniform one."""
    stats = calibrate(model, [TOKENS], CONFIG)
    plans = {
        "uniform": uniform_plan(stats.histograms, CONFIG),
        "lazy": teal_greedy(model, [TOKENS[:2]], CONFIG, stats, step=0.1),
        "full": teal_path(model, [TOKENS[:2]], CONFIG, stats, [0.5], step=0.1, lazy=False)[0.5],
    }
    kl = {}
    for name, plan in plans.items():
        apply_rsparse(model, CONFIG, stats, plan)
        kl[name] = evaluate(model, TOKENS[2:]).kl
        remove_rsparse(model)
    assert kl["lazy"] < 1.1 * kl["full"] and kl["lazy"] < kl["uniform"], kl


def test_teal_meets_every_sparsity_in_every_block(model):
    stats = calibrate(model, [TOKENS], CONFIG)
    before = model(TOKENS).logits
    path = teal_path(model, [TOKENS[:2]], CONFIG, stats, (0.6, 0.3), step=0.2)
    assert torch.equal(model(TOKENS).logits, before)
    sizes = layer_sizes(target_layers(model, CONFIG))
    for sparsity, plan in path.items():
        assert list(plan) == list(sizes)
        for block in ("layers.0.", "layers.1."):
            part = {name: layer for name, layer in plan.items() if block in name}
            assert mean_sparsity(part, sizes) == pytest.approx(sparsity)
    assert all(path[0.3][name].sparsity <= path[0.6][name].sparsity for name in sizes)
    with pytest.raises(UsageError, match="it must be a number at least 0 and below 1"):
        teal_path(model, [TOKENS], CONFIG, stats, (1.0,))


def test_sequential_calibration_sees_the_sparse_prefix(model):
    dense, sequential = calibrate(model, [TOKENS], CONFIG), calibrate_sequential(model, [TOKENS], CONFIG)
    assert dense.text == sequential.text and dense.tokens == sequential.tokens and not sparse_layers(model)
    for name, counts in dense.histograms.items():
        first = "layers.0." in name
        assert torch.equal(counts, sequential.histograms[name]) == first, name
    plan = uniform_plan(dense.histograms, RSparseConfig(0.0))
    again = calibrate_sequential(model, [TOKENS], CONFIG, plan)
    moved = [float((again.histograms[n] - counts).abs().sum()) for n, counts in dense.histograms.items()]
    assert max(moved) <= 20  # a dense prefix: only scores on the edge of a bin, by rounding of another layout


# -- search ------------------------------------------------------------------------------------------------------------


def test_a_search_repeats_resumes_and_leaves_the_model(model, tmp_path, monkeypatch):
    before = model(TOKENS).logits
    stats = calibrate(model, [TOKENS], CONFIG)
    file = tmp_path / "search.json"
    first = search_rho(model, TOKENS, CONFIG, search=SEARCH, stats=stats, resume=file)
    assert torch.equal(model(TOKENS).logits, before) and not sparse_layers(model)
    assert first.evaluations == 10 == len(first.history) and first.fitness <= first.start
    assert list(first.history) == sorted(first.history, reverse=True)
    assert all(layer.sparsity == 0.5 for layer in first.plan.values())

    count = []
    score = r_sparse_search.mean_loss
    monkeypatch.setattr(r_sparse_search, "mean_loss", lambda *a: count.append(1) or score(*a))
    data = json.loads(file.read_text())
    data["scores"] = dict(list(data["scores"].items())[:6])  # interrupted after six
    file.write_text(json.dumps(data))
    second = search_rho(model, TOKENS, CONFIG, search=SEARCH, stats=stats, resume=file)
    assert second == first and len(count) == 4 + 3  # the rest, and the finalists with rho = 1
    assert search_rho(model, TOKENS, CONFIG, search=SEARCH, stats=stats, resume=file) == first and len(count) == 7


def test_a_search_is_drawn(model, tmp_path):
    search = SearchConfig(evals=8, population=4, elite=1, quick=2, finalists=1, seed=1)
    search_rho(model, TOKENS, CONFIG, search=search).plot(tmp_path / "search.png")
    assert (tmp_path / "search.png").stat().st_size > 0


def test_what_a_search_refuses(model, tmp_path):
    file = tmp_path / "search.json"
    stats = calibrate(model, [TOKENS], CONFIG)

    def attempt(**changes):
        return search_rho(model, TOKENS, CONFIG, stats=stats, resume=file, **{"search": SEARCH, **changes})

    for text, complaint in (
        ("[1", "is not JSON"),
        ("[]", "holds no scores"),
        ('{"scores": {"a": 1}}', "holds no scores"),
        ('{"scores": []}', "holds no scores"),
    ):
        file.write_text(text)
        with pytest.raises(FormatError, match=complaint):
            attempt()
    file.unlink()
    attempt(evals=3)
    with pytest.raises(UsageError, match="another search"):
        attempt(evals=4)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(UsageError, match="another search"):
        attempt(evals=3)
    assert not sparse_layers(model) and type(model.model.layers[0].mlp.up_proj) is nn.Linear
    with pytest.raises(UsageError, match="SearchConfig evals=1; it must be a whole number from 3 up"):
        attempt(evals=1)


def test_a_genome_without_a_number_loses(model, monkeypatch):
    stats = calibrate(model, [TOKENS], CONFIG)
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    found = search_rho(model, TOKENS, CONFIG, search=SearchConfig(evals=3, quick=2), stats=stats)
    assert found.fitness == math.inf

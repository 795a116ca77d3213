"""R-Sparse: the formula and the budget against plain NumPy, thresholds, what must be exactly dense, what is refused."""

from __future__ import annotations

import copy
import logging
import math

import numpy as np
import pytest
import torch
from torch import nn

import edgewright
from edgewright.errors import CheckFailed, Unsupported, UsageError
from edgewright.io.packed import PackedLinear, PackedTensor
from edgewright.io.transformers_names import cache_of, with_cache
from edgewright.kernels import sparse_rows
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.systems.r_sparse import layer as r_sparse_layer
from edgewright.systems.r_sparse.layer import Factors, RSparseLinear, budget, column_norms, truncated_svd
from edgewright.systems.r_sparse.model import (
    achieved_sparsity,
    apply_rsparse,
    dense_logits,
    evaluate,
    model_traffic,
    remove_rsparse,
    setting,
    sparse_layers,
    sparse_logits,
)
from edgewright.systems.r_sparse.plan import (
    Calibration,
    LayerPlan,
    RSparseConfig,
    calibrate,
    default_plan,
    histogram,
    mean_sparsity,
    score_scales,
    target_layers,
)
from tests.toy_llama import make_tiny_llama

TOKENS = torch.randint(3, 256, (8, 64), generator=torch.Generator().manual_seed(3))
HELD_OUT = torch.randint(3, 256, (4, 32), generator=torch.Generator().manual_seed(4))


def linear(m, n, seed=0, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(n, m, bias=bias).requires_grad_(False)


def sparse(layer, threshold, rank=0, **more):
    factors = dict(zip(("down", "up"), truncated_svd(layer, rank), strict=True)) if rank else {}
    return RSparseLinear(copy.deepcopy(layer), threshold=threshold, scale=column_norms(layer), **factors, **more)


# -- formula and budget ------------------------------------------------------------------------------------------------


def test_the_worked_example():
    layer = nn.Linear(4, 3, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.tensor([[2.0, 0, 1, 0], [0, 1, 0, -1], [1, 1, 0, 0]]))
    x = torch.tensor([1, -0.5, 0.2, 2])
    scores = x.abs() * column_norms(layer)
    torch.testing.assert_close(scores, torch.tensor([2.236068, 0.707107, 0.2, 2.0]))
    for path in ("auto", "torch", "reference"):
        assert sparse(layer, 1.0, path=path)(x).tolist() == [2.0, -2.0, 1.0]
        found = sparse(layer, 1.0, rank=1, path=path)(x)
        torch.testing.assert_close(found, torch.tensor([1.901235, -2.012815, 0.948081]), rtol=0, atol=2e-6)
        torch.testing.assert_close(sparse(layer, -1.0, path=path)(x), torch.tensor([2.2, -2.5, 0.5]))


@pytest.mark.parametrize(
    ("m", "n", "rho", "channels", "rank"),
    [
        (576, 576, 1.0, 288, 0),
        (576, 576, 0.9, 259, 14),
        (576, 576, 0.5, 144, 72),
        (192, 576, 0.9, 259, 7),
        (1536, 576, 0.9, 259, 21),
        (576, 1536, 0.9, 691, 21),
    ],
)
def test_the_published_budget(m, n, rho, channels, rank):
    kept, found = budget(m, n, 0.5, rho)
    assert (math.floor(kept * n), found) == (channels, rank)
    assert (channels * m + found * (m + n)) / (m * n) == pytest.approx(0.5, abs=(m + n) / (m * n))


@pytest.mark.parametrize("rank", [0, 3, 20])
@pytest.mark.parametrize("threshold", [-1.0, 0.4, math.inf])
def test_all_paths_are_the_float64_formula(threshold, rank):
    layer = linear(20, 31)
    x = torch.randn(31, generator=torch.Generator().manual_seed(1))
    weight, bias = (t.double().numpy() for t in (layer.weight, layer.bias))
    keep = np.abs(x.numpy()) * column_norms(layer).numpy() > np.float32(threshold)
    u, s, vt = np.linalg.svd(weight)
    low = (u[:, :rank] * s[:rank]) @ vt[:rank]
    wanted = weight @ (x.double().numpy() * keep) + low @ (x.double().numpy() * ~keep) + bias
    for path in ("auto", "torch", "reference", "operator"):
        found = sparse(layer, threshold, rank, path=path)(x)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=2e-6)  # 31 float32 products
    if rank == 20:  # full rank: exact whatever is kept
        np.testing.assert_allclose(wanted, layer(x).numpy(), rtol=1e-5, atol=2e-6)
    gap = np.linalg.norm(wanted - layer(x).double().numpy())
    assert gap <= (s[rank] if rank < 20 else 0) * np.linalg.norm(x.numpy() * ~keep) + 1e-5


def test_column_norms_are_those_of_the_singular_vectors():
    layer = linear(30, 20)
    _, s, vt = torch.linalg.svd(layer.weight, full_matrices=False)
    torch.testing.assert_close(column_norms(layer), torch.linalg.vector_norm(s.unsqueeze(1) * vt, dim=0))


def test_one_token_equals_many_and_gradients_flow():
    layer = sparse(linear(24, 16), 0.3, rank=4, dense_tokens=0)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
    many = layer(x)
    one = torch.stack([layer(row.reshape(1, 1, 16)).flatten() for row in x.flatten(0, 1)]).reshape(many.shape)
    torch.testing.assert_close(one, many)
    x.requires_grad_()
    layer(x[:, :1]).sum().backward()  # two rows with gradients
    layer(x[0, 0]).sum().backward()  # one, which must not take the kernel
    assert x.grad is not None and x.grad[0, 0].abs().sum() > 0 and x.grad[0, 1].abs().sum() == 0


def test_leading_tokens_and_prompts_stay_dense():
    inner = linear(24, 16)
    x = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(2))
    prompt = sparse(inner, 0.4)
    assert torch.equal(prompt(x), prompt.inner(x))
    some = sparse(inner, 0.4, dense_tokens=2, path="reference")(x)
    torch.testing.assert_close(some[:, :2], inner(x)[:, :2])
    torch.testing.assert_close(some[:, 2:], sparse(inner, 0.4, dense_tokens=0)(x)[:, 2:])
    assert not torch.allclose(some[:, 2:], inner(x)[:, 2:])


def test_a_batch_on_the_kernel_path_falls_back_and_says_so_once(caplog):
    r_sparse_layer._say_once.cache_clear()
    layer = sparse(linear(24, 16), 0.4, path="torch")
    x = torch.randn(3, 1, 16, generator=torch.Generator().manual_seed(2))
    with caplog.at_level(logging.WARNING):
        first = layer(x)
        layer(x)
    assert len(caplog.records) == 1 and "masked product" in caplog.text
    torch.testing.assert_close(first[1, 0], layer(x[1, 0]))


def test_moved_weights_are_noticed():
    layer = sparse(linear(24, 16), 0.2)
    x = torch.randn(16, generator=torch.Generator().manual_seed(2))
    before = layer(x)
    layer.inner.weight = nn.Parameter(2 * layer.inner.weight, requires_grad=False)
    r_sparse_layer.by_input_(layer.inner)
    bias = layer.inner.bias
    torch.testing.assert_close(layer(x) - bias, 2 * (before - bias))


def test_export_keeps_the_numbers():
    layer = sparse(linear(24, 16), 0.3, rank=3, dense_tokens=0).eval()
    x = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(2))
    for path in ("auto", "operator"):
        layer.path = path
        program = torch.export.export(layer, (x,))
        assert ("sparse_gemv" in str(program.graph)) == (path == "operator")
        torch.testing.assert_close(program.module()(x), layer(x))


# -- calibration -------------------------------------------------------------------------------------------------------


def test_thresholds_are_quantiles():
    scores = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).abs() * 0.01
    stats = Calibration({"a": histogram(scores)}, 1, "", "weighted")
    for q in (0.001, 0.3, 0.5, 0.9, 0.999):
        achieved = float((scores <= stats.threshold("a", q)).double().mean())
        assert achieved == pytest.approx(q, abs=5e-4)
    assert stats.threshold("a", 0.0) == -1 and stats.threshold("a", 1.0) == math.inf
    halves = histogram(scores[:30]) + histogram(scores[30:])
    assert torch.equal(halves, stats.histograms["a"])
    assert histogram(torch.tensor([0.0, 1e-30, 1e30])).sum() == 3


@pytest.mark.parametrize("score", ["weighted", "magnitude"])
def test_calibration_text_meets_its_target(tiny_llama, score):
    config = RSparseConfig(0.5, score=score)
    stats = calibrate(tiny_llama, TOKENS.split(4), config)
    assert stats.tokens == 8 * 63 and len(stats.histograms) == 14
    apply_rsparse(tiny_llama, config, stats)
    # Inputs of later layers move with the sparsity before them; the first block's q, k, v see what was calibrated.
    achieved = achieved_sparsity(tiny_llama, TOKENS.split(4))
    for name in ("q_proj", "k_proj", "v_proj"):
        assert achieved[f"model.layers.0.self_attn.{name}"] == pytest.approx(0.5, abs=0.005)
    assert all(0.4 < value < 0.6 for value in achieved.values())


def test_zero_sparsity_is_the_dense_model(tiny_llama):
    wanted = tiny_llama(HELD_OUT).logits
    config = RSparseConfig(0.0, dense_prefill=False)
    apply_rsparse(tiny_llama, config, calibrate(tiny_llama, [TOKENS], config))
    torch.testing.assert_close(sparse_logits(tiny_llama)(HELD_OUT), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dense_logits(tiny_llama)(HELD_OUT), wanted, rtol=1e-5, atol=1e-6)
    remove_rsparse(tiny_llama)
    assert torch.equal(tiny_llama(HELD_OUT).logits, wanted)  # the layout is back as well
    assert not sparse_layers(tiny_llama)


def test_decoding_token_by_token_equals_the_whole(tiny_llama):
    config = RSparseConfig(0.5, rho=0.8)
    apply_rsparse(tiny_llama, config, calibrate(tiny_llama, [TOKENS], config))
    with torch.no_grad():
        whole = sparse_logits(tiny_llama, dense_tokens=8)(HELD_OUT[:1, :20])
        out = tiny_llama(HELD_OUT[:1, :8], use_cache=True)  # the prompt is dense
        found = [out.logits]
        for i in range(8, 20):
            out = tiny_llama(HELD_OUT[:1, i : i + 1], **with_cache(cache_of(out)), use_cache=True)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)  # two ways to sum, two blocks


def test_shared_masks_use_one_scale(tiny_llama):
    config = RSparseConfig(0.5, share_mask=True)
    layers = target_layers(tiny_llama, config)
    scales = score_scales(layers, config)
    q, k, v = (f"model.layers.1.self_attn.{name}_proj" for name in "qkv")
    assert torch.equal(scales[q], scales[k]) and torch.equal(scales[q], scales[v])
    squares = sum(column_norms(layers[name]).square() for name in (q, k, v))
    torch.testing.assert_close(scales[q].square(), squares)
    down = "model.layers.1.mlp.down_proj"
    torch.testing.assert_close(scales[down], column_norms(layers[down]))
    apply_rsparse(tiny_llama, config, calibrate(tiny_llama, [TOKENS], config))
    made = sparse_layers(tiny_llama)
    assert float(made[q].threshold) == float(made[v].threshold)


# -- the whole model ---------------------------------------------------------------------------------------------------


def test_traffic_counts_factors_and_leaves_the_table_out(tiny_llama):
    config = RSparseConfig(0.5, rho=0.8)
    layers = target_layers(tiny_llama, config)
    weights = sum(layer.weight.numel() for layer in layers.values())
    apply_rsparse(tiny_llama, config, calibrate(tiny_llama, [TOKENS], config))
    with pytest.raises(UsageError, match="nothing was counted"):
        model_traffic(tiny_llama)
    half = dict.fromkeys(layers, 0.6)
    traffic = model_traffic(tiny_llama, half)
    made = sparse_layers(tiny_llama).values()
    factors = sum(4 * layer.rank * (layer.in_features + layer.out_features) for layer in made)
    read = sum(4 * layer.rank * (0.6 * layer.in_features + layer.out_features) for layer in made)
    assert traffic.dense == 4 * weights and traffic.factors == factors > 0
    assert traffic.sparse == pytest.approx(0.4 * 4 * weights + read)
    assert traffic.rest == 4 * (256 * 64 + 5 * 64)  # tied head and norms; no table besides
    with setting(tiny_llama, counting=True):
        sparse_logits(tiny_llama)(HELD_OUT)
    assert 0.4 < model_traffic(tiny_llama).ratio < 0.65


def test_packed_weights_and_quantised_inputs(tiny_llama):
    rule = Rule("*_proj", WeightConfig("int4", granularity=32, scale="mse"), edgewright.ActivationConfig(8))
    packed = edgewright.convert_(edgewright.quantize_(tiny_llama, QuantConfig(rules=(rule,))))
    wanted = packed(HELD_OUT).logits
    config = RSparseConfig(0.5, rho=0.7, dense_prefill=False)
    stats = calibrate(packed, [TOKENS], config)
    apply_rsparse(packed, config, stats, dict.fromkeys(stats.histograms, LayerPlan(0.0)))
    torch.testing.assert_close(packed(HELD_OUT).logits, wanted, rtol=1e-4, atol=1e-5)
    remove_rsparse(packed)
    apply_rsparse(packed, config, stats)
    layer = sparse_layers(packed)["model.layers.0.mlp.down_proj"]
    assert isinstance(layer.inner, PackedLinear) and layer.up.dtype == torch.bfloat16 and layer.rank > 0
    x = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = layer(x)
        with setting(packed, path="reference"):
            torch.testing.assert_close(layer(x), rows, rtol=1e-4, atol=1e-5)
    assert 0 < evaluate(packed, HELD_OUT).kl < 1
    with pytest.raises(Unsupported, match="path='reference'"), setting(packed, path="operator"):
        layer(x)


def test_the_default_division_and_the_mean(tiny_llama):
    layers = target_layers(tiny_llama, RSparseConfig())
    plan = default_plan(layers, RSparseConfig(0.4))
    assert plan["model.layers.0.self_attn.q_proj"] == LayerPlan(0.4, 0.2)
    assert plan["model.layers.0.self_attn.o_proj"] == LayerPlan(0.4, 0.85)
    assert plan["model.layers.1.self_attn.q_proj"] == LayerPlan(0.4, 1.0)
    sizes = dict.fromkeys(layers, 1) | {"model.layers.0.mlp.up_proj": 3}
    mixed = {name: LayerPlan(0.9 if name.endswith("0.mlp.up_proj") else 0.1) for name in layers}
    assert mean_sparsity(mixed, sizes) == pytest.approx((13 * 0.1 + 3 * 0.9) / 16)


def test_factors_are_kept_in_files(tmp_path, monkeypatch):
    layer = linear(12, 18)
    down, up = Factors(tmp_path).get(layer, 5)
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr("edgewright.systems.r_sparse.layer.truncated_svd", None)  # a second one would fail
    again = Factors(tmp_path).get(layer, 3)
    assert torch.equal(again[0], down[:, :3]) and torch.equal(again[1], up[:3])
    monkeypatch.undo()
    file.write_bytes(b"\xff" * 40)  # a broken cache is no harm
    assert torch.equal(Factors(tmp_path).get(layer, 5)[0], down)


# -- claim, on the real model ------------------------------------------------------------------------------------------


def test_low_rank_alone_is_far_worse_and_more_sparsity_costs_more(smollm2):
    """The order of Table 3, on the first two blocks of SmolLM2 with a few real tokens."""
    from edgewright.io.text import load_texts, token_blocks

    model, tokenizer = smollm2
    small = copy.copy(model)  # the same head and table, blocks of its own
    small._modules = dict(model._modules)
    small.model = copy.copy(model.model)
    small.model._modules = dict(model.model._modules)
    small.model.layers = nn.ModuleList(copy.deepcopy(layer) for layer in model.model.layers[:2])
    text = token_blocks(load_texts(None, "calibration"), tokenizer, 64, 2)
    held_out = token_blocks(load_texts(None, "evaluation"), tokenizer, 32, 1)
    config = RSparseConfig(0.5)
    stats = calibrate(small, [text], config)
    kl = {}
    for name, plan in {
        "0.3": LayerPlan(0.3),
        "0.5": LayerPlan(0.5),
        "0.7": LayerPlan(0.7),
        "low rank": LayerPlan(0.5, 0.0),
    }.items():
        apply_rsparse(small, config, stats, dict.fromkeys(stats.histograms, plan))
        kl[name] = evaluate(small, held_out).kl
        remove_rsparse(small)
    assert kl["0.3"] < kl["0.5"] < kl["0.7"] and kl["low rank"] > 3 * kl["0.5"]
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear  # the shared model was left alone


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0; it must be"),
        ({"sparsity": -0.1}, "sparsity=-0.1; it must be"),
        ({"sparsity": math.nan}, "it must be a number"),
        ({"rho": 1.1}, "rho=1.1; it must be"),
        ({"score": "size"}, "score='size'; it must be one of"),
        ({"path": "fast"}, "path='fast'; it must be one of"),
        ({"targets": "("}, "no regular expression"),
    ],
)
def test_settings_that_cannot_be(settings, complaint):
    with pytest.raises(UsageError, match=complaint):
        RSparseConfig(**settings)


def test_texts_and_models_that_cannot_be(tiny_llama):
    config = RSparseConfig(0.5)
    with pytest.raises(UsageError, match="63 tokens of calibration text are too few"):
        calibrate(tiny_llama, [TOKENS[:1, :63]], config)
    with pytest.raises(UsageError, match="token ids of shape"):
        calibrate(tiny_llama, [TOKENS[0]], config)
    with pytest.raises(UsageError, match="no linear layer's name matches"):
        calibrate(tiny_llama, [TOKENS], RSparseConfig(targets="dense"))
    stats = calibrate(tiny_llama, [TOKENS], config)
    with pytest.raises(UsageError, match="the calibration has weighted scores"):
        apply_rsparse(tiny_llama, RSparseConfig(score="magnitude"), stats)
    with pytest.raises(UsageError, match="the plan does not fit"):
        apply_rsparse(tiny_llama, config, stats, {"lm_head": LayerPlan(0.5)})
    with pytest.raises(UsageError, match="would read nothing"):
        apply_rsparse(tiny_llama, RSparseConfig(0.99, rho=0.0), stats)
    with pytest.raises(UsageError, match="was not calibrated"):
        apply_rsparse(tiny_llama, config, Calibration({}, 1, "", "weighted"))
    with pytest.raises(UsageError, match="no R-Sparse layer"):
        evaluate(tiny_llama, HELD_OUT)
    assert not sparse_layers(tiny_llama)  # every refusal came before the first layer was replaced
    apply_rsparse(tiny_llama, config, stats)
    with pytest.raises(UsageError, match="is an R-Sparse layer already"):
        apply_rsparse(tiny_llama, config, stats)
    with pytest.raises(UsageError, match="dense_prefix=1"):
        evaluate(tiny_llama, HELD_OUT, dense_prefix=1.0)


def test_layers_that_cannot_be(tiny_llama):
    config = RSparseConfig(0.5)
    unused = copy.deepcopy(tiny_llama)
    unused.extra_up_proj = nn.Linear(8, 8)
    with pytest.raises(CheckFailed, match="extra_up_proj never ran"):
        calibrate(unused, [TOKENS], config)
    broken = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        broken.model.layers[1].input_layernorm.weight.fill_(math.nan)
    with pytest.raises(CheckFailed, match=r"model\.layers\.1\.self_attn\.q_proj holds NaN"):
        calibrate(broken, [TOKENS], config)
    training = edgewright.quantize_(
        copy.deepcopy(tiny_llama), QuantConfig(rules=(Rule("*_proj", WeightConfig("int4")),))
    )
    with pytest.raises(Unsupported, match="convert_"):
        calibrate(training, [TOKENS], config)
    with torch.device("meta"):
        empty = make_tiny_llama()
    with pytest.raises(Unsupported, match="meta device"):
        calibrate(empty, [TOKENS], config)
    holed = linear(4, 4)
    holed.weight[0, 0] = math.nan
    with pytest.raises(CheckFailed, match="no singular values"):
        truncated_svd(holed, 2)


def test_packed_layers_take_plain_torch_without_a_compiler(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (24, 32), generator=generator, dtype=torch.int8)
    layer = PackedLinear(PackedTensor(codes, torch.rand(24, 1, generator=generator), "int4"))
    x = torch.randn(32, generator=generator)
    made = sparse(layer, 3.0)
    wanted = made(x)
    monkeypatch.setattr(sparse_rows, "_kernel", lambda extra=(): (None, "none"))
    torch.testing.assert_close(made(x), wanted, rtol=1e-5, atol=1e-4)

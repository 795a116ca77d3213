"""The sparse layer: equal to Glm4MoeMoE and to a loop over tokens in float64, whatever the back-end."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE

from edgewright.errors import CheckFailed, UsageError
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import new_decoder
from edgewright.quantization.api import convert_, dequantize_, quantize_
from edgewright.quantization.config import ActivationConfig, QuantConfig, Rule, WeightConfig
from edgewright.systems.mobilemoe.backends import counting_sort
from edgewright.systems.mobilemoe.design import SHAPES, mobilemoe, moe_parameters
from edgewright.systems.mobilemoe.layer import MoEConfig, SparseMoE

SMALL = MoEConfig(num_experts=12, top_k=3, expert_size=32, shared_size=48)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(seed: int = 0, hidden: int = 64, **changes: Any) -> SparseMoE:
    module = SparseMoE(hidden, replace(SMALL, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), module.gate.e_score_correction_bias):
            tensor.normal_(0, 0.1, generator=generator)
    return module


def by_token(module: SparseMoE, u: Tensor) -> Tensor:
    """The formulas of the paper, token by token, in float64."""
    c, rows = module.config, []
    router, bias = module.gate.weight.double(), module.gate.e_score_correction_bias.double()
    for x in u.double().flatten(0, -2):
        scores = torch.sigmoid(router @ x)
        chosen = sorted(range(c.num_experts), key=lambda e: (-float((scores[e] + bias[e]).detach()), e))[: c.top_k]
        total = sum(scores[e] for e in chosen) + 1e-20
        y = torch.zeros_like(x)
        for e in chosen:
            gate, up = (module.experts.gate_up_proj[e].double() @ x).chunk(2)
            y = y + c.route_scale * scores[e] / total * (module.experts.down_proj[e].double() @ (F.silu(gate) * up))
        if c.shared_size:
            shared = module.shared_experts
            inner = F.silu(shared.gate_proj.weight.double() @ x) * (shared.up_proj.weight.double() @ x)
            y = y + shared.down_proj.weight.double() @ inner
        rows.append(y)
    return torch.stack(rows).view_as(u)


def gradients(module: SparseMoE, u: Tensor) -> tuple[Tensor, list[Tensor]]:
    u = u.clone().requires_grad_()
    module.zero_grad()
    out = module(u)
    (out * draw(*out.shape, seed=9)).sum().backward()
    return out.detach(), [u.grad, *(p.grad for p in module.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("changes", [{}, {"shared_size": 0, "route_scale": 2.5}, {"top_k": 1}, {"top_k": 12}])
def test_it_is_the_formula(changes: dict[str, Any]) -> None:
    module, u = layer(**changes), draw(2, 9, 64)
    torch.testing.assert_close(module(u).double(), by_token(module, u), rtol=1e-5, atol=1e-6)


BACKENDS = ("sorted", "grouped_mm", "gather", "dense", "auto")


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_the_loop(backend: str) -> None:
    u = draw(2, 20, 64)
    expected, slopes = gradients(layer(backend="loop"), u)
    found, ours = gradients(layer(backend=backend), u)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(ours, slopes, strict=True):
        # sums over 40 tokens in another order, of terms up to 10
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_widths_without_a_grouped_matmul_fall_back() -> None:
    u = draw(1, 20, 30)
    loop, grouped = (layer(hidden=30, expert_size=5, backend=name) for name in ("loop", "grouped_mm"))
    torch.testing.assert_close(grouped(u), loop(u), rtol=1e-5, atol=1e-6)


def test_it_is_glm4_moe() -> None:
    config = Glm4MoeConfig(
        hidden_size=64, moe_intermediate_size=32, n_routed_experts=12, num_experts_per_tok=3, n_shared_experts=2,
        n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.5,
    )  # fmt: skip
    config._experts_implementation = "eager"  # a model's own would choose it
    theirs = Glm4MoeMoE(config)
    ours = layer(shared_size=64, route_scale=1.5)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    u = draw(2, 15, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(u), theirs(u), rtol=1e-5, atol=1e-6)


def test_all_experts_with_equal_scores_are_their_mean() -> None:
    module, u = layer(top_k=12, shared_size=0), draw(5, 64)
    with torch.no_grad():
        module.gate.weight.zero_()
        gate, up = torch.einsum("nd,efd->enf", u, module.experts.gate_up_proj).chunk(2, -1)
        each = torch.einsum("enf,edf->end", F.silu(gate) * up, module.experts.down_proj)
        torch.testing.assert_close(module(u), each.mean(0), rtol=1e-5, atol=1e-6)


def test_the_bias_selects_and_does_not_weigh() -> None:
    module, u = layer(), draw(40, 64)
    with torch.no_grad():
        free = module.gate(u)
        module.gate.e_score_correction_bias[7] += 10
        pushed = module.gate(u)
    assert not (free.indices == 7).any(1).all() and (pushed.indices == 7).any(1).all()
    scores = free.logits.sigmoid().gather(1, pushed.indices)
    torch.testing.assert_close(pushed.weights, scores / scores.sum(1, keepdim=True))
    assert torch.equal(pushed.logits, free.logits)


def test_ties_go_to_the_lower_index() -> None:
    module = layer()
    with torch.no_grad():
        module.gate.weight.zero_()
        module.gate.e_score_correction_bias.copy_(torch.tensor([0.0, 1, 0, 1, 1, 1, 0, -2, 0, 0, 0, 0]))
        assert module.gate(draw(3, 64)).indices.tolist() == [[1, 3, 4]] * 3


def test_counting_sort_is_a_stable_sort() -> None:
    ids = torch.randint(0, 7, (500,), generator=torch.Generator().manual_seed(0))
    order, counts = counting_sort(ids, 9)
    assert order.tolist() == sorted(range(500), key=lambda i: int(ids[i]))
    assert counts.tolist() == [int((ids == e).sum()) for e in range(9)]


@pytest.mark.parametrize("backend", ["loop", "sorted", "grouped_mm", "auto"])
def test_overflow_is_dropped_by_arrival(backend: str) -> None:
    """Eight tokens that all want experts 1 and 3: capacity ceil(1.5 * 8 * 2 / 4) = 6 keeps the first six of both."""
    module = SparseMoE(64, MoEConfig(4, 2, 8, 8, capacity_factor=1.5, backend=backend)).train()
    whole = layer(seed=1, num_experts=4, top_k=2, expert_size=8, shared_size=8)
    module.load_state_dict(whole.state_dict())
    u = draw(8, 64)
    with torch.no_grad():
        for m in (module, whole):
            m.gate.e_score_correction_bias.copy_(torch.tensor([0.0, 9, 0, 9]))
        shared = whole.shared_experts(u)
        expected = torch.cat([whole(u)[:6], shared[6:]])
        torch.testing.assert_close(module(u), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(module.eval()(u), whole(u), rtol=1e-5, atol=1e-6)  # inference drops nothing
    assert module.last_routing is not None and module.last_routing.counts.tolist() == [0, 8, 0, 8]


@pytest.mark.parametrize("backend", ["loop", "sorted", "grouped_mm"])
def test_no_tokens_are_no_error(backend: str) -> None:
    module = layer(backend=backend, capacity_factor=1.5)
    for mode in (True, False):
        assert module.train(mode)(torch.zeros(0, 5, 64)).shape == (0, 5, 64)


def test_the_router_stays_in_float32() -> None:
    module = layer().to(torch.bfloat16)
    assert module.gate.weight.dtype == module.gate.e_score_correction_bias.dtype == torch.float32
    assert module.experts.down_proj.dtype == torch.bfloat16
    u = draw(6, 64)
    assert module(u.bfloat16()).dtype == torch.bfloat16
    exact = layer().gate(u).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer().gate(u).logits, exact)


@pytest.mark.parametrize("length", [1, 20])
def test_it_exports(length: int) -> None:
    module = layer().eval()
    program = torch.export.export(module, (draw(1, length, 64),))
    u = draw(1, length, 64, seed=3)
    torch.testing.assert_close(program.module()(u), module(u), rtol=1e-5, atol=1e-6)


def decoder_config(**changes: Any) -> EdgeDecoderConfig:
    moe = {"num_experts": 6, "top_k": 2, "expert_size": 32, "shared_size": 64}
    fields = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    return EdgeDecoderConfig(**{**fields, "ffn_types": "moe", "moe": moe, **changes})


def test_a_decoder_of_experts_generates_with_its_cache(tmp_path: Any) -> None:
    model = new_decoder(decoder_config()).eval()
    assert float(model.model.layers[0].mlp.experts.gate_up_proj.detach().std()) == pytest.approx(0.02, rel=0.05)
    ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.generate(ids, **options), expected)
    copy.deepcopy(model.train())(ids, labels=ids).loss.backward()
    copy.deepcopy(model)


@pytest.mark.parametrize("size", SHAPES)
def test_the_published_shapes_have_their_parameters(size: str) -> None:
    config = mobilemoe(size)
    assert moe_parameters(config) == (SHAPES[size].total, SHAPES[size].active)
    moe = MoEConfig(**config.moe or {})
    assert (moe.num_experts, moe.top_k, moe.shared_size) == (60, 4, 2 * config.hidden_size)
    assert moe.expert_size * 2 == config.hidden_size


def test_the_count_is_that_of_the_model() -> None:
    for changes in (
        {},
        {"tie_word_embeddings": False, "qkv_bias": True, "ffn_types": ["moe", "mlp"], "qk_norm": "rms"},
    ):
        model = new_decoder(decoder_config(**changes))
        assert moe_parameters(model.config)[0] == sum(p.numel() for p in model.parameters())


# -- four bits ---------------------------------------------------------------------------------------------------------

INT4 = Rule("*", WeightConfig("int4", 32, scale="full_range", scale_dtype="float32"), ActivationConfig(8))


@pytest.mark.parametrize("group_axis", ["in", "out"])
def test_experts_train_in_four_bits_and_ship_as_trained(group_axis: str) -> None:
    plain = layer(group_axis=group_axis, hidden=64, shared_size=64)
    module = quantize_(copy.deepcopy(plain), QuantConfig((INT4,)))
    assert type(module.gate) is type(plain.gate)  # the router is never quantised
    u = draw(2, 9, 64)
    module(u).square().sum().backward()
    stack = module.experts.gate_up_proj
    assert stack.weight.grad is not None and stack.weight.grad.abs().sum() > 0
    scale = full_range(plain.experts.gate_up_proj.detach(), group_axis)
    torch.testing.assert_close(stack(), scale, rtol=0, atol=0)
    with torch.no_grad():
        for backend in ("loop", "sorted", "grouped_mm"):
            module.experts.config = replace(module.experts.config, backend=backend)
            torch.testing.assert_close(module(u), trained(module, u), rtol=1e-5, atol=1e-6)
        expected = module(u)
        convert_(module)
        assert module.experts.down_proj.codes.dtype == torch.int8
        torch.testing.assert_close(module.experts.gate_up_proj[3], scale[3], rtol=0, atol=0)
        torch.testing.assert_close(module(u), expected, rtol=1e-6, atol=1e-6)
    dequantize_(module)
    assert isinstance(module.experts.gate_up_proj, nn.Parameter)
    assert sorted(module.state_dict()) == sorted(plain.state_dict())
    assert torch.equal(module.experts.gate_up_proj.detach(), scale)


def full_range(weight: Tensor, group_axis: str) -> Tensor:
    """The paper's rule in the obvious way: groups of 32, s = 2 max / 15, half to even, -8 to 7."""
    rows = weight if group_axis == "in" else weight.transpose(1, 2)
    groups = rows.reshape(-1, 32)
    step = groups.abs().amax(1, keepdim=True) / 7.5
    values = ((groups / step).round().clamp(-8, 7) * step).view(rows.shape)
    return values if group_axis == "in" else values.transpose(1, 2)


def trained(module: Any, u: Tensor) -> Tensor:
    """The plain loop over the quantised values and inputs."""
    copied = SparseMoE(64, module.config)
    quantized, shared = module.experts.gate_up_proj.input_quantizer, module.shared_experts
    flat = u.flatten(0, 1)
    routing = module.gate(flat)
    out = torch.zeros_like(flat)
    for n in range(len(flat)):
        for weight, e in zip(routing.weights[n], routing.indices[n].tolist(), strict=True):
            gate, up = (module.experts.gate_up_proj()[e] @ quantized(flat[n : n + 1])[0]).chunk(2)
            hidden = module.experts.down_proj.input_quantizer((F.silu(gate) * up).unsqueeze(0))[0]
            out[n] += weight * (module.experts.down_proj()[e] @ hidden)
    assert copied.config == module.config
    return (out + shared(flat)).view_as(u)


def test_four_bits_are_torchao_s() -> None:
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    weight = layer().experts.gate_up_proj.detach()
    config = QuantConfig((Rule("*gate_up_proj", INT4.weight),))
    module = convert_(quantize_(layer(), config))
    matrix = weight.flatten(0, 1)
    step, zero = choose_qparams_affine(
        matrix, MappingType.SYMMETRIC, (1, 32), torch.int8, -8, 7, eps=1e-9, scale_dtype=torch.float32
    )
    codes = quantize_affine(matrix, (1, 32), step, zero, torch.int8, -8, 7)
    stack = module.experts.gate_up_proj
    # torchao multiplies by the reciprocal of a step: a weight that lies between two codes may go to the other one,
    # and the largest of a group, 7.5 steps, is such a weight
    place = (matrix / step.view(-1, 2).repeat_interleave(32, 1)).abs()
    moved = stack.codes != codes
    assert moved.any() and ((place - place.floor())[moved] - 0.5).abs().max() < 1e-5
    assert ((stack.codes - codes).abs() <= 1).all()
    torch.testing.assert_close(stack.step, step.view_as(stack.step), rtol=1e-6, atol=0)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 13}, "top_k=13; it must be a whole number from 1 to 12"),
        ({"top_k": 0}, "top_k=0"),
        ({"num_experts": 2.5}, "num_experts=2.5"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0; it must be a number above 0, or None"),
        ({"backend": "fast"}, "backend='fast'; it must be one of auto, loop"),
        ({"score": "tanh"}, "score='tanh'"),
        ({"group_axis": "row"}, "group_axis='row'"),
        ({"hidden_act": "swoosh"}, "hidden_act='swoosh'"),
        ({"route_scale": float("nan")}, "route_scale=nan"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SMALL, **changes)


def test_splits_that_do_not_divide_are_refused() -> None:
    assert asdict(MoEConfig.split(3072)) == asdict(MoEConfig(60, 4, 384, 1536))
    assert asdict(MoEConfig.split(512, 8, 4, shared=False)) == asdict(MoEConfig(32, 4, 128, 0))
    with pytest.raises(UsageError, match="granularity=7 does not divide the feed-forward width 512"):
        MoEConfig.split(512, 8, 7)
    with pytest.raises(UsageError, match="granularity=1 leaves no routed piece"):
        MoEConfig.split(512, 8, 1)


def test_a_router_of_nan_is_named() -> None:
    module = layer()
    with pytest.raises(CheckFailed, match="its inputs hold NaN"):
        module(torch.full((2, 64), float("nan")))
    with torch.no_grad():
        module.gate.weight[0, 0] = float("inf")
    with pytest.raises(CheckFailed, match="its weights hold NaN or infinity"):
        module(draw(2, 64))


def test_groups_that_do_not_divide_an_expert_are_refused() -> None:
    module = layer(expert_size=20)
    before = module.experts.down_proj
    with pytest.raises(UsageError, match="experts.down_proj: its rows of 20 weights do not divide into groups of 32"):
        quantize_(module, QuantConfig((INT4,)))
    assert module.experts.down_proj is before


def test_a_capacity_needs_a_backend_that_drops() -> None:
    with pytest.raises(UsageError, match="backend='dense' cannot drop tokens"):
        layer(backend="dense", capacity_factor=1.0).train()(draw(4, 64))

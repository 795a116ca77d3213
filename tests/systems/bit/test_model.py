"""The BiT student: which tensors take which values, what stays float, the way back, and what is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from edgewright.errors import CheckFailed, Unsupported, UsageError
from edgewright.quantization.attention import AttentionQuantizers
from edgewright.quantization.layers import QuantEmbedding, QuantLinear
from edgewright.systems.bit.model import BitConfig, binarize_encoder_, elastic_quantizers, parameter_groups

IDS = torch.randint(5, 99, (16, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(16, 12, dtype=torch.long)
MASK[:8, 7:] = 0
BATCH = {"input_ids": IDS, "attention_mask": MASK}
SMALL = {"vocab_size": 99, "max_position_embeddings": 40}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="attention .* switched to eager")
        yield


def encoder(kind: str = "bert") -> nn.Module:
    import transformers as t

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "distilbert":
            config = t.DistilBertConfig(**SMALL, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
            return t.DistilBertModel(config).eval()
        if kind == "roberta":
            return t.RobertaModel(t.RobertaConfig(**SMALL, **SIZES)).eval()
        return t.BertModel(t.BertConfig(**SMALL, **SIZES)).eval()


def states(model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(model(**BATCH, output_hidden_states=True).hidden_states)


def captured(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What every activation quantiser received and gave."""
    given, results = {}, {}
    hooks = []
    for name, module in elastic_quantizers(model):

        def keep(_, inputs, output, name=name):
            given[name], results[name] = inputs[0].detach(), output.detach()

        hooks.append(module.register_forward_hook(keep))
    states(model)
    for hook in hooks:
        hook.remove()
    return given, results


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_thirty_two_bits_are_the_teacher_bit_for_bit(kind):
    teacher = encoder(kind)
    for start in (teacher, binarize_encoder_(copy.deepcopy(teacher), BitConfig(weight_bits=1, activation_bits=32))):
        student = binarize_encoder_(copy.deepcopy(start), BitConfig(weight_bits=32, activation_bits=32))
        assert all(torch.equal(a, b) for a, b in zip(states(student), states(teacher), strict=True))
        assert set(student.state_dict()) == set(teacher.state_dict())


def test_eager_attention_without_quantisers_is_the_teachers():
    import transformers as t

    from edgewright.quantization.attention import quantize_attention_

    teacher = t.BertModel._from_config(encoder().config, attn_implementation="eager")
    teacher.load_state_dict(encoder().state_dict())
    wanted = states(teacher.eval())
    quantize_attention_(teacher, lambda name, module: AttentionQuantizers())
    assert all(torch.equal(a, b) for a, b in zip(states(teacher), wanted, strict=True))


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_every_binary_tensor_has_two_values(kind):
    model = encoder(kind)
    for name, p in model.named_parameters():
        if "query" in name or "q_lin" in name:
            p.data.mul_(40)  # random attention is so even that every probability would round to 0
    binarize_encoder_(model)
    given, results = captured(model)
    unsigned = {"bert": "output.dense", "roberta": "output.dense", "distilbert": "ffn.lin2"}[kind]
    pooler = kind != "distilbert"
    assert len(results) == 2 * (6 + 4) + pooler  # linear layers, and q, k, v and probabilities, in each of two layers
    for name, quantizer in elastic_quantizers(model):
        expected_set = "probabilities" in name or (unsigned in name and "attention.output" not in name)
        assert quantizer.config.signed is not expected_set, name
        alpha = quantizer.alpha.item()
        assert set(results[name].unique().tolist()) == ({0.0, alpha} if expected_set else {-alpha, alpha}), name
        if expected_set:
            assert bool((given[name] >= 0).all()), name  # ReLU or softmax stands before it
    for name, result in results.items():
        if "probabilities" in name:
            assert bool((result[:8, :, :, 7:] == 0).all())  # padding stays without weight


def test_weights_follow_the_papers_formula():
    teacher = encoder()
    model = binarize_encoder_(copy.deepcopy(teacher))
    linear = model.encoder.layer[0].attention.self.query
    assert isinstance(linear, QuantLinear) and isinstance(model.embeddings.word_embeddings, QuantEmbedding)
    w = linear.weight.detach()
    wanted = w.abs().mean() * torch.where(w - w.mean() >= 0, 1.0, -1.0)
    torch.testing.assert_close(linear.quantizer.values(linear.weight).detach(), wanted, rtol=1e-6, atol=0)
    table = teacher.embeddings.word_embeddings.weight.detach()
    rows = table.abs().mean(1, keepdim=True) * torch.where(table - table.mean() >= 0, 1.0, -1.0)
    found = model.embeddings.word_embeddings(IDS).detach()
    torch.testing.assert_close(found, rows[IDS], rtol=1e-6, atol=0)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm | nn.Embedding) and not isinstance(module, QuantEmbedding):
            other = teacher.get_submodule(name)
            assert torch.equal(module.weight, other.weight), name


def test_straight_through_gradient_is_exact():
    model = binarize_encoder_(encoder())
    linear = model.encoder.layer[0].intermediate.dense
    x, upstream = torch.randn(5, 32), torch.randn(5, 64)
    linear(x).backward(upstream)
    assert torch.equal(linear.weight.grad, upstream.t() @ linear.input_quantizer(x).detach())


def test_gelu_gives_way_only_where_both_sets_are_used():
    for config, kept in ((BitConfig(), nn.ReLU), (BitConfig(1, 32), None), (BitConfig(two_sets=False), None)):
        model = binarize_encoder_(encoder(), config)
        activation = model.encoder.layer[0].intermediate.intermediate_act_fn
        assert isinstance(activation, nn.ReLU) is (kept is nn.ReLU)
        assert (model.config.hidden_act == "relu") is (kept is nn.ReLU)


def test_the_next_stage_keeps_weights_and_thresholds_and_starts_scales_anew():
    model = binarize_encoder_(encoder(), BitConfig(activation_bits=2))
    states(model)
    for _, quantizer in elastic_quantizers(model):
        if quantizer.shift is not None:
            quantizer.shift.data.add_(0.25)
        quantizer.alpha.data.fill_(7.0)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("dense.weight")}
    identity = {name: id(p) for name, p in model.named_parameters() if name in weights}
    binarize_encoder_(model, BitConfig(activation_bits=1))
    assert identity == {name: id(p) for name, p in model.named_parameters() if name in weights}
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in weights.items())
    for name, quantizer in elastic_quantizers(model):
        assert quantizer.config.levels == "binary" and not quantizer.is_calibrated()
        assert quantizer.shift is None or bool((quantizer.shift == 0.25).all()), name
    states(model)
    assert all(quantizer.alpha.item() != 7.0 for _, quantizer in elastic_quantizers(model))


def test_choices_of_the_configuration():
    def shifts(config):
        return {name for name, q in elastic_quantizers(binarize_encoder_(encoder(), config)) if q.shift is not None}

    ours, official = shifts(BitConfig()), shifts(BitConfig(official_qkv_shift=True))
    assert len(ours - official) == 2 * 3 and all("attention_quantizers" in name for name in ours - official)
    assert shifts(BitConfig(shift=False)) == set()
    quantizers = dict(elastic_quantizers(binarize_encoder_(encoder(), BitConfig(two_sets=False, learn_scale=False))))
    assert all(q.config.signed and not q.alpha.requires_grad for q in quantizers.values())
    model = binarize_encoder_(
        encoder(), BitConfig(sets=(("*.0.output.dense", "signed"), ("*.1.output.dense", "float")))
    )
    assert model.encoder.layer[0].output.dense.input_quantizer.config.signed
    assert model.encoder.layer[1].output.dense.input_quantizer is None
    model = binarize_encoder_(encoder(), BitConfig(embeddings=False, pooler=False))
    assert type(model.pooler.dense) is nn.Linear and type(model.embeddings.word_embeddings) is nn.Embedding


def test_groups_hold_every_parameter_once_and_scales_apart():
    model = binarize_encoder_(encoder())
    groups = parameter_groups(model, 1e-3, scale_rate=1e-4, weight_decay=0.01)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters()) and len(set(ids)) == len(ids)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.01), (1e-3, 0.0), (1e-4, 0.0)]
    assert len(groups[2]["params"]) == len(elastic_quantizers(model))
    assert all(p.ndim > 1 for p in groups[0]["params"]) and all(p.ndim == 1 for p in groups[1]["params"])


def test_fused_attention_is_switched_with_a_note():
    model = encoder()
    model.set_attn_implementation("sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match="attention 'sdpa' .* switched to eager"):
            binarize_encoder_(model)


def test_models_that_cannot_be_binarised_are_refused_by_name(tiny_llama):
    import transformers as t

    with pytest.raises(Unsupported, match="LlamaForCausalLM .llama.: decoders take quantize_"):
        binarize_encoder_(tiny_llama)
    with pytest.raises(Unsupported, match="knows the encoders bert, roberta, distilbert"):
        binarize_encoder_(nn.Linear(2, 2))
    decoder = t.BertConfig(**SMALL, **SIZES, is_decoder=True)
    with pytest.raises(Unsupported, match="decoders take"):
        binarize_encoder_(t.BertModel(decoder))
    with pytest.raises(UsageError, match="tied to the output layer"):
        binarize_encoder_(t.BertForMaskedLM(t.BertConfig(**SMALL, **SIZES)))


def test_values_that_cannot_be_meant_are_refused():
    for wrong in ({"weight_bits": 2}, {"activation_bits": 16}, {"sets": (("*", "binary"),)}):
        with pytest.raises(UsageError):
            BitConfig(**wrong)
    with pytest.raises(UsageError, match="matches no linear layer"):
        binarize_encoder_(encoder(), BitConfig(sets=(("decoder.*", "signed"),)))


def test_negative_inputs_of_the_unsigned_set_name_their_layer():
    model = binarize_encoder_(encoder(), BitConfig(check=True))
    states(model)
    model.encoder.layer[1].intermediate.intermediate_act_fn = nn.Identity()
    with pytest.raises(CheckFailed, match=r"encoder.layer.1.output.dense has negative values"):
        states(model)

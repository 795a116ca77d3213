"""Second-order calibration: an oracle in float64, its effect on outputs, its memory."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from edgewright.errors import Unsupported, UsageError
from edgewright.quantization.api import convert_, quantize_
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.quantization.fake_quantize import Quantizer
from edgewright.quantization.gptq import gptq_, inverse_factor, repair
from edgewright.quantization.grids import GRIDS
from edgewright.quantization.scales import grouped, mse_alpha


def slow_repair(weight, step, hessian, damping, encode):
    """Optimal brain quantisation with full downdates of the inverse Hessian, float64, one row at a time."""
    diagonal = np.diag(hessian)
    order = np.argsort(-diagonal, kind="stable")
    damped = hessian[np.ix_(order, order)] + np.eye(len(order)) * damping * diagonal.mean()
    result = np.zeros_like(weight)
    for row in range(weight.shape[0]):
        values = weight[row][order].astype(np.float64).copy()
        inverse = np.linalg.inv(damped)
        for column in range(len(order)):
            level = encode(values[column] / step[row, order[column]]) * step[row, order[column]]
            result[row, order[column]] = level
            scaled = (values[column] - level) / inverse[column, column]
            values -= scaled * inverse[column]
            inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return result


@pytest.mark.parametrize("name", ["int4", "seq2", "ternary", "binary"])
def test_repair_equals_the_slow_algorithm(name):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=generator)
    mixing = torch.randn(32, 32, generator=generator)
    inputs = torch.randn(200, 32, generator=generator) @ mixing
    hessian = inputs.t() @ inputs
    quantizer = Quantizer(GRIDS[name])
    alpha = mse_alpha(grouped(weight, 2), GRIDS[name])
    latent = repair(weight, alpha, quantizer, *inverse_factor(hessian, 0.01))
    step = quantizer.step(alpha).repeat_interleave(16, dim=1).numpy()

    def encode(u):
        code = GRIDS[name].encode_(torch.tensor([u], dtype=torch.float64))
        return float(code + GRIDS[name].offset)

    slow = slow_repair(weight.numpy(), step, hessian.double().numpy(), 0.01, encode)
    same = np.isclose(quantizer.values(latent, alpha).numpy(), slow, rtol=1e-6)
    # A float32 value that lies on a rounding boundary may fall to the other side; the rest must agree.
    assert same.mean() > 0.97


def test_calibration_repairs_outputs_and_codes_survive_conversion(tiny_llama):
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (8, 32), generator=generator)
    probe = torch.randint(0, 256, (4, 32), generator=generator)
    with torch.no_grad():
        reference = tiny_llama(probe).logits
    config = QuantConfig.weights("seq2", 32, scale="mse")
    plain = quantize_(copy.deepcopy(tiny_llama), config)
    repaired = copy.deepcopy(tiny_llama)
    seen = []
    errors = gptq_(repaired, config, blocks, on_layer=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)] and len(errors) == 14
    assert all(error.repaired < error.rounded for error in errors)
    with torch.no_grad():
        after = repaired(probe).logits
        assert (after - reference).square().mean() < (plain(probe).logits - reference).square().mean()
        assert torch.equal(convert_(repaired)(probe).logits, after)


def test_same_result_twice_and_learned_scales_can_go_on_training(tiny_llama):
    blocks = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(2))
    models = [copy.deepcopy(tiny_llama) for _ in range(2)]
    for model in models:
        gptq_(model, QuantConfig.weights("int3", 32, scale="learned"), blocks)
    for (name, first), second in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(first, second), name
    models[0](blocks, labels=blocks).loss.backward()
    scale = models[0].model.layers[0].mlp.up_proj.quantizer.weight_scale
    assert scale.grad is not None and scale.grad.abs().sum() > 0


def test_encoders_are_calibrated_too():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    ).eval()
    blocks = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(3))
    errors = gptq_(model, QuantConfig((Rule("encoder.layer.*", WeightConfig("int4", 32)),)), blocks)
    assert len(errors) == 12 and all(error.repaired <= error.rounded * 1.05 for error in errors)


def test_refusals(tiny_llama):
    with pytest.raises(UsageError, match="samples, length"):
        gptq_(tiny_llama, QuantConfig.weights("int4"), torch.zeros(0, 8, dtype=torch.int64))
    with pytest.raises(Unsupported, match="no list of blocks"):
        gptq_(nn.Sequential(nn.Linear(32, 4)), QuantConfig.weights("int4"), torch.zeros(1, 8, dtype=torch.int64))

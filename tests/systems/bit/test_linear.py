"""Packed binary layers: exact products, sizes by arithmetic, folders and ONNX files that give the model back."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from edgewright.errors import FormatError, UsageError
from edgewright.kernels.popcount import pack_bits
from edgewright.quantization.elastic import ElasticConfig, ElasticQuantizer
from edgewright.systems.bit.folder import KEY, load_binary, save_binary
from edgewright.systems.bit.linear import BinaryEmbedding, BinaryLinear, pack_binary_, size_rows
from edgewright.systems.bit.model import BitConfig, binarize_encoder_, elastic_quantizers

IDS = torch.randint(5, 99, (16, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(16, 12, dtype=torch.long)
MASK[:8, 7:] = 0
BATCH = {"input_ids": IDS, "attention_mask": MASK}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="attention .* switched to eager")
        yield


def student(config: BitConfig | None = None, **sizes: int) -> nn.Module:
    """A small BERT as a calibrated BiT student, its thresholds moved off zero."""
    from transformers import BertConfig, BertModel

    shape = {"vocab_size": 99, "max_position_embeddings": 40, "hidden_size": 36, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "intermediate_size": 72, **sizes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = binarize_encoder_(BertModel(BertConfig(**shape)).eval(), config)
        for _, quantizer in elastic_quantizers(model):
            if quantizer.shift is not None:
                nn.init.normal_(quantizer.shift, std=0.1)
    output(model)
    return model


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).last_hidden_state


def quantizer(signed: bool, features: int, alpha: float, seed: int = 0) -> ElasticQuantizer:
    module = ElasticQuantizer(ElasticConfig(signed=signed), "layer", features)
    module.calibrate(torch.ones(1))
    module.alpha.data.fill_(alpha)
    nn.init.normal_(module.shift, std=0.2, generator=torch.Generator().manual_seed(seed))
    return module


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.booleans(), st.integers(0, 2**31 - 1))
def test_packed_product_equals_the_fake_quantised_one_exactly(n, out, signed, seed):
    """Scales that are powers of two let float32 add up exactly, so both orders of rounding must meet."""
    generator = torch.Generator().manual_seed(seed)
    inputs = quantizer(signed, n, 0.25, seed)
    signs = torch.randn(out, n, generator=generator) >= 0
    layer = BinaryLinear(pack_bits(signs), n, torch.tensor([0.5]), None, inputs)
    x = torch.randn(7, n, generator=generator)
    with torch.no_grad():
        wanted = F.linear(inputs(x), (signs.float() * 2 - 1) * 0.5)
    assert torch.equal(layer.weight, (signs.float() * 2 - 1) * 0.5)
    for path in ("auto", "torch", "float"):
        layer.path = path
        assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("signed", [True, False])
def test_with_any_scales_the_integer_is_exact_and_rounded_once(signed):
    inputs = quantizer(signed, 384, 0.37)
    signs = torch.randn(50, 384, generator=torch.Generator().manual_seed(1)) >= 0
    alpha = torch.rand(50, generator=torch.Generator().manual_seed(2))
    bias = torch.randn(50, generator=torch.Generator().manual_seed(3))
    layer = BinaryLinear(pack_bits(signs), 384, alpha, bias, inputs)
    x = torch.randn(6, 384, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        codes = (inputs(x) / inputs.alpha).round()
        integers = codes.double() @ (signs.double() * 2 - 1).t()
        wanted = integers.float() * (alpha * inputs.alpha) + bias
        floats = F.linear(inputs(x), layer.weight, bias)
    assert torch.equal(layer(x), wanted)
    # The float layer rounds each of its 384 additions.
    torch.testing.assert_close(layer(x), floats, rtol=1e-5, atol=384 * 6e-8 * 0.37)


def test_other_inputs_give_the_fake_quantised_layer_bit_for_bit():
    for config in (BitConfig(activation_bits=32), BitConfig(activation_bits=2)):
        model = student(config)
        packed = pack_binary_(copy.deepcopy(model))
        assert torch.equal(output(packed), output(model))
        with torch.no_grad():
            table = model.embeddings.word_embeddings(IDS)
        assert torch.equal(packed.embeddings.word_embeddings(IDS), table)


def test_a_packed_model_is_the_same_model_on_every_path():
    model = student()
    wanted, results = output(model), []
    for path in ("auto", "torch", "float"):
        packed = pack_binary_(copy.deepcopy(model), path)
        results.append(output(packed))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    # Rounding once instead of n times moves a hidden state in its last digits; a value on a threshold may flip, and
    # does not with this seed.
    torch.testing.assert_close(results[0], wanted, rtol=0, atol=1e-4)
    kinds = {type(m) for m in packed.modules()}
    assert {BinaryLinear, BinaryEmbedding} <= kinds and type(packed.embeddings.position_embeddings) is nn.Embedding


def test_a_loaded_state_replaces_the_kernels_copy_of_the_weights():
    one, two = (pack_binary_(student()) for _ in range(2))
    for module in one.modules():
        if isinstance(module, BinaryLinear):
            module.words.bitwise_not_()
            module._tiles = None
    before = output(two)
    two.load_state_dict(one.state_dict())
    assert torch.equal(output(two), output(one)) and not torch.equal(output(two), before)


def test_sizes_follow_the_arithmetic_of_the_real_encoder():
    import edgewright

    model, _ = edgewright.load("minilm-l6")
    binarize_encoder_(model)
    for _, q in elastic_quantizers(model):
        q.calibrate(torch.ones(1))
    rows = {row.name: row for row in size_rows(pack_binary_(model))}
    linear = [row for row in rows.values() if row.kind == "bits" and row.name.startswith("encoder")]
    table = rows["embeddings.word_embeddings.words"]
    assert sum(row.numbers for row in linear) == 6 * (4 * 384**2 + 2 * 384 * 1536) == 10616832
    assert sum(row.bytes for row in linear) == 10616832 // 8  # 1.33 MB
    assert table.numbers == 30522 * 384 and table.bytes == table.numbers // 8  # 1.47 MB
    assert rows["embeddings.word_embeddings.alpha_w"].bytes == 4 * 30522  # 0.12 MB
    assert sum(row.float_bytes for row in linear) + table.float_bytes == 4 * (10616832 + 30522 * 384)  # 89.4 MB
    thresholds = sum(row.bytes for row in rows.values() if row.kind == "threshold")
    floats = sum(row.bytes for row in rows.values() if row.kind == "float")
    assert thresholds == 4 * (6 * (3 * 384 + 3 * 384 + 384 + 384 + 1536) + 384)
    assert sum(row.bytes for row in rows.values()) < 4.2e6 and floats < 0.95e6


def test_what_cannot_be_packed_is_refused():
    from transformers import BertConfig, BertModel

    plain = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(UsageError, match="no layer is on the binary grid"):
        pack_binary_(plain)
    with pytest.raises(UsageError, match="has no scale yet: run a batch"):
        pack_binary_(binarize_encoder_(plain))
    with pytest.raises(UsageError, match="do not fit 70 inputs"):
        BinaryLinear(pack_bits(torch.ones(3, 64, dtype=torch.bool)), 70, torch.ones(1))
    with pytest.raises(UsageError, match="path='gpu'"):
        BinaryLinear(pack_bits(torch.ones(3, 64, dtype=torch.bool)), 64, torch.ones(1), path="gpu")


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [BitConfig(), BitConfig(activation_bits=2, sets=(("*.0.output.dense", "signed"),))])
def test_a_folder_gives_the_model_back(tmp_path, config):
    packed = pack_binary_(student(config))
    folder = save_binary(packed, config, tmp_path / "student")
    again = load_binary(folder)
    assert torch.equal(output(again), output(packed))
    assert set(again.state_dict()) == set(packed.state_dict())
    assert save_binary(again, config, tmp_path / "again") and (
        (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    )


def test_folders_that_lie_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_binary(pack_binary_(student()), BitConfig(), tmp_path / "student")
    weights, config = folder / "model.safetensors", folder / "config.json"
    good, text = {name: value.clone() for name, value in load_file(weights).items()}, config.read_text()
    name = "encoder.layer.0.intermediate.dense.words"
    for change, message in (
        ({name: good[name][:5]}, "should be torch.int64"),
        ({name: good[name].double()}, "should be torch.int64"),
        ({"encoder.layer.0.intermediate.dense.alpha_w": torch.tensor([float("nan")])}, "NaN or infinity"),
        ({"extra": torch.ones(1)}, "extra should be nothing, there is torch.float32"),
    ):
        save_file(good | change, weights)
        with pytest.raises(FormatError, match=message):
            load_binary(folder)
    save_file({key: value for key, value in good.items() if key != name}, weights)
    with pytest.raises(FormatError, match="there is nothing"):
        load_binary(folder)
    save_file(good, weights)
    values = json.loads(text)
    for change, message in (
        ({KEY: {"format": 1, "config": {"weight_bits": 7}}}, "no BitConfig"),
        ({KEY: {"format": 9, "config": {}}}, "of format 1"),
        ({KEY: None}, "of format 1"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "none of the encoders"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": 35}, "does not describe"),
    ):
        config.write_text(json.dumps(values | change))
        with pytest.raises(FormatError, match=message):
            load_binary(folder)
    config.write_text("{")
    with pytest.raises(FormatError, match="is not JSON"):
        load_binary(folder)
    config.write_text(text)
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(FormatError):
        load_binary(folder)
    with pytest.raises(UsageError, match="cannot read"):
        load_binary(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no packed binary layer"):
        save_binary(student(), BitConfig(), tmp_path / "float")


def test_an_onnx_file_holds_bits_and_runs_in_onnx_runtime(tmp_path):
    import onnx

    from edgewright.systems.bit.linear import export_binary_onnx

    packed = pack_binary_(student(hidden_size=64, intermediate_size=128, num_hidden_layers=1))
    result = export_binary_onnx(packed, tmp_path / "bit.onnx", example_inputs=BATCH)
    assert result.path.exists() and result.max_error <= result.tolerance
    tensors = onnx.load(result.path).graph.initializer
    wide = [t for t in tensors if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1 and min(t.dims) >= 64]
    assert not wide, [t.name for t in wide]  # no weight matrix is stored in float
    bits = [t for t in tensors if t.data_type == onnx.TensorProto.UINT8 and len(t.dims) == 3]
    assert sum(len(t.raw_data) for t in bits) == sum(r.bytes for r in size_rows(packed) if r.kind == "bits")
    with pytest.raises(UsageError, match="no packed binary layer"):
        export_binary_onnx(nn.Linear(2, 2), tmp_path / "float.onnx")

"""Layers with a forward of their own stay themselves under quantisation: compared with the original model's logits."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from edgewright.errors import Unsupported
from edgewright.export.executorch.exporter import export_executorch
from edgewright.export.huggingface import save_quantized
from edgewright.export.onnx.exporter import export_onnx
from edgewright.io.own_forward import KeptForward, refuse_own_forwards
from edgewright.io.quantized_folder import load_quantized
from edgewright.quantization.api import convert_, dequantize_, quantize_, quantized_modules
from edgewright.quantization.config import ActivationConfig, QuantConfig, Rule, WeightConfig
from tests.toy_llama import make_byte_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 128, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64,
    "scale_embedding": True, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma2": ("Gemma2ForCausalLM", SIZES | {"query_pre_attn_scalar": 16, "sliding_window": 8}),
    "Gemma3": ("Gemma3ForCausalLM", SIZES | {"query_pre_attn_scalar": 16, "sliding_window": 8}),
    "Falcon": (
        "FalconForCausalLM",
        {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
    ),
    "Bart": ("BartForConditionalGeneration", SEQ2SEQ),
    "MBart": ("MBartForConditionalGeneration", SEQ2SEQ),
    "M2M100": ("M2M100ForConditionalGeneration", SEQ2SEQ),
    "Pegasus": ("PegasusForConditionalGeneration", SEQ2SEQ),
}


def make(family: str) -> Any:
    name, settings = FAMILIES[family]
    factory = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return factory(factory.config_class(**settings)).eval()


def everything(grid: str = "int8", activation: ActivationConfig | None = None) -> QuantConfig:
    return QuantConfig((Rule("*", WeightConfig(grid, 16, scale="absmax"), activation),), skip=(), tied="together")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    extra = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, use_cache=False, **extra).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_those_of_the_original(family: str) -> None:
    original = make(family)
    expected = logits(original)
    model = quantize_(copy.deepcopy(original), everything())
    own = [module.original.__name__ for _, module in quantized_modules(model) if isinstance(module, KeptForward)]
    layers = [type(m) for m in original.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    # transformers 5.0 scales the embeddings of Gemma 2 in its model; no other of these families has plain layers only.
    assert set(own) == {kind.__name__ for kind in layers if kind not in (nn.Linear, nn.Embedding)}
    assert own or family == "Gemma2"
    fake = logits(model)
    assert 0 < float((fake - expected).norm() / expected.norm()) < 0.03
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(logits(again), fake)
    plain = dequantize_(copy.deepcopy(model))
    assert torch.equal(logits(plain), fake)
    assert [type(m) for m in plain.modules()] == [type(m) for m in original.modules()]
    assert torch.equal(logits(convert_(model)), fake)
    assert torch.equal(logits(copy.deepcopy(model)), fake)
    assert torch.equal(logits(dequantize_(model)), fake)
    with pytest.raises(Unsupported, match="whose own forward GGUF cannot express") if own else nullcontext():
        refuse_own_forwards(quantize_(plain, everything()), "GGUF")


class Scaled(nn.Linear):
    """Reads its weight itself, and has a buffer, a parameter and a keyword of its own."""

    def __init__(self) -> None:
        super().__init__(32, 16)
        self.gain = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("shift", torch.arange(16.0), persistent=False)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        out = self.gain * F.linear(x, self.weight / self.weight.norm(), self.bias) + self.shift
        return 2 * out if twice else out


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scaled, self.plain = Standardised(2, 32, 3), Scaled(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.scaled(self.conv(x).mean((2, 3)), twice=True))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_user_s_own_layers(dtype: torch.dtype) -> None:
    model, x = net().to(dtype), torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = model(x).detach()
    config = QuantConfig((Rule("*", WeightConfig("int8", "row", scale="absmax")),))
    quantize_(model, config)
    fake = model(x)
    assert 0 < float((fake - expected).norm() / expected.norm()) < 0.03
    fake.float().square().mean().backward()
    for layer in (model.conv, model.scaled):
        assert float(layer.latent.grad.abs().sum()) > 0 and layer.weight is layer.latent  # type: ignore[union-attr]
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in net().parameters())
    assert torch.equal(convert_(model)(x), fake)
    assert {"conv.codes", "scaled.codes", "scaled.gain"} <= set(model.state_dict())
    assert "scaled.weight" not in model.state_dict()


def refused(model: nn.Module, config: QuantConfig, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        quantize_(model, config)
    assert not quantized_modules(model)


def test_what_cannot_be_kept_is_refused_by_name() -> None:
    weights = QuantConfig.weights("int8")
    inputs = QuantConfig((Rule("*", WeightConfig("int8"), ActivationConfig(8)),))
    refused(net(), inputs, "layer conv is a Standardised that cannot be quantised: its class has a forward of its own")
    refused(nn.MultiheadAttention(32, 2), weights, r"layer out_proj .* past the layer; add 'out_proj' to skip=")
    halves = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    refused(
        halves, weights, "layer 0 is a ParametrizedLinear that cannot be quantised: its weight is no float parameter"
    )
    patched = nn.Sequential(nn.Linear(8, 8))
    patched[0].forward = lambda x: x  # type: ignore[method-assign]
    refused(patched, weights, "layer 0 is a Linear that cannot be quantised: its forward was replaced")
    table = nn.Sequential(nn.Embedding(8, 8, max_norm=1.0))
    refused(table, QuantConfig.weights("int8"), "layer 0 is a Embedding .* max_norm")
    skipping = QuantConfig((Rule("*", WeightConfig("int8")),), skip=("conv", "scaled"))
    assert [name for name, _ in quantized_modules(quantize_(net(), skipping))] == ["plain"]


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3", "Bart"])
def test_a_quantised_folder_brings_them_back(family: str, tmp_path: Path) -> None:
    model = convert_(quantize_(make(family), everything()))
    save_quantized(model, make_byte_tokenizer(), tmp_path / "folder")  # type: ignore[arg-type]
    again, _ = load_quantized(tmp_path / "folder")
    assert torch.equal(logits(again), logits(model))


def test_exporters_refuse_by_name_what_they_cannot_write(tmp_path: Path) -> None:
    model = convert_(quantize_(net(), QuantConfig.weights("int8")))
    x = torch.randn(2, 2, 8, 8)
    with pytest.raises(Unsupported, match=r"layer conv is a quantised Standardised, whose own forward a \.pte file"):
        export_executorch(model, None, tmp_path / "m.pte", example_inputs=(x,))
    with pytest.raises(Unsupported, match="layer conv is a quantised Standardised, whose own forward an ONNX file"):
        export_onnx(model, tmp_path / "m.onnx", example_inputs=x)
    assert not list(tmp_path.iterdir())

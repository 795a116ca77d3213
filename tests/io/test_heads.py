"""A folder gives the class that its config.json names: a head is loaded, refused or named, never dropped in silence."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from edgewright import cli
from edgewright.errors import FormatError, Unsupported, UsageError
from edgewright.io.models import load

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
BASE = {"vocab_size": 271, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CLASSES: dict[str, Any] = {
    "BertForSequenceClassification": lambda: transformers.BertConfig(**BASE, **SMALL),
    "BertForMaskedLM": lambda: transformers.BertConfig(**BASE, **SMALL),
    "RobertaForSequenceClassification": lambda: transformers.RobertaConfig(**BASE, **SMALL, max_position_embeddings=80),
    "DistilBertForSequenceClassification": lambda: transformers.DistilBertConfig(
        **BASE, dim=32, n_layers=1, n_heads=4, hidden_dim=64
    ),
    "LlamaForSequenceClassification": lambda: transformers.LlamaConfig(**BASE, **SMALL),
    "Qwen2ForSequenceClassification": lambda: transformers.Qwen2Config(**BASE, **SMALL, num_key_value_heads=2),
    "T5ForConditionalGeneration": lambda: transformers.T5Config(  # type: ignore[call-arg]
        **BASE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
}
IDS = torch.arange(5, 25)[None]


def logits(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


@pytest.fixture
def saved(tiny: Any, write_gguf: Any, tmp_path: Path) -> Any:
    """saved(class name) -> (model, its folder)."""
    _, tokenizer = load(write_gguf(tiny()))

    def save(name: str) -> tuple[Any, Path]:
        torch.manual_seed(0)
        model = getattr(transformers, name)(CLASSES[name]()).eval()
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return model, tmp_path / name

    return save


@pytest.mark.parametrize("name", CLASSES)
def test_the_head_is_loaded(name: str, saved: Any) -> None:
    model, folder = saved(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again, _ = load(folder)
    assert type(again) is type(model)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "LlamaForSequenceClassification"])
def test_a_target_that_cannot_hold_the_head_names_one_that_can(
    name: str, saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = saved(name)
    for command in (["export", str(folder)], ["compress", str(folder), "--bits", "8", "--method", "rtn"]):
        assert cli.main([*command, "--output", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert f"{name} cannot be written as GGUF" in said and "--to onnx" in said
    assert cli.main(["export", str(folder), "--to", "onnx", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / f"{name}.onnx").is_file()


def test_weights_without_a_place_are_named(saved: Any) -> None:
    _, folder = saved("BertForSequenceClassification")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    with pytest.warns(UserWarning, match=r"2 weights that BertModel has no place for; left out: classifier.bias"):
        assert type(load(folder)[0]).__name__ == "BertModel"
    (folder / "config.json").write_text(json.dumps({**config, "architectures": None}))
    with pytest.raises(FormatError, match=r"lacks 6 weights of its model.*; name its class in config.json"):
        load(folder)


def test_a_head_without_its_weights_is_an_error(saved: Any) -> None:
    _, folder = saved("RobertaForSequenceClassification")
    state = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("classifier")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"lacks 4 weights of its model, the first is 'classifier.dense.bias'"):
        load(folder)


def test_classes_that_transformers_does_not_have(saved: Any) -> None:
    _, folder = saved("BertForMaskedLM")
    config = json.loads((folder / "config.json").read_text())
    for name, error, words in (
        ("EvilModel", Unsupported, "'EvilModel' for model_type 'bert', which transformers"),
        ("LlamaForCausalLM", FormatError, "none of 'bert'"),
        ("AutoModel", Unsupported, "'AutoModel'"),
        ("__builtins__", Unsupported, "does not have"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
        with pytest.raises(error, match=words):
            load(folder)


def test_older_names_of_causal_classes(tiny: Any, write_gguf: Any, tmp_path: Path) -> None:
    model, tokenizer = load(write_gguf(tiny()))
    for saver in (model, tokenizer):
        saver.save_pretrained(tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps({**config, "architectures": ["LLaMAForCausalLM"]}))
    assert torch.equal(logits(load(tmp_path / "old")[0]), logits(model))
    remote = {**config, "architectures": ["MyForCausalLM"], "auto_map": {"AutoModelForCausalLM": "my.MyForCausalLM"}}
    (tmp_path / "old" / "config.json").write_text(json.dumps(remote))
    with pytest.raises(Unsupported, match="code from a model folder is never run"):
        load(tmp_path / "old")


def test_tensors_of_torch_save_are_read_without_running_code(saved: Any, tmp_path: Path) -> None:
    model, folder = saved("LlamaForSequenceClassification")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(logits(load(folder)[0]), logits(model))

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({**model.state_dict(), "evil": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(Unsupported, match="transformers cannot load"):
        load(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UsageError, match=r"only as pytorch_model.bin, a pickle.*python -c"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_what_a_folder_is_is_said(saved: Any) -> None:
    _, folder = saved("BertForMaskedLM")
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(
        UsageError, match=r"quantised already \(by gptq to 4 bits\); pass the original model in float32"
    ):
        load(folder)
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(UsageError, match=r"an adapter \(PEFT\) of org/base, not a model; merge"):
        load(folder)

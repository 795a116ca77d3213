"""Configurations and tokenizers that claim more than their files hold are refused before anything is made of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import edgewright
from edgewright.errors import EdgewrightError, FormatError
from edgewright.io.foreign import check_json_files, load_tokenizer, reading
from edgewright.measure.memory import peak_rss
from tests.toy_llama import make_byte_tokenizer, make_tiny_llama

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "bert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gemma2": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16,
    },
    "mixtral": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_local_experts": 2,
    },
}  # fmt: skip


def save(folder: Path, kind: str) -> dict[str, Any]:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    if kind == "llama":
        model: Any = make_tiny_llama()
    else:
        config = AutoConfig.for_model(
            kind, vocab_size=256, bos_token_id=1, eos_token_id=2, pad_token_id=2, **FAMILIES[kind]
        )
        model = (AutoModel if kind == "bert" else AutoModelForCausalLM).from_config(config)
    model.save_pretrained(folder)
    make_byte_tokenizer().save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", ["llama", *FAMILIES])
def test_a_configuration_cannot_reserve_memory_or_time(kind: str, tmp_path: Path) -> None:
    config = save(tmp_path, kind)
    edgewright.load(tmp_path)
    layers = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    width = "n_embd" if kind == "gpt2" else "hidden_size"
    claims: list[dict[str, Any]] = [{"vocab_size": 20_000_000}, {layers: 3000}, {layers: 10**9}, {width: 1 << 20}]
    claims += [{"num_labels": 10**9}, {"vocab_size": 10**30}]
    if kind == "mixtral":
        claims.append({"num_local_experts": 10**7})
    for claim in claims:
        (tmp_path / "config.json").write_text(json.dumps(config | claim))
        began = time.process_time()
        with peak_rss() as peak, pytest.raises(EdgewrightError):
            before = peak_now()
            edgewright.load(tmp_path)
        assert time.process_time() - began < 5, claim
        assert peak.bytes - before < 500 << 20, claim


def peak_now() -> int:
    from edgewright.measure.memory import current_rss

    return current_rss()


def change(path: Path, **fields: Any) -> None:
    tree = json.loads(path.read_text())
    for name, value in fields.items():
        *keys, last = name.split("__")
        place = tree
        for key in keys:
            place = place[key]
        place[last] = value
    path.write_text(json.dumps(tree))


def test_broken_tokenizers_are_one_sentence_with_the_whole_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, "llama")
    path = tmp_path / "tokenizer.json"
    good = path.read_text()
    for fields in (
        {"model__vocab": 3},
        {"model__merges": [["zz", "yy"]]},
        {"added_tokens": [{"id": "x"}]},
        {"post_processor": {"type": "Unheard"}},
        {"padding": {"strategy": {"Fixed": 4_000_000_000}}},
    ):
        path.write_text(good)
        change(path, **fields)
        with pytest.raises(FormatError, match="tokenizer|cannot be read"):
            load_tokenizer(tmp_path)
        with pytest.raises(EdgewrightError):
            edgewright.load(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(FormatError, match=r"tokenizer\.json is not JSON"):
        load_tokenizer(tmp_path)
    path.write_text(good)
    monkeypatch.setattr("edgewright.io.foreign.MOST_ENTRIES", 100)
    with pytest.raises(FormatError, match="vocab has 256 entries; at most 100"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr("edgewright.io.foreign.LARGEST_TOKENIZER", 1000)
    with pytest.raises(FormatError, match="at most 1000 are allowed"):
        check_json_files(tmp_path)


def test_errors_of_others_are_ours_and_our_own_faults_are_not() -> None:
    class PanicException(BaseException):  # as pyo3 names it
        pass

    long = "one sentence, " * 100
    for error in (KeyError("x"), AttributeError("y"), Exception("a\nb"), PanicException("index"), ValueError(long)):
        with pytest.raises(FormatError, match=r"^file\.json cannot be read") as told, reading("file.json"):
            raise error
        assert "\n" not in str(told.value)
    assert long.strip() in str(told.value)
    with pytest.raises(KeyboardInterrupt), reading("file.json"):
        raise KeyboardInterrupt
    with pytest.raises(EdgewrightError, match="^ours$"), reading("file.json"):
        raise EdgewrightError("ours")


@pytest.mark.parametrize("kind", ["su", "x" * 1000])
def test_a_header_that_ends_llama_cpp_is_one_sentence(kind: str, tmp_path: Path) -> None:
    from edgewright.runtime import child_check
    from edgewright.runtime.llamacpp import LlamaCppEngine
    from tests.toy_gguf import write_toy

    path = write_toy(tmp_path / "toy.gguf", llama__rope__scaling__type=kind, llama__rope__scaling__factor=2.0)
    child_check._passed.clear()  # a file of somebody else
    with pytest.raises(FormatError, match="ends the process that runs it"):
        LlamaCppEngine(path, context=64)


def test_a_foreign_file_that_is_sound_runs(tmp_path: Path) -> None:
    from edgewright.runtime import child_check
    from edgewright.runtime.llamacpp import LlamaCppEngine
    from tests.toy_gguf import write_toy

    path = write_toy(tmp_path / "toy.gguf")
    child_check._passed.clear()
    with LlamaCppEngine(path, context=64) as engine, torch.no_grad():
        assert engine.logits([1, 2]).shape == (2, engine.vocabulary)

"""`edgewright export`: targets, output, JSON, and what cannot be asked for."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

import edgewright
from edgewright.commands import export
from edgewright.errors import CheckFailed, UsageError
from edgewright.io.packed import PackedLinear, PackedTensor


@pytest.fixture
def quantized(tiny_llama, tmp_path):
    """A folder of a quantised model with a byte-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from edgewright.export.huggingface import save_quantized

    codes = torch.randint(-8, 8, (128, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    tiny_llama.model.layers[0].mlp.up_proj = PackedLinear(
        PackedTensor(codes, torch.full((128, 2), 0.01).bfloat16().float(), "int4")
    )
    tiny_llama.model.embed_tokens.weight.data *= 5  # far apart logits
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # llama.cpp wants to know how a text ends
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=alphabet[1], eos_token=alphabet[2])
    return save_quantized(tiny_llama, fast, tmp_path / "tiny-int4")


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    return export.run(parser.parse_args(list(arguments)))


def test_a_quantised_folder_to_gguf_with_the_same_codes(quantized, tmp_path, capsys):
    assert run(str(quantized), "--to", "gguf", "--output", str(tmp_path / "out"), "--float-type", "F32") == 0
    out = capsys.readouterr().out
    assert "int4, groups of 32" in out and "Q4_0" in out and "verified: 20 tensors decode" in " ".join(out.split())
    back, _ = edgewright.load(tmp_path / "out" / "tiny-int4.gguf")
    model, _ = edgewright.load(quantized)
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(back.get_submodule(name).weight, model.get_submodule(name).weight)


def test_several_targets_as_json(quantized, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        run(str(quantized), "--to", "hf,hf-float,gguf", "--no-verify", "--output", str(out), "--json", "--name", "m")
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert [file["target"] for file in result["files"]] == ["hf", "hf-float", "gguf"]
    assert {path.name for path in out.iterdir()} == {"m-hf", "m-hf-float", "m.gguf", "m.gguf.json"}
    for file in result["files"]:
        assert file["bytes"] > 0 and str(out) in file["path"]
    ids = torch.arange(3, 19)[None]
    first, second, third = (edgewright.load(path)[0] for path in (quantized, out / "m-hf", out / "m-hf-float"))
    with torch.no_grad():
        assert torch.equal(first(input_ids=ids).logits, second(input_ids=ids).logits)
        assert torch.equal(first(input_ids=ids).logits, third(input_ids=ids).logits)


def test_strict_unless_lenient(quantized, tmp_path):
    model, tokenizer = edgewright.load(quantized)
    model.model.layers[0].mlp.up_proj.step.mul_(1.0001)
    from edgewright.export.huggingface import save_quantized

    save_quantized(model, tokenizer, quantized)
    arguments = (str(quantized), "--no-verify", "--output", str(tmp_path / "out"))
    with pytest.raises(CheckFailed, match="blk.0.ffn_up.weight"):
        run(*arguments)
    assert not (tmp_path / "out" / "tiny-int4.gguf").exists()
    assert run(*arguments, "--lenient") == 0


def test_a_quantised_folder_to_pte_that_writes_text(quantized, tmp_path, capsys):
    from edgewright.runtime.engine import open_engine

    assert run(str(quantized), "--to", "pte", "--output", str(tmp_path), "--name", "m", "--context", "128") == 0
    out = capsys.readouterr().out
    assert "delegated to XNNPACK" in out and "verified: " in out and "edgewright chat" in out
    with open_engine(tmp_path / "m.pte", threads=1) as engine:
        assert engine.context == 128 and len(engine.generate("abc", 3, ignore_end=True).ids) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--to", "pte", "--min-delegated", "2"], UsageError, "a number from 0 to 1; a share"),
        (["--to", "gguf,pte", "--table", "int5"], UsageError, "auto, exact, int8, float"),
        (["--to", "exe"], UsageError, "unknown target 'exe'"),
        (["--to", ","], UsageError, "names no target"),
        (["--layout", "tiny"], UsageError, "auto, portable, small, fast"),
        (["--kv", "5"], UsageError, "4 or 8 bits"),
        (["--name", "../m"], UsageError, "plain file name"),
    ],
)
def test_what_cannot_be_asked_for(arguments, error, message):
    """Said before the model is loaded: the model named here does not exist."""
    with pytest.raises(error, match=message):
        run("no-such-model", *arguments)


def test_names():
    assert export.default_name("smollm2-135m") == "smollm2-135m"
    assert export.default_name("/models/tiny/") == "tiny"
    assert export.default_name("out/m.gguf") == "m"
    assert export.default_name("out/m-3.1-00001-of-00003.gguf") == "m-3.1"
    assert export.default_name("tiny-3.1") == "tiny-3.1"

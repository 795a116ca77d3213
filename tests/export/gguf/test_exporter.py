"""Whole files: every grid and layout, decoded and run; departures are said, failures leave nothing behind."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from edgewright.errors import CheckFailed, FormatError, OutputError, Unsupported, UsageError
from edgewright.export.gguf import ggml
from edgewright.export.gguf.exporter import export_gguf, llama_cpp_quantize
from edgewright.export.gguf.tensors import model_tensors
from edgewright.io.gguf.reader import GGUFFile
from edgewright.io.packed import PackedEmbedding, PackedLinear
from tests.export.export_models import make_llama, make_qwen, make_tokenizer, pack_layers, random_packed, rounded
from tests.processes import ROOT

GRIDS = ("binary", "ternary", "seq2", "int2", "int3", "int4", "int8")
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def written(export) -> dict[str, str]:
    return {row.tensor: row.written for row in export.table}


@pytest.mark.parametrize("layout", ["small", "fast"])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid(grid, layout, tokenizer, tmp_path):
    model = pack_layers(make_llama(), grid, table="int8")
    export = export_gguf(model, tokenizer, tmp_path / "m.gguf", layout=layout, **QUIET)
    rows = len(export.table)
    assert export.checks["tensors"] == export.checks["tensors_equal"]["edgewright"] == rows == 2 + 2 * 9
    assert export.checks["tensors_equal"]["llama.cpp"] == 1 + 2 * 7
    assert all(row.lossless and not row.departure for row in export.table)
    assert export.bytes == (tmp_path / "m.gguf").stat().st_size > sum(row.bytes for row in export.table)


def test_grouped_steps(tokenizer, tmp_path):
    model = pack_layers(make_llama(), "ternary", group=64, table="int4")
    export = export_gguf(model, tokenizer, tmp_path / "m.gguf", layout="small", **QUIET)
    assert written(export)["blk.1.attn_q.weight"] == "Q2_0"
    assert written(export)["token_embd.weight"] == "Q4_0"


@pytest.mark.parametrize("version", [2, 3])
def test_qwen(version, tokenizer, tmp_path):
    model = pack_layers(make_qwen(version), "int4", group=32)
    export = export_gguf(model, tokenizer, tmp_path / "m.gguf", **QUIET)
    assert GGUFFile(export.path).metadata["general.architecture"] == f"qwen{version}"
    assert export.checks["top1_agreement"] >= 0.9


@pytest.mark.parametrize(
    "overrides",
    [
        {"attention_bias": True},
        {"tie_word_embeddings": False},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=["bias", "untied", "linear", "llama3"],
)
def test_variants_of_llama_in_float(overrides, tokenizer, tmp_path):
    """F32 leaves no excuse: llama.cpp's logits follow PyTorch's."""
    model = make_llama(**overrides)
    export = export_gguf(model, tokenizer, tmp_path / "m.gguf", float_type="F32", embedding="F32", **QUIET)
    assert export.checks["top1_agreement"] >= 0.99
    # not zero: llama.cpp keeps keys and values in fp16
    assert abs(export.checks["kl"]) < 1e-4


def test_a_float_embedding_is_quantised_openly(tokenizer, tmp_path):
    model = pack_layers(make_llama(), "int4", group=32)
    before = copy.deepcopy(model.state_dict())
    export = export_gguf(model, tokenizer, tmp_path / "m.gguf", **QUIET)
    table = export.table[0]
    assert (table.tensor, table.written, table.lossless) == ("token_embd.weight", "Q8_0", False)
    assert "rounded to Q8_0" in table.why
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    lossless = export_gguf(model, tokenizer, tmp_path / "f.gguf", embedding="F32", **QUIET)
    assert all(row.lossless for row in lossless.table)


def test_q8_0_is_llama_cpps(tmp_path):
    from edgewright.export.gguf.encode import q8_0

    values = np.random.default_rng(0).standard_normal((400, 320)).astype(np.float32)
    values[3] = 0
    values[4] = np.round(values[4] * 8) / 8  # many exact halves after scaling
    values[5, ::32] = 127.0
    values[5, 1::2] = 0.49999997
    assert np.array_equal(q8_0(values).reshape(400, -1), ggml.quantize(values, "Q8_0"))


def test_bfloat16_models(tokenizer, tmp_path):
    model = pack_layers(make_llama().bfloat16(), "int4", group=32, table="int8")
    export = export_gguf(model, tokenizer, tmp_path / "m.gguf", **QUIET)
    assert export.checks["top1_agreement"] >= 0.9
    assert next(model.parameters()).dtype == torch.bfloat16


def test_no_fitting_type_is_an_error_under_strict(tokenizer, tmp_path):
    model = make_llama()
    model.model.layers[1].mlp.up_proj = PackedLinear(random_packed("int4", 512, 256, 16))
    with pytest.raises(CheckFailed, match=r"blk\.1\.ffn_up\.weight: Q4_0 wanted, F16 possible .* groups have 16"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", **QUIET)
    assert list(tmp_path.iterdir()) == []
    export = export_gguf(model, tokenizer, tmp_path / "m.gguf", strict=False, **QUIET)
    row = next(row for row in export.table if row.departure)
    assert (row.tensor, row.wanted, row.written, row.lossless) == ("blk.1.ffn_up.weight", "Q4_0", "F16", True)


def test_an_inexact_step_is_an_error_under_strict(tokenizer, tmp_path):
    model = pack_layers(make_llama(), "int4", group=32)
    model.model.layers[0].self_attn.q_proj.step[3, 2] = 0.0123456789
    with pytest.raises(CheckFailed, match=r"blk\.0\.attn_q\.weight: Q4_0 wanted, F32 possible .*fp16"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", **QUIET)
    export = export_gguf(model, tokenizer, tmp_path / "m.gguf", strict=False, **QUIET)
    assert written(export)["blk.0.attn_q.weight"] == "F32"


def test_a_wrong_tensor_is_found(tokenizer, tmp_path, monkeypatch):
    from edgewright.export.gguf import encode as gguf_encode

    model = pack_layers(make_llama(), "int4", group=32)
    honest = gguf_encode.pack

    def flipped(packed, name):
        raw = honest(packed, name)
        raw[0, 5] ^= 1
        return raw

    monkeypatch.setattr(gguf_encode, "pack", flipped)
    with pytest.raises(CheckFailed, match="does not decode to the model with edgewright: 1 of"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", **QUIET)
    assert list(tmp_path.iterdir()) == []


def test_unpermuted_rows_are_found(tokenizer, tmp_path, monkeypatch):
    """The weights decode as intended, but the model answers differently: only running the file shows it."""
    from edgewright.export.gguf import tensors as gguf_tensors

    monkeypatch.setattr(gguf_tensors, "pair_order", lambda rows, heads: torch.arange(rows))
    with pytest.raises(CheckFailed, match="choose the same token at only"):
        export_gguf(pack_layers(make_llama(), "int4", group=32), tokenizer, tmp_path / "m.gguf", **QUIET)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_splitter_is_found(tokenizer, tmp_path, monkeypatch):
    from edgewright.export.gguf import metadata as gguf_metadata

    monkeypatch.setattr(gguf_metadata, "splitter_name", lambda description: "gpt-2")
    tokenizer = make_tokenizer("qwen2")  # digits apart, so that merges over digits would differ
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"]["12"] = len(backend["model"]["vocab"])
    backend["model"]["merges"].append(["1", "2"])
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    merged = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), bos_token="<s>")
    with pytest.raises(CheckFailed, match="splits the text differently"):
        export_gguf(make_llama(), merged, tmp_path / "m.gguf", **QUIET)


def test_kv_cache_bits(tokenizer, tmp_path):
    model = pack_layers(make_llama(), "int4", group=32, table="int8")
    export = export_gguf(model, tokenizer, tmp_path / "m.gguf", kv=8, **QUIET)
    assert set(export.checks["top1_agreement_by_cache"]) == {"f16", "q8_0"}
    notes = json.loads(export.sidecar.read_text())
    assert notes["commands"]["chat"] == "llama-cli -m m.gguf -ctk q8_0 -ctv q8_0 -fa on"
    assert notes["quantization"]["kv_cache_bits"] == 8
    assert len(notes["table"]) == len(export.table)
    assert notes["checks"]["tensors"] == 20


def test_models_that_cannot_be_written(tokenizer, tmp_path):
    class Doubled(nn.Linear):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    model = make_llama()
    model.model.layers[0].mlp.up_proj = Doubled(256, 512, bias=False)
    with pytest.raises(Unsupported, match="layers.0.mlp.up_proj is a Doubled"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", **QUIET)
    with pytest.raises(Unsupported, match="hidden_act='gelu'"):
        export_gguf(make_llama(hidden_act="gelu"), tokenizer, tmp_path / "m.gguf", **QUIET)
    model = make_llama()
    model.model.extra = nn.Linear(2, 2)
    with pytest.raises(Unsupported, match="extra.weight"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", **QUIET)
    model = make_llama()
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(FormatError, match="model.norm.weight"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", **QUIET)
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=272))
    with pytest.raises(Unsupported, match="GPT2LMHeadModel cannot be written"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", **QUIET)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "tiny"}, "auto, portable, small, fast"),
        ({"float_type": "Q4_0"}, "F32, F16"),
        ({"embedding": "Q4_0"}, "Q8_0"),
        ({"kv": 3}, "4 or 8 bits"),
    ],
)
def test_unknown_settings(settings, message, tokenizer, tmp_path):
    with pytest.raises(UsageError, match=message):
        export_gguf(make_llama(), tokenizer, tmp_path / "m.gguf", **settings, **QUIET)
    with pytest.raises(UsageError, match="must end in .gguf"):
        export_gguf(make_llama(), tokenizer, tmp_path / "model", **QUIET)


def test_unwritable_output(tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        export_gguf(make_llama(), tokenizer, tmp_path / "file" / "m.gguf", verify=False, **QUIET)


def test_a_full_disk_leaves_nothing(tmp_path):
    """A file size limit is what a full disk looks like to the writer: an OSError in the middle of the tensors."""
    code = """
        import resource, sys
        from pathlib import Path
        from tests.export.export_models import make_llama, make_tokenizer, pack_layers
        from edgewright.errors import OutputError
        from edgewright.export.gguf.exporter import export_gguf
        from edgewright.export.huggingface import save_dequantized, save_quantized
        model, tokenizer = pack_layers(make_llama(), "int4", 32), make_tokenizer()
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        folder = Path({folder!r})
        for write in (
            lambda: export_gguf(model, tokenizer, folder / "m.gguf", progress=False),
            lambda: save_quantized(model, tokenizer, folder / "q"),
            lambda: save_dequantized(model, tokenizer, folder / "d"),
        ):
            try:
                write()
            except OutputError as error:
                print("refused:", error)
        print("left:", sorted(path.name for path in folder.iterdir()))
    """
    code = textwrap.dedent(code).format(folder=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("refused: cannot write") == 3, result.stdout
    assert "left: []" in result.stdout


def test_smollm2_in_mixed_layouts(smollm2, tmp_path):
    """Rows of 576 take no K-quant, rows of 1536 do; the real tokenizer and chat template come along."""
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    for index, layer in enumerate(model.model.layers):
        gate = "ternary" if index == 7 else "int4"  # only one: its kernel is slow on x86
        for part, grids in (
            (layer.self_attn, {"q_proj": "int4", "k_proj": "int4", "v_proj": "int4", "o_proj": "int4"}),
            (layer.mlp, {"gate_proj": gate, "up_proj": "int3", "down_proj": "seq2"}),
        ):
            for name, grid in grids.items():
                group = {"int4": 32, "ternary": 64, "int3": 32, "seq2": None}[grid]
                setattr(part, name, PackedLinear(rounded(getattr(part, name).weight, grid, group)))
    table = rounded(model.model.embed_tokens.weight, "int8", 32)
    model.model.embed_tokens, model.lm_head = PackedEmbedding(table), PackedLinear(table)

    export = export_gguf(model, tokenizer, tmp_path / "m.gguf", layout="small", **QUIET)
    types = written(export)
    parts = ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert [types[f"blk.7.{part}.weight"] for part in parts] == ["Q4_0", "Q4_0", "Q2_0", "Q4_0", "Q2_K"]
    assert types["token_embd.weight"] == "Q8_0" and "output.weight" not in types
    why = next(row.why for row in export.table if row.tensor == "blk.7.ffn_gate.weight")
    assert "TQ1_0 needs rows divisible by 256, this one has 576" in why
    assert export.checks["tensors_equal"] == {"edgewright": 272, "gguf": 210, "llama.cpp": 211}
    metadata = GGUFFile(export.path).metadata
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert metadata["tokenizer.chat_template"] == tokenizer.chat_template
    import edgewright

    with edgewright.open_engine(export.path, context=512) as engine:
        messages = [{"role": "user", "content": "Hello"}]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert engine.chat_prompt(messages) == expected


# ---- llama.cpp's own quantiser


def test_the_peer_file_is_what_ggml_quantises(tokenizer, tmp_path):
    model = make_llama()
    for name in ggml.PEER_TYPES:
        export = llama_cpp_quantize(model, tokenizer, tmp_path / "m.gguf", type=name, progress=False)
        file = GGUFFile(export.path)
        output = "Q8_0" if name == "Q8_0" else "Q6_K"
        assert written(export)["token_embd.weight"] == output
        for tensor, row in zip(model_tensors(model), export.table, strict=True):
            if len(row.shape) == 2:
                assert row.written == (output if row.tensor == "token_embd.weight" else name)
                assert np.array_equal(file.raw(row.tensor), ggml.quantize(tensor.values(), row.written).ravel())


def test_the_peer_refuses_packed_models(tokenizer, tmp_path):
    with pytest.raises(UsageError, match="needs float weights"):
        llama_cpp_quantize(pack_layers(make_llama(), "int4"), tokenizer, tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="Q4_0, Q4_1, Q5_0, Q5_1, Q8_0"):
        llama_cpp_quantize(make_llama(), tokenizer, tmp_path / "m.gguf", type="Q3_K")


@pytest.mark.parametrize("hidden", [256, 192], ids=["256", "rows without Q6_K"])
def test_the_peer_file_equals_llama_cpps_tool(hidden, tokenizer, tmp_path):
    """Against llama.cpp's complete quantiser, where a build with it is installed: same types, same bytes."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = make_llama(hidden_size=hidden, num_attention_heads=hidden // 64, num_key_value_heads=1)
    source = export_gguf(model, tokenizer, tmp_path / "f.gguf", float_type="F32", embedding="F32", **QUIET).path
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    theirs = tmp_path / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(theirs).encode(), params) == 0
    ours = GGUFFile(llama_cpp_quantize(model, tokenizer, tmp_path / "ours.gguf", progress=False).path)
    theirs = GGUFFile(theirs)
    assert set(ours.tensors) == set(theirs.tensors)
    for name, tensor in ours.tensors.items():
        assert tensor.type_name == theirs.tensors[name].type_name, name
        assert np.array_equal(ours.raw(name), theirs.raw(name)), name

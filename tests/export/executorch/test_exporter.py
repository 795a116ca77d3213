"""`export_executorch`: our codes in the file, PyTorch's numbers out of the runtime, refusals by name."""

from __future__ import annotations

import json

import pytest
import torch

from edgewright.errors import CheckFailed, MissingPackage, Unsupported, UsageError
from edgewright.export.executorch import exporter as executorch, layers as executorch_layers
from edgewright.export.executorch.exporter import export_executorch
from edgewright.io.packed import PackedLinear, PackedTensor
from edgewright.runtime.executorch import ExecuTorchEngine
from edgewright.runtime.executorch_program import ExecuTorchProgram
from tests.export.executorch.executorch_models import Odd, TinyNet, language_export, packed_llama, packed_matrix


@pytest.fixture(scope="module")
def language():
    """(packed model, its export); lowered once for all tests."""
    return language_export()


def by_token(x):
    """8 bits per token, asymmetric with zero in range, written from the description in float64."""
    x = x.double()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    step = (high - low) / 255
    zero = (-128 - low / step).round().clamp(-128, 127)
    return ((x / step).round() + zero).clamp(-128, 127).sub(zero).mul(step)


# ---- oracle


@pytest.mark.parametrize(("grid", "group"), [("int4", 32), ("seq2", 64), ("binary", 32), ("int8", 64), ("int3", 96)])
def test_the_reference_is_8da4w_written_out(grid, group):
    columns = 96 if group in (32, 96) else 64
    layer = PackedLinear(packed_matrix(16, columns, grid, group))
    copied, notes = executorch_layers.prepare(torch.nn.Sequential(layer))
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(1))
    expected = by_token(x) @ layer.weight.double().T
    assert not notes
    # float32 against float64: an input on the border of its rounding may move by one step of 1/255
    torch.testing.assert_close(copied(x).double(), expected, rtol=1e-4, atol=2e-3 * expected.abs().max().item())


def test_file_computes_what_the_packed_model_computes(language):
    _model, export = language
    assert export.checks["relative_error"] <= executorch_tolerance() and export.checks["top1_agreement"] >= 0.95
    assert export.checks["kl_to_model"] < 1e-2  # what 8-bit inputs change
    assert export.delegation.share >= 0.5 and "llama.custom_sdpa" in export.delegation.kept
    assert not export.notes  # nothing was rounded that the model does not round
    assert json.dumps(export.to_dict())


def executorch_tolerance() -> float:
    from edgewright.export.executorch.verify import QUANTIZED

    return QUANTIZED


def test_cached_decoding_equals_prefill(language):
    _, export = language
    ids = list(range(40))
    with ExecuTorchEngine(export.path, check=False) as engine:
        whole = engine.logits(ids)
        steps = engine.logits_by_token(ids, 1)
    # the kernels round each token by itself, so the calls differ only by the order of float32 sums
    assert abs(steps - whole[1:]).max() <= 0.05 * abs(whole).max()
    assert (steps.argmax(-1) == whole[1:].argmax(-1)).mean() >= 0.9


def test_codes_of_the_tied_table_are_in_the_file_once(language):
    model, export = language
    data = export.path.read_bytes()
    table = model.model.embed_tokens.codes.numpy().tobytes()
    assert data.count(table) == 1
    down = model.model.layers[0].mlp.down_proj.codes.to(torch.int16) + 8  # XNNPACK: even columns in the low nibble
    nibbles = (down[:, ::2] | down[:, 1::2] << 4).to(torch.uint8).numpy().tobytes()
    assert nibbles in data


# ---- other modules


def test_cnn_with_a_free_batch(tmp_path):
    net = TinyNet().eval()
    export = export_executorch(
        net, None, tmp_path / "net.pte", example_inputs=[torch.randn(2, 1, 8, 8)], dynamic_batch=True
    )
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with ExecuTorchProgram(export.path, check=False) as program:
        (ours,) = program.run([images.numpy()])
        assert program.inputs[0].shape == (None, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(ours), net(images), rtol=1e-4, atol=1e-5)  # sums in another order


# ---- refusals


def test_unsupported_operator_names_itself_and_its_module(tmp_path):
    with pytest.raises(Unsupported, match=r"linalg_eig\w*.*middle \(Solver\)"):
        export_executorch(Odd(), None, tmp_path / "odd.pte", example_inputs=[torch.randn(4, 4)])
    assert not list(tmp_path.iterdir())


def test_too_little_delegated_leaves_no_file(tmp_path):
    class Sums(torch.nn.Module):
        def forward(self, x):
            return x.cumsum(1)

    with pytest.raises(CheckFailed, match=r"takes only 0% of \d+ nodes .*cumsum"):
        export_executorch(Sums(), None, tmp_path / "sums.pte", example_inputs=[torch.randn(2, 8)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("grid", "group", "words"), [("int8", 32, "one step per row"), ("int4", 16, "multiple of 32")])
def test_groups_without_a_kernel_are_refused_by_layer(grid, group, words, tmp_path):
    net = torch.nn.Sequential(torch.nn.ReLU(), PackedLinear(packed_matrix(8, 64, grid, group)))
    with pytest.raises(Unsupported, match=f"layer 1 has {grid} codes in groups of {group}.*{words}"):
        export_executorch(net, None, tmp_path / "x.pte", example_inputs=[torch.randn(1, 64)])


def test_grouped_head_is_refused_where_asked_and_noted_otherwise():
    model = packed_llama()
    packed = packed_matrix(256, 64, "int8", 32)
    model.lm_head = PackedLinear(packed)
    model.model.embed_tokens = type(model.model.embed_tokens)(PackedTensor(packed.codes, packed.step, "int8"))
    with pytest.raises(Unsupported, match="layer lm_head"):
        executorch_layers.prepare(model, "exact")
    copied, notes = executorch_layers.prepare(model)
    assert len(notes) == 1 and "one step a row" in notes[0]
    assert copied.lm_head.codes.data_ptr() == copied.model.embed_tokens.codes.data_ptr()


def test_rows_of_a_cut_head_are_rounded_apart_from_the_table():
    from edgewright.pruning.unembedding import PrunedHead

    model = packed_llama()
    model.lm_head = PrunedHead(PackedLinear(packed_matrix(5, 64, "int8", 32)), torch.arange(5), 256)
    copied, notes = executorch_layers.prepare(model)
    assert copied.lm_head.rows.bits == 8 and copied.lm_head(torch.randn(2, 64)).shape == (2, 5)
    assert len(notes) == 1 and notes[0].startswith("lm_head.rows")
    assert torch.equal(copied.model.embed_tokens.codes, model.model.embed_tokens.codes)  # the table keeps its own


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"path": "model.bin"}, "ends in .pte"),
        ({"min_delegated": 2}, "a number from 0 to 1"),
        ({"embedding": "int5"}, "auto, exact, int8, float"),
        ({"context": 1}, "context must be 2"),
        ({"context": 4096}, "trained for 256 tokens"),
    ],
)
def test_arguments_that_cannot_work(arguments, words, tiny_llama, tmp_path):
    path = tmp_path / arguments.pop("path", "model.pte")
    with pytest.raises(UsageError, match=words):
        export_executorch(tiny_llama, None, path, **arguments)


def test_module_without_example_inputs(tmp_path):
    with pytest.raises(UsageError, match="example_inputs="):
        export_executorch(TinyNet(), None, tmp_path / "net.pte")


def test_sliding_window_is_refused(tiny_llama, tmp_path):
    tiny_llama.config.layer_types = ["sliding_attention", "full_attention"]
    tiny_llama.config.sliding_window = 16
    with pytest.raises(Unsupported, match="layer types"):
        export_executorch(tiny_llama, None, tmp_path / "model.pte", context=64)


def test_missing_extra_names_itself(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(MissingPackage, match=r"edgewright\[executorch\]"):
        executorch.export_executorch(TinyNet(), None, tmp_path / "x.pte", example_inputs=[torch.randn(1, 1, 8, 8)])

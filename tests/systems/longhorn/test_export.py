"""A Longhorn model in files: ONNX Runtime and ExecuTorch write what PyTorch writes, from states that go in and out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgewright.errors import Unsupported, UsageError
from edgewright.export.gguf.exporter import export_gguf
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import new_decoder
from edgewright.systems.longhorn.export import LonghornSession, export_longhorn

RUNTIMES = ("onnx", "executorch")


def model_of(mixers: list[str]) -> torch.nn.Module:
    shape = EdgeDecoderConfig(vocab_size=48, hidden_size=16, num_attention_heads=4, mixers=mixers, ffn_types="none")
    return new_decoder(shape).eval()


@pytest.mark.parametrize("to", RUNTIMES)
def test_files_write_what_the_model_writes(to: str, tmp_path: Path) -> None:
    model = model_of(["longhorn", "skip_attention"])
    # lowering a chunk for ExecuTorch takes half a minute, so that one is left to a person who asks for it
    export_longhorn(model, tmp_path, to=to, chunk=4, stages=("prefill", "decode") if to == "onnx" else ("decode",))
    session = LonghornSession(tmp_path)
    ids = torch.randint(1, 48, (1, 10), generator=torch.Generator().manual_seed(0))  # two chunks and two tokens
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 10:].tolist()
    assert session.generate(ids[0].tolist(), 6) == expected
    session.reset()
    with torch.no_grad():
        expected_logits = model(ids).logits[0, -1]
    # another order of the same sums, in another runtime
    torch.testing.assert_close(session.feed(ids[0].tolist()), expected_logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="number of tokens=0; it must be a whole number from 1 up"):
        session.feed([])
    session.close()


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="chunk=1; it must be a whole number from 2 up"):
        export_longhorn(model_of(["longhorn"]), tmp_path, chunk=1)
    with pytest.raises(UsageError, match="give .'prefill', 'decode'. or .'decode',."):
        export_longhorn(model_of(["longhorn"]), tmp_path, stages=("prefill",))
    with pytest.raises(UsageError, match="holds no decode.pte or decode.onnx"):
        LonghornSession(tmp_path)
    with pytest.raises(Unsupported):
        export_gguf(model_of(["longhorn"]), None, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())

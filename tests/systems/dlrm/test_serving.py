"""Exported models answer as the model does, for bags of no id, of one, and full ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgewright.errors import UsageError
from edgewright.runtime.program import open_program
from edgewright.systems.dlrm.clicks import JaggedBatch
from edgewright.systems.dlrm.model import DLRM, DLRMConfig
from edgewright.systems.dlrm.serving import DLRMProgram, example_inputs, export_dlrm, requests

SLOTS = (1, 4, 2)
# tables as quotient and remainder, plain, and narrow
CONFIG = DLRMConfig(3, (50, 20, 10), 8, (8,), (6, 1), qr_threshold=40, table_dims=(8, 8, 2))


def bags() -> JaggedBatch:
    """Five samples; bags of length 0, 1 and full."""
    values = (torch.tensor([49, 3, 7]), torch.tensor([19, 0, 1, 2, 2, 5]), torch.tensor([9, 8, 0]))
    offsets = (torch.tensor([0, 1, 1, 2, 3, 3]), torch.tensor([0, 4, 4, 5, 6, 6]), torch.tensor([0, 0, 1, 3, 3, 3]))
    weights = tuple(torch.linspace(0.5, 1.5, len(v)) for v in values)
    return JaggedBatch(values, offsets, weights)


def test_padded_ids_give_the_same() -> None:
    model = DLRM(CONFIG).eval()
    dense = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    arrays = [torch.from_numpy(a) for a in requests(model, dense, bags(), SLOTS)]
    with torch.no_grad():
        # sums of bags in another order
        torch.testing.assert_close(
            DLRMProgram(model, SLOTS)(*arrays), model(dense, bags()).sigmoid(), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("name", ["m.onnx", "m.pte"])
def test_the_file_equals_the_model(tmp_path: Path, name: str) -> None:
    model = DLRM(CONFIG)
    dense = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    export_dlrm(model, tmp_path / name, slots=SLOTS)
    assert model.training  # as it was
    with open_program(tmp_path / name, check=False) as program, torch.no_grad():
        (found,) = program.run(requests(model, dense, bags(), SLOTS))
        expected = model.eval()(dense, bags()).sigmoid()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)


def test_bad_requests() -> None:
    model = DLRM(CONFIG)
    with pytest.raises(UsageError, match="with format '': give 'onnx'"):
        export_dlrm(model, "model.gguf")
    with pytest.raises(UsageError, match=r"slots=\(1, 4\): one number"):
        export_dlrm(model, "model.onnx", slots=(1, 4))
    with pytest.raises(UsageError, match="max_bag=4"):
        requests(model, torch.zeros(5, 3), bags(), (1, 3, 2))
    far = JaggedBatch((torch.tensor([50]), *(torch.tensor([0]),) * 2), (torch.tensor([0, 1]),) * 3)
    with pytest.raises(IndexError, match="table 0 has rows 0 to 49"):
        requests(model, torch.zeros(1, 3), far, SLOTS)
    assert [tuple(t.shape) for t in example_inputs(model, SLOTS)] == [(3, 3), (3, 7), (3, 7)]

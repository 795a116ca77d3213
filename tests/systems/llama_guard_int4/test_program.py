"""A guard in a .pte file answers like the model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import edgewright
from edgewright.compression.stages import int4_config
from edgewright.errors import UsageError
from edgewright.pruning.unembedding import prune_unembedding_
from edgewright.systems.llama_guard_int4.model import ModelPredictor, ProgramPredictor, export_guard
from edgewright.systems.llama_guard_int4.policy import GuardPolicy, GuardSettings
from tests.toy_llama import make_tiny_llama

KEPT = (2, 5, 17, 100, 255)


def test_the_exported_program_reads_on_like_the_model(tmp_path: Path) -> None:
    """One file for all: a prompt longer than a chunk, its continuation, a step back, a new start, too many tokens."""
    from edgewright.export.executorch import exporter as executorch

    model = make_tiny_llama(num_hidden_layers=1)
    edgewright.convert_(edgewright.quantize_(model, int4_config(32)))
    prune_unembedding_(model, KEPT)
    path = tmp_path / "guard.pte"
    executorch.export_executorch(model, None, path, context=192)
    predictor, reference = ProgramPredictor(path), ModelPredictor(model)
    assert tuple(predictor.columns) == KEPT == tuple(reference.columns) and predictor.context == 192
    ids = torch.randint(3, 250, (180,), generator=torch.Generator().manual_seed(0)).tolist()

    def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        assert ours.shape == (len(KEPT),)
        # the same codes; an input may be rounded to its neighbouring 8-bit code where float sums differ in order
        assert float((ours - theirs).norm() / theirs.norm()) < 0.05

    same(predictor.start(ids), reference.start(ids))
    same(predictor.follow(ids[:3]), reference.follow(ids[:3]))
    predictor.crop(180)
    reference.crop(180)
    same(predictor.follow(ids[5:7]), reference.follow(ids[5:7]))
    same(predictor.start(ids[:4]), reference.start(ids[:4]))
    with pytest.raises(UsageError, match="190 tokens after 4 do not fit into a context of 192"):
        predictor.follow(ids + ids[:10])


def test_a_whole_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="after prune_unembedding_"):
        export_guard(make_tiny_llama(), None, tmp_path, GuardSettings(GuardPolicy({"S1": "cards"})))  # type: ignore[arg-type]

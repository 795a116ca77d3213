"""The house's decoder as .pte: blocks that run twice are stored once, each executed layer has its own cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_gguf_families import decoder

from edgewright.errors import Unsupported
from edgewright.export.executorch import export_executorch

UNEVEN: dict[str, Any] = {
    "intermediate_size": [192, 64, 128],
    "num_attention_heads": [4, 2, 4],
    "num_key_value_heads": [2, 1, 4],
    "head_dim": 32,
    "mixers": ["full_attention", "full_attention", "skip_attention"],
    "qk_norm": "l2",
    "rope_interleaved": True,
}


def test_shared_blocks_are_stored_once(tmp_path: Path) -> None:
    model = decoder(num_hidden_layers=4, share_map=[0, 0, 1, 1])
    done = export_executorch(model, None, tmp_path / "shared.pte", context=48)
    stored = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert done.checks["top1_agreement"] == 1.0 and done.checks["cached_error"] < 1e-4
    assert done.bytes < 1.15 * stored


def test_layers_of_different_kinds_and_sizes(tmp_path: Path) -> None:
    done = export_executorch(decoder(**UNEVEN), None, tmp_path / "uneven.pte", context=48)
    assert done.checks["top1_agreement"] == 1.0 and done.checks["cached_error"] < 1e-4


def test_what_the_kernel_does_not_compute_is_refused(tmp_path: Path) -> None:
    windows = decoder(mixers=["full_attention", "sliding_attention", "full_attention"], sliding_window=8)
    with pytest.raises(Unsupported, match="only full attention is exported"):
        export_executorch(windows, None, tmp_path / "model.pte", context=48)

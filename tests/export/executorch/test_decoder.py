"""the package's decoder as .pte: blocks that run twice are stored once, each executed layer has its own cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgewright.errors import Unsupported
from edgewright.export.executorch.exporter import export_executorch
from edgewright.export.executorch.verify import FLOAT, relative_error
from edgewright.runtime.executorch import ExecuTorchEngine
from tests.export.gguf.test_families import decoder

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


SCALED: dict[str, dict[str, Any]] = {
    "Granite": {
        "logits_scaling": 7.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1,
    },
    "Gemma": {"head_dim": 16},
    "Cohere": {"logit_scale": 0.25},
    "NanoChat": {"final_logit_softcapping": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("family", SCALED)
def test_what_a_model_does_behind_its_head_is_in_the_file(family: str, tmp_path: Path) -> None:
    """Against transformers' own logits: scales and caps of logits, of the token table, of residuals, of attention."""
    import transformers

    settings = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**settings | SCALED[family])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    export = export_executorch(model, None, tmp_path / "m.pte", context=64, verify=False)
    ids = torch.randint(3, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    with ExecuTorchEngine(export.path, check=False) as engine, torch.no_grad():
        ours, theirs = torch.from_numpy(engine.logits(ids[0].tolist())), model(ids).logits[0]
    assert relative_error(ours, theirs) < FLOAT


def test_caps_of_attention_are_refused(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=64, max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(Unsupported, match="Gemma2ForCausalLM with attn_logit_softcapping=50.0 is not exported"):
        export_executorch(Gemma2ForCausalLM(config).eval(), None, tmp_path / "m.pte", context=32)

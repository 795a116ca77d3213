"""A guard as an exported file: one program with its cache, whose outputs are the logits of the legal words alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.export.executorch.exporter import export_executorch
from edgewright.pruning.unembedding import PrunedHead
from edgewright.runtime.executorch import ExecuTorchEngine
from edgewright.systems.llama_guard_int4.settings import GuardSettings, write_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "guard.pte"


class ProgramPredictor:
    """Reads on in a .pte file whose cache is inside; what the file says about its outputs and context holds."""

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        self.engine = ExecuTorchEngine(path, threads=threads)
        self.columns: Sequence[int] | None = self.engine.kept_ids
        self.context = self.engine.context
        self._ids: list[int] = []

    def start(self, ids: Sequence[int]) -> Tensor:
        self._ids = []
        return self._read(ids, reuse=False)

    def follow(self, ids: Sequence[int]) -> Tensor:
        return self._read(ids, reuse=True)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._ids = self._ids[:length]

    def _read(self, ids: Sequence[int], reuse: bool) -> Tensor:
        if not ids or len(self._ids) + len(ids) > self.context:
            raise UsageError(f"{len(ids)} tokens after {len(self._ids)} do not fit into a context of {self.context}")
        self._ids = [*self._ids, *ids]
        return torch.from_numpy(self.engine.next_logits(self._ids, reuse=reuse))


def export_guard(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    settings: GuardSettings,
    *,
    context: int = 256,
) -> Path:
    """Write guard.pte, tokenizer and policy into `folder`, for `GuardModel.from_pretrained`; returns the file's path.

    model: with a cut head, converted. context: tokens of policy, conversation and answer. Raises UsageError for a whole
    head, and what `export_executorch` raises.
    """
    head: Any = getattr(model, "lm_head", None)
    if not isinstance(head, PrunedHead) or head.expand:
        raise UsageError("export_guard takes a model after prune_unembedding_(model, ids), not expanded")
    path = Path(folder) / FILE
    export_executorch(model, tokenizer, path, context=context)
    tokenizer.save_pretrained(folder)
    write_settings(replace(settings, program=FILE), folder)
    return path

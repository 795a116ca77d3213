"""A teacher's answers on disk: its k largest probabilities per token and the mass of all others.

    cache_teacher(teacher, blocks, "teacher/", k=64)
    batches = BlockBatches(TeacherCache("teacher/").blocks(), batch_size=8)
    fit(student, LanguageDistillation(), batches, config)        # no teacher in memory

Folder: manifest.json and shard-00000.safetensors ... with tokens int32 [n, T], values float16 [n, T, k], indices
int32 [n, T, k], tail float16 [n, T]. A shard is written whole or not at all; a second call goes on where one stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.checks import check, whole
from edgewright.distillation.language import check_evaluating
from edgewright.distillation.manifest import claim_shards, fingerprint, read_manifest, shard_paths, track
from edgewright.errors import FormatError, UsageError
from edgewright.io.hashing import blake2b
from edgewright.io.tensors import load_tensors, save_tensors

KIND = "teacher cache"


@torch.no_grad()
def cache_teacher(
    teacher: nn.Module,
    blocks: Tensor,
    folder: str | Path,
    k: int = 64,
    *,
    batch_size: int = 4,
    shard_blocks: int = 64,
    progress: bool = True,
) -> TeacherCache:
    """Run a teacher over text once and store its top k; a folder that was begun is finished.

    Args:
        teacher: in evaluation mode.
        blocks: token ids [N, T].
        folder: of the cache.
        k: probabilities kept for each token, at most the size of the vocabulary.
        batch_size: rows in one forward.
        shard_blocks: rows of a file.
        progress: show a bar.

    Returns:
        The cache.

    Raises:
        UsageError: k out of its range, a teacher in training mode, no blocks, ids outside the vocabulary, or a folder
            that holds the answers of another teacher, k or data.
    """
    check_evaluating(teacher)
    if blocks.ndim != 2 or blocks.numel() == 0:
        raise UsageError(f"blocks of shape {list(blocks.shape)}; give token ids [N, T] with at least one row")
    vocabulary = int(teacher.config.vocab_size)  # type: ignore[union-attr,arg-type]
    check("k", k, whole(1, vocabulary), "at most the size of the vocabulary")
    low, high = int(blocks.min()), int(blocks.max())
    if low < 0 or high >= vocabulary:
        raise UsageError(f"token id {low if low < 0 else high} is outside the teacher's vocabulary of {vocabulary}")
    settings = {
        "k": k,
        "blocks": list(blocks.shape),
        "shard_blocks": shard_blocks,
        "batch_size": batch_size,
        "vocabulary": vocabulary,
        "data": blake2b(blocks.to(torch.int32), size=12),
        "teacher": fingerprint(teacher),
    }
    folder = claim_shards(folder, KIND, settings)
    paths = shard_paths(folder, -(-len(blocks) // shard_blocks), "safetensors")
    with track("caching the teacher", blocks.numel(), progress) as advance:
        for path, part in zip(paths, blocks.split(shard_blocks), strict=True):
            if path.exists():
                advance(part.numel(), False)
                continue
            answers = [_answer(teacher, rows, k, advance) for rows in part.split(batch_size)]
            tensors = {name: torch.cat([answer[name] for answer in answers]) for name in answers[0]}
            save_tensors(path, tensors)
    return TeacherCache(folder)


class TeacherCache:
    """Reads a folder of `cache_teacher`.

    Args:
        folder: finished.

    Raises:
        UsageError: another folder or an unfinished one.
        FormatError: a damaged manifest; in `blocks`, a damaged shard.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.settings: dict[str, Any] = read_manifest(self.folder, KIND)
        blocks, counts = self.settings.get("blocks"), [self.settings.get(name) for name in ("shard_blocks", "k")]
        sizes = [*blocks, *counts] if isinstance(blocks, list) and len(blocks) == 2 else [None]
        if not all(type(size) is int and 0 < size < 2**40 for size in sizes):
            raise FormatError(f"{self.folder} does not say its blocks: {str(blocks)[:80]}, {counts!r:.80}")
        rows, self.shard_blocks = int(self.settings["blocks"][0]), int(self.settings["shard_blocks"])
        self._paths = shard_paths(self.folder, -(-rows // self.shard_blocks), "safetensors")
        missing = [path.name for path in self._paths if not path.exists()]
        if missing:
            raise UsageError(f"{self.folder} is unfinished ({missing[0]} is missing); call cache_teacher again")
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def blocks(self, dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
        """All rows in memory, as `BlockBatches` takes and `LanguageDistillation` understands them.

        Args:
            dtype: of the tokens.

        Returns:
            "tokens" [N, T], "values" and "indices" [N, T, k], "tail" [N, T].
        """
        shards = [self._read(index) for index in range(len(self._paths))]
        joined = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
        return {**joined, "tokens": joined["tokens"].to(dtype)}

    def _read(self, index: int) -> dict[str, Tensor]:
        path = self._paths[index]
        try:
            tensors = load_tensors(path)
        except (FormatError, UsageError) as error:
            raise FormatError(f"{path} cannot be read ({error}); delete it and call cache_teacher again") from error
        rows, width = min(self.shard_blocks, self._rows - index * self.shard_blocks), int(self.settings["blocks"][1])
        k = int(self.settings["k"])
        token, answer = (rows, width), (rows, width, k)
        shapes = {"tokens": token, "values": answer, "indices": answer, "tail": token}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != shapes:
            raise FormatError(f"{path} holds {found}, not {shapes}; delete it and call cache_teacher again")
        return tensors


def _answer(teacher: nn.Module, tokens: Tensor, k: int, advance: Any) -> dict[str, Tensor]:
    """Top-k probabilities of tokens [n, T], one row at a time in float32 so that [n, T, V] exists once at most."""
    device = next(teacher.parameters()).device
    logits = teacher(input_ids=tokens.to(device), use_cache=False).logits
    answers = []
    for row in logits:
        top, indices = torch.softmax(row.float(), dim=-1).topk(k, dim=-1)
        values = top.to(torch.float16)
        # The tail makes up for what half precision lost, so that the stored numbers sum to one.
        tail = (1 - values.float().sum(-1)).clamp(min=0).to(torch.float16)
        answers.append((values.cpu(), indices.to(torch.int32).cpu(), tail.cpu()))
    advance(tokens.numel(), True)
    values, indices, tail = (torch.stack(part) for part in zip(*answers, strict=True))
    return {"tokens": tokens.to(torch.int32).cpu(), "values": values, "indices": indices, "tail": tail}

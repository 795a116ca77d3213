"""The trained model as a GGUF file: what llama.cpp writes with it, and how much of that are words of its text."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgewright.export.gguf.exporter import export_gguf
from edgewright.models.decoder.footprint import footprint
from edgewright.runtime.llamacpp import LlamaCppEngine

STARTS = ("The function returns", "If the argument is", "This class")
SUBJECT = "writer in llama.cpp"


def judge_writer(trained: Any, documents: Sequence[str], path: Path, tokens: int, seed: int) -> dict[str, Any]:
    """Export the result of `pretrain` to `path` and let llama.cpp write.

    Args:
        documents: that it was trained on, whose words are known.
        tokens: that are written behind each beginning.

    Returns:
        {"rows": rows of a report, "texts": what was written}
    """
    config = trained.model.config
    exported = export_gguf(trained.model, trained.tokenizer, path, float_type="F16", embedding="F16", progress=False)
    cost = footprint(config, weight_bits=32)
    size = (trained.output / "edge" / "model.safetensors").stat().st_size
    texts, speed = _continuations(path, config.max_position_embeddings, tokens, seed)
    known, used = set(_words(documents)), _words(texts)
    share = sum(word in known for word in used) / len(used) if used else 0.0
    loss = trained.report.row("validation_loss")
    rows = [
        {"metric": "validation_loss", "value": loss.value, "subject": "writer", "se": loss.se, "n": loss.n},
        {"metric": "weights", "value": cost.stored, "subject": "writer"},
        {"metric": "file_ratio", "value": size / cost.weight_bytes, "subject": "writer, float32"},
        {"metric": "top1_agreement", "value": exported.checks["top1_agreement"], "subject": SUBJECT},
        {"metric": "known_words", "value": share, "subject": SUBJECT, "n": len(used)},
        {"metric": "file_size", "value": exported.bytes, "subject": SUBJECT, "unit": "bytes"},
        {"metric": "decode", "value": speed, "subject": SUBJECT, "unit": "tokens/s"},
    ]
    return {"rows": rows, "texts": texts}


def _continuations(path: Path, context: int, tokens: int, seed: int) -> tuple[list[str], float]:
    """What the file writes behind a few beginnings, and tokens a second."""
    texts, seconds, count = [], 0.0, 0
    with LlamaCppEngine(path, threads=1, context=context) as engine:
        for start in STARTS:
            ids = engine.tokenize(start)
            began = time.perf_counter()
            written = list(engine.generate(ids, min(tokens, context - len(ids) - 1), temperature=0.7, seed=seed).ids)
            seconds, count = seconds + time.perf_counter() - began, count + len(written)
            texts.append(start + engine.detokenize(written))
    return texts, count / max(seconds, 1e-9)


def _words(texts: Sequence[str]) -> list[str]:
    return [word for text in texts for word in re.findall(r"[a-z]{3,}", text.lower())]

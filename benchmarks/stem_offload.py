"""A STEM model with its tables in memory, in a store in memory, and on disk: resident memory, speed, bytes read.

The model has the backbone of MobileLLM-125M in half its depth, random weights, STEM in a third of the layers. Rows are
drawn by Zipf's law, as tokens are. `resident` is of a fresh process that loads the model and decodes; the page cache is
warm in all rows of disk. `bytes` are read from tables for each token, `expected` follows from |S| f b / 8 (1 - hits).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgewright.io.transformers_names import cache_of, with_cache
from edgewright.measure.memory import current_rss, peak_memory, release_free_memory
from edgewright.measure.report import Report
from edgewright.measure.timing import alternate, paired_ratio
from edgewright.models.decoder.model import new_decoder
from edgewright.systems.mobilellm.presets import mobilellm_config
from edgewright.systems.stem.files import load_offloaded, save_stem
from edgewright.systems.stem.layer import StemConfig, stem_blocks, with_stem
from edgewright.systems.stem.store import EmbeddingStore, offload_
from results import save

LAYERS, VOCABULARY = 15, 32000
PROMPT, DECODED = 256, 24
CACHE = 2048
CASES: dict[str, dict[str, Any] | None] = {
    "in memory": None,
    "store in memory": {"prefetch": 0},
    "disk, no cache": {"cache_rows": 0, "prefetch": 2},
    "disk, not read ahead": {"cache_rows": CACHE, "prefetch": 0},
    "disk": {"cache_rows": CACHE, "prefetch": 2},
    "disk, int8": {"cache_rows": CACHE, "prefetch": 2},
}


def build() -> Any:
    config = with_stem(
        mobilellm_config("125M", num_hidden_layers=LAYERS, vocab_size=VOCABULARY), "1/3", StemConfig(init="match")
    )
    return new_decoder(config, 0).eval()


def zipf(count: int, seed: int) -> torch.Tensor:
    """int64 [1, count]: tokens with probability 1 / rank."""
    weights = 1 / np.arange(1, VOCABULARY + 1)
    ranks = np.random.default_rng(seed).choice(VOCABULARY, count, p=weights / weights.sum())
    return torch.from_numpy(np.random.default_rng(0).permutation(VOCABULARY)[ranks]).unsqueeze(0)


def opened(folder: Path, name: str) -> tuple[Any, EmbeddingStore | None]:
    options = CASES[name]
    if options is None or not name.startswith("disk"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        return model, None if options is None else offload_(model, **options)
    return load_offloaded(folder, folder / "int8" if "int8" in name else None, **options)


@torch.no_grad()
def decode(model: Any, tokens: torch.Tensor) -> None:
    """One token after the other, as given: every case fetches the same rows."""
    cache = None
    for i in range(tokens.shape[1]):
        cache = cache_of(model(input_ids=tokens[:, i : i + 1], use_cache=True, **with_cache(cache)))


@torch.no_grad()
def prefill(model: Any, tokens: torch.Tensor) -> None:
    model(input_ids=tokens, use_cache=False, logits_to_keep=1)


def resident(folder: str, name: str) -> int:
    """Bytes that stay in memory after loading and decoding; for a fresh process."""
    model, store = opened(Path(folder), name)
    for parameter in model.parameters():  # files that are mapped are in memory only where they were read
        parameter.data = parameter.data.clone()
    if store is not None and not name.startswith("disk"):
        for rows in store.tables.values():
            rows.parts = {part: tensor.clone() for part, tensor in rows.parts.items()}
    decode(model, zipf(16, 1))
    release_free_memory()
    return current_rss()


def measure(repeats: int = 5) -> Report:
    report = Report("STEM tables in memory and elsewhere")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        model = build()
        save_stem(model, folder)
        offload_(model, "disk", folder / "int8", dtype="int8").close()
        del model
        for name in CASES:
            value = peak_memory(resident, str(folder), name).result
            report.add("resident", value, subject=name, unit="bytes")
        ready = {name: opened(folder, name) for name in CASES}
        turn = {name: iter(range(10**6)) for name in CASES}

        def case(name: str, work: Callable[..., None], count: int) -> Callable[[], None]:
            return lambda: work(ready[name][0], zipf(count, 100 + next(turn[name])))

        for kind, work, count in (("decode", decode, DECODED), ("prefill", prefill, PROMPT)):
            for _, store in ready.values():
                if store is not None:
                    store.reset_stats()
            times = alternate({name: case(name, work, count) for name in CASES}, repeats, 2)
            for name, time in times.items():
                rate = time.map(lambda s, n=count: n / s)  # type: ignore[misc]
                report.add(f"{kind}_tokens", rate.median, subject=name, se=rate.spread, n=rate.n, unit="tokens/s")
                ratio = paired_ratio(times["in memory"], time)
                report.add(f"{kind}_speed", ratio.median, subject=name, se=ratio.spread, n=ratio.n)
                store = ready[name][1]
                if store is not None:
                    stats, tokens = store.stats(), (repeats + 2) * count
                    asked = stats["hits"] + stats["misses"]
                    row = next(iter(store.tables.values())).format.row_bytes
                    layers = len(stem_blocks(ready[name][0]))
                    hit = stats["hits"] / asked
                    report.add(f"{kind}_hits", hit, subject=name)
                    report.add(f"{kind}_bytes", stats["bytes"] / tokens, subject=name, unit="bytes/token")
                    distinct = asked / layers / tokens  # of a prompt's tokens only the distinct ones are fetched
                    report.add(
                        f"{kind}_expected", layers * row * distinct * (1 - hit), subject=name, unit="bytes/token"
                    )
                    report.add(f"{kind}_stall", stats["stall_ms"] / tokens, subject=name, unit="ms/token")
        for _, store in ready.values():
            if store is not None:
                store.close()
    return report


def main() -> None:
    report = measure()
    report.print_table()
    print(save(report, "stem-offload"))


if __name__ == "__main__":
    main()

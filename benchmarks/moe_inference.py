"""Inference of a mixture of experts on the CPU: one layer by back-end, and a model beside a dense one of equal memory.

The layer is MobileMoE S's (60 experts of 384 and a shared one at width 768, float32), its inputs random, so that the
experts' load is near even. "dense-masked" lets every expert compute every token. The models are blocks of S cut to few
layers and a small vocabulary, each matched by a dense model of the same bytes: decoding reads the active weights, so
the ratio of the bytes read is what memory bandwidth alone would give. The same pair at 4 bits runs in llama.cpp.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgewright.export.gguf.exporter import export_gguf
from edgewright.io.text import builtin_documents
from edgewright.io.transformers_names import cache_of, with_cache
from edgewright.measure.memory import current_rss, peak_rss, release_free_memory
from edgewright.measure.report import Report
from edgewright.measure.timing import alternate, paired_ratio
from edgewright.models.decoder.model import EdgeDecoderForCausalLM, new_decoder
from edgewright.models.decoder.tokenizer import train_tokenizer
from edgewright.quantization.api import convert_, quantize_
from edgewright.quantization.config import QuantConfig, Rule, WeightConfig
from edgewright.runtime.benchmark import benchmark_files
from edgewright.systems.mobilemoe.design import SHAPES, mobilemoe, moe_parameters
from edgewright.systems.mobilemoe.layer import Experts, MoEConfig, SparseMoE
from results import save

BACKENDS = {"sorted": "sorted", "grouped_mm": "grouped_mm", "loop": "loop", "dense-masked": "dense"}
LAYERS, VOCABULARY, PROMPT, DECODED = 2, 4096, 256, 16


def layer_times(report: Report, repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = SparseMoE(SHAPES["s"].hidden, MoEConfig()).eval()
    for weight in layer.parameters():
        nn.init.normal_(weight, 0.0, 0.02, generator=generator)
    for tokens in (PROMPT, 1):
        u = torch.randn(1, tokens, SHAPES["s"].hidden, generator=generator)
        calls = 1 if tokens > 1 else 20
        times = alternate({n: _layer_case(layer, b, u, calls) for n, b in BACKENDS.items()}, repeats=repeats, warmup=1)
        for name, time in times.items():
            rate, ratio = time.map(lambda s, k=tokens * calls: k / s), paired_ratio(times["loop"], time)
            subject = f"layer, {name}, T={tokens}"
            report.add("speed", rate.median, subject=subject, se=rate.spread, n=rate.n, unit="tokens/s")
            report.add("speedup_over_loop", ratio.median, subject=subject, se=ratio.spread, n=ratio.n)


def _layer_case(layer: SparseMoE, backend: str, u: torch.Tensor, calls: int) -> Callable[[], None]:
    config = replace(layer.config, backend=backend)

    def run() -> None:
        layer.experts.config = config
        with torch.inference_mode():
            for _ in range(calls):
                layer(u)

    return run


def pair() -> tuple[EdgeDecoderForCausalLM, EdgeDecoderForCausalLM]:
    """(sparse, dense) of equal bytes: the dense feed-forward is as wide as all experts and the router together."""
    sparse = mobilemoe("s", VOCABULARY, num_hidden_layers=LAYERS)
    moe = MoEConfig(**sparse.moe or {})
    width = moe.num_experts * moe.expert_size + moe.shared_size + moe.num_experts // 3
    width = round(width / 32) * 32  # 4-bit groups divide it
    fields: dict[str, Any] = {"ffn_types": "mlp", "moe": None, "intermediate_size": width}
    dense = mobilemoe("s", VOCABULARY, num_hidden_layers=LAYERS, **fields)
    assert abs(moe_parameters(dense)[0] / moe_parameters(sparse)[0] - 1) < 1e-3
    return new_decoder(sparse).eval(), new_decoder(dense).eval()


def model_times(report: Report, repeats: int) -> None:
    models = dict(zip(("mixture", "dense of equal memory"), pair(), strict=True))
    ids = torch.randint(0, VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    prefill = alternate({n: _prefill_case(m, ids) for n, m in models.items()}, repeats=repeats, warmup=1)
    decode = alternate({n: _decode_case(m, ids[:, :32]) for n, m in models.items()}, repeats=repeats, warmup=1)
    for phase, times, tokens in (("prefill", prefill, PROMPT), ("decode", decode, DECODED)):
        for name, time in times.items():
            rate = time.map(lambda s, k=tokens: k / s)
            report.add(f"{phase}_speed", rate.median, subject=name, se=rate.spread, n=rate.n, unit="tokens/s")
        ratio = paired_ratio(times["dense of equal memory"], times["mixture"])
        report.add(f"{phase}_speedup", ratio.median, subject="mixture", se=ratio.spread, n=ratio.n)
    total, active = moe_parameters(models["mixture"].config)
    report.add("bytes_read_ratio", total / active, subject="mixture")
    for name, model in models.items():
        report.add("memory", sum(p.numel() * 4 for p in model.parameters()) / 1e6, subject=name, unit="MB")


def _prefill_case(model: EdgeDecoderForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            model(ids, logits_to_keep=1)

    return run


def _decode_case(model: EdgeDecoderForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    """DECODED single tokens after a prompt that is read once, outside the time."""
    with torch.inference_mode():
        cache = cache_of(model(ids, use_cache=True, logits_to_keep=1))

    def run() -> None:
        with torch.inference_mode():
            for step in range(DECODED):
                model(ids[:, step : step + 1], logits_to_keep=1, **with_cache(cache))
            cache.crop(-DECODED)

    return run


def prompt_memory(report: Report) -> None:
    """What a prompt brings into memory when the experts are a mapped file: one repeated token uses few of them."""
    prompts = {
        "different tokens": torch.arange(PROMPT).unsqueeze(0) % VOCABULARY,
        "one repeated token": torch.full((1, PROMPT), 7),
    }
    model = new_decoder(mobilemoe("s", VOCABULARY, num_hidden_layers=LAYERS)).eval()
    experts = [layer.mlp.experts for layer in model.model.layers]
    with tempfile.TemporaryDirectory() as folder:
        files = {(i, name): Path(folder) / f"{i}.{name}" for i in range(LAYERS) for name in Experts.weight_stacks}
        shapes = {key: getattr(experts[key[0]], key[1]).shape for key in files}
        for (i, name), path in files.items():
            getattr(experts[i], name).detach().numpy().tofile(path)
        for subject, ids in prompts.items():
            for (i, name), path in files.items():  # mapped again: nothing of the files is in this process's memory
                values = torch.from_file(str(path), shared=False, size=shapes[i, name].numel())
                setattr(experts[i], name, nn.Parameter(values.view(shapes[i, name]), requires_grad=False))
            release_free_memory()
            before = current_rss()
            with torch.inference_mode(), peak_rss() as peak:
                model(ids, logits_to_keep=1)
            used = sum(int((layer.mlp.last_routing.counts > 0).sum()) for layer in model.model.layers)
            share = used / (LAYERS * experts[0].config.num_experts)
            report.add("experts_used", share, subject=f"prompt, {subject}")
            report.add("memory_touched", (peak.bytes - before) / 1e6, subject=f"prompt, {subject}", unit="MB")


def llama_cpp_times(report: Report, repeats: int) -> None:
    """The same two models at 4 bits as glm4moe and qwen3 files in llama.cpp."""
    config = QuantConfig(rules=(Rule("model.layers.*", WeightConfig("int4", 32, scale="absmax")),))
    tokenizer = train_tokenizer(builtin_documents("english"), VOCABULARY)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, model in zip(("mixture", "dense of equal memory"), pair(), strict=True):
            path = Path(folder) / f"{name.replace(' ', '-')}.gguf"
            convert_(quantize_(model, config))
            export_gguf(model, tokenizer, path, verify=False, progress=False)
            files[path.name] = f"{name}, 4 bits in llama.cpp"
        paths = [Path(folder) / file for file in files]
        measured = benchmark_files(paths, prompt_tokens=PROMPT, decode_tokens=64, repeats=repeats)
    for row in measured.rows:
        if row.metric in ("file_size", "prefill", "decode"):
            report.add(row.metric, row.value, subject=files[row.subject], se=row.se, n=row.n, unit=row.unit)
    first, second = files.values()
    for phase in ("prefill", "decode"):
        report.add(f"{phase}_speedup", report.value(phase, first) / report.value(phase, second), subject=first)


def main(repeats: int = 7) -> None:
    report = Report("Mixture of experts at inference: back-ends, and a dense model of equal memory")
    report.notes.append(f"float32; models of {LAYERS} layers of MobileMoE S, vocabulary {VOCABULARY}")
    layer_times(report, repeats)
    model_times(report, repeats)
    llama_cpp_times(report, repeats)
    prompt_memory(report)
    report.print_table()
    print(save(report, "mobilemoe-inference"))


if __name__ == "__main__":
    main()

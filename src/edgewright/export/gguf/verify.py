"""Verification of GGUF file: each tensor, decoded by independent readers, equals the model; llama.cpp answers like it.

Weights must be equal, value for value. Logits cannot be: llama.cpp rounds the inputs of quantised matrices to 8 bits,
so they are compared by the token they choose.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgewright.errors import CheckFailed
from edgewright.export.gguf import ggml
from edgewright.export.gguf.blocks import TYPE_IDS, Array, ggml_type
from edgewright.export.gguf.encode import as_written
from edgewright.export.gguf.layout import LayoutRow
from edgewright.export.gguf.tensors import ModelTensor
from edgewright.export.gguf.texts import check_template, check_tokens, normalization
from edgewright.io.gguf.reader import GGUFFile
from edgewright.io.gguf.types import decode
from edgewright.io.packed import PackedEmbedding
from edgewright.measure.machine import usable_cores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AGREEMENT = 0.9  # default least share of positions at which llama.cpp and PyTorch choose the same token
PROMPT_TOKENS, NEW_TOKENS = 24, 24
PIECE = 1 << 17  # values decoded at once

# Types that the installed gguf package decodes; Q1_0 and Q2_0 are younger than it.
GGUF_PACKAGE_TYPES = ("Q4_0", "Q8_0", "TQ1_0", "TQ2_0", "Q2_K", "Q3_K")


def check_tensors(
    path: Path,
    tensors: Sequence[ModelTensor],
    rows: Sequence[LayoutRow],
    on_tensor: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Decode every tensor of a file with all readers that know its type; raise CheckFailed where one differs.

    Readers: edgewright's own, the gguf package's and llama.cpp's. Returns how many tensors each of them confirmed.
    """
    file = GGUFFile(path)
    confirmed = {"edgewright": 0, "gguf": 0, "llama.cpp": 0}

    def check(pair: tuple[ModelTensor, LayoutRow]) -> Sequence[str]:
        tensor, row = pair
        packed = tensor.packed
        whole = tensor.values() if packed is None else None
        codes, step = (packed.codes.numpy(), packed.step.numpy()) if packed is not None else (None, None)
        if tensor.experts:  # one row a matrix, as the file's shape has it
            codes, step = codes.reshape(tensor.experts, -1), step.reshape(tensor.experts, -1)  # type: ignore[union-attr]
        raw = np.asarray(file.raw(row.tensor)).reshape(row.shape[0], -1)
        piece = max(1, PIECE * row.shape[0] // row.weights)  # rows, so that a piece of each reading stays in the cache
        readers: Sequence[str] = ()
        for start in range(0, row.shape[0], piece):
            part = slice(start, start + piece)
            if packed is not None:
                expected = _meaning(codes[part], step[part], packed.offset)  # type: ignore[index]
            else:
                expected = whole[part] if row.lossless else _rounded(whole[part], row)  # type: ignore[index]
            readings = _readings(raw[part], row.written)
            for reader, values in readings.items():
                if not np.array_equal(values.reshape(expected.shape), expected):
                    raise _difference(row, reader, values.reshape(expected.shape), expected)
            readers = tuple(readings)
        return readers

    with ThreadPoolExecutor(max_workers=2) as pool:
        for readers in pool.map(check, zip(tensors, rows, strict=True)):
            on_tensor()
            for reader in readers:
                confirmed[reader] += 1
    return {"tensors": len(rows), "tensors_equal": confirmed}


def _meaning(codes: Array, step: Array, offset: float) -> Array:
    """float32 step * (code + offset), as `PackedTensor.dequantize`; numpy, because two threads check at a time here."""
    values = codes.astype(np.float32)
    values += np.float32(offset)
    values.reshape(*step.shape, -1)[...] *= step[..., None]
    return values


def _readings(raw: Array, name: str) -> dict[str, Array]:
    """Reader -> float32 values, for every reader that knows the type. raw: uint8 [rows, bytes of a row]."""
    raw = raw.reshape(-1)
    readings = {"edgewright": decode(raw, TYPE_IDS[name])}
    if name in GGUF_PACKAGE_TYPES:
        from gguf import GGMLQuantizationType, quants

        blocks = raw.reshape(-1, ggml_type(name).bytes)
        readings["gguf"] = quants.dequantize(blocks, GGMLQuantizationType[name])
    if name in ggml.DECODERS:
        readings["llama.cpp"] = ggml.dequantize(raw, name)
    return readings


def _difference(row: LayoutRow, reader: str, values: Array, expected: Array) -> CheckFailed:
    return CheckFailed(
        f"{row.tensor} as {row.written} does not decode to the model with {reader}: {int((values != expected).sum())} "
        f"of {expected.size} values differ, by up to {np.abs(values - expected).max():.3g}; the file was not kept"
    )


def _rounded(values: Array, row: LayoutRow) -> Array:
    """What a float tensor becomes in its type; CheckFailed where that is further away than rounding explains."""
    written = as_written(values, row.written)
    if row.written == "F16":
        allowed = np.abs(values) * 2.0**-11 + 2.0**-25
    else:  # Q8_0: half a step, and the step itself is rounded to fp16
        largest = np.abs(values.reshape(-1, 32)).max(axis=1, keepdims=True)
        allowed = np.repeat(largest * (0.5 / 127 * 1.01 + 2.0**-11) + 2.0**-17, 32, axis=1).reshape(values.shape)
    if (np.abs(written - values) > allowed).any():
        raise CheckFailed(f"{row.tensor}: {row.written} is further from the model than rounding explains")
    return written


def check_runs(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tensors: Sequence[ModelTensor],
    rows: Sequence[LayoutRow],
    cache_type: str | None = None,
    threshold: float = AGREEMENT,
    compare: Callable[[list[int], Tensor], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Run a file in llama.cpp and compare tokens, chat prompts, logits and a greedy continuation with PyTorch.

    Raises CheckFailed when texts are split differently or too few positions choose the same token. A model whose
    choices hang on the 8-bit rounding of activations (near ties) is judged by what that rounding alone does to it.
    compare: gives, from the tokens and the file's logits [T, V], the entry "original" of the result.
    """
    from edgewright.runtime.llamacpp import LlamaCppEngine

    # llama.cpp's threads wait for each other by spinning: with all cores asked for and one of them busy elsewhere, a
    # second of work becomes a minute.
    threads = max(1, usable_cores() // 2)
    by_cache: dict[str, Tensor] = {}
    for cache in ("f16",) if cache_type is None else ("f16", cache_type):
        caches = {"cache_type_k": cache, "cache_type_v": cache}
        with LlamaCppEngine(path, threads=threads, context=512, check=False, **caches) as engine:
            ids = check_tokens(engine, tokenizer)
            prompts = check_template(engine, tokenizer)
            by_cache[cache] = torch.from_numpy(engine.logits(ids))
            prompt = ids[:PROMPT_TOKENS]
            written = list(engine.generate(prompt, NEW_TOKENS, ignore_end=True).ids)
            text = engine.detokenize(written)
    reference, replaced = _reference(model, tensors, rows)
    ours, continuation = _logits(reference, replaced, ids, prompt + written)
    # A model trained with a quantised cache answers like the file run with one, any other like the file run without.
    agreements = {cache: _agreement(theirs, ours) for cache, theirs in by_cache.items()}
    agreement = max(agreements.values())
    theirs = by_cache[max(agreements, key=lambda cache: agreements[cache])]
    needed = threshold
    checks: dict[str, Any] = {
        "tokenizer": normalization(tokenizer),
        "chat_prompts_equal": prompts,
        "positions": len(ids),
        "top1_agreement": round(agreement, 4),
        "top1_threshold": threshold,
        "kl": round(float(_kl(ours, theirs)), 6),
        "top1_agreement_by_cache": {cache: round(value, 4) for cache, value in agreements.items()},
    }
    if agreement < threshold:
        with _rounded_activations(reference, tensors, rows):
            floor = _agreement(_logits(reference, replaced, ids)[0], ours)
        error = math.sqrt(max(floor * (1 - floor), 1 / len(ids)) / len(ids))
        needed = min(threshold, floor - 3 * error)
        checks["top1_agreement_of_activation_rounding"] = round(floor, 4)
    if compare is not None:
        checks["original"] = compare(ids, theirs)
    if not agreement >= needed or not torch.isfinite(theirs).all():
        raise CheckFailed(
            f"llama.cpp and PyTorch choose the same token at only {agreement:.0%} of {len(ids)} positions "
            f"({needed:.0%} needed); the file was not kept"
        )
    chosen = continuation[len(prompt) - 1 : -1].argmax(-1).tolist()
    same = [a == b for a, b in zip(chosen, written, strict=True)]
    checks["greedy"] = {
        "text": text,
        "tokens": len(written),
        "equal_until": same.index(False) if False in same else len(same),
        "equal_choices": sum(same),
    }
    return checks


def _reference(
    model: PreTrainedModel, tensors: Sequence[ModelTensor], rows: Sequence[LayoutRow]
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The model in float32 and the parameters that the file holds rounded, by name."""
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        model = copy.deepcopy(model).float()
        for module in model.modules():
            if isinstance(module, PackedEmbedding):
                module.dtype = torch.float32
    replaced = {}
    for tensor, row in zip(tensors, rows, strict=True):
        if not row.lossless:
            # rounding goes by row, so the order of the rows does not matter to it
            value = model.get_parameter(tensor.parameter).detach()
            replaced[tensor.parameter] = torch.from_numpy(as_written(value.cpu().numpy(), row.written)).to(value.device)
    return model, replaced


@torch.no_grad()
def _logits(model: PreTrainedModel, replaced: dict[str, Tensor], *texts: Sequence[int]) -> list[Tensor]:
    """float32 [T, vocabulary] for each text, of the model with some parameters replaced; the model stays as it is.

    One call for all texts, because a packed model dequantises its weights at every call.
    """
    longest = max(len(ids) for ids in texts)
    padded = [[*ids, *[0] * (longest - len(ids))] for ids in texts]  # causal: what follows a text does not touch it
    training = model.training
    model.eval()
    try:
        arguments = {"input_ids": torch.tensor(padded, device=model.device), "use_cache": False}
        logits: Tensor = torch.func.functional_call(model, replaced, (), arguments).logits.float().cpu()
    finally:
        model.train(training)
    return [row[: len(ids)] for row, ids in zip(logits, texts, strict=True)]


def _agreement(first: Tensor, second: Tensor) -> float:
    return float((first.argmax(-1) == second.argmax(-1)).float().mean())


def _kl(reference: Tensor, other: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of the next-token distributions, in nats."""
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


@contextmanager
def _rounded_activations(
    model: PreTrainedModel, tensors: Sequence[ModelTensor], rows: Sequence[LayoutRow]
) -> Iterator[None]:
    """Round the inputs of quantised matrices to 8 bits a block, as llama.cpp's kernels do."""
    handles = []
    for tensor, row in zip(tensors, rows, strict=True):
        if row.written in ("F16", "F32") or not hasattr(tensor.module, "in_features"):
            continue
        block = 256 if ggml_type(row.written).block == 256 else 32

        def rounded(module: nn.Module, inputs: tuple[Tensor, ...], block: int = block) -> tuple[Tensor, ...]:
            blocks = inputs[0].unflatten(-1, (-1, block))
            step = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-20) / 127
            return ((blocks / step).round().mul(step).flatten(-2), *inputs[1:])

        handles.append(tensor.module.register_forward_pre_hook(rounded))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

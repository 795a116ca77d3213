"""Verification of .pte: the finished file is run and its outputs are those of PyTorch.

Weights are the same codes on both sides, so what differs is rounding: a float32 sum in another order moves an input now
and then across a border of its 8-bit rounding, by 1/255 of its token's range. Deep models make that large: SmolLM2's
logits change by 5 % when its embeddings change in the seventh digit. So it is measured: the file may differ from
PyTorch by `QUANTIZED`, or by twice what such a change of the embeddings does to PyTorch alone. Without quantised layers
only the order of sums is left: `FLOAT`.

A statically quantised network is computed in integers there and in floats here. The integers are exact; what differs
are results that lie on the border of two codes (exact halves are common behind an average or an addition), which a
change in the seventh digit sends to the other one. Later layers carry that on. So again the bound is twice what such a
change, in front of every rounding of an activation, does to PyTorch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgewright.errors import CheckFailed
from edgewright.export.executorch.layers import DynamicLinear
from edgewright.export.gguf.texts import check_template

QUANTIZED = 0.05  # root mean square of the difference over that of the outputs, with 8-bit inputs
FLOAT = 1e-3  # the same in float32
SEVENTH_DIGIT = 2.0**-23  # relative size of the change that measures how far rounding carries
POSITIONS = 96
DECODED = 8  # tokens that are also decoded one by one

TEXT = """The ferry leaves at 7:15 and, if the wind holds, reaches the far shore before noon. "Nobody asked me," said
the pilot, "but I'd have waited." In 1904 the crossing took 5 hours; today it is closer to 3. A kilogram of bread costs
2.40 here and a little less inland. Water expands when it freezes, which is why pipes burst in winter rather than in
summer. def twice(x): return 2 * x  # naïve, but it works. Żółw i zając; Москва; 東京 (50% off!)
"""


def check_language(
    path: Path,
    prepared: Any,
    model: Any,
    tokenizer: Any,
    compare: Callable[[list[int], Tensor], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Compare logits of a text in one go and decoded token by token. Raises CheckFailed beyond the tolerance.

    compare: gives, from the tokens and the file's logits [T, V], the entry "original" of the result.
    """
    from edgewright.runtime.executorch import ExecuTorchEngine

    with ExecuTorchEngine(path, check=False) as engine:
        ids = _ids(engine, tokenizer)
        whole = torch.from_numpy(engine.logits(ids))
        begin = max(1, len(ids) - DECODED)
        stepwise = torch.from_numpy(engine.logits_by_token(ids, begin))
    expected = _eager(prepared, ids, whole.shape[1])
    tolerance = FLOAT
    if _rounds(prepared):
        changed = relative_error(_eager(prepared, ids, whole.shape[1], SEVENTH_DIGIT), expected)
        tolerance = float(f"{max(QUANTIZED, 2 * changed):.3g}")
    error = relative_error(whole, expected)
    cached = relative_error(stepwise, whole[begin:])
    agreement = float((whole.argmax(-1) == expected.argmax(-1)).float().mean())
    if not error <= tolerance:
        raise CheckFailed(_message(path, error, tolerance))
    if not cached <= tolerance:
        raise CheckFailed(
            f"decoding with the cache differs by {cached:.2g} from one pass over all, allowed {tolerance:g}; "
            "the file was not kept"
        )
    checks: dict[str, Any] = {
        "positions": len(ids),
        "relative_error": float(f"{error:.3g}"),
        "tolerance": tolerance,
        "top1_agreement": round(agreement, 4),
        "cached_error": float(f"{cached:.3g}"),
    }
    original = _eager(model, ids, whole.shape[1]).log_softmax(-1)
    ours = whole.log_softmax(-1)
    checks["kl_to_model"] = float(f"{float((original.exp() * (original - ours)).sum(-1).mean()):.3g}")
    if compare is not None:
        checks["original"] = compare(list(ids), whole)
    return checks


def check_program(
    path: Path,
    prepared: Any,
    inputs: Sequence[Tensor],
    dynamic: bool,
    integers: bool = False,
    compare: Callable[[Sequence[Tensor], Sequence[Tensor]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Compare all outputs for the example, and for another batch where that is free. Raises CheckFailed.

    integers: the program rounds activations with fixed scales; the tolerance is then measured, see above.
    compare: gives, from the example and the file's outputs for it, the entry "original" of the result.
    """
    from edgewright.export.executorch.verify import flat_outputs
    from edgewright.runtime.executorch_program import ExecuTorchProgram

    tolerance = QUANTIZED if integers or not isinstance(prepared, nn.Module) or _rounds(prepared) else FLOAT
    cases = [tuple(inputs)] + ([tuple(value[:1] for value in inputs)] if dynamic else [])
    worst, outputs, original = 0.0, 0, {}
    with ExecuTorchProgram(path, check=False) as program, torch.no_grad():
        for case in cases:
            expected = flat_outputs(prepared(*case))
            if integers:
                with _Nudged():
                    nudged = flat_outputs(prepared(*case))
                changed = max(relative_error(a.double(), b.double()) for a, b in zip(nudged, expected, strict=True))
                tolerance = max(tolerance, float(f"{2 * changed:.3g}"))
            results = program.run([value.detach().cpu().numpy() for value in case])
            if len(results) != len(expected):
                raise CheckFailed(f"the file gives {len(results)} outputs, the model {len(expected)}; it was not kept")
            outputs = len(results)
            if compare is not None and case is cases[0]:
                original = {"original": compare(case, [torch.from_numpy(result) for result in results])}
            for ours, theirs in zip(results, expected, strict=True):
                error = relative_error(torch.from_numpy(ours).double(), theirs.double())
                if not error <= tolerance:
                    raise CheckFailed(_message(path, error, tolerance))
                worst = max(worst, error)
    return {"outputs": outputs, "relative_error": float(f"{worst:.3g}"), "tolerance": tolerance, **original}


class _Nudged(TorchFunctionMode):
    """Changes every activation in its seventh digit just before torch rounds it to a fixed scale."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind = getattr(func, "overloadpacket", func)
        if kind in (torch.fake_quantize_per_tensor_affine, torch.ops.aten.fake_quantize_per_tensor_affine):
            noise = torch.randn(args[0].shape, generator=self.generator)
            args = (args[0] * (1 + SEVENTH_DIGIT * noise), *args[1:])
        return func(*args, **(kwargs or {}))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Root mean square of the difference over that of `theirs`; NaN where either is not finite or shapes differ."""
    if ours.shape != theirs.shape or not (torch.isfinite(ours) == torch.isfinite(theirs)).all():
        return float("nan")
    finite = torch.isfinite(theirs)  # a cut head that is scattered back holds -inf on both sides
    difference, reference = (ours - theirs)[finite], theirs[finite]
    return float(
        difference.double().square().mean().sqrt() / reference.double().square().mean().sqrt().clamp_min(1e-12)
    )


def _rounds(prepared: nn.Module) -> bool:
    return any(isinstance(module, DynamicLinear) for module in prepared.modules())


@torch.no_grad()
def _eager(model: Any, ids: Sequence[int], outputs: int, change: float = 0.0) -> Tensor:
    training = model.training
    model.eval()
    try:
        inputs: dict[str, Tensor] = {"input_ids": torch.tensor([list(ids)])}
        if change:
            rows = model.get_input_embeddings()(inputs["input_ids"])
            noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
            inputs = {"inputs_embeds": rows * (1 + change * noise)}
        # the model's own forward: what it does behind its head (scales, caps) counts
        logits: Tensor = model(**inputs, use_cache=False).logits[0].float()
    finally:
        model.train(training)
    return logits[:, :outputs]


def _ids(engine: Any, tokenizer: Any) -> list[int]:
    longest = min(POSITIONS, engine.context)
    if tokenizer is not None:
        theirs = list(tokenizer(TEXT)["input_ids"])
        if engine.tokenize(TEXT) != theirs:
            raise CheckFailed("the tokenizer inside the file splits a text differently from the model's own")
        check_template(engine, tokenizer)
        return theirs[:longest]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, engine.tokens, (longest,), generator=generator).tolist()


def _message(path: Path, error: float, tolerance: float) -> str:
    return f"{path.name} computes something else than PyTorch: relative error {error:.2g}, allowed {tolerance:g}"


def flat_outputs(value: Any) -> tuple[Tensor, ...]:
    """The tensors of a model's output in order: of a tensor, a tuple, a list, a mapping or a ModelOutput."""
    if isinstance(value, Tensor):
        return (value,)
    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    elif isinstance(value, dict):
        value = tuple(value.values())
    if not isinstance(value, tuple | list):
        return ()
    return tuple(tensor for part in value for tensor in flat_outputs(part))

"""The chain: order, checkpoints, figures, resume to the same bits; its stages on a tiny model; torchao's arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import edgewright
from edgewright.compression.chain import ChainStage, run_chain, waterfall
from edgewright.compression.stages import (
    cut_stage,
    export_stage,
    int4_config,
    prune_both_,
    prune_stage,
    quantize_stage,
    train_stage,
)
from edgewright.errors import FormatError, UsageError
from edgewright.measure.size import parameter_counts
from edgewright.pruning.importance import collect
from edgewright.pruning.unembedding import PrunedHead
from edgewright.quantization.config import ActivationConfig
from edgewright.quantization.grids import grid_named
from edgewright.quantization.scales import full_range_alpha, grouped
from edgewright.systems.llama_guard_int4.answers import AnswerLoss, teacher_answers
from edgewright.training.batches import BlockBatches
from edgewright.training.config import TrainConfig
from tests.toy_llama import make_tiny_llama

TOKENS = torch.randint(3, 250, (8, 12), generator=torch.Generator().manual_seed(0))
KEPT = (2, 5, 17, 100)
INPUTS = ActivationConfig(8, symmetric=False)


def add(amount: int, calls: list[int], fail: bool = False) -> ChainStage:
    """A stage on integers."""

    def run(model: int, folder: Path) -> int:
        calls.append(amount)
        if fail and len(calls) < 4:
            raise KeyboardInterrupt
        return model + amount

    def save(model: int, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "n").write_text(str(model))

    return ChainStage(f"add {amount}", run, save, lambda folder: int((folder / "n").read_text()), {"amount": amount})


def test_stages_run_in_order_and_are_measured(tmp_path: Path) -> None:
    calls: list[int] = []
    stages = [add(1, calls), add(10, calls)]
    result = run_chain(stages, lambda: 5, tmp_path / "run", evaluate=lambda n: {"n": n, "half": n / 2})
    assert result.model == 16 and calls == [1, 10]
    assert {name: part["n"] for name, part in result.figures.items()} == {"start": 5, "add 1": 6, "add 10": 16}
    report = result.report("sum", {"n": "units"})
    assert report.value("half", "add 10") == 8 and report.row("n", "start").unit == "units"
    picture = waterfall(result, "n", "half", tmp_path / "waterfall.png", scale=1)
    assert picture.stat().st_size > 0


def test_it_goes_on_after_the_last_finished_stage(tmp_path: Path) -> None:
    calls: list[int] = []
    stages = [add(1, calls), add(10, calls, fail=True), add(100, calls)]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_chain(stages, lambda: 5, tmp_path / "run", evaluate=lambda n: {"n": n})
    assert calls == [1, 10, 10]  # the first stage ran once

    def never() -> int:
        raise AssertionError("the start is not needed any more")

    result = run_chain(stages, never, tmp_path / "run", evaluate=lambda n: {"n": n})
    assert result.model == 116 and calls == [1, 10, 10, 10, 100]
    again = run_chain(stages, never, tmp_path / "run", evaluate=lambda n: {"n": n})
    assert again.model == 116 and again.figures == result.figures and len(calls) == 5


def test_another_chain_is_refused(tmp_path: Path) -> None:
    calls: list[int] = []
    run_chain([add(1, calls)], lambda: 5, tmp_path / "run", settings={"seed": 0})
    with pytest.raises(UsageError, match=r"holds another run \(settings.seed=0, not 1\)"):
        run_chain([add(1, calls)], lambda: 5, tmp_path / "run", settings={"seed": 1})
    with pytest.raises(UsageError, match="stages.1.name=None, not 'add 2'"):
        run_chain([add(1, calls), add(2, calls)], lambda: 5, tmp_path / "run", settings={"seed": 0})
    changed = add(1, calls)
    with pytest.raises(UsageError, match="stages.0.amount=1, not 7"):
        run_chain(
            [ChainStage("add 1", changed.run, changed.save, changed.load, {"amount": 7})], lambda: 5, tmp_path / "run"
        )
    for stages in ([], [add(1, calls), add(1, calls)]):
        with pytest.raises(UsageError, match="each with a name of its own"):
            run_chain(stages, lambda: 5, tmp_path / "other")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="holds no chain"):
        run_chain([add(1, calls)], lambda: 5, tmp_path / "mine")
    (tmp_path / "run" / "add 1" / "done.json").write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        run_chain([add(1, calls)], lambda: 5, tmp_path / "run", settings={"seed": 0})


def rows() -> dict[str, torch.Tensor]:
    places = torch.tensor([[8, 9, 10]]).expand(8, 3)
    labels = torch.tensor(KEPT)[torch.randint(0, 4, (8, 3), generator=torch.Generator().manual_seed(1))]
    return {"tokens": TOKENS, "places": places, "labels": labels}


def stages(tokenizer: Any, teacher: nn.Module) -> list[ChainStage]:
    data = teacher_answers(teacher, make_tiny_llama(), rows(), KEPT)
    loss, batches = lambda: AnswerLoss(kl=1.0, kept=KEPT), lambda: BlockBatches(data, 4)
    config = TrainConfig(steps=3, learning_rate=1e-3)
    return [
        prune_stage(tokenizer, lambda model: collect(model, [TOKENS]), layers=3, mlp=64, multiple=32),
        train_stage(tokenizer, loss, batches, config),
        quantize_stage(tokenizer, int4_config(32), loss, batches, config),
        cut_stage(tokenizer, KEPT, INPUTS),
    ]


def test_a_real_chain_and_its_resume(tmp_path: Path, smollm2) -> None:
    """Interrupted after every stage, the same bits as in one go; every folder is what it says."""
    tokenizer = smollm2[1]
    teacher = make_tiny_llama(num_hidden_layers=4)

    def start() -> nn.Module:
        return make_tiny_llama(num_hidden_layers=4)

    def evaluate(model: Any) -> dict[str, float]:
        with torch.no_grad():
            return {"parameters": parameter_counts(model).total, "sum": float(model(TOKENS).logits.double().sum())}

    steps = stages(tokenizer, teacher)
    whole = run_chain(steps, start, tmp_path / "a", evaluate=evaluate)
    counts = [part["parameters"] for part in whole.figures.values()]
    assert counts[0] > counts[1] == counts[2] == counts[3] < counts[4] == counts[3] + 64 * len(KEPT)
    assert isinstance(whole.model.lm_head, PrunedHead)
    recovered, _ = edgewright.load(tmp_path / "a" / "recover" / "model")
    assert recovered.config.num_hidden_layers == 3 and recovered.config.intermediate_size == 64

    class Stop(Exception):
        pass

    def stopping(stage: ChainStage) -> ChainStage:
        def run(model: Any, folder: Path) -> Any:
            raise Stop

        return ChainStage(stage.name, run, stage.save, stage.load, stage.settings)

    for done in range(1, 4):
        part = [*steps[:done], stopping(steps[done]), *steps[done + 1 :]]
        with pytest.raises(Stop):
            run_chain(part, start, tmp_path / "b", evaluate=evaluate)
    resumed = run_chain(steps, start, tmp_path / "b", evaluate=evaluate)
    assert resumed.figures == whole.figures


def test_an_exported_file_is_a_stage(tmp_path: Path) -> None:
    def export(model: nn.Module, folder: Path) -> None:
        (folder / "model.txt").write_text(json.dumps(parameter_counts(model).total))

    result = run_chain([export_stage(export, "model.txt")], make_tiny_llama, tmp_path / "run")
    assert result.model == tmp_path / "run" / "export" / "model" / "model.txt" and result.model.is_file()


def test_both_prunings_use_one_measurement() -> None:
    model = make_tiny_llama(num_hidden_layers=4)
    whole = make_tiny_llama(num_hidden_layers=4)
    stats = collect(model, [TOKENS])
    kept = prune_both_(model, stats, 3, 64, 32)
    for layer, index in zip(model.model.layers, kept, strict=True):
        neurons = stats.neurons[index].topk(64).indices.sort().values
        assert torch.equal(layer.mlp.up_proj.weight, whole.model.layers[index].mlp.up_proj.weight[neurons])


def test_the_forward_is_torchaos() -> None:
    """Int4 groups of 64 by absmax/7.5 and int8 asymmetric tokens: bitwise torchao's QAT linear.

    torchao multiplies by 1/scale where we divide by the scale, so the two may part at ties, and absmax/7.5 puts the
    largest weight of a group on one (7.5 steps). A positive one is clipped to 7 either way: here all are.
    """
    from torchao.quantization import qat, quantize_ as torchao_quantize_

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=generator)
    peaks = grouped(weight, 2)
    weight = (peaks * peaks.gather(-1, peaks.abs().argmax(-1, keepdim=True)).sign()).reshape(96, 128)
    ours, theirs = (nn.Sequential(nn.Linear(128, 96, bias=False)) for _ in range(2))
    ours[0].weight.data, theirs[0].weight.data = weight.clone(), weight.clone()
    from edgewright.quantization.config import QuantConfig, Rule, WeightConfig

    rule = WeightConfig("int4", 64, scale="full_range", scale_dtype="float32")
    edgewright.quantize_(ours, QuantConfig((Rule("*", rule, INPUTS),), skip=()))
    torchao_quantize_(
        theirs,
        qat.QATConfig(
            activation_config=qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
            weight_config=qat.IntxFakeQuantizeConfig(torch.int4, group_size=64),
            step="prepare",
        ),
    )
    x = torch.randn(5, 7, 128, generator=generator)
    assert torch.equal(ours(x), theirs(x))
    upstream = torch.randn(5, 7, 96, generator=generator)
    ours(x).backward(upstream)
    theirs(x).backward(upstream)
    clipped = grouped(weight, 2) / (grouped(weight, 2).abs().amax(-1, keepdim=True) / 7.5) > 7.4999
    inside = ~clipped.reshape(96, 128)  # theirs gives a clipped weight no gradient, ours the identity
    torch.testing.assert_close(ours[0].weight.grad[inside], theirs[0].weight.grad[inside], rtol=1e-5, atol=1e-5)
    converted = edgewright.convert_(ours)
    torch.testing.assert_close(converted(x), theirs(x), rtol=0, atol=0)


def test_full_range_scale() -> None:
    weights = torch.tensor([[[0.3, -1.5, 0.75, 0.0]]])
    assert full_range_alpha(weights, grid_named("int4")).item() == pytest.approx(0.2)
    assert full_range_alpha(weights, grid_named("int8")).item() == pytest.approx(1.5 / 127.5)
    with pytest.raises(UsageError, match="for integer grids such as int4, not ternary"):
        full_range_alpha(weights, grid_named("ternary"))

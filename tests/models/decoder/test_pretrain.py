"""Pre-training: exact loss, exact resume after a kill, several processes equal to one, a model that any tool loads."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import edgewright
from edgewright.errors import FormatError, UsageError
from edgewright.io.shards import open_shards
from edgewright.models.decoder.model import new_decoder
from edgewright.models.decoder.next_token import NextToken
from edgewright.models.decoder.pretrain import PretrainSettings, pretrain
from edgewright.models.decoder.pretrain_evaluation import sample
from edgewright.training.checkpoint.files import LocalFiles
from edgewright.training.checkpoint.whole import SavedState
from edgewright.training.resume import latest_checkpoint, steps_lost
from tests import toy_pretrain as toy
from tests.processes import run_script


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory):
    """A run that nothing disturbs, in one process on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield toy.run(tmp_path_factory.mktemp("one"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of toy_pretrain.py, in processes of their own."""
    folder = tmp_path_factory.mktemp("others")
    run_script(toy.__file__, folder, 2, timeout=300)
    return folder


@pytest.mark.parametrize("chunk", [3, 10_000])
def test_loss_and_gradients_against_plain_autograd(chunk: int) -> None:
    objective, plain = (NextToken(new_decoder(toy.shape(), 3)) for _ in range(2))
    objective.chunk = chunk
    tokens = torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(1))
    loss = objective(tokens)
    loss.backward()
    logits = plain.decoder(tokens[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for (name, mine), theirs in zip(objective.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(objective(tokens, what="rows").mean(), expected.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(objective(tokens, what="next"), plain.decoder(tokens).logits[:, -1])


def test_checkpointed_activations_change_no_bit(one, tmp_path: Path) -> None:
    again = toy.run(tmp_path, gradient_checkpointing=True)
    assert all(torch.equal(value, toy.weights(again)[name]) for name, value in toy.weights(one).items())


def test_small_batches_add_up(one, tmp_path: Path) -> None:
    again = toy.run(tmp_path, micro_batch=2)
    for name, value in toy.weights(one).items():  # four shares are added in another order
        torch.testing.assert_close(value, toy.weights(again)[name], rtol=0, atol=2e-6, msg=name)


def test_what_a_run_leaves(one) -> None:
    rows = one.train.history
    assert [row["step"] for row in rows] == list(range(1, toy.STEPS + 1))
    assert rows[0]["loss"] == pytest.approx(math.log(300), rel=0.02)  # a fresh model knows nothing
    assert rows[-1]["eval_loss"] < rows[0]["loss"] - 0.1
    row = one.report.row("validation_loss")
    assert row.se is not None and row.se > 0 and row.n == 7
    shards = open_shards(one.output / "shards")
    per_token = shards.total("validation", "bytes") / shards.total("validation")
    assert one.report.value("bits_per_byte") == pytest.approx(row.value / math.log(2) / per_token)
    samples = [json.loads(line) for line in (one.output / "samples.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in samples] == [3, 6]
    assert {"loss.png", "metrics.csv", "report.json", "report.md"} <= {path.name for path in one.output.iterdir()}


def test_the_model_loads_everywhere(one) -> None:
    tokens = torch.arange(3, 40).unsqueeze(0)
    expected = one.model(tokens).logits
    for folder, kind in (("", "LlamaForCausalLM"), ("model", "LlamaForCausalLM"), ("edge", "EdgeDecoderForCausalLM")):
        model, tokenizer = edgewright.load(one.output / folder)
        assert type(model).__name__ == kind and len(tokenizer) <= 300
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
        assert model.config.eos_token_id == tokenizer.eos_token_id


def test_a_model_without_a_native_class_is_kept_as_ours(tmp_path: Path) -> None:
    mixers = ["full_attention", "sliding_attention"]
    config = toy.shape(share_map=[0, 1], mixers=mixers, sliding_window=8, qk_norm="l2", rope_interleaved=True)
    result = toy.run(tmp_path, config=config, steps=2)
    model, _ = edgewright.load(tmp_path)
    note = next(note for note in result.report.notes if note.startswith("model/"))
    assert type(model).__name__ in note or "our own class" in note


def test_experts_are_balanced_while_they_train(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "top_k": 2, "expert_size": 16, "shared_size": 16}
    config = toy.shape(share_map=[0, 1], ffn_types="moe", moe=experts, qk_norm="l2")
    result = toy.run(tmp_path, config=config, steps=3)
    assert {"z_loss", "max_load"} <= result.train.metrics.keys()
    biases = [layer.mlp.gate.e_score_correction_bias for layer in result.model.model.layers]
    assert all(bias.abs().max() > 0 for bias in biases)
    assert type(edgewright.load(tmp_path)[0]).__name__ == "Glm4MoeForCausalLM"


def test_bf16_trains(tmp_path: Path, one) -> None:
    result = toy.run(tmp_path, precision="bf16")
    assert abs(result.report.value("training_loss") - one.report.value("training_loss")) < 0.05
    assert all(value.dtype == torch.float32 for value in toy.weights(result).values())


def test_samples_with_cache_are_those_without(one) -> None:
    objective = NextToken(one.model)
    for temperature in (0.0, 0.9):
        drawn = sample(objective, [5, 6, 7], 12, -1, temperature, torch.Generator().manual_seed(1))
        generator, tokens = torch.Generator().manual_seed(1), [5, 6, 7]
        for _ in range(12):
            logits = one.model(torch.tensor([tokens])).logits[0, -1].detach()
            if temperature:
                probabilities = torch.softmax(logits / temperature, -1)
                tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
            else:
                tokens.append(int(logits.argmax()))
        assert drawn == tokens[3:]


def test_a_kill_costs_the_steps_since_the_checkpoint(one, others: Path) -> None:
    lost, said = (others / "killed.txt").read_text().splitlines()
    assert int(lost) == 1 <= toy.CHECKPOINT_EVERY  # killed in the sixth step, after the checkpoint of the fourth
    assert "from step 4 of 6; 1 steps" in said
    resumed = load_file(others / "killed.safetensors")
    assert all(torch.equal(value, resumed[name]) for name, value in toy.weights(one).items())
    for name in ("metrics.csv", "samples.jsonl"):
        assert (others / "killed" / name).read_text() == (one.output / name).read_text()
    assert steps_lost(others / "killed") == (6, 0)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "cut"])
def test_two_processes_equal_one(one, others: Path, name: str) -> None:
    """ "cut" was interrupted and went on from a checkpoint of parts."""
    found = load_file(others / f"{name}.safetensors")
    for key, value in toy.weights(one).items():
        # two halves of a batch are added in another order: a few units in the last place of weights near 1
        torch.testing.assert_close(found[key], value, rtol=0, atol=2e-6, msg=key)
    rows = [(folder / "metrics.csv").read_text().splitlines() for folder in (one.output, others / name)]
    for mine, theirs in zip(*rows, strict=True):
        if not mine.startswith("step"):
            numbers = [[float(cell or 0) for cell in line.split(",")] for line in (mine, theirs)]
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
    if name == "cut":
        whole = load_file(others / "fsdp.safetensors")
        assert all(torch.equal(found[key], value) for key, value in whole.items())


def test_parts_of_two_processes_are_read_by_one(one, others: Path) -> None:
    root = others / "fsdp" / "checkpoints"
    folder = latest_checkpoint(root.parent)
    assert len(list(folder.glob("*.safetensors"))) == 2 and not list(folder.glob("*.distcp"))
    saved = SavedState(LocalFiles(root))
    objective = NextToken(new_decoder(toy.shape(), 9))
    targets = {f"model.{name}": parameter.detach() for name, parameter in objective.named_parameters()}
    assert targets.keys() <= saved.names
    saved.read(targets)
    found = load_file(others / "fsdp.safetensors")
    for name, parameter in objective.decoder.named_parameters():
        assert torch.equal(parameter, found[name])
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(FormatError, match=r"no checkpoint .* can be used: .* has 100 bytes"):
        SavedState(LocalFiles(root))


def test_bad_input_is_one_sentence(one, tmp_path: Path) -> None:
    shards = open_shards(one.output / "shards")
    run = toy.settings(steps=1)
    for call, message in (
        (lambda: pretrain(toy.shape(vocab_size=100), shards, run, tmp_path), "the model has 100 rows"),
        (lambda: pretrain(toy.shape(), toy.documents(), toy.settings(context=65), tmp_path), "context=65 is longer"),
        (lambda: PretrainSettings(steps=3, tokens=4), "give one of the two"),
        (lambda: toy.settings(schedule="square"), "schedule='square' is unknown"),
        (lambda: toy.settings(precision="fp16"), "one of no, bf16"),
        (lambda: toy.settings(batch_size=6, micro_batch=4).train_config(2), "take batch_size=8"),
        (lambda: toy.run(one.output, learning_rate=1.0), "cannot resume"),
        (lambda: pretrain(toy.shape(), tmp_path / "none", run, tmp_path), "manifest.json: No such file"),
        (lambda: toy.run(tmp_path / "one-process", parallel="fsdp"), "torchrun"),
    ):
        with pytest.raises(UsageError, match=message):
            call()
    assert PretrainSettings(tokens=1000, context=16, batch_size=8).updates == 8
    assert dataclasses.replace(run, warmup=0.5, steps=10).train_config(1).warmup_steps == 5

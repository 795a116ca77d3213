"""What APOLLO keeps: tensors of the sizes the paper gives, saved and resumed, in every loop that trains."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from edgewright.errors import UsageError
from edgewright.systems.apollo import (
    APOLLO,
    APOLLOMini,
    apollo_layerwise,
    apollo_param_groups,
    optimizer_memory,
    state_bytes,
    state_floats,
)
from edgewright.training import BlockBatches, TrainConfig, TrainingInterrupted, fit
from tests.processes import run_script
from tests.systems.apollo import toys as toy
from tests.systems.apollo.toys import apollo, flat, network, train


def smollm2_shapes():
    """SmolLM2-135M without memory: names and shapes alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.tie_weights()  # which some versions of transformers leave out without memory
    return model


@pytest.mark.parametrize(("rank", "numbers"), [(1, 57_108_096 + 420), (64, 83_235_456 + 420)])
def test_memory_of_smollm2_is_the_papers_formula(rank, numbers):
    model = smollm2_shapes()
    groups = apollo_param_groups(model, rank)
    sketched = {id(p) for _, p in groups[0]["params"]}
    shapes = [(p.shape, id(p) in sketched) for p in model.parameters()]
    assert len(sketched) == 210 and sum(s.numel() for s, _ in shapes) == 134_515_008
    method = "APOLLO-Mini" if rank == 1 else "APOLLO"
    assert sum(state_floats(method if low else "AdamW", shape, rank) for shape, low in shapes) == numbers
    memory = optimizer_memory(model, groups)
    # The paper's two constants, the last norm and the seed, are 4 and 8 bytes here; every parameter has a step of 4.
    assert memory["total"] == 4 * numbers + 210 * 4 + len(shapes) * 4
    assert round(memory["vs_adamw"], 1) == {1: 4.7, 64: 3.2}[rank]


@pytest.mark.parametrize("kind", [None, "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"rank": 1, "scale_type": "tensor"}, {"proj": "svd"}, {"side": "local"}])
def test_live_bytes_are_the_predicted_ones(kind, options):
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 64))
    optimizer = APOLLO(apollo_param_groups(model, options.get("rank", 32), "1.weight"), state_dtype=kind, **{
        k: v for k, v in options.items() if k != "rank"
    })  # fmt: skip
    before = optimizer_memory(model, optimizer)
    model(torch.randn(4, 300, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    optimizer.step()
    assert all(isinstance(v, Tensor) for entry in optimizer.state.values() for v in entry.values())
    assert optimizer_memory(model, optimizer)["live"] == before["total"] == state_bytes(optimizer)


def test_bfloat16_state_trains_as_float32_does():
    losses = {}
    for kind in ("float32", "bfloat16"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(12, 384), nn.Tanh(), nn.Linear(384, 16))
        groups = apollo_param_groups(model, 12, "2.weight")
        optimizer = APOLLO(groups, lr=3e-3, scale="auto", state_dtype=kind)
        losses[kind] = sum(train(model, optimizer, 0, 120)[-20:])
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_in_a_window_it_goes_on_to_the_same_bits(kind, dtype, tmp_path):
    def made():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(12, 384), nn.Tanh(), nn.Linear(384, 16)).to(dtype)
        return model, apollo(model, rank=12, update_proj_gap=20, state_dtype=kind)

    def steps(model, optimizer, begin, end):
        for step in range(begin, end):
            x, y = toy.batch(step)
            (model(x.to(dtype)) - y).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = made()
    steps(model, optimizer, 0, 37)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    steps(model, optimizer, 37, 67)
    again, resumed = made()
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    steps(again, resumed, 37, 67)
    assert torch.equal(flat(model), flat(again))
    copied = copy.deepcopy(resumed)
    assert copied.state_dict()["param_groups"] == resumed.state_dict()["param_groups"]


def test_a_state_of_other_parameters_is_refused_before_anything_changes():
    model, other = network(), nn.Sequential(*network()[:5], nn.Linear(16, 20))
    optimizer, copied = apollo(model), apollo(other)
    train(model, optimizer, 0, 2)
    saved = optimizer.state_dict()
    with pytest.raises(UsageError, match=r"state of parameter 5.weight has moments \[4, 16\], now they are \[4, 20\]"):
        copied.load_state_dict(saved)
    assert not copied.state
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(UsageError, match="the saved optimizer is no APOLLO"):
        APOLLO(model.parameters()).load_state_dict(adamw.state_dict())
    broken = copy.deepcopy(saved)
    del broken["state"][0]["proj_seed"]
    with pytest.raises(UsageError, match="parameter 0.weight has no 'proj_seed'"):
        apollo(network()).load_state_dict(broken)


def test_memory_of_a_foreign_optimizer_is_refused():
    model = network()
    with pytest.raises(UsageError, match="the groups have no 'rank'"):
        optimizer_memory(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(UsageError, match="that is not of this model"):
        optimizer_memory(network(), apollo(model))
    with pytest.raises(UsageError, match="method='Adam'; it must be one of AdamW"):
        state_floats("Adam", (3, 4))


# -- every loop that trains --------------------------------------------------------------------------------------------


class Stopping:
    """A loss function that stops the run once, at a step."""

    def __init__(self, at):
        self.left = at

    def __call__(self, model, batch):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return (model(batch["x"]) - batch["y"]).square().mean()


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_the_loop_stops_and_resumes_to_the_same_bits(kind, tmp_path):
    x, y = toy.batch(0)
    config = TrainConfig(12, schedule="cosine", clip_norm=1.0, checkpoint_every=5)

    def start(folder, at=0):
        model = network()
        optimizer = apollo(model, update_proj_gap=4, state_dtype=kind)
        data = BlockBatches({"x": x, "y": y}, 8)
        fit(model, Stopping(at), data, config, optimizer=optimizer, output=folder, progress=False)
        return flat(model)

    whole = start(tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, TrainingInterrupted)):
        start(tmp_path / "cut", 9)
    assert torch.equal(whole, start(tmp_path / "cut"))


def test_the_trainer_of_transformers(tiny_llama, tmp_path):
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 256, (24, 16), generator=generator)]

    def trained(model, folder, resume=False):
        optimizer = APOLLO(apollo_param_groups(model, 8), lr=1e-3, scale="auto")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)
        arguments = TrainingArguments(
            str(folder), max_steps=6, per_device_train_batch_size=4, save_steps=3, report_to=[], use_cpu=True,
            disable_tqdm=True, logging_strategy="no", save_strategy="steps",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, schedule))
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
        return flat(model)

    again = copy.deepcopy(tiny_llama)
    before = flat(tiny_llama)
    whole = trained(tiny_llama, tmp_path)
    assert not torch.equal(before, whole)
    assert torch.equal(whole, trained(again, tmp_path, resume=True))


def test_two_processes_that_share_the_weights(tmp_path):
    run_script(toy.__file__, tmp_path)
    for name, options in toy.SHARDED.items():
        model = network()
        train(model, apollo(model, **options), 0, 12)
        saved = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        # gradients and sums are added in another order
        torch.testing.assert_close(saved, flat(model), rtol=0, atol=1e-5)


# -- inside backward ---------------------------------------------------------------------------------------------------


def test_layerwise_gives_the_same_bits_and_keeps_no_gradient():
    ordinary, layered = network(), network()
    groups = [apollo_param_groups(model, 4, r"weight$") for model in (ordinary, layered)]
    plain = APOLLO(groups[0], lr=1e-2)
    inside = apollo_layerwise(layered, groups[1], lr=1e-2)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (plain, inside)]
    for step in range(8):
        for model, optimizer in ((ordinary, plain), (layered, inside)):
            toy.loss_of(model, step).backward()
            if model is layered:
                assert all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
    assert torch.equal(flat(ordinary), flat(layered))


def test_layerwise_refuses_what_needs_all_gradients():
    with pytest.raises(UsageError, match="clip_norm=1.0: the norm of all gradients is never known"):
        apollo_layerwise(network(), rank=2, clip_norm=1.0)
    with pytest.raises(UsageError, match="accumulation=4: gradients are used at once"):
        apollo_layerwise(network(), rank=2, accumulation=4)
    model = network()
    apollo_layerwise(model, rank=2)
    toy.loss_of(model, 0).backward()
    with pytest.raises(UsageError, match=r"a second gradient before step\(\)"):
        toy.loss_of(model, 1).backward()


# -- the paper's effect ------------------------------------------------------------------------------------------------


def test_with_a_fraction_of_the_state_it_learns_like_adamw():
    """Claim at toy size: the last losses of APOLLO are within a fifth of AdamW's, SGD's of the same rate are not."""
    last = {}
    for name in ("AdamW", "APOLLO", "Mini", "SGD"):
        found = []
        for seed in range(3):
            model = network(seed)
            optimizer = {
                "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.0),
                "APOLLO": lambda m: APOLLO(apollo_param_groups(m, 4, r"weight$"), lr=1e-2, scale="auto"),
                "Mini": lambda m: APOLLOMini(apollo_param_groups(m, 1, r"weight$"), lr=1e-2, scale="auto"),
                "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
            }[name](model)
            found.append(sum(train(model, optimizer, 0, 150)[-20:]))
        last[name] = sum(found)
    assert last["APOLLO"] < 1.2 * last["AdamW"] and last["Mini"] < 1.2 * last["AdamW"] < last["SGD"]

"""Contract: however a run is stopped, calling it again ends in the bits of a run that was never stopped."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from edgewright.errors import CheckFailed, FormatError, OutputError, UsageError
from edgewright.training import BlockBatches, TrainConfig, TrainingInterrupted, fit
from edgewright.training.checkpoint import writer
from edgewright.training.checkpoint.files import LocalFiles
from edgewright.training.checkpoint.manifest import _digest
from edgewright.training.checkpoint.whole import SavedState
from edgewright.training.resume import MODEL, checkpoint_path, latest_checkpoint
from tests.processes import run_script
from tests.training import training_toy as toy
from tests.training.training_toy import ACCUMULATION, STEPS, Plain, cross_entropy, data, seeded, toy_run

MICRO_STEPS = STEPS * ACCUMULATION


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """State, result and CSV of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    state, result = toy_run(folder)
    return state, result, (folder / "metrics.csv").read_bytes()


def interrupt(at: int, number: int = signal.SIGINT):
    return lambda call: signal.raise_signal(number) if call == at else None


def assert_same(state, result, folder: Path, whole) -> None:
    assert state.keys() == whole[0].keys()
    for name, value in whole[0].items():
        assert torch.equal(state[name], value), name
    assert result.history == whole[1].history
    assert (folder / "metrics.csv").read_bytes() == whole[2]


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.name.startswith((".", "tmp-", "trash-")))


@pytest.mark.parametrize("at", range(1, MICRO_STEPS + 1))
def test_ctrl_c_at_every_micro_step(at: int, tmp_path: Path, whole) -> None:
    with pytest.raises(TrainingInterrupted) as stopped:
        toy_run(tmp_path, interrupt(at))
    micro = at % ACCUMULATION
    assert stopped.value.checkpoint == checkpoint_path(tmp_path, at // ACCUMULATION, micro)
    assert "same command again to resume" in str(stopped.value)
    state, result = toy_run(tmp_path)
    assert result.resumed_from == at // ACCUMULATION
    assert_same(state, result, tmp_path, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.csv"]


@pytest.mark.parametrize("every", [1, 2])
def test_stopped_at_each_micro_step_of_one_run(every: int, tmp_path: Path, whole) -> None:
    for _ in range(MICRO_STEPS):
        with pytest.raises(TrainingInterrupted):
            toy_run(tmp_path, interrupt(1, signal.SIGTERM), checkpoint_every=every)
    state, result = toy_run(tmp_path, interrupt(1), checkpoint_every=every)  # nothing left to do: never called
    assert_same(state, result, tmp_path, whole)


@pytest.mark.parametrize("at", range(1, MICRO_STEPS + 1))
@pytest.mark.parametrize("every", [1, 3])
def test_crash_at_every_micro_step(at: int, every: int, tmp_path: Path, whole) -> None:
    def crash(call: int) -> None:
        if call == at:
            raise MemoryError

    with pytest.raises(MemoryError):
        toy_run(tmp_path, crash, checkpoint_every=every)
    state, result = toy_run(tmp_path, checkpoint_every=every)
    done = (at - 1) // ACCUMULATION // every * every
    assert result.resumed_from == (done or None)
    assert_same(state, result, tmp_path, whole)


def test_the_last_checkpoint_has_the_same_bytes(tmp_path: Path) -> None:
    def crash(call: int) -> None:
        if call == 5:
            raise MemoryError

    toy_run(tmp_path / "whole", checkpoint_every=1)
    with pytest.raises(MemoryError):
        toy_run(tmp_path / "cut", crash, checkpoint_every=1)
    toy_run(tmp_path / "cut", checkpoint_every=1)
    whole, cut = (latest_checkpoint(tmp_path / name) / "r00000-00000.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    expected, _ = toy_run(tmp_path / "whole", steps=20)
    kills = int(run_script(toy.__file__, "killed", tmp_path, 0))
    assert kills > 3
    state = load_file(tmp_path / "end.safetensors")
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert (tmp_path / "run/metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()
    assert list((tmp_path / "run/checkpoints").glob("*-*")) == [checkpoint_path(tmp_path / "run", 20)]


def test_a_kill_between_two_checkpoints_leaves_none_too_many(tmp_path: Path, whole, monkeypatch) -> None:
    monkeypatch.setattr(writer, "collect", lambda *_, **__: None)  # the kill came before it
    toy_run(tmp_path, checkpoint_every=1)
    assert len(list((tmp_path / "checkpoints").glob("ckpt-*"))) > 1
    monkeypatch.undo()
    state, result = toy_run(tmp_path, checkpoint_every=1)
    assert len(list((tmp_path / "checkpoints").glob("ckpt-*"))) == 1
    assert_same(state, result, tmp_path, whole)


def test_second_ctrl_c_leaves_at_once_and_spoils_nothing(tmp_path: Path, whole, monkeypatch) -> None:
    def twice(call: int) -> None:
        if call == 7:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as left:
        toy_run(tmp_path, twice, checkpoint_every=2)
    assert not isinstance(left.value, TrainingInterrupted)
    commit = writer.commit

    def commit_slowly(*arguments) -> str:
        signal.raise_signal(signal.SIGINT)
        return commit(*arguments)

    monkeypatch.setattr(writer, "commit", commit_slowly)
    with pytest.raises(KeyboardInterrupt) as left:
        toy_run(tmp_path, interrupt(1), checkpoint_every=2)
    assert not isinstance(left.value, TrainingInterrupted)
    monkeypatch.undo()
    assert leftovers(tmp_path) == []
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 2, 0)
    state, result = toy_run(tmp_path, checkpoint_every=2)
    assert_same(state, result, tmp_path, whole)


def test_handlers_come_back_and_other_threads_work(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingInterrupted):
        toy_run(None, interrupt(3))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    results: list = []
    thread = threading.Thread(target=lambda: results.append(toy_run(None)))
    thread.start()
    thread.join()
    assert results[0][1].steps == STEPS


def test_interrupt_without_output_says_that_nothing_is_saved() -> None:
    with pytest.raises(TrainingInterrupted, match="after 1 of 5 steps: nothing was saved") as stopped:
        toy_run(None, interrupt(3))
    assert stopped.value.checkpoint is None


def test_policies(tmp_path: Path) -> None:
    def run(resume: str, output: Path | None = tmp_path):
        config = TrainConfig(3, 1e-2, checkpoint_every=1)
        return fit(seeded(Plain), cross_entropy, data(), config, output=output, resume=resume, progress=False)

    with pytest.raises(UsageError, match="no checkpoint in"):
        run("must")
    with pytest.raises(UsageError, match="no output folder"):
        run("must", None)
    with pytest.raises(UsageError, match="resume='always'; it must be one of auto, never, must"):
        run("always")
    first = run("auto")
    assert first.resumed_from is None and run("must").resumed_from == 3
    assert run("never").resumed_from is None
    assert run("auto").history == first.history


def fresh(**changes):
    """Arguments of a small run, some of them changed."""
    config = {
        "steps": 6,
        "learning_rate": 1e-2,
        **{k: v for k, v in changes.items() if k in ("steps", "seed", "betas")},
    }
    model = changes.get("model") or seeded(Plain)
    return {
        "model": model,
        "loss_function": cross_entropy,
        "batches": changes.get("batches") or data(),
        "config": TrainConfig(**config),
        "optimizer": changes.get("optimizer"),
        "settings": changes.get("settings", {"bits": 4, "shape": (1, 2)}),
        "progress": False,
    }


def stopped_run(output: Path, **changes) -> None:
    arguments = fresh(**changes)
    calls = [0]

    def loss_function(model, batch):
        calls[0] += 1
        if calls[0] == 2:
            signal.raise_signal(signal.SIGINT)
        return cross_entropy(model, batch)

    with pytest.raises(TrainingInterrupted):
        fit(**{**arguments, "loss_function": loss_function}, output=output)


def wider() -> nn.Module:
    model = Plain()
    model.layers = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    return model


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 7}, "steps was 6, now 7"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"betas": (0.9, 0.99)}, r"betas.1 was 0.999, now 0.99"),
        ({"settings": {"bits": 3, "shape": (1, 2)}}, "settings.bits was 4, now 3"),
        ({"settings": {}}, "settings.bits was 4, now 'absent'"),
        ({"optimizer": [{"params": "all", "lr": 1e-3}]}, "learning_rate was 0.01, now 0.001"),
        ({"model": wider}, r"'layers.0.bias' was float32\[8\], now float32\[9\]"),
        ({"batches": lambda: data(batch_size=5)}, "batch_size of the batches was 4, now 5"),
        ({"batches": lambda: BlockBatches({"x": torch.zeros(21, 6)}, 4, 3)}, "content of the blocks"),
        ({"batches": lambda: iter([1, 2, 3])}, "list_iterator.*no state_dict"),
    ],
)
def test_a_resume_that_differs_is_refused_by_name(changes, sentence: str, tmp_path: Path) -> None:
    stopped_run(tmp_path)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changes = {name: value() if callable(value) else value for name, value in changes.items()}
    arguments = fresh(**changes)
    if arguments["optimizer"]:
        arguments["optimizer"] = [{"params": arguments["model"].parameters(), "lr": 1e-3}]
    before = {name: value.clone() for name, value in arguments["model"].state_dict().items()}
    with pytest.raises(UsageError, match=sentence):
        fit(**arguments, output=tmp_path)
    assert all(torch.equal(before[name], value) for name, value in arguments["model"].state_dict().items())
    assert kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert fit(**fresh(), output=tmp_path).resumed_from == 2


def test_frozen_weights_must_be_those_of_the_run(tmp_path: Path) -> None:
    def frozen(seed: int) -> nn.Module:
        model = seeded(Plain)
        model.layers[0].requires_grad_(False)
        with torch.no_grad():
            model.layers[0].weight[0, 0] += seed
        return model

    stopped_run(tmp_path, model=frozen(0))
    saved = [name for name in SavedState(LocalFiles(tmp_path / "checkpoints")).names if name.startswith(MODEL)]
    assert sorted(saved) == ["model.layers.2.bias", "model.layers.2.weight"]
    with pytest.raises(UsageError, match="'layers.0.weight' has other values"):
        fit(**fresh(model=frozen(1)), output=tmp_path)
    with pytest.raises(UsageError, match="groups.0.parameters was 1, now 2"):
        fit(**fresh(), output=tmp_path)
    fit(**fresh(model=frozen(0)), output=tmp_path)


def test_batches_without_state_train_but_do_not_resume(tmp_path: Path) -> None:
    endless = ({"x": torch.zeros(2, 6), "y": torch.zeros(2, dtype=torch.long)} for _ in iter(int, 1))
    stopped_run(tmp_path, batches=endless)
    with pytest.raises(UsageError, match="have no state_dict.*resume='never'"):
        fit(**fresh(), output=tmp_path)


def test_same_objects_go_on_after_an_interrupt(tmp_path: Path) -> None:
    expected = seeded(Plain)
    fit(**fresh(model=expected), output=tmp_path / "whole")
    arguments, calls = fresh(optimizer=None), [0]

    def loss_function(model, batch):
        calls[0] += 1
        if calls[0] in (2, 4):
            signal.raise_signal(signal.SIGINT)
        return cross_entropy(model, batch)

    for _ in range(2):
        with pytest.raises(TrainingInterrupted):
            fit(**{**arguments, "loss_function": loss_function}, output=tmp_path / "cut")
    fit(**arguments, output=tmp_path / "cut")
    for ours, theirs in zip(arguments["model"].parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_half_precision_state_keeps_its_bits(tmp_path: Path) -> None:
    class Wide(torch.optim.SGD):
        """Momentum in float32 for bfloat16 weights, which torch's own loading would round."""

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p, dtype=torch.float32))
                momentum.mul_(0.9).add_(p.grad.float())
                p.data = (p.data.float() - self.param_groups[0]["lr"] * momentum).bfloat16()

    def arguments():
        model = seeded(Plain).bfloat16()
        loss = lambda model, batch: cross_entropy(model, {**batch, "x": batch["x"].bfloat16()})  # noqa: E731
        return {**fresh(model=model, optimizer=Wide(model.parameters(), lr=0.1)), "loss_function": loss}

    whole = arguments()
    fit(**whole, output=tmp_path / "whole")
    first = arguments()
    first["evaluate"], first["evaluate_every"] = lambda model: signal.raise_signal(signal.SIGINT) or {}, 3  # type: ignore[func-returns-value]
    with pytest.raises(TrainingInterrupted):
        fit(**first, output=tmp_path / "cut")
    second = arguments() | {"evaluate": lambda model: {}, "evaluate_every": 3}
    fit(**second, output=tmp_path / "cut")
    for ours, theirs in zip(second["model"].parameters(), whole["model"].parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(second["optimizer"].state[ours]["momentum"], whole["optimizer"].state[theirs]["momentum"])


def test_nan_keeps_the_last_good_checkpoint_and_weights(tmp_path: Path) -> None:
    model, calls = seeded(Plain), [0]

    def loss_function(model, batch):
        calls[0] += 1
        return cross_entropy(model, batch) * (float("nan") if calls[0] == 4 else 1.0)

    config = TrainConfig(6, 1e-2, checkpoint_every=2, schedule="constant")
    with pytest.raises(CheckFailed, match=r"loss is nan at step 4 \(learning rate 0.01\).*ckpt-00000002-00000000"):
        fit(model, loss_function, data(), config, output=tmp_path, progress=False)
    assert all(p.isfinite().all() for p in model.parameters())
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 2, 0)
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + 3


def test_unwritable_and_full_disks_are_one_sentence(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot create the output folder"):
        fit(**fresh(), output=tmp_path / "file/run")

    def full(self, handle, data) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LocalFiles, "write", full)
    arguments = fresh() | {"config": TrainConfig(2, 1e-2, checkpoint_every=1)}
    with pytest.raises(OutputError, match="No space left"):
        fit(**arguments, output=tmp_path / "run")
    assert leftovers(tmp_path) == []


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    stopped_run(tmp_path)
    folder = latest_checkpoint(tmp_path)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["manifest.json", "r00000-00000.safetensors"]
    for file in files:
        content = file.read_bytes()
        for damaged in (content[: len(content) // 2], bytes([content[-2] ^ 1]).join([content[:-2], content[-1:]])):
            file.write_bytes(damaged)
            with pytest.raises(FormatError, match="damaged.*resume='never'"):
                fit(**fresh(), output=tmp_path)
        file.write_bytes(content)
    text = files[0].read_text()
    for micro in (2**53, 1):
        manifest = json.loads(text)
        manifest["state"]["state"]["micro"] = micro
        manifest["digest"] = _digest({name: value for name, value in manifest.items() if name != "digest"})
        files[0].write_text(json.dumps(manifest))
        with pytest.raises(FormatError, match=f"damaged: it has 0 losses and 0 metrics of {micro} micro steps"):
            fit(**fresh(), output=tmp_path)
    files[0].write_text(text)
    fit(**fresh(), output=tmp_path)


def test_what_a_checkpoint_cannot_hold_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"settings.settings.model is of type PosixPath"):
        fit(**fresh(settings={"model": tmp_path}), output=tmp_path)
    outside = torch.optim.SGD([*(model := seeded(Plain)).parameters(), nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(UsageError, match="not in the model"):
        fit(**fresh(model=model, optimizer=outside), output=tmp_path)

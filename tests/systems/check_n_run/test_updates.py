"""Lists, updates for devices, the command, and roots behind URLs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgewright import cli
from edgewright.errors import CheckFailed, FormatError, UsageError
from edgewright.systems.check_n_run import (
    CheckpointConfig,
    DiffCheckpointer,
    apply_delta,
    diff,
    inspect_dir,
    merge,
    restore,
    update as updates,
)
from edgewright.training.checkpoint.files import LOCK, open_files
from tests.systems.check_n_run.toy import Run, same


def trained(root: object, saves: int = 3, bits: object = 4, **changes: object) -> DiffCheckpointer:
    run = Run()
    config = CheckpointConfig(**{"bits": bits, "policy": "consecutive", "keep": 9, "nbins": 25, "ratio": 0.6,
                                 "expected_restores": 9, **changes})  # type: ignore[arg-type]  # fmt: skip
    with torch.no_grad():
        run.model.tables[0].weight[4] = float("inf")
    checkpointer = DiffCheckpointer(root, run.model, run.optimizers, reader=run.reader, config=config)  # type: ignore[arg-type]
    for _ in range(saves):
        run.step()
        checkpointer.steps += 1
        checkpointer.save(now=True)
        with torch.no_grad():
            run.model.tables[1].weight[int(checkpointer.steps)] = float("nan")
        checkpointer.tracker.mark(1, torch.tensor([checkpointer.steps]))
    checkpointer.close()
    return checkpointer


def at(root: Path, identity: str) -> Run:
    run = Run(seed=6)
    restore(root, run.model, identity=identity)
    return run


def model_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


@pytest.mark.parametrize("bits", [2, 3, 4, 8, "none"])
def test_an_update_leads_from_one_restored_model_to_the_next(bits: object, tmp_path: Path) -> None:
    ids = [saved.id for saved in trained(tmp_path / "ck", bits=bits).history]
    first, last = tmp_path / "ck" / ids[0], tmp_path / "ck" / ids[2]
    fields = diff(first, last, tmp_path / "update.bin")
    device = at(tmp_path / "ck", ids[0])
    apply_delta(device.model, tmp_path / "update.bin")
    assert same(model_of(device), model_of(at(tmp_path / "ck", ids[2])))
    changed = sum(record["rows"] for record in fields["records"])
    assert 0 < changed < 30 and fields["dense"] == ["seen", "top.bias", "top.weight"]
    back = diff(last, first, tmp_path / "back.bin")
    apply_delta(device.model, tmp_path / "back.bin")
    assert back["id"] == ids[0] and same(model_of(device), model_of(at(tmp_path / "ck", ids[0])))


def test_updates_that_follow_each_other_merge(tmp_path: Path) -> None:
    ids = [saved.id for saved in trained(tmp_path / "ck").history]
    paths = [tmp_path / "ck" / identity for identity in ids]
    diff(paths[0], paths[1], tmp_path / "a.bin")
    diff(paths[1], paths[2], tmp_path / "b.bin")
    merge(tmp_path / "a.bin", tmp_path / "b.bin", tmp_path / "both.bin")
    device = at(tmp_path / "ck", ids[0])
    apply_delta(device.model, tmp_path / "both.bin")
    assert same(model_of(device), model_of(at(tmp_path / "ck", ids[2])))
    with pytest.raises(UsageError, match="do not follow"):
        merge(tmp_path / "b.bin", tmp_path / "a.bin", tmp_path / "c.bin")


def test_an_update_for_another_model_or_a_damaged_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [saved.id for saved in trained(tmp_path / "ck").history]
    path = tmp_path / "update.bin"
    diff(tmp_path / "ck" / ids[0], tmp_path / "ck" / ids[1], path)
    for device, error in ((Run(seed=1), "the model is not that of"), (at(tmp_path / "ck", ids[1]), "is not that of")):
        before = model_of(device)
        with pytest.raises(UsageError, match=error):
            apply_delta(device.model, path)
        assert same(before, model_of(device))
    device = at(tmp_path / "ck", ids[0])
    before = model_of(device)
    good = path.read_bytes()
    for place in range(10, len(good), max(1, len(good) // 40)):
        flipped = bytearray(good)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        with pytest.raises((FormatError, UsageError, CheckFailed)):
            apply_delta(device.model, path)
        assert same(before, model_of(device)), place
    path.write_bytes(good[:-3])
    with pytest.raises(FormatError):
        apply_delta(device.model, path)
    path.write_bytes(good)
    put = updates._put
    monkeypatch.setattr(updates, "_put", lambda steps: put(steps[1:] if len(steps) > 1 else steps))
    with pytest.raises(CheckFailed, match="the model is as it was"):
        apply_delta(device.model, path)


def test_lists_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "ck"
    ids = [saved.id for saved in trained(root).history]
    listing = inspect_dir(root)
    assert [entry.id for entry in listing.entries] == ids[::-1] and listing.latest == ids[2]
    assert [entry.kind for entry in listing.entries] == ["diff", "diff", "full"] and not listing.orphans
    assert all(entry.usable and 0 < entry.ratio <= 1 for entry in listing.entries)
    assert listing.entries[2].rows == 83 and listing.entries[2].raw_rows == 1
    assert cli.main(["checkpoint", "list", str(root)]) == 0 and cli.main(["checkpoint", "verify", str(root)]) == 0
    shown = capsys.readouterr().out
    assert "LATEST" in shown and "float)" in shown
    models = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for identity, file in zip(ids[:2], models, strict=False):
        assert cli.main(["checkpoint", "restore", str(root), "--id", identity, "--to", str(file)]) == 0
    assert same(load_file(models[1]), model_of(at(root, ids[1])))
    update = tmp_path / "update.bin"
    command = ["checkpoint", "diff", str(root / ids[0]), str(root / ids[1]), "--to", str(update)]
    assert cli.main(command) == 0 and cli.main(command) == 2
    assert cli.main(["checkpoint", "apply", str(models[0]), str(update), "--to", str(models[2])]) == 0
    assert same(load_file(models[2]), load_file(models[1]))
    data = next((root / ids[1]).glob("*.safetensors"))
    text = bytearray(data.read_bytes())
    text[-1] ^= 1
    data.write_bytes(text)
    capsys.readouterr()
    assert cli.main(["checkpoint", "list", str(root)]) == 0  # sizes alone
    assert cli.main(["checkpoint", "verify", str(root), "--json"]) == 1
    assert json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))["latest"] == ids[2]
    entries = inspect_dir(root, content=True).entries
    assert [entry.usable for entry in entries] == [False, False, True] and "sha256" in entries[0].status
    assert cli.main(["checkpoint", "gc", str(root), "--keep", "1"]) == 0  # the one that still can be restored stays
    assert [path.name for path in root.glob("ckpt-*")] == [ids[0]]
    assert cli.main(["checkpoint", "list", str(tmp_path / "nothing")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_old_checkpoints_go_and_what_is_built_upon_stays(tmp_path: Path) -> None:
    history = trained(tmp_path, saves=5, keep=2, policy="one-shot").history
    assert sorted(path.name for path in tmp_path.glob("ckpt-*")) == [history[place].id for place in (0, 3, 4)]
    whole = tmp_path / "whole"
    history = trained(whole, saves=4, keep=2, policy="full").history
    assert sorted(path.name for path in whole.glob("ckpt-*")) == [one.id for one in history[2:]]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URL of a bucket of an S3 server on this machine."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    wanted = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**wanted, "AWS_DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem().mkdir("checkpoints")
        yield "s3://checkpoints"
    server.stop()


@pytest.mark.parametrize("place", ["memory", "s3"])
@pytest.mark.parametrize("policy", ["consecutive", "full"])
def test_a_root_behind_a_url(place: str, policy: str, request: pytest.FixtureRequest) -> None:
    import fsspec

    root = request.getfixturevalue("bucket") if place == "s3" else "memory://checkpoints"
    url = f"{root}/{policy}"
    checkpointer = trained(url, policy=policy, keep=1)
    run = Run(seed=5)
    info = restore(url, run.model, run.optimizers, run.reader)
    assert info.id == checkpointer.history[-1].id and not info.skipped
    assert len(inspect_dir(url).entries) == len(info.chain)
    system = fsspec.filesystem(place)
    for path in system.find(f"{url.partition('//')[2]}/{info.id}"):  # without its manifest it is no checkpoint
        if path.endswith("manifest.json"):
            system.rm_file(path)
    files = open_files(url)
    if policy == "full":
        with pytest.raises((FormatError, UsageError)):
            restore(url, run.model)
    assert LOCK not in files.names("")
    held = files.lock()
    with pytest.raises(UsageError, match="is being written by process"):
        DiffCheckpointer(url, run.model, run.optimizers)
    files.unlock(held)

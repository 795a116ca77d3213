"""Readers of `fuzz_readers` for what runs leave behind, and for files of other programs: exported networks, pickles."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


def read_all(*reads: Callable[[], object]) -> None:
    """Call all; the error of the last one that failed with an error of ours is raised at the end."""
    from edgewright.errors import EdgewrightError

    failed = None
    for read in reads:
        try:
            read()
        except EdgewrightError as error:
            failed = error
    if failed is not None:
        raise failed


# ---- exported networks -----------------------------------------------------------------------------------------------


def build_pte(folder: Path) -> None:
    from edgewright.export.executorch.exporter import export_executorch

    export_executorch(nn.Linear(8, 3), None, folder / "program.pte", example_inputs=[torch.randn(1, 8)])


def build_chat_pte(folder: Path) -> None:
    from edgewright.export.executorch.exporter import export_executorch
    from tests.toy_llama import make_byte_tokenizer, make_tiny_llama

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    export_executorch(make_tiny_llama(**shape), make_byte_tokenizer(), folder / "chat.pte", context=32)


def read_chat_pte(folder: Path) -> None:
    from edgewright.runtime.engine import open_engine

    with open_engine(folder / "chat.pte", threads=1) as engine:
        engine.next_logits(engine.tokenize("hello")[:4] or [0])


def build_onnx(folder: Path) -> None:
    from edgewright.export.onnx.exporter import export_onnx

    network = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    export_onnx(network, folder / "program.onnx", example_inputs=torch.randn(2, 8))


def read_program(folder: Path) -> None:
    from edgewright.runtime.program import open_program
    from edgewright.runtime.program_inputs import stand_in_inputs

    (file,) = (file for file in folder.iterdir() if file.suffix in (".onnx", ".pte"))
    with open_program(file, threads=1) as program:
        program.run(stand_in_inputs(program.inputs, length=4))


# ---- folders of models -----------------------------------------------------------------------------------------------


def build_r_sparse(folder: Path) -> None:
    from edgewright.systems.r_sparse.folder import save_rsparse
    from edgewright.systems.r_sparse.model import apply_rsparse
    from edgewright.systems.r_sparse.plan import LayerPlan, RSparseConfig, calibrate
    from tests.fuzz_models import tokenizer
    from tests.toy_llama import make_tiny_llama

    model = make_tiny_llama(hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    config = RSparseConfig(0.5, rho=0.8)
    stats = calibrate(model, [torch.randint(3, 256, (4, 32))], config)
    plan = dict.fromkeys(stats.histograms, LayerPlan(0.5, 0.8))
    apply_rsparse(model, config, stats, plan)
    save_rsparse(model, tokenizer(), folder / "model", config, stats, plan)


def read_r_sparse(folder: Path) -> None:
    from edgewright.systems.r_sparse.folder import load_rsparse

    model, _, _ = load_rsparse(folder / "model")
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))


def build_guard(folder: Path) -> None:
    from edgewright.pruning.unembedding import prune_unembedding_
    from edgewright.quantization.config import ActivationConfig
    from edgewright.systems.llama_guard_int4.model import save_guard
    from edgewright.systems.llama_guard_int4.policy import GuardPolicy, GuardSettings
    from tests.fuzz_models import tokenizer
    from tests.toy_llama import make_tiny_llama

    text, policy = tokenizer(), GuardPolicy({"S1": "cards", "S2": "doses"})
    text.add_tokens([" safe"])
    model = make_tiny_llama(hidden_size=32, intermediate_size=48, vocab_size=len(text))
    prune_unembedding_(model, policy.output_vocabulary(text))
    save_guard(model, text, folder / "guard", GuardSettings(policy, 0.4, ActivationConfig(8, symmetric=False)))


def read_guard(folder: Path) -> None:
    from edgewright.systems.llama_guard_int4.model import GuardModel

    GuardModel.from_pretrained(folder / "guard").moderate([{"role": "user", "content": "hello"}])


def build_store(folder: Path) -> None:
    from edgewright.systems.stem.files import save_stem
    from edgewright.systems.stem.store import offload_
    from tests.fuzz_models import tokenizer
    from tests.systems.stem.toys import stem

    model = stem(vocab_size=256)
    save_stem(model, folder / "model", tokenizer())
    offload_(model, "disk", folder / "tables", dtype="int8")


def read_store(folder: Path) -> None:
    from edgewright.systems.stem.files import load_offloaded

    model, _ = load_offloaded(folder / "model", folder / "tables")
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))


# ---- pytorch_model.bin -----------------------------------------------------------------------------------------------


def build_torch(folder: Path) -> None:
    from safetensors.torch import load_file

    from tests.fuzz_models import build_llama

    build_llama(folder)
    weights = folder / "model" / "model.safetensors"
    torch.save(load_file(weights), folder / "model" / "pytorch_model.bin")
    weights.unlink()


class Call:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def hostile_pickles(mark: Path) -> dict[str, bytes]:
    """Texts of data.pkl that run code, or eat memory, in a reader that trusts them; `mark` is made if code runs."""
    import os

    command = f"touch {mark}"
    storage = (
        b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu\x8a\x09" + b"\xff" * 7 + b"\x0f\0t"
    )
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"QK\0(\x8a\x09" + b"\xff" * 7 + b"\x0f\0tK\x01\x85"
    return {
        "reduce": pickle.dumps({"w": Call(os.system, command)}, 2),
        "global": b"\x80\x02cos\nsystem\n(X" + struct.pack("<I", len(command)) + command.encode() + b"tR.",
        "instance": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "object": b"(cos\nsystem\nS'" + command.encode() + b"'\no.",
        "build": pickle.dumps({"w": Call(exec, f"import pathlib; pathlib.Path({str(mark)!r}).touch()")}, 2),
        "getattr": b"\x80\x02cbuiltins\ngetattr\nctorch\nnn\nX\x06\0\0\0Module\x86R.",
        "recursion": b"\x80\x02" + b"(" * 200_000 + b"." + b"t" * 200_000,
        "nesting": b"\x80\x02" + b"]" + b"\x85" * 200_000 + b".",
        "laughs": b"\x80\x02]q\0"
        + b"".join(b"]q" + bytes([n]) + (b"h" + bytes([n - 1])) * 10 for n in range(1, 30))
        + b".",
        "storage": b"\x80\x02}X\x01\0\0\0w" + rebuild + b"\x89ccollections\nOrderedDict\n)RtRs.",
        "long": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "text": b"\x80\x02X\xff\xff\xff\xff.",
        "memo": b"\x80\x02]r\xff\xff\xff\xff.",
    }


def write_pickle(file: Path, data: bytes) -> None:
    """A file of torch.save with another data.pkl."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)


# ---- what runs leave behind ------------------------------------------------------------------------------------------


def _chain(folder: Path) -> Any:
    from edgewright.compression.chain import ChainStage, run_chain

    def save(model: list[int], to: Path) -> None:
        to.mkdir(exist_ok=True)
        (to / "model.txt").write_text(str(len(model)))

    def load(source: Path) -> list[int]:
        return [0] * int((source / "model.txt").read_text())

    stages = [ChainStage(name, lambda model, _: [*model, 0], save, load, {"seed": 1}) for name in ("a", "b")]
    return run_chain(stages, lambda: [0], folder, evaluate=lambda model: {"size": len(model)}, settings={"bits": 4})


def _measured(folder: Path) -> Any:
    from edgewright.compression.pipeline import Compression

    budget = SimpleNamespace(steps=None, minutes=1)
    run: Any = SimpleNamespace(settings=SimpleNamespace(budget=budget), output=folder)
    return Compression.steps(run, nn.Module())


def _recipe(folder: Path) -> Any:
    from edgewright.systems.recipe import Plan, _open_folder

    record = {"recipe": "winq", "size": "tiny", "settings": {"steps": 3, "arms": ["a", "b"]}}
    return _open_folder(folder, record, Plan(("one",), 1.0, 1, 1), False)


def _stage(folder: Path) -> Any:
    from edgewright.distillation.stages import _finished

    return _finished(folder, {"stage": 1, "seed": 0}, nn.Linear(2, 2))


def _written(folder: Path) -> Any:
    from edgewright.distillation.manifest import claim_shards
    from edgewright.distillation.self_generation import _read_shard

    claim_shards(folder, "text that a model wrote", {"seed": 1, "length": 8, "mixture": (1, 2)})
    return _read_shard(folder / "shard-00000.jsonl", 256)


def _search(folder: Path) -> Any:
    from edgewright.systems.r_sparse import allocation as r_sparse_search

    return r_sparse_search._stored(folder / "search.json", "a")


def _pretrained(folder: Path) -> None:
    from edgewright.commands.pretrain import _from_file
    from edgewright.models.decoder.pretrain_evaluation import _read
    from edgewright.training.metrics import MetricsLog

    def go_on() -> None:
        [sample for sample in _read(folder / "samples.jsonl") if sample["step"] <= 1]
        MetricsLog.last_step(folder / "metrics.csv")

    read_all(go_on, lambda: _from_file(folder / "shape.json", 64))


def _monitored(folder: Path) -> Any:
    from edgewright.systems.low_precision_recsys.monitor import Monitor

    return Monitor.history(SimpleNamespace(store=folder))  # type: ignore[arg-type]


CHECKED = (
    "period,state,delta,upper,ne,ne_reference,auc_delta,calibration,psi,psi_unit,warning,raised,share\n"
    "0,OK,0.1,0.2,0.9,0.9,0.0,1.0,0.01,table.a,False,a b,0.25\n"
)


def build_runs(folder: Path) -> None:
    from edgewright.io.tensors import save_tensors
    from edgewright.measure.report import Report
    from tests.systems.stem.toys import config

    _chain(folder / "chain")
    for name, content in {
        "compress/steps.json": {"steps": 20, "seconds": 3.0},
        "stage/stage.json": {"stage": 1, "seed": 0, "metrics": {"loss": 1.0}, "errors": {"loss": 0.1}},
        "search/search.json": {"search": "a", "scores": {"a" * 24: 1.5}},
        "pretrain/shape.json": config().to_dict(),
        "pretrain/samples.jsonl": {"step": 1, "prompt": "a", "text": "b"},
        "written/shard-00000.jsonl": {"start": 3, "greedy": 1, "round": 0, "tokens": [1, 2, 3], "text": "abc"},
        "monitor/history.csv": None,
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CHECKED if content is None else json.dumps(content) + "\n")
    (folder / "pretrain" / "metrics.csv").write_text("step,loss\n1,2.5\n2,2.25\n")
    save_tensors(folder / "stage" / "student.safetensors", nn.Linear(2, 2).state_dict())
    _written(folder / "written")
    _recipe(folder / "recipe")
    report = Report("a run", {"recipe": "winq"})
    report.add("loss", 1.0, se=0.1, n=3)
    report.save(folder / "recipe")


def read_runs(folder: Path) -> None:
    from edgewright.measure.report import Report

    read_all(
        lambda: _chain(folder / "chain"),
        lambda: _measured(folder / "compress"),
        lambda: _stage(folder / "stage"),
        lambda: _search(folder / "search"),
        lambda: _pretrained(folder / "pretrain"),
        lambda: _written(folder / "written"),
        lambda: _monitored(folder / "monitor"),
        lambda: _recipe(folder / "recipe"),
        lambda: Report.from_file(folder / "recipe").markdown(),
    )

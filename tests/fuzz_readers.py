"""Every reader of the package with a small valid input of its own, for `benchmarks/fuzz.py`."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests import fuzz_runs
from tests.fuzz_models import (
    SMALL,
    _family,
    build_binary,
    build_cut,
    build_decoder,
    build_gguf,
    build_llama,
    build_quantized,
    build_stem,
    load_model,
    read_binary,
    read_cut,
    read_gguf,
    read_stem,
    run_gguf,
)

TEXT = "one two three four five six seven eight nine ten " * 20


@dataclass(frozen=True)
class Reader:
    """build makes the input in an empty folder; read reads the damaged copy; targets: files that are damaged, by
    pattern; seal: puts checksums right again, so that what lies behind them is reached; weight: how often it comes in
    a round; every: in which rounds it comes, for readers that start a process each time."""

    build: Callable[[Path], None]
    read: Callable[[Path], Any]
    targets: tuple[str, ...] = ("*",)
    seal: Callable[[Path], None] | None = None
    weight: int = 1
    every: int = 1


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def build_checkpoints(folder: Path) -> None:
    from edgewright.systems.check_n_run import CheckpointConfig, DiffCheckpointer
    from tests.systems.check_n_run.toy import Run

    run = Run()
    config = CheckpointConfig(bits=4, nbins=25, ratio=0.6)
    with DiffCheckpointer(folder / "ck", run.model, run.optimizers, reader=run.reader, config=config) as writer:
        for _ in range(2):
            run.step()
            writer.save(now=True)


def seal_checkpoints(folder: Path) -> None:
    from edgewright.training.checkpoint.manifest import NAME, _digest

    for manifest in (folder / "ck").glob(f"ckpt-*/{NAME}"):
        body = json.loads(manifest.read_text())
        for name in body["files"]:
            data = (manifest.parent / name).read_bytes()
            body["files"][name] = [hashlib.sha256(data).hexdigest(), len(data)]
        body.pop("digest", None)
        manifest.write_text(json.dumps({**body, "digest": _digest(body)}))


def read_checkpoints(folder: Path) -> None:
    from edgewright.errors import EdgewrightError
    from edgewright.systems.check_n_run import restore
    from edgewright.systems.check_n_run.recovery import inspect_dir, load_model
    from edgewright.training.checkpoint.files import LocalFiles
    from tests.systems.check_n_run.toy import Run, same

    inspect_dir(folder / "ck", content=True)
    run = Run(seed=5)
    run.step()
    before = run.state()
    try:
        restore(folder / "ck", run.model, run.optimizers, run.reader)
    except EdgewrightError:
        assert same(run.state(), before), "a restore that failed changed something"
    else:
        run.step()
    load_model(LocalFiles(folder / "ck"))


def build_update(folder: Path) -> None:
    from safetensors.torch import save_file

    from edgewright.systems.check_n_run.recovery import load_model
    from edgewright.systems.check_n_run.update import diff
    from edgewright.training.checkpoint.files import LocalFiles

    build_checkpoints(folder)
    first, last = sorted((folder / "ck").glob("ckpt-*"))
    diff(first, last, folder / "update.bin")
    diff(last, first, folder / "back.bin")
    save_file(load_model(LocalFiles(folder / "ck"), first.name)[1], folder / "model.safetensors")


def seal_update(folder: Path) -> None:
    from edgewright.io.tensors import read_tensors, save_tensors
    from edgewright.systems.check_n_run.update import _seal

    tensors, texts = read_tensors(folder / "update.bin")
    fields = json.loads(texts["update"])
    fields["sha256"] = _seal(fields, tensors)
    save_tensors(folder / "update.bin", tensors, {"update": json.dumps(fields)})


def read_update(folder: Path) -> None:
    from edgewright.io.tensors import load_tensors
    from edgewright.systems.check_n_run.update import apply_delta, merge

    tensors = load_tensors(folder / "model.safetensors")
    apply_delta(tensors, folder / "update.bin")
    merge(folder / "update.bin", folder / "back.bin", folder / "merged.bin")


def _fit(output: Path, steps: int) -> Any:
    import torch.nn.functional as F

    from edgewright.training import BlockBatches, TrainConfig, fit

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    blocks = {"x": torch.randn(24, 3), "y": torch.randint(0, 2, (24,))}
    config = TrainConfig(3, 1e-2, checkpoint_every=1)

    def loss(model: Any, batch: Any) -> Any:
        loss.calls += 1
        if loss.calls > steps:
            raise KeyboardInterrupt
        return F.cross_entropy(model(batch["x"]), batch["y"])

    loss.calls = 0
    return fit(model, loss, BlockBatches(blocks, 4, seed=1), config, output=output, progress=False)


def build_fit(folder: Path) -> None:
    try:
        _fit(folder / "run", 2)
    except KeyboardInterrupt:
        pass


def read_fit(folder: Path) -> None:
    _fit(folder / "run", 99)


def build_sharded(folder: Path) -> None:
    _sharded(lambda model: model.save(folder / "model"))


def read_sharded(folder: Path) -> None:
    def load(model: Any) -> None:
        model.load(folder / "model")

    _sharded(load)


def _sharded(use: Callable[[Any], Any]) -> None:
    import torch.distributed as dist

    from edgewright.systems.dlrm.model import DLRM, DLRMConfig
    from edgewright.systems.dlrm.sharded import ShardedDLRM

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        use(ShardedDLRM(DLRM(DLRMConfig(2, (5, 7), 4, (4,), (1,)), 0)))
    finally:
        dist.destroy_process_group()


def build_lion(folder: Path) -> None:
    from edgewright.systems.distributed_lion.checkpoint import save_replicas

    model, optimizer = _lion()
    save_replicas(folder / "run", model, optimizer, {"seen": 1})


def read_lion(folder: Path) -> None:
    from edgewright.systems.distributed_lion.checkpoint import load_replicas

    load_replicas(folder / "run", *_lion())


def _lion() -> Any:
    from edgewright.systems.distributed_lion.distributed import DistributedLion, lion_groups

    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    return model, DistributedLion(lion_groups(model, 0.1), 1e-3)


# ---- click models ----------------------------------------------------------------------------------------------------

LINES = ["label,I1,I2,C1,C2", *(f"{i % 2},{i},{i * 0.5},a{i % 5},b{i % 3}" for i in range(60))]


def build_dlrm(folder: Path) -> None:
    from edgewright.systems.dlrm.click_log import prepare_clicks, read_layout
    from edgewright.systems.dlrm.model import DLRM, DLRMConfig
    from edgewright.systems.low_precision_recsys.model import apply_recipe, uniform_recipe

    (folder / "log.csv").write_text("\n".join(LINES))
    _, _, vocabulary = prepare_clicks(
        folder / "log.csv", read_layout(folder / "log.csv"), folder / "data", hash_rows=16, min_count=1
    )
    schema = vocabulary.schema
    model = DLRM(DLRMConfig(2, schema.sizes, 4, (4,), (1,), table_names=schema.tables)).eval()
    model.save_pretrained(folder / "model")
    vocabulary.write_into(folder / "model")
    apply_recipe(model, uniform_recipe(model, "int8", "int8-dynamic")).save_pretrained(folder / "low")


def read_dlrm(folder: Path) -> None:
    from edgewright.errors import EdgewrightError
    from edgewright.systems.dlrm.click_log import Vocabulary
    from edgewright.systems.dlrm.model import DLRM
    from edgewright.systems.low_precision_recsys.export import click_folder
    from edgewright.systems.low_precision_recsys.model import QuantizedModel

    failed = None
    for read in (
        lambda: DLRM.from_pretrained(folder / "model"),
        lambda: Vocabulary.from_pretrained(folder / "model").schema,
        lambda: QuantizedModel.from_pretrained(folder / "low"),
        lambda: click_folder(str(folder / "model")),
    ):
        try:
            read()
        except EdgewrightError as error:
            failed = error
    if failed is not None:
        raise failed


def _log(name: str) -> tuple[Callable[[Path], None], Callable[[Path], None]]:
    def build(folder: Path) -> None:
        text = "\n".join(LINES).replace(",", "\t" if "tsv" in name else ",").encode()
        (folder / name).write_bytes(gzip.compress(text, mtime=0) if name.endswith(".gz") else text)

    def read(folder: Path) -> None:
        from edgewright.systems.dlrm.click_log import read_chunks, read_layout

        for _ in read_chunks(folder / name, read_layout(folder / name)):
            pass

    return build, read


def build_parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = [line.split(",") for line in LINES]
    table = pyarrow.table({name: [row[k] for row in columns[1:]] for k, name in enumerate(columns[0])})
    pyarrow.parquet.write_table(table, folder / "log.parquet")


def read_parquet(folder: Path) -> None:
    from edgewright.systems.dlrm.click_log import read_chunks, read_layout

    for _ in read_chunks(folder / "log.parquet", read_layout(folder / "log.parquet")):
        pass


# ---- the rest --------------------------------------------------------------------------------------------------------


def build_shards(folder: Path) -> None:
    from edgewright.io.shards import write_shards

    texts = [f"{i} {TEXT[i:]}" for i in range(12)]
    options: dict[str, Any] = {"tokenizer": "t", "vocab_size": 256, "end_token": 0, "validation_share": 0.2}
    write_shards(folder / "shards", texts, lambda t: [list(x.encode()) for x in t], shard_bytes=2000, **options)


def read_shards(folder: Path) -> None:
    from edgewright.io.shards import open_shards

    shards = open_shards(folder / "shards")
    shards.total("training")


def build_settings(folder: Path) -> None:
    from edgewright.compression.settings import CompressSettings, claim
    from edgewright.io.run_folder import claim_folder
    from edgewright.measure.report import Report

    claim(folder / "run", CompressSettings(model="smollm2-135m", bits=4))
    claim_folder(folder / "other", "pretrain")
    report = Report("a run", {"seed": 1})
    report.add("size", 3.0, subject="x", se=0.1, n=3, unit="MB")
    report.notes.append("a note")
    report.save(folder / "report")


def read_settings(folder: Path) -> None:
    import io

    from rich.console import Console

    from edgewright.compression.settings import CompressSettings, check_claim
    from edgewright.errors import EdgewrightError
    from edgewright.io.run_folder import claim_folder
    from edgewright.measure.report import Report

    failed = None
    for read in (
        lambda: check_claim(folder / "run", CompressSettings(model="smollm2-135m", bits=4)),
        lambda: claim_folder(folder / "other", "pretrain"),
        lambda: Report.from_file(folder / "report").print_table(Console(file=io.StringIO())),
    ):
        try:
            read()
        except EdgewrightError as error:
            failed = error
    if failed is not None:
        raise failed


def build_static(folder: Path) -> None:
    from edgewright.quantization.static.config import StaticConfig
    from edgewright.quantization.static.file import save_static
    from edgewright.quantization.static.network import calibrate_, convert_static, quantize_static
    from tests.toy_network import images, toy_net

    config = StaticConfig(weight_bits=5)
    prepared = calibrate_(quantize_static(toy_net(), images(2), config), images(8).split(4))
    save_static(convert_static(prepared), folder / "toy.safetensors", config)


def read_static(folder: Path) -> None:
    from edgewright.quantization.static.file import load_static
    from tests.toy_network import images, toy_net

    load_static(toy_net(seed=9), images(2), folder / "toy.safetensors")


def build_teacher(folder: Path) -> None:
    from edgewright.distillation.teacher_cache import cache_teacher
    from edgewright.pruning.importance import Importance
    from tests.toy_llama import make_tiny_llama

    torch.manual_seed(0)
    rows = torch.randint(0, 256, (6, 8))
    cache_teacher(make_tiny_llama(), rows, folder / "teacher", k=4, shard_blocks=4, batch_size=3, progress=False)
    norms = tuple(torch.rand(4, dtype=torch.float64) for _ in range(2))
    Importance(torch.rand(2, dtype=torch.float64), 5, norms, 2).save(folder / "importance.safetensors")
    from edgewright.distillation.best import Best

    Best(folder).offer(1.0, {"a": 1.0}, nn.Linear(2, 2))


def read_teacher(folder: Path) -> None:
    from edgewright.distillation.best import Best
    from edgewright.distillation.teacher_cache import TeacherCache
    from edgewright.errors import EdgewrightError
    from edgewright.pruning.importance import Importance

    failed = None
    for read in (
        lambda: TeacherCache(folder / "teacher").blocks(),
        lambda: Importance.load(folder / "importance.safetensors"),
        lambda: Best(folder, fresh=False).restore(nn.Linear(2, 2)),
    ):
        try:
            read()
        except EdgewrightError as error:
            failed = error
    if failed is not None:
        raise failed


def build_text(folder: Path) -> None:
    rows = [json.dumps({"text": TEXT[k:]}) for k in range(30)]
    (folder / "a.jsonl").write_text("\n".join(rows))
    (folder / "b.txt").write_text((TEXT + "\n\n") * 5)


def read_text(folder: Path) -> None:
    from edgewright.errors import EdgewrightError
    from edgewright.io.text import TextFiles, load_texts

    failed = None
    for read in (
        lambda: load_texts(folder / "a.jsonl", "calibration"),
        lambda: load_texts(folder / "b.txt", "evaluation"),
        lambda: list(TextFiles([folder])),
    ):
        try:
            read()
        except EdgewrightError as error:
            failed = error
    if failed is not None:
        raise failed


def build_template(folder: Path) -> None:
    from tests.toy_gguf import TEMPLATE

    (folder / "template.jinja").write_text(TEMPLATE)


BOMBS = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{{ 'x' * 3000000000 }}",
    "{% set a = 'x' * 100000 %}{% for i in range(99999) %}{{ a }}{% endfor %}",
    "{{ lipsum(n=100000) }}",
    "{% set ns = namespace(a='xx') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ 'x'.rjust(4000000000) }}",
    "{{ (range(99999) | list) * 99999 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ raise_exception('no') }}",
)


def read_template(folder: Path) -> None:
    from edgewright.runtime.chat_template import render_chat

    text = (folder / "template.jinja").read_text("utf-8", "replace")
    chance = random.Random(text)
    if chance.random() < 0.3:
        text = chance.choice(BOMBS) + text
    render_chat(text, [{"role": "user", "content": "hello"}], marks={"bos_token": "<s>", "eos_token": "</s>"})


READERS: dict[str, Reader] = {
    "llama folder": Reader(build_llama, load_model, weight=4),
    "gpt2 folder": Reader(_family("gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=64), load_model, weight=2),
    "bert folder": Reader(_family("bert", **SMALL), load_model, weight=2),
    "gemma folder": Reader(_family("gemma2", head_dim=16, num_key_value_heads=1, **SMALL), load_model, weight=2),
    "mixtral folder": Reader(_family("mixtral", num_local_experts=2, num_key_value_heads=1, **SMALL), load_model),
    "tokenizer": Reader(
        build_llama, load_model, ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"), weight=4
    ),
    "config": Reader(build_llama, load_model, ("config.json", "generation_config.json"), weight=4),
    "quantised folder": Reader(build_quantized, load_model, weight=3),
    "own decoder": Reader(build_decoder, load_model, weight=2),
    "binary folder": Reader(build_binary, read_binary, weight=2),
    "cut folder": Reader(build_cut, read_cut),
    "stem folder": Reader(build_stem, read_stem),
    "gguf": Reader(build_gguf, read_gguf, weight=6),
    "gguf in llama.cpp": Reader(build_gguf, run_gguf, weight=1),
    "checkpoints": Reader(build_checkpoints, read_checkpoints, seal=seal_checkpoints, weight=4),
    "update": Reader(build_update, read_update, ("update.bin",), seal=seal_update, weight=4),
    "training checkpoint": Reader(build_fit, read_fit, ("*.json", "*.safetensors", "*.csv"), weight=3),
    "sharded model": Reader(build_sharded, read_sharded),
    "lion checkpoint": Reader(build_lion, read_lion),
    "click model": Reader(build_dlrm, read_dlrm, ("*.json", "*.safetensors"), weight=3),
    "csv log": Reader(*_log("log.csv"), weight=2),
    "csv.gz log": Reader(*_log("log.csv.gz"), weight=2),
    "tsv log": Reader(*_log("log.tsv")),
    "parquet log": Reader(build_parquet, read_parquet),
    "token shards": Reader(build_shards, read_shards, weight=2),
    "settings and reports": Reader(build_settings, read_settings, weight=2),
    "static network": Reader(build_static, read_static),
    "teacher, importance, best": Reader(build_teacher, read_teacher, weight=2),
    "texts": Reader(build_text, read_text),
    "program (.pte)": Reader(fuzz_runs.build_pte, fuzz_runs.read_program, every=8),
    "language model (.pte)": Reader(fuzz_runs.build_chat_pte, fuzz_runs.read_chat_pte, every=8),
    "program (.onnx)": Reader(fuzz_runs.build_onnx, fuzz_runs.read_program, every=4),
    "r-sparse folder": Reader(fuzz_runs.build_r_sparse, fuzz_runs.read_r_sparse),
    "guard folder": Reader(fuzz_runs.build_guard, fuzz_runs.read_guard),
    "stem store": Reader(fuzz_runs.build_store, fuzz_runs.read_store, ("tables/*", "model/*")),
    "pytorch_model.bin": Reader(fuzz_runs.build_torch, load_model, ("pytorch_model.bin",), weight=2),
    "run folders": Reader(fuzz_runs.build_runs, fuzz_runs.read_runs, ("*.json*", "*.csv", "*.safetensors"), weight=3),
    "chat template": Reader(build_template, read_template, weight=2),
}

"""The ExecuTorch engine and program: text in and out of one file, and damaged files that only raise errors of ours."""

from __future__ import annotations

import argparse
import struct

import numpy as np
import pytest
import torch

from edgewright.errors import EdgewrightError, FormatError, Unsupported, UsageError
from edgewright.export.executorch.exporter import export_executorch
from edgewright.io.packed import PackedLinear
from edgewright.io.pte import read_layout
from edgewright.runtime.benchmark import FILE_METRICS, benchmark_files, report_columns
from edgewright.runtime.engine import open_engine
from edgewright.runtime.executorch import ExecuTorchEngine
from edgewright.runtime.executorch_program import ExecuTorchProgram, weights_of
from edgewright.runtime.program import open_program
from edgewright.runtime.pte_metadata import pack, unpack, weights_in
from tests.export.executorch.executorch_models import byte_tokenizer, language_export


@pytest.fixture(scope="module")
def language_file():
    return language_export()[1].path


@pytest.fixture(scope="module")
def engine(language_file):
    with open_engine(language_file, threads=1) as engine:  # checks the file in a child process first
        yield engine


@pytest.fixture(scope="module")
def program_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pte") / "linear.pte"
    export_executorch(torch.nn.Linear(8, 3), None, path, example_inputs=[torch.randn(1, 8)])
    return path


def test_tokenizer_travels_inside(engine):
    ours = byte_tokenizer()
    text = 'Grüße, "東京" 12%'
    assert engine.tokenize(text) == ours(text)["input_ids"]
    assert engine.detokenize(engine.tokenize(text)) == text
    assert (engine.vocabulary, engine.tokens, engine.context) == (256, 256, 96)
    assert engine.chat_prompt([{"role": "user", "content": "hi"}]) == "user: hi\nassistant:"


def test_logits_stream_is_logits_in_parts(engine):
    ids = list(range(90))
    parts = list(engine.logits_stream(ids))
    assert all(len(part) <= 128 for part in parts)
    assert np.array_equal(np.concatenate(parts), engine.logits(ids))


def test_greedy_generation_follows_the_logits(engine):
    prompt = list(b"A river")
    generation = engine.generate(prompt, 8, ignore_end=True)
    whole = engine.logits([*prompt, *generation.ids])
    assert [int(row.argmax()) for row in whole[len(prompt) - 1 : -1]] == list(generation.ids)
    assert generation.prompt_tokens == len(prompt) and len(generation.token_seconds) == 7


def test_reuse_gives_the_same_text_from_less_work(engine):
    prompt = list(b"The same beginning and then")
    first = engine.generate(prompt, 4, ignore_end=True)
    longer = [*prompt, *first.ids, 65, 66]
    again = engine.generate(longer, 4, ignore_end=True, reuse=True)
    fresh = engine.generate(longer, 4, ignore_end=True)
    assert again.ids == fresh.ids and again.reused_tokens >= len(prompt) and fresh.reused_tokens == 0


def test_text_arrives_in_whole_characters_and_sampling_repeats(engine):
    pieces = []
    one = engine.generate("Once", 12, temperature=1.5, seed=3, on_token=pieces.append, ignore_end=True)
    two = engine.generate("Once", 12, temperature=1.5, seed=3, ignore_end=True)
    assert "".join(pieces) == one.text == two.text and one.ids == two.ids


def test_context_ends_generation_and_refuses_longer_prompts(engine):
    generation = engine.generate([5] * 90, 50, ignore_end=True)
    assert generation.finish == "context" and len(generation.ids) == 7  # the last one needs no place
    with pytest.raises(UsageError, match="97 tokens do not fit the context of 96"):
        engine.generate([5] * 96)
    with pytest.raises(UsageError, match="token 256 is not in the vocabulary"):
        engine.logits([256])


def test_closed_engine_says_so(language_file):
    engine = ExecuTorchEngine(language_file, check=False)
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="is closed"):
        engine.logits([1])


def test_cache_types_belong_to_llama_cpp(language_file):
    with pytest.raises(UsageError, match="llama.cpp's"):
        open_engine(language_file, cache_type_k="q8_0")


def test_chat_answers_from_the_path_alone(language_file, capsys):
    from edgewright.commands import chat

    parser = argparse.ArgumentParser()
    chat.add_arguments(parser)
    arguments = parser.parse_args([str(language_file), "--prompt", "hello", "--max-tokens", "4", "--threads", "1"])
    assert chat.run(arguments) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_threads_of_an_open_engine_are_not_taken_from_it(engine, language_file):
    ids = list(b"Two engines, one pool")
    before = engine.next_logits(ids)
    other = 1 if engine.threads > 1 else 2
    with pytest.warns(UserWarning, match=f"open with {engine.threads} threads: {other} have to wait"):
        second = ExecuTorchEngine(language_file, threads=other, check=False)
    assert second.threads == engine.threads
    second.next_logits(ids)
    second.close()
    assert np.array_equal(engine.next_logits(ids), before)


def test_next_logits_is_the_last_row_and_reuses_the_cache(engine):
    ids = list(b"As far as it is the same")
    row = engine.next_logits(ids)
    assert row.shape == (256,) and np.array_equal(row, engine.generate(ids, 1) and engine.next_logits(ids))
    longer = [*ids, 7, 8]
    fresh, again = engine.next_logits(longer), (engine.next_logits(ids), engine.next_logits(longer, reuse=True))[1]
    # another chunking is another order of sums, which moves an 8-bit input across a border now and then
    assert np.abs(fresh - again).max() <= 0.05 * np.abs(fresh).max()
    with pytest.raises(UsageError, match="do not fit the context"):
        engine.next_logits([5] * 97)


def test_bench_shows_the_rows_of_a_gguf(language_file, program_file):
    """The figures in the file are those of the arithmetic, counted here from the packed model."""
    model, _ = language_export()
    report = benchmark_files([language_file, program_file], prompt_tokens=8, decode_tokens=4, repeats=2, threads=1)
    assert all(report.value(metric, language_file.name) > 0 for metric in FILE_METRICS)
    assert report_columns(report)[:2] == ["file_size", "bits_per_weight"]
    layers = [m for m in model.model.layers.modules() if isinstance(m, PackedLinear)]
    count = sum(layer.codes.numel() for layer in layers) + 256 * 64 + 3 * 64  # the tied table once, three norms
    size = sum(
        layer.codes.numel() * (8 if layer.grid == "int8" else 4) / 8 + 2 * layer.step.numel() for layer in layers
    )
    size += 256 * 64 + 2 * 256 + 4 * 3 * 64
    told = weights_of(language_file)
    assert (told.count, told.bytes, told.token_bytes) == (count, size, size)  # a head reads its whole table
    assert report.value("bits_per_weight", language_file.name) == 8 * size / count
    assert report.value("bits_per_weight", program_file.name) == 32


def test_weights_of_a_table_that_is_no_head():
    from edgewright.export.executorch.sizes import stored_weights

    net = torch.nn.Sequential(torch.nn.Embedding(100, 8), torch.nn.Linear(8, 100, bias=False))
    assert stored_weights(net) == {"count": 1600, "bytes": 6400, "token_bytes": 3200 + 32}
    net[1].weight = net[0].weight
    assert stored_weights(net) == {"count": 800, "bytes": 3200, "token_bytes": 3200}


@pytest.mark.parametrize(
    "told", [{"count": 0, "bytes": 1}, {"count": 1}, {"count": 2, "bytes": 2, "token_bytes": 9}, 7]
)
def test_nonsense_about_weights_is_refused(told):
    assert weights_in({}, "x.pte") is None
    with pytest.raises(FormatError, match="description of its weights"):
        weights_in({"weights": told}, "x.pte")


# ---- programs


def test_program_runs_and_checks_its_inputs(program_file):
    with open_program(program_file, threads=1) as program:
        assert [str(spec) for spec in program.inputs] == ["input_0 float32 [1, 8]"]
        (result,) = program.run([np.zeros((1, 8), np.float32)])
        assert result.shape == (1, 3) and result.dtype == np.float32
        with pytest.raises(UsageError, match="takes input_0 float32"):
            program.run([np.zeros((2, 8), np.float32)])


def test_each_kind_is_sent_to_its_own_opener(program_file, language_file):
    with pytest.raises(Unsupported, match="open_program"):
        ExecuTorchEngine(program_file, check=False)
    with pytest.raises(Unsupported, match="open_engine"):
        ExecuTorchProgram(language_file, check=False)


# ---- damaged and foreign files


@pytest.mark.parametrize("data", [b"", b"GGUF" * 20, b"\0\0\0\0ET12", b"\x1c\0\0\0ET12" + b"\0" * 64, b"PK\3\4" * 40])
def test_foreign_files_are_refused_before_any_runtime(data, tmp_path):
    path = tmp_path / "foreign.pte"
    path.write_bytes(data)
    for opener in (open_engine, open_program):
        with pytest.raises(FormatError):
            opener(path)


def test_every_truncation_is_found_in_the_header(program_file, tmp_path):
    data = program_file.read_bytes()
    assert read_layout(program_file).segments
    path = tmp_path / "cut.pte"
    for length in [*range(0, 80), *range(80, len(data), 61), len(data) - 1]:
        path.write_bytes(data[:length])
        try:
            layout = read_layout(path)
        except FormatError:
            continue
        # only padding behind the last segment may be missing
        assert all(layout.base + s.offset + s.size <= length for s in layout.segments)


def test_bit_flips_never_escape_our_errors(program_file, tmp_path):
    """The outside is flipped everywhere in this process; the runtime meets a sample of flipped files in children."""
    data = bytearray(program_file.read_bytes())
    rng = np.random.default_rng(0)
    path = tmp_path / "flipped.pte"
    survivors = []
    for place in rng.integers(0, read_layout(program_file).base, 300).tolist():
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            read_layout(path)
            survivors.append(bytes(flipped))
        except FormatError:
            pass
    for number in rng.choice(len(survivors), 2, replace=False).tolist():
        path.write_bytes(survivors[number])
        try:
            with open_program(path, threads=1) as program:
                program.run([np.zeros((1, 8), np.float32)])
        except EdgewrightError:
            pass


def test_header_that_points_outside_is_refused(program_file, tmp_path):
    data = bytearray(program_file.read_bytes())
    struct.pack_into("<Q", data, 16, 1 << 60)
    path = tmp_path / "outside.pte"
    path.write_bytes(data)
    with pytest.raises(FormatError, match="truncated or damaged"):
        open_program(path)


def test_description_is_bounded_and_checked():
    metadata = {"format": 1, "kind": "program", "text": "é" * 1000}
    packed = pack(metadata).numpy().tobytes()
    assert unpack(packed, "x.pte") == metadata
    for damaged in (packed[:-3], packed[:5], b"", b"\0" * 50, pack({"format": 9}).numpy().tobytes()):
        with pytest.raises(FormatError, match="description"):
            unpack(damaged, "x.pte")

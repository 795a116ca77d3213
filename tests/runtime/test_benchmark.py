"""Benchmarks: files take turns, every promised figure is there."""

from __future__ import annotations

import shutil

import pytest

from edgewright.errors import UsageError
from edgewright.runtime import benchmark
from edgewright.runtime.benchmark import FILE_METRICS, MACHINE, benchmark_files


def test_every_file_gets_every_metric_in_turn(toy_file, tmp_path, monkeypatch):
    copied = tmp_path / "copied.gguf"
    shutil.copy(toy_file, copied)
    order: list[str] = []
    real = benchmark.LlamaCppEngine.generate

    def spy(self, *args, **kwargs):
        order.append(self.path.name)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(benchmark.LlamaCppEngine, "generate", spy)
    report = benchmark_files([toy_file, copied], prompt_tokens=8, decode_tokens=4, repeats=2, threads=1)
    assert order == [toy_file.name, copied.name] * 3
    for name in (toy_file.name, copied.name):
        assert all(report.value(metric, name) > 0 for metric in FILE_METRICS)
        assert report.row("decode", name).n == 2 and report.row("decode", name).unit == "tok/s"
    assert report.value("file_size", "copied.gguf") == copied.stat().st_size / 1e6
    assert report.value("bits_per_weight", "copied.gguf") == 32
    assert report.value("read bandwidth, threads: 1", MACHINE) > 0.1
    assert report.value("peak_memory", "copied.gguf") > 10
    assert report.settings["prompt_tokens"] == 8 and any("interquartile" in note for note in report.notes)


def test_prompts_repeat_and_hold_no_marks(toy):
    ids = benchmark._random_prompt(toy, 500, 0)
    assert ids == benchmark._random_prompt(toy, 500, 0) != benchmark._random_prompt(toy, 500, 1)
    assert len(ids) == 500 and max(ids) < 257


def test_bad_arguments(toy_file, tmp_path):
    with pytest.raises(UsageError, match="at least one file"):
        benchmark_files([])
    with pytest.raises(UsageError, match="same file twice"):
        benchmark_files([toy_file, toy_file])
    with pytest.raises(UsageError, match="there is no file"):
        benchmark_files([toy_file, tmp_path / "none.gguf"])
    with pytest.raises(UsageError, match="at least one prompt token"):
        benchmark_files([toy_file], repeats=0)

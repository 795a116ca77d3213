"""The main job on a model of a few kilobytes: every stage for real, resumed, refused, and in its small parts."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

from edgewright import cli
from edgewright.compression import methods
from edgewright.compression.pipeline import compress
from edgewright.compression.settings import CompressSettings, TrainingBudget
from edgewright.compression.sweep import sweep
from edgewright.errors import CheckFailed, UsageError
from edgewright.export.gguf.exporter import export_gguf
from edgewright.io.gguf.reader import GGUFFile
from edgewright.io.models import load
from edgewright.quantization.api import convert_, quantize_
from tests.toy_gguf import write_toy

TEXT = "\n\n".join(f"Paragraph {i}: the quick brown fox jumps over {i * 7} lazy dogs." for i in range(120))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def settings(toy, text, **changes) -> CompressSettings:
    base = CompressSettings(
        str(toy), data=str(text), budget=TrainingBudget(3), block_length=32, calibration_blocks=4, evaluation_blocks=4,
        benchmark=False, learning_rate=1e-3,
    )  # fmt: skip
    return replace(base, **changes)


def test_the_whole_job_resumes_and_repeats(toy, text, tmp_path):
    said: list[str] = []
    chosen = settings(toy, text)
    report = compress(chosen, tmp_path / "run", say=said.append, progress=False)
    assert report.subjects == ["reference", "llama.cpp-Q4_0", "rtn", "mse", "gptq", "qat"]
    for subject in report.subjects:
        row = report.row("kl", subject)
        assert row.value >= 0 and row.se is not None
        assert (tmp_path / "run" / f"{subject}.gguf").is_file()
    assert report.value("kl", "reference") < report.value("kl", "rtn")
    kept = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {"rows", "machine", "versions", "settings"} <= set(kept)
    assert set(kept["rows"][0]) == {"metric", "value", "se", "n", "unit", "subject"}
    assert (tmp_path / "run" / "pareto.png").stat().st_size > 1000

    # A second call reads the finished run; without its last files it does only what is missing, to the same bits.
    said.clear()
    compress(chosen, tmp_path / "run", say=said.append, progress=False)
    assert said == [f"{tmp_path / 'run'} holds this run already, finished"]
    first = (tmp_path / "run" / "qat.gguf").read_bytes()
    for name in ("report.json", "qat.gguf"):
        (tmp_path / "run" / name).unlink()
    said.clear()
    compress(chosen, tmp_path / "run", say=said.append, progress=False)
    assert not any("rtn" in sentence for sentence in said)
    assert (tmp_path / "run" / "qat.gguf").read_bytes() == first
    again = compress(chosen, tmp_path / "other", say=said.append, progress=False)
    assert (tmp_path / "other" / "qat.gguf").read_bytes() == first
    assert again.value("kl", "qat") == report.value("kl", "qat")

    with pytest.raises(UsageError, match=r"bits=4, not 3"):
        compress(replace(chosen, bits=3.0), tmp_path / "run", say=said.append, progress=False)


def test_the_model_can_write_its_own_training_text(toy, tmp_path):
    chosen = CompressSettings(
        str(toy), budget=TrainingBudget(2), baselines=(), block_length=64, calibration_blocks=2, evaluation_blocks=2,
        benchmark=False,
    )  # fmt: skip
    report = compress(chosen, tmp_path / "run", say=lambda _: None, progress=False)
    assert report.subjects == ["reference", "qat"]
    assert {path.name.split("-")[0] for path in (tmp_path / "run" / "data").iterdir()} == {"plain", "chat"}


@pytest.mark.parametrize(
    ("bits", "grid"), [(1.0, "binary"), (1.58, "ternary"), (2.0, "int2"), (3.0, "int3"), (8.0, "int8")]
)
def test_other_widths_export_and_decode(toy, text, tmp_path, bits, grid):
    chosen = settings(toy, text, bits=bits, method="rtn", baselines=())
    report = compress(chosen, tmp_path, say=lambda _: None, progress=False)
    assert report.subjects == ["reference", "rtn"]
    model, _ = load(toy)
    packed = methods.round_to_nearest(model, bits)
    assert packed.model.layers[0].self_attn.q_proj.grid == grid
    from edgewright.io.gguf.reader import GGUFFile

    decoded = torch.from_numpy(GGUFFile(tmp_path / "rtn.gguf").dequantize("blk.0.ffn_down.weight").copy())
    assert torch.equal(decoded, packed.model.layers[0].mlp.down_proj.weight)


def test_quantised_cache_reaches_training_and_the_sidecar(toy, text, tmp_path):
    chosen = settings(toy, text, kv=8, baselines=(), budget=TrainingBudget(1))
    compress(chosen, tmp_path, say=lambda _: None, progress=False)
    notes = json.loads((tmp_path / "qat.gguf.json").read_text())
    assert "-ctk q8_0 -ctv q8_0" in notes["commands"]["chat"]


def test_sweep_joins_its_points(toy, text, tmp_path):
    chosen = settings(toy, text, method="rtn", baselines=())
    report = sweep(chosen, tmp_path, widths=(8.0, 4.0), say=lambda _: None, progress=False)
    assert report.subjects == ["reference", "rtn 8 bit", "rtn 4 bit"]
    assert report.value("kl", "rtn 8 bit") < report.value("kl", "rtn 4 bit")
    assert (tmp_path / "pareto.png").is_file()


def test_rounding_the_table_twice_changes_nothing(tiny_llama):
    once = methods.with_rounded_table(tiny_llama)
    twice = methods.with_rounded_table(once)
    assert torch.equal(once.model.embed_tokens.weight, twice.model.embed_tokens.weight)
    assert once.lm_head.weight is once.model.embed_tokens.weight
    packed = convert_(quantize_(once, methods.table_config()))
    assert torch.equal(packed.model.embed_tokens.weight, twice.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("text", "budget"),
    [("40", TrainingBudget(40)), ("4m", TrainingBudget(None, 4.0)), ("1.5 min", TrainingBudget(None, 1.5))],
)
def test_budgets(text, budget):
    assert TrainingBudget.parse(text) == budget


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", "5"], "1, 1.58, 2, 3, 4, 8"),
        (["--method", "awq"], "rtn, mse, gptq, qat"),
        (["--kv", "3"], "choose 4 or 8"),
        (["--budget", "soon"], "optimizer steps such as 40"),
        (["--budget", "0"], "optimizer steps such as 40"),
        (["--learning-rate", "0"], "a number above 0"),
    ],
)
def test_settings_that_cannot_work_exit_with_2(toy, arguments, words, tmp_path, capsys):
    assert cli.main(["compress", str(toy), *arguments, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_unknown_models_and_texts_exit_with_2(toy, tmp_path, capsys):
    assert cli.main(["compress", "smollm9", "--output", str(tmp_path / "a")]) == 2
    assert "smollm2-135m" in capsys.readouterr().err
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert cli.main(["compress", str(toy), "--data", str(empty), "--output", str(tmp_path / "b")]) == 2
    assert "empty" in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert cli.main(["compress", str(toy), "--data", str(short), "--output", str(tmp_path / "c")]) == 2
    assert "block" in capsys.readouterr().err


def test_foreign_and_unwritable_folders_are_refused(toy, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    assert cli.main(["compress", str(toy), "--output", str(tmp_path / "full")]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert os.listdir(tmp_path / "full") == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    assert cli.main(["compress", str(toy), "--output", str(tmp_path / "file" / "below")]) in (1, 2)
    assert "file" in capsys.readouterr().err


def test_input_file_is_untouched(toy, text, tmp_path):
    before = toy.read_bytes(), text.read_bytes()
    compress(settings(toy, text, method="gptq", baselines=()), tmp_path, say=lambda _: None, progress=False)
    assert (toy.read_bytes(), text.read_bytes()) == before
    assert GGUFFile(tmp_path / "gptq.gguf").metadata["general.architecture"] == "llama"


def test_files_only_leaves_no_report(toy, text, tmp_path, capsys):
    arguments = ["compress", str(toy), "--method", "rtn", "--data", str(text), "--block-length", "32", "--files-only"]
    assert cli.main([*arguments, "--output", str(tmp_path / "run")]) == 0
    assert "written and verified" in capsys.readouterr().err
    assert (tmp_path / "run" / "rtn.gguf").is_file() and not (tmp_path / "run" / "report.json").exists()


def quick(model, text, **changes) -> CompressSettings:
    return settings(model, text, bits=8.0, method="rtn", baselines=(), evaluation_blocks=2, **changes)


def saved(toy, folder, **changes):
    """The toy as a folder, with another chat template or other fields of its configuration."""
    model, tokenizer = load(toy)
    tokenizer.chat_template = changes.pop("template", tokenizer.chat_template)
    for name, value in changes.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_blocks_end_where_the_trained_positions_end(toy, text, tmp_path):
    model = saved(toy, tmp_path / "model", max_position_embeddings=24)
    said: list[str] = []
    report = compress(quick(model, text), tmp_path / "run", say=said.append, progress=False)
    assert any("was trained for 24 positions: blocks have 24 tokens, not 32" in sentence for sentence in said)
    assert "blocks of 24 tokens, the positions that the model was trained for" in report.notes
    assert report.row("kl", "rtn").n == 2 * 23


@pytest.mark.parametrize(
    ("template", "note"),
    [
        (None, "rtn goes on: "),
        ("{{ raise_exception('no questions here') }}", "refuses these messages: no questions here"),
        ("{% for x in range(10 ** 9) %}{% endfor %}", "chat template does not work"),
        ("{{ messages[0].content }}{% generation %}{% endgeneration %}", "rtn answers: "),
    ],
    ids=["none", "refuses", "broken", "generation"],
)
def test_what_a_chat_template_does_costs_no_report(toy, text, template, note, tmp_path):
    model = saved(toy, tmp_path / "model", template=template)
    report = compress(quick(model, text), tmp_path / "run", say=lambda text: None, progress=False)
    assert (tmp_path / "run" / "report.json").is_file()
    assert any(note in sentence for sentence in report.notes), report.notes


def test_weights_beyond_float16_are_written_in_float32(toy, text, tmp_path):
    model, tokenizer = load(toy)
    with torch.no_grad():
        for layer in model.model.layers:  # the same function, in numbers that float16 does not have
            layer.post_attention_layernorm.weight[3] /= 2.0**21
            layer.mlp.gate_proj.weight[:, 3] *= 2.0**21
            layer.mlp.up_proj.weight[:, 3] *= 2.0**21
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckFailed, match=r"F32 possible \(values beyond fp16's 65504\); strict=False writes the file"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", verify=False, progress=False)
    done = quick(tmp_path / "model", text, lenient=True)
    report = compress(done, tmp_path / "run", say=lambda text: None, progress=False)
    assert report.value("kl", "reference") < 1e-3


def test_a_run_of_an_older_version_goes_on(toy, text, tmp_path):
    chosen = quick(toy, text)
    compress(chosen, tmp_path / "run", say=lambda text: None, progress=False)
    marker = tmp_path / "run" / "settings.json"
    held = json.loads(marker.read_text())
    del held["lenient"]  # a setting that it did not have
    marker.write_text(json.dumps(held))
    compress(chosen, tmp_path / "run", say=lambda text: None, progress=False)
    with pytest.raises(UsageError, match="lenient=False, not True"):
        compress(replace(chosen, lenient=True), tmp_path / "run", say=lambda text: None, progress=False)


def test_a_short_text_names_the_option_that_works(toy, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("The mill is wide, said the miller.\n\nHe went home and ate bread, then slept.")
    command = ["compress", str(toy), "--bits", "8", "--method", "rtn", "--no-bench", "--no-baselines", "--json"]
    command += ["--data", str(tmp_path / "short.txt"), "--output", str(tmp_path / "run")]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    option = said[said.index("--block-length") :].split()[:2]
    assert cli.main([*command, *option]) == 0  # word for word


def test_folders_of_runs_have_the_whole_name(toy, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny-3.1", "tiny-3.2"):
        saved(toy, tmp_path / name)
        command = ["compress", name, "--bits", "8", "--method", "rtn", "--no-baselines", "--files-only"]
        assert cli.main([*command, "--block-length", "32", "--data", str(text)]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny-3.1-8bit", "tiny-3.2-8bit"]

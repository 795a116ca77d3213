"""`edgewright compare` end to end on tiny models, with a stub runtime, and on the bundled file in llama.cpp."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgewright.cli import main
from edgewright.commands import compare as compare_module
from edgewright.errors import UsageError

SMALL = ["--blocks", "3", "--block-length", "32"]


def byte_tokenizer(swapped: bool = False) -> Any:
    """One token a byte: 256 in all. `swapped` exchanges two letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    if swapped:
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def save(model: Any, folder: Path, swapped: bool = False) -> str:
    model.save_pretrained(folder)
    byte_tokenizer(swapped).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pair(tiny_llama: Any, tmp_path: Path) -> tuple[str, str]:
    """A tiny model's folder and that of the same model with noise on its weights."""
    first = save(tiny_llama, tmp_path / "first")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return first, save(tiny_llama, tmp_path / "noisy")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {i} says {i * i}.\n\n" for i in range(100)))
    return str(path)


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()  # what the fixtures said
    code = main(["compare", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def values(printed: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["metric"], row["subject"]): row for row in json.loads(printed)["rows"]}


def test_table_report_and_plot(
    pair: tuple[str, str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, printed, _ = command(capsys, *pair, "--text", text, *SMALL, "--output", str(out))
    assert code == 0
    assert "first" in printed and "noisy" in printed and "top1_agreement" in printed and "±" in printed
    assert sorted(path.name for path in out.iterdir()) == ["kl.png", "report.json", "report.md"]
    rows = values((out / "report.json").read_text())
    assert rows["kl", "noisy"]["value"] > 0 and rows["kl", "noisy"]["se"] > 0
    assert rows["kl", "first"]["value"] == 0 and rows["top1_agreement", "first"]["value"] == 100
    assert rows["tokens", "noisy"]["value"] == rows["kl", "noisy"]["n"] == 3 * 31
    ratio = rows["perplexity", "noisy"]["value"] / rows["perplexity", "first"]["value"]
    assert rows["perplexity_ratio", "noisy"]["value"] == pytest.approx(ratio, rel=1e-12)
    assert (out / "kl.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_all_that_stdout_holds_and_repeats(
    pair: tuple[str, str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (command(capsys, *pair, "--text", text, *SMALL, "--json", "--threads", "1")[1] for _ in range(2))
    data = json.loads(first)
    assert data["rows"] == json.loads(second)["rows"]
    assert data["settings"]["blocks"] == 3 and data["settings"]["split"] == "all"
    assert {"rows", "machine", "versions", "settings"} <= set(data)
    other = command(capsys, *pair, "--text", text, *SMALL, "--json", "--threads", "1", "--seed", "1")[1]
    assert json.loads(other)["rows"] != data["rows"]


def test_a_model_with_itself(pair: tuple[str, str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = values(command(capsys, pair[0], pair[0], "--text", text, *SMALL, "--json", "--threads", "1")[1])
    again = f"{pair[0]} (2)"
    assert rows["kl", again]["value"] == 0 and rows["top1_agreement", again]["value"] == 100
    assert rows["perplexity_ratio", again]["value"] == 1 and rows["perplexity_ratio", again]["se"] == 0


def test_reference_option(pair: tuple[str, str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    named = command(capsys, *pair, "--reference", pair[1], "--text", text, *SMALL, "--json", "--threads", "1")[1]
    extra = command(capsys, pair[0], "--reference", pair[1], "--text", text, *SMALL, "--json", "--threads", "1")[1]
    swapped = command(capsys, pair[1], pair[0], "--text", text, *SMALL, "--json", "--threads", "1")[1]
    assert values(named) == values(extra) == values(swapped)
    assert values(named)["kl", "noisy"]["value"] == 0 < values(named)["kl", "first"]["value"]


class StubEngine:
    """A runtime that runs a tiny model in PyTorch, one buffer for all its logits."""

    metadata = {"tokenizer.ggml.eos_token_id": 0}

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer, self.closed = model, tokenizer, False

    def __enter__(self) -> StubEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        assert not special
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def logits(self, ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].numpy()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tiny_llama: Any, tmp_path: Path) -> StubEngine:
    stub = StubEngine(tiny_llama, byte_tokenizer())
    opened: list[dict[str, Any]] = []

    def open_engine(path: str, **options: Any) -> StubEngine:
        opened.append(options)
        return stub

    monkeypatch.setattr(compare_module, "open_engine", open_engine)
    stub.opened = opened  # type: ignore[attr-defined]
    (tmp_path / "model.gguf").write_bytes(b"")
    return stub


def test_an_exported_file_runs_in_its_runtime(
    stub: StubEngine, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = save(stub.model, tmp_path / "model"), str(tmp_path / "model.gguf")
    for order in ((folder, file), (file, folder)):  # blocks come from a model's tokenizer, or from a runtime's
        stub.closed = False
        code, printed, _ = command(capsys, *order, "--text", text, *SMALL, "--json", "--threads", "2")
        assert code == 0 and stub.closed
        assert stub.opened[-1] == {"threads": 2, "context": compare_module.SMALLEST_CONTEXT}  # type: ignore[attr-defined]
        rows = values(printed)
        # the stub is the same model; a batch of one row may differ from it in the last bits
        assert rows["kl", Path(order[1]).name]["value"] < 1e-9
        assert rows["top1_agreement", Path(order[1]).name]["value"] == 100
        assert json.loads(printed)["settings"]["runs in"]["model.gguf"] == "llama.cpp"


def test_an_engine_is_closed_when_the_comparison_fails(
    stub: StubEngine, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(stub.model, tmp_path / "model", swapped=True)
    code, _, error = command(capsys, folder, str(tmp_path / "model.gguf"), "--text", text, *SMALL)
    assert code == 2 and "different tokens" in error and stub.closed


def test_tokenizers_that_differ_in_two_letters(
    tiny_llama: Any, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = save(tiny_llama, tmp_path / "one"), save(tiny_llama, tmp_path / "other", swapped=True)
    code, printed, error = command(capsys, one, other, "--text", text, *SMALL, "--output", str(tmp_path / "out"))
    assert code == 2 and printed == "" and error.count("\n") == 1
    assert one in error and other in error and not (tmp_path / "out").exists()


def test_nan_names_the_model_and_exits_1(
    pair: tuple[str, str], stub: StubEngine, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.logits = lambda ids: np.full((len(ids), 256), math.nan, np.float32)  # type: ignore[method-assign]
    code, _, error = command(capsys, pair[0], str(tmp_path / "model.gguf"), "--text", text, *SMALL)
    assert code == 1 and "model.gguf" in error and "NaN" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{first}"], "two models"),
        (["{first}", "{noisy}", "--blocks", "0"], "--blocks 0"),
        (["{first}", "{noisy}", "--block-length", "1"], "--block-length 1"),
        (["{first}", "{noisy}", "--threads", "0"], "--threads 0"),
        (["{first}", "{noisy}", "--block-length", "257"], "256 positions"),
        (["{first}", "{noisy}", "--block-length", "250", "--text", "{short}"], "less than one block"),
        (["{first}", "{noisy}", "--text", "{empty}"], "empty"),
        (["{first}", "{noisy}", "--text", "{missing}"], "cannot read"),
        (["{first}", "no-such-model"], "known names are"),
        (["{first}", "{missing}.gguf"], "there is no file"),
        (["{first}", "{missing}.gguf", "--in", "pytorch"], "no such model"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    said: str,
    pair: tuple[str, str],
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("too short")
    places = {"first": pair[0], "noisy": pair[1], "missing": str(tmp_path / "missing")}
    places |= {name: str(tmp_path / f"{name}.txt") for name in ("empty", "short")}
    filled = [argument.format(**places) for argument in arguments]
    code, printed, error = command(capsys, *filled, *([] if "--text" in filled else ["--text", text]))
    assert code == 2 and printed == ""
    assert said in error and error.startswith("edgewright: ") and error.count("\n") == 1


def test_an_encoder_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="predicts no tokens"):
        compare_module.compare([pair[0], "minilm-l6"], progress=False)


def test_an_output_folder_that_cannot_be_made(
    pair: tuple[str, str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed, error = command(capsys, *pair, "--text", text, *SMALL, "--output", f"{text}/inside-a-file")
    assert code == 1 and "inside-a-file" in error and error.count("\n") == 1
    assert printed == ""  # told before the work


def test_a_disk_that_fills_up_does_not_cost_the_figures(
    pair: tuple[str, str],
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from matplotlib.figure import Figure

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    code, printed, error = command(capsys, *pair, "--text", text, *SMALL, "--output", str(tmp_path / "out"))
    assert code == 1 and "No space left" in error and "top1_agreement" in printed
    assert list((tmp_path / "out").iterdir()) == []


def test_subjects_are_short_and_different() -> None:
    assert compare_module._subjects(["a/x.gguf", "b/y.gguf"]) == ["x.gguf", "y.gguf"]
    assert compare_module._subjects(["a/x.gguf", "b/x.gguf"]) == ["a/x.gguf", "b/x.gguf"]
    assert compare_module._subjects(["m", "m", "m"]) == ["m", "m (2)", "m (3)"]


def test_bundled_model_and_its_file_in_llama_cpp(capsys: pytest.CaptureFixture[str]) -> None:
    """The same Q4_1 weights in PyTorch and in llama.cpp, which rounds activations to 8 bits: close, but not equal."""
    from edgewright.io.bundled import bundled_path

    file = str(bundled_path("smollm2-135m"))
    code, printed, _ = command(capsys, "smollm2-135m", file, "--blocks", "2", "--block-length", "64", "--json")
    assert code == 0
    rows = values(printed)
    name = Path(file).name
    assert 0 < rows["kl", name]["value"] < 0.01 and rows["top1_agreement", name]["value"] > 90
    assert abs(rows["perplexity_ratio", name]["value"] - 1) < 0.03

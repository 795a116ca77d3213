"""The scripts of examples/ and the notebook run as they stand, on a small model."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.export.export_models import make_llama, make_tokenizer
from tests.processes import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


# script -> (arguments for a model and an empty folder, a word of what it prints)
RUNS: dict[str, tuple[Callable[[str, Path], list[str]], str]] = {
    "export_quantized.py": (lambda model, folder: [model, str(folder / "m.gguf")], "MB"),
    "train_quantized.py": (lambda model, folder: [model, str(folder), "4"], "divergence from the teacher"),
    "quantize_in_optimizer.py": (lambda model, folder: ["60"], "accuracy with 1-bit weights"),
    "pretrain_small.py": (lambda model, folder: [str(folder), "4"], "nats a token"),
    "int8_network.py": (lambda model, folder: [str(folder / "m.onnx")], "of first choices as in float"),
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(RUNS)


@pytest.mark.parametrize("script", RUNS)
def test_an_example_runs(script: str, checkpoint: str, tmp_path: Path) -> None:
    arguments, word = RUNS[script]
    command = [sys.executable, str(EXAMPLES / script), *arguments(checkpoint, tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and word in done.stdout, done.stdout + done.stderr


def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "grids.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)


PAGES = [
    str(path.relative_to(ROOT))
    for path in [
        ROOT / "README.md",
        ROOT / "docs" / "tutorial.md",
        *sorted((ROOT / "src" / "edgewright" / "systems").glob("*/README.md")),
    ]
    if "```python" in path.read_text("utf-8")
]


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(
    page: str, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As it is printed, one block after the other, but for the model: a small one in place of SmolLM2, except where its
    words matter.
    """
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        text = block if "llama_guard" in page else block.replace('"smollm2-135m"', repr(checkpoint))
        exec(compile(text, page, "exec"), names)

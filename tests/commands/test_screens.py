"""What a command leaves on the screen: its own lines, and none that Python or another library wrote past it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.toy_llama import make_byte_tokenizer, make_tiny_llama

TEXT = "\n\n".join(f"Line {i} of a text that tells how {i} birds flew over the {i % 7} hills." for i in range(90))
FOREIGN = ("Warning:", "Failed to load", "_pytree", "deprecated", "Traceback")
# One process for all of them: importing takes longer than what they do.
CHILD = """
import json, sys
from edgewright.cli import main
for arguments in json.loads(sys.argv[1]):
    print("$", *arguments, file=sys.stderr, flush=True)
    print("exit", main(arguments), file=sys.stderr, flush=True)
"""


def screens(commands: list[list[str]], folder: Path) -> list[tuple[str, str]]:
    """(command, what it wrote to stderr) of each; all must end well."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(commands)], capture_output=True, text=True, cwd=folder, check=False
    )
    parts = [part.partition("\n") for part in done.stderr.split("$ ")[1:]]
    assert len(parts) == len(commands) and all(said.endswith("exit 0\n") for _, _, said in parts), done.stderr
    return [(name, said) for name, _, said in parts]


def test_no_command_shows_lines_of_other_libraries(tmp_path: Path, tiny_llama: object) -> None:
    tiny_llama.save_pretrained(tmp_path / "model")  # type: ignore[attr-defined]
    make_byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    quick = ["--threads", "1"]
    commands = [
        ["export", "model", "--to", "gguf,onnx", "--output", "out"],
        ["compress", "model", "--method", "rtn", "--data", "text.txt", "--block-length", "32", "--files-only",
         "--output", "run"],
        ["compare", "out/model.gguf", "model", "--text", "text.txt", "--blocks", "2", "--block-length", "32", *quick],
        ["chat", "out/model.gguf", "--plain", "--prompt", "he", "--max-tokens", "4", "--context", "64", *quick],
        ["bench", "out/model.gguf", "--prompt-tokens", "8", "--decode-tokens", "4", "--repeats", "2", *quick],
        ["prune", "model", "--text", "text.txt", "--samples", "4", "--length", "16", "--blocks", "2", "--layers", "1",
         "--protect", "", "--output", "cut"],
        ["run", "stem", "--dry-run"],
    ]  # fmt: skip
    for name, said in screens(commands, tmp_path):
        assert not [mark for mark in FOREIGN if mark in said], f"{name}\n{said}"


def test_warnings_of_ours_are_one_sentence(tmp_path: Path) -> None:
    model = make_tiny_llama(attention_bias=True)
    model.save_pretrained(tmp_path / "model")
    make_byte_tokenizer().save_pretrained(tmp_path / "model")
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "model" / "model.safetensors"
    held = {name: value.clone() for name, value in load_file(weights).items()}
    save_file({**held, "extra.weight": held["model.norm.weight"].clone()}, weights, {"format": "pt"})
    ((_, said),) = screens([["export", "model", "--to", "hf-float", "--output", "out"]], tmp_path)
    assert "edgewright: warning: " in said and "left out: extra.weight\n" in said
    assert "UserWarning" not in said and ".py" not in said


def test_warnings_of_others_keep_their_form() -> None:
    code = (
        "import warnings\nfrom edgewright import cli\ncli._prepare_process()\n"
        "warnings.warn('not ours')\nwarnings.warn('raised on behalf of ours', RuntimeWarning)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert "UserWarning: not ours" in said and "RuntimeWarning: raised" in said and "edgewright: warning" not in said

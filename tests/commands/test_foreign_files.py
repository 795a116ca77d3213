"""Files that end the process of llama.cpp end a child: the commands that open them say so in a sentence."""

from __future__ import annotations

import pytest

from edgewright.cli import main
from tests.toy_gguf import write_toy, write_toy_gpt2


@pytest.mark.parametrize("command", [["chat", "--prompt", "hi"], ["bench"], ["compare"]])
def test_an_abort_is_a_sentence(command, tmp_path, capsys):
    """The second of two layers has no keys: llama.cpp stops at an assertion."""
    file = write_toy(tmp_path / "own.gguf", llama__attention__head_count_kv=[1, 0]).rename(tmp_path / "foreign.gguf")
    files = [str(file)] * (2 if command == ["compare"] else 1)
    assert main([command[0], *files, *command[1:]]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "ends the process that runs it (SIGABRT)" in told and "GGML_ASSERT" in told


def test_chat_ends_with_the_positions_of_a_model(tmp_path, capsys):
    file = write_toy_gpt2(tmp_path / "gpt2.gguf", 64)
    assert main(["chat", str(file), "--prompt", "a", "--plain", "--max-tokens", "100", "--threads", "1"]) == 0

"""edgewright chat: one answer, or a conversation that remembers, resets and survives Ctrl-C."""

from __future__ import annotations

import builtins

import pytest

from edgewright.cli import main
from edgewright.runtime.llamacpp import LlamaCppEngine
from tests.toy_gguf import write_toy

QUICK = ["--max-tokens", "4", "--threads", "1", "--context", "256"]


@pytest.fixture(scope="module")
def toy_file(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.gguf")


@pytest.fixture
def prompts(monkeypatch):
    """Every prompt that reached the engine; "interrupt" in one presses Ctrl-C in the middle of the answer."""
    seen: list[str] = []

    def generate(self, prompt, max_new_tokens, *, on_token, **kwargs):
        seen.append(prompt)
        on_token("half")
        if "interrupt" in prompt.rsplit("user", 1)[1]:
            raise KeyboardInterrupt
        return real(self, prompt, max_new_tokens, on_token=on_token, **kwargs)

    real = LlamaCppEngine.generate
    monkeypatch.setattr(LlamaCppEngine, "generate", generate)
    return seen


def type_lines(monkeypatch, *lines):
    script = iter(lines)

    def read(prompt=""):
        line = next(script, None)
        if line is None:
            raise EOFError
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr(builtins, "input", read)


def test_one_answer(toy_file, capsys):
    arguments = ["chat", str(toy_file), *QUICK, "--prompt", "he", "--temperature", "1", "--seed", "3"]
    answers = []
    for _ in range(2):
        assert main(arguments) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and answers[0].endswith("\n")


def test_conversation(toy_file, monkeypatch, capsys, prompts):
    type_lines(monkeypatch, "one", "", "two", KeyboardInterrupt, "interrupt", "three", "/reset", "/what", "four")
    assert main(["chat", str(toy_file), *QUICK, "--system", "Be brief."]) == 0
    one, two, _, three, four = prompts
    assert one.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none<|im_end|>")
    assert two.startswith(one + "half") and "two<|im_end|>" in two
    assert "interrupt<|im_end|>\n<|im_start|>assistant\nhalf<|im_end|>" in three
    assert four == one.replace("one", "four")
    aside = capsys.readouterr().err
    assert "tokens/s" in aside and "stopped" in aside and "Unknown command /what" in aside


def test_a_full_context_is_told_and_survived(toy_file, monkeypatch, capsys):
    type_lines(monkeypatch, 300 * "x", "he")
    assert main(["chat", str(toy_file), *QUICK]) == 0
    told = capsys.readouterr()
    assert "do not fit the context" in told.err and "or /reset" in told.err and "tokens/s" in told.err


@pytest.mark.parametrize("arguments", [["--max-tokens", "0"], ["--temperature", "-1"], ["--cache-type-k", "q5"]])
def test_bad_arguments_exit_with_2(toy_file, arguments, capsys):
    try:
        code = main(["chat", str(toy_file), "--prompt", "x", *arguments])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2 and capsys.readouterr().err

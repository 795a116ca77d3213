"""Messages in the words of the command line: every command and option that one names is there, and none speaks Python.

Messages are read from the source: the texts given to the error classes, and the help of the commands.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgewright
from edgewright import cli
from edgewright.commands.option_names import in_command_words

PACKAGE = Path(edgewright.__file__).parent
ERRORS = {
    "UsageError",
    "FormatError",
    "MissingPackage",
    "OutputError",
    "CheckFailed",
    "Unsupported",
    "NotRepresentable",
    "EdgewrightError",
}
SOURCES = sorted(PACKAGE.rglob("*.py"))
# Options in messages that belong to other programs, each with its program.
FOREIGN = {"--no-deps": "pip", "--force-reinstall": "pip", "--nproc-per-node": "torchrun"}
# Where errors of a module reach the user of a command: its messages in that command's words hold no Python.
REACHED = {
    "export/gguf/exporter.py": ("export",),
    "export/gguf/layout.py": ("export", "compress"),
    "export/gguf/families.py": ("export", "compress"),
    "export/gguf/metadata.py": ("export", "compress"),
    "export/gguf/tensors.py": ("export", "compress"),
    "export/gguf/texts.py": ("export", "compress"),
    "export/executorch/exporter.py": ("export",),
    "export/executorch/language.py": ("export",),
    "export/onnx/verify.py": ("export",),
    "io/text.py": ("compress", "compare", "prune", "sparsify", "stem"),
    "io/text_rows.py": ("compress", "compare", "prune", "sparsify", "stem", "pretrain"),
    "io/decode.py": ("compress", "train"),
    "io/models.py": ("export", "compress", "compare"),
    "io/model_folder.py": ("export", "compress", "compare"),
    "io/gguf/reader.py": ("export", "chat", "bench", "compare"),
    "io/gguf/model.py": ("export", "compress", "compare"),
    "io/gguf/tokenizer.py": ("export", "compress", "compare"),
    "compression/settings.py": ("compress",),
    "compression/pipeline.py": ("compress",),
    "compression/sweep.py": ("compress",),
    "compression/methods.py": ("compress",),
    "evaluation/language.py": ("compare", "compress", "prune", "sparsify", "stem"),
    "runtime/llamacpp.py": ("chat",),
    "runtime/engine.py": ("chat", "bench"),
    "runtime/benchmark.py": ("bench",),
    "pruning/depth.py": ("prune",),
    "pruning/width.py": ("prune",),
}
# Messages of those modules that no command can meet, by a part of their text, each with its reason.
PYTHON_ONLY = {
    "type={": "the pipeline chooses the type",
    "llama_cpp_quantize needs float weights": "the pipeline quantises the float model",
    "evaluate_language": "the commands make the blocks and functions",
    "engine of {self.path} is closed": "a command closes it when it ends",
    "unknown split": "the commands offer a choice",
    "prune_depth_ needs stats": "the command gives them",
    "keep={": "the command gives no list",
    "cache_type": "the command offers a choice",
    "edgewright.models.efficientnet_lite": "the commands know this name",
    "does not pass its call's arguments": "no Python call: the sentence is about a class",
    "block_length {block_length} and max_blocks": "the commands check theirs first",
    "e.g. {name}=": "the command offers a choice",
    "hidden_act=": "a field of config.json",
    "with {key}=": "a field of config.json",
    "quantization settings": "no command gives them",
}
PYTHON = re.compile(r"\b[a-z_]+=(?!=)|\b[A-Za-z_][\w.]*\w\((?!s\))")


def text_of(node: ast.AST | None) -> str:
    """The text of a string expression, {} where a value stands."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else "{" + ast.unparse(part.value) + "}"  # type: ignore[attr-defined]
            for part in node.values
        )
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.IfExp):
        return text_of(node.body) + text_of(node.orelse)
    return ""


def messages(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ERRORS and (text := text_of(node.args[0])):
                yield node.lineno, text


def parser_of(command: str) -> argparse.ArgumentParser:
    module = importlib.import_module(cli.COMMANDS[command][0])
    parser = argparse.ArgumentParser(prog=command, exit_on_error=False)
    module.add_arguments(parser)
    return parser


def options(parser: argparse.ArgumentParser) -> set[str]:
    found: set[str] = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for other in action.choices.values():
                found |= options(other)
    return found


COMMAND = re.compile(rf"edgewright ({'|'.join(cli.COMMANDS)})\b((?:[ ](?:\{{[^}}]*\}}|[^\s;:,()`'\"]|'[^']*')+)*)")


def commands() -> Iterator[tuple[str, str]]:
    """(where, command line) of every command that a message or the description of a command names."""
    for path in SOURCES:
        where = path.relative_to(PACKAGE).as_posix()
        texts = list(messages(path))
        if where.startswith("commands/") or where.endswith("/command.py"):
            texts.append((1, ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""))
        for line, text in texts:
            for match in COMMAND.finditer(text):
                yield f"{where}:{line}", match[0]


FOUND = sorted(set(commands()))


def test_commands_are_found() -> None:
    assert len(FOUND) > 15


@pytest.mark.parametrize(("where", "line"), FOUND, ids=lambda value: value if ":" not in value else "")
def test_every_command_that_is_named_can_be_typed(where: str, line: str) -> None:
    command = line.split()[1]
    given = shlex.split(re.sub(r"\{[^}]*\}", "1", line).replace("[", "").replace("]", "").rstrip("."))[2:]
    parser = parser_of(command)
    known = options(parser)
    words = [word.split("=")[0] for word in given if word.startswith("--")]
    assert set(words) <= known, f"{where}: {line}"
    if given and not line.endswith((" --help", "--json")):
        try:
            parser.parse_args(given)
        except (argparse.ArgumentError, SystemExit) as error:
            # a sentence may name a command without all it needs ("edgewright export" writes ...), not with wrong parts
            assert "required" in str(error) or (isinstance(error, SystemExit) and not words), (
                f"{where}: {line}: {error}"
            )


@pytest.mark.parametrize("line", ["edgewright systems", "edgewright systems dlrm", "edgewright run nonsense"])
def test_commands_without_files_run(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(shlex.split(line)[1:]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_every_option_that_is_named_is_one() -> None:
    every = {"--help", "--version"}.union(*(options(parser_of(command)) for command in cli.COMMANDS))
    for path in SOURCES:
        for line, text in messages(path):
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
                assert option in every | FOREIGN.keys(), f"{path.relative_to(PACKAGE)}:{line}: {option}"


@pytest.mark.parametrize("source", REACHED)
def test_messages_of_commands_speak_no_python(source: str) -> None:
    wrong = []
    for line, text in messages(PACKAGE / source):
        if any(part in text for part in PYTHON_ONLY) or "python -c" in text:
            continue
        for command in REACHED[source]:
            module = importlib.import_module(cli.COMMANDS[command][0])
            plain = re.sub(r"\{[^}]*\}", "1", text)  # values, as they would stand there
            said = in_command_words(plain, parser_of(command), getattr(module, "WORDS", ()))
            if PYTHON.search(said):
                wrong.append(f"{source}:{line} in {command}: {said}")
    assert not wrong, "\n".join(wrong)


def test_a_departure_names_the_option_of_each_command() -> None:
    sentence = next(text for _, text in messages(PACKAGE / "export/gguf/exporter.py") if "strict=False" in text)
    for command in ("export", "compress"):
        assert "--lenient writes the file" in in_command_words(sentence, parser_of(command))
        assert "--lenient" in options(parser_of(command))


def test_arguments_become_options() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--float-type")
    parser.add_argument("--lenient", action="store_true")
    parser.add_argument("model")
    sentence = "float_type='X' of a=1; lenient=True, model='m'; strict=False writes it; edgewright.float_type=2"
    assert in_command_words(sentence, parser) == (
        "--float-type X of a=1; --lenient, model='m'; --lenient writes it; edgewright.float_type=2"
    )
    assert in_command_words("width=3", parser, ((r"\bwidth=", "float_type="),)) == "--float-type 3"

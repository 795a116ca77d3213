"""Messages in the words of a command: errors name arguments of the Python interface, a command has options.

The convention that makes this possible: a message writes an argument as `name=value`. Where the command has an option
of that name it becomes `--name value`. A command's module may hold WORDS, pairs (pattern, replacement), for what is
called otherwise there; they are applied first.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

Words = Sequence[tuple[str, str]]
# What every command says the same way.
COMMON: Words = ((r"\bstrict=False\b", "--lenient"),)
ARGUMENT = re.compile(r"(?<![\w.\-])([a-z_]+)=('[^']*'|\"[^\"]*\"|[\w.+\-]*\w)")


def in_command_words(sentence: str, parser: argparse.ArgumentParser, words: Words = ()) -> str:
    """A message of the Python interface as the command of `parser` says it."""
    for pattern, replacement in (*words, *COMMON):
        sentence = re.sub(pattern, replacement, sentence)
    options = _options(parser)

    def option(match: re.Match[str]) -> str:
        name = options.get(match[1])
        if name is None:
            return match[0]
        value = match[2].strip("'\"")
        if value in ("True", "None"):
            return name if value == "True" else f"no {name}"
        return f"{name} {value if value.isalnum() else match[2]}"

    return ARGUMENT.sub(option, sentence)


def _options(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Name of an argument -> option, those of sub-commands included."""
    found: dict[str, str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for other in action.choices.values():
                found |= _options(other)
        elif action.option_strings:
            found[action.dest] = action.option_strings[-1]
    return found

"""The command line: a table of commands, each one module that is imported only when it is used.

Exit codes: 0 done, 1 a check, a claim or the output failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from types import FrameType
from typing import Any

from edgewright import __version__
from edgewright.errors import EdgewrightError, UsageError

# command -> (module with add_arguments(parser) and run(args) -> exit code, one line of help)
COMMANDS = {
    "compress": ("edgewright.commands.compress", "quantise a model, export it, verify the file and report"),
    "bench": ("edgewright.commands.bench", "size, speed and memory of exported files on this machine"),
    "compare": ("edgewright.commands.compare", "quality of two models or files, each figure with its standard error"),
    "prune": ("edgewright.commands.prune", "cut blocks and neurons by importance; the result is a plain checkpoint"),
    "sparsify": ("edgewright.systems.r_sparse.command", "skip weights of small inputs while decoding (R-Sparse)"),
    "pretrain": ("edgewright.commands.pretrain", "train a language model from scratch on text"),
    "train": ("edgewright.systems.dlrm.command", "train a model of clicks (DLRM) on your own log"),
    "checkpoint": ("edgewright.systems.check_n_run.command", "list, verify, restore checkpoints of tables; updates"),
    "stem": ("edgewright.systems.stem.command", "tables in place of up-projections (STEM): convert, edit facts"),
    "design": ("edgewright.commands.design", "shapes of a decoder for a number of weights, with size and speed"),
    "export": ("edgewright.commands.export", "write a model for a runtime, then run what was written and compare"),
    "chat": ("edgewright.commands.chat", "talk to an exported file"),
    "systems": ("edgewright.commands.systems", "the catalogue of published systems and what we measured"),
    "run": ("edgewright.commands.run", "the recipe of one published system, with its claims checked"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors made on purpose become one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _prepare_process()
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()  # here, so that a reader that went away is noticed while it can still be handled
        return code
    except EdgewrightError as error:
        return _complain(str(error), error.exit_code)
    except BrokenPipeError:
        # Nothing more can be written: keep the interpreter's own flush at exit from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # as rich does when it is the one to notice
    except OSError as error:
        return _complain(f"{error} (EDGEWRIGHT_TRACEBACK=1 shows where)", 1)
    except KeyboardInterrupt as error:
        return _complain(str(error) or "interrupted", 130)


def _prepare_process() -> None:
    """What must stand before torch is imported.

    transformers imports torchao where it is installed, which then warns about GPU kernels that are not needed here.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.showwarning = _show_warning


_shown_by_python = warnings.showwarning


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """One line for a warning that edgewright itself raises; Python's form, with file and line, for all others."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") == "warnings":
        frame = frame.f_back
    ours = frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "edgewright"
    if ours and file is None and issubclass(category, UserWarning | RuntimeWarning):
        print(f"edgewright: warning: {' '.join(str(message).split())}", file=sys.stderr)
    else:
        _shown_by_python(message, category, filename, lineno, file, line)


def _dispatch(arguments: list[str]) -> int:
    parser = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    if arguments[0].startswith("-"):
        parser.parse_args(arguments)  # --help and --version end here; any other option is refused
        return 2
    name = arguments[0]
    if name not in COMMANDS:
        from edgewright.systems.catalogue import did_you_mean

        known = ", ".join(COMMANDS)
        raise UsageError(f"no command is called {name!r}{did_you_mean(name, COMMANDS)}; commands: {known}")
    module = import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(prog=f"edgewright {name}", description=module.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(parser)
    args = parser.parse_args(arguments[1:])
    try:
        code: int = module.run(args)
    except EdgewrightError as error:
        from edgewright.commands.option_names import in_command_words

        return _complain(in_command_words(str(error), parser, getattr(module, "WORDS", ())), error.exit_code)
    return code


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="edgewright",
        usage="edgewright COMMAND [OPTION...]",
        description="Models for the device in your hand: shrink them, train them cheaply, check them, ship them.",
        epilog=f"commands:\n{commands}\n\n`edgewright COMMAND --help` explains one of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"edgewright {__version__}", help="print the version")
    return parser


def _complain(sentence: str, code: int) -> int:
    if os.environ.get("EDGEWRIGHT_TRACEBACK", "0") not in ("", "0"):
        import traceback

        traceback.print_exc()
    print(f"edgewright: {sentence}", file=sys.stderr)
    return code

"""edgewright chat: talk to an exported file."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from edgewright.errors import UsageError
from edgewright.runtime.engine import open_engine

if TYPE_CHECKING:
    from edgewright.runtime.interfaces import Engine, Generation

CACHE_TYPES = ("f16", "q8_0", "q4_0")
# Calls of the Python interface as this command says them (see `commands.option_names`).
WORDS = (
    (r"continue a plain text with generate\(text\) instead", "--plain goes on with a text as it is"),
    (r"open the file with more, e\.g\. open_engine\(path, context=(\d+)\),", r"give it more with --context \1,"),
)
HELP = "/reset starts afresh, Ctrl-C stops an answer, Ctrl-D leaves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="exported file (.gguf, .pte)")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit")
    parser.add_argument("--system", metavar="TEXT", help="instructions that stand before the conversation")
    parser.add_argument("--plain", action="store_true", help="go on with the text as it is, without a chat template")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="longest answer (default 512)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest (default)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default 0)")
    parser.add_argument(
        "--context", type=int, default=2048, metavar="N", help="tokens it remembers (default 2048; a .pte has its own)"
    )
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="threads (default: every core)")
    parser.add_argument("--cache-type-k", choices=CACHE_TYPES, default="f16", help="how keys are kept (default f16)")
    parser.add_argument("--cache-type-v", choices=CACHE_TYPES, default="f16", help="how values are kept (default f16)")


def run(args: argparse.Namespace) -> int:
    if args.max_tokens < 1 or args.temperature < 0:
        raise UsageError(
            f"chat needs --max-tokens >= 1 and --temperature >= 0, got {args.max_tokens} and {args.temperature}"
        )
    with open_engine(
        args.file,
        threads=args.threads,
        context=args.context,
        cache_type_k=args.cache_type_k,
        cache_type_v=args.cache_type_v,
    ) as engine:
        conversation = Conversation(engine, args)
        if args.prompt is not None:
            conversation.ask(args.prompt)
            return 0
        return _interactive(conversation, args)


class Conversation:
    """The messages so far and how to add an answer to them."""

    def __init__(self, engine: Engine, args: argparse.Namespace) -> None:
        self.engine, self.args = engine, args
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.args.system}] if self.args.system else []

    def ask(self, text: str) -> Generation | None:
        """Print the answer to `text` as it comes. None when Ctrl-C stopped it; what was written is remembered."""
        self.messages.append({"role": "user", "content": text})
        parts: list[str] = []

        def show(piece: str) -> None:
            parts.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()

        generation = None
        try:
            generation = self.engine.generate(
                text if self.args.plain else self.engine.chat_prompt(self.messages),
                self.args.max_tokens,
                temperature=self.args.temperature,
                seed=self.args.seed,
                on_token=show,
                reuse=True,
            )
        except KeyboardInterrupt:
            if self.args.prompt is not None:
                raise
        except UsageError:
            self.messages.pop()
            raise
        sys.stdout.write("\n")
        self.messages.append({"role": "assistant", "content": "".join(parts)})
        return generation


def _interactive(conversation: Conversation, args: argparse.Namespace) -> int:
    from rich.console import Console

    aside = Console(stderr=True)
    aside.print(f"{args.file}: {HELP}.", style="dim", markup=False, highlight=False)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            sys.stdout.write("\n")
            return 0
        except KeyboardInterrupt:
            aside.print(f"\n{HELP}.", style="dim", highlight=False)
            continue
        if text == "/reset":
            conversation.reset()
            aside.print("The conversation starts afresh.", style="dim")
        elif text.startswith("/"):
            aside.print(f"Unknown command {text}: {HELP}.", style="dim", markup=False)
        elif text:
            try:
                generation = conversation.ask(text)
            except UsageError as error:  # the context is full: the conversation can go on after /reset
                aside.print(f"{error}; or /reset", style="dim", markup=False)
                continue
            aside.print(_timing(generation) if generation else "stopped", style="dim", highlight=False)


def _timing(generation: Generation) -> str:
    text = (
        f"{generation.prompt_tokens} prompt tokens ({generation.reused_tokens} remembered), "
        f"first token {generation.time_to_first_token:.2f} s"
    )
    if generation.token_seconds:
        text += f", {generation.decode_tokens_per_second:.1f} tokens/s"
    if generation.finish == "length":
        text += ", cut at --max-tokens"
    elif generation.finish == "context":
        text += ", the context is full"
    return text

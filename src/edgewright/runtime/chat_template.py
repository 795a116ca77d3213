"""Chat templates of model files, rendered in a sandbox: a template comes with the file, so it is not to be trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

from edgewright.errors import FormatError, MissingPackage, UsageError
from edgewright.runtime.confined import call_confined

MAX_TEMPLATE_CHARACTERS = 1 << 18  # the longest published templates have about 20,000


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """As `render_here`, in a process of its own with bounds on time, memory and the text: a template is a program.

    Raises FormatError also for a template that takes longer than `confined.TIMEOUT` or more than `confined.MEMORY`.
    """
    plain = [dict(message) for message in messages]
    arguments = ("edgewright.runtime.chat_template", "render_here", "the model's chat template")
    return str(call_confined(*arguments, template, plain, **options))


def render_here(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    answer: bool = True,
    marks: Mapping[str, str | None] | None = None,
) -> str:
    """The messages in the format of `template`, character for character as transformers' `apply_chat_template`.

    Args:
        template: in Jinja, with the tags, filters and functions that transformers gives it.
        messages: each with a "role" and a "content" (text, or a list of parts), or with "tool_calls".
        tools: descriptions (JSON schema) of what the model may call.
        answer: end where the model's answer begins.
        marks: special tokens by their name in transformers (bos_token, eos_token, ...); None where there is none.

    Raises:
        UsageError: messages that are not of this form, or that the template refuses.
        FormatError: a template that does not work.
    """
    if not messages:
        raise UsageError('a chat needs at least one message, e.g. [{"role": "user", "content": "Hello"}]')
    for message in messages:
        if not isinstance(message.get("role"), str) or not {"content", "tool_calls"} & set(message):
            raise UsageError(
                f"a chat message needs a role and a content, got {dict(message)!r}; "
                'e.g. {"role": "user", "content": "Hello"}'
            )
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise FormatError(f"the chat template has {len(template)} characters, more than {MAX_TEMPLATE_CHARACTERS}")
    # as transformers: what is None is not there
    names = {name: mark for name, mark in (marks or {}).items() if mark is not None}
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    environment = _environment()
    from jinja2 import TemplateError

    try:
        return str(
            environment.from_string(template).render(
                messages=chat,
                tools=None if tools is None else [dict(tool) for tool in tools],
                documents=None,
                add_generation_prompt=answer,
                **names,
            )
        )
    except _Refused as error:
        raise UsageError(f"the model's chat template refuses these messages: {error}") from error
    except (TemplateError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise FormatError(f"the model's chat template does not work: {error}") from error


@cache
def _environment() -> Any:
    """The environment of transformers 5 (utils/chat_template_utils.py), without the rest of that package."""
    try:
        from jinja2 import nodes
        from jinja2.exceptions import SecurityError
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.utils import Namespace
    except ImportError as error:
        raise MissingPackage("chat templates need the package jinja2: pip install jinja2") from error

    class GenerationTag(Extension):
        """{% generation %} marks the assistant's part for training; the text inside is rendered as it is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

        def _render(self, caller: Any) -> Any:
            return caller()

    class PlainNamespace(Namespace):
        """namespace() without underscore names, which lead into Python's insides."""

        def __init__(*args: Any, **values: Any) -> None:
            self, *rest = args
            values = dict(*rest, **values)
            for name in values:
                PlainNamespace._check(name)
            Namespace.__init__(self, values)  # type: ignore[arg-type]

        def __setitem__(self, name: str, value: Any) -> None:
            PlainNamespace._check(name)
            Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a chat template may not store {name!r} in a namespace")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.globals.update(
        raise_exception=_refuse,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=_PlainDict(),
        namespace=PlainNamespace,
    )
    environment.filters["tojson"] = _to_json
    return environment


class _PlainDict:
    """dict() for templates: what makes one, and nothing else of the class."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Refused(Exception):
    """Raised by the template itself."""


def _refuse(message: object) -> NoReturn:
    raise _Refused(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter writes HTML escapes
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

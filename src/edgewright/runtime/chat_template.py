"""Chat templates of model files, rendered in a sandbox: a template comes with the file, so it is not to be trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from edgewright.errors import FormatError, MissingPackage, UsageError
from edgewright.runtime.confined import call_confined

MAX_TEMPLATE_CHARACTERS = 1 << 18  # the longest published templates have about 20,000
ROLES = ("system", "user", "assistant", "tool")


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """As `render_here`, in a process of its own with bounds on time, memory and the text: a template is a program.

    Raises FormatError also for a template that takes longer than `confined.TIMEOUT` or more than `confined.MEMORY`.
    """
    plain = [dict(message) for message in messages]
    arguments = ("edgewright.runtime.chat_template", "render_here", "the model's chat template")
    return str(call_confined(*arguments, template, plain, **options))


def render_here(template: str, messages: Sequence[Mapping[str, str]], *, bos: str = "", eos: str = "") -> str:
    """The messages in the format of `template` (Jinja, with the names that transformers gives it), ready for an answer.

    Raises UsageError for messages that are not {"role", "content"}, FormatError for a template that does not work.
    """
    for message in messages:
        if set(message) < {"role", "content"} or message["role"] not in ROLES:
            raise UsageError(
                f"a chat message needs a role of {', '.join(ROLES)} and a content, got {dict(message)!r}; "
                'e.g. {"role": "user", "content": "Hello"}'
            )
    if not messages:
        raise UsageError('a chat needs at least one message, e.g. [{"role": "user", "content": "Hello"}]')
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise FormatError(f"the chat template has {len(template)} characters, more than {MAX_TEMPLATE_CHARACTERS}")
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingPackage("chat templates need the package jinja2: pip install jinja2") from error

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(template).render(
            messages=[dict(m) for m in messages], add_generation_prompt=True, bos_token=bos, eos_token=eos
        )
    except _Refused as error:
        raise UsageError(f"the model's chat template refuses these messages: {error}") from error
    except (TemplateError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise FormatError(f"the model's chat template does not work: {error}") from error


class _Refused(Exception):
    """Raised by the template itself."""


def _refuse(message: object) -> NoReturn:
    raise _Refused(str(message))


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)

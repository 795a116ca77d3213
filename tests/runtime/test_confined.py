"""Functions in the confined process: limits on time, memory and answers; the next call works whatever came before."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest

from edgewright.errors import FormatError, Unsupported, UsageError
from edgewright.runtime import confined
from edgewright.runtime.chat_template import render_chat, render_here

USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module", autouse=True)
def paths() -> Any:
    """One process for all tests, but for those that end it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confined, "TIMEOUT", 1.0)
        confined._process.close()
        yield
        confined._process.close()


def call(function: str, *args: Any) -> Any:
    return confined.call_confined("tests.runtime.child_cases", function, "the test", *args)


def test_one_process_answers_many_calls_from_many_threads() -> None:
    first = call("process")
    assert first != os.getpid() and call("process") == first
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(call("process"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [first] * 8 and call("text", 100_000) == "x" * 100_000
    began = time.perf_counter()
    for _ in range(50):
        call("process")
    assert time.perf_counter() - began < 5  # a millisecond each on an idle machine


@pytest.mark.parametrize(
    ("function", "argument", "words"),
    [
        ("loop", 1, "the test was not done within 1 s"),
        ("grow", 1 << 40, "the test takes more than 512 MB"),
        ("text", confined.LARGEST_ANSWER + 1, "the test writes more than 8 MB"),
        ("kill", 9, r"the test ended the process that ran it \(SIGKILL\)"),
        ("kill", 11, "SIGSEGV"),
    ],
)
def test_what_is_too_much_is_one_sentence(function: str, argument: int, words: str) -> None:
    with pytest.raises(FormatError, match=words) as told:
        call(function, argument)
    assert type(told.value).__module__.startswith("edgewright")
    assert call("text", 3) == "xxx"


def test_typed_errors_arrive_and_arguments_are_json() -> None:
    first = call("process")
    with pytest.raises(Unsupported, match="not this"):
        call("refuse_all", "not this")
    with pytest.raises(UsageError, match="not JSON"):
        call("text", object())
    assert call("process") == first


def test_a_process_that_died_in_between_is_started_again() -> None:
    first = call("process")
    os.kill(first, 9)
    assert call("process") != first


BOMBS = {
    "loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% if a == b %}{% endif %}{% endfor %}{% endfor %}",
    "lipsum": "{% for i in range(9999) %}{{ lipsum(n=1000) }}{% endfor %}",
    "repeated text": "{{ 'x' * 3000000000 }}",
    "doubling": "{% set n = namespace(a='xx') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}{{ n.a }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "lists": "{{ (range(99999) | list) * 99999 }}",
    "long text": "{% set a = 'x' * 100000 %}{% for i in range(99999) %}{{ a }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_cannot_take_time_or_memory(bomb: str) -> None:
    began = time.monotonic()
    with pytest.raises(FormatError, match="the model's chat template"):
        render_chat(BOMBS[bomb], USER)
    assert time.monotonic() - began < 15
    assert render_chat("{{ messages[0].content }}", USER) == "Hi"


def test_the_text_is_that_of_the_template_itself() -> None:
    template = "{% for m in messages %}{{ loop.index }}{{ m | tojson }}\n{% endfor %}"
    messages = [{"role": "user", "content": "naïve \U0001f600 \ud800 <&> \x00"}, {"role": "tool", "content": ""}]
    assert render_chat(template, messages) == render_here(template, messages)

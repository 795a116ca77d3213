"""Chat templates: rendered as written, and harmless whoever wrote them."""

from __future__ import annotations

import pytest

from edgewright.errors import FormatError, UsageError
from edgewright.runtime.chat_template import render_chat

USER = [{"role": "user", "content": "Hi {{ 1 }}"}]


def test_messages_and_marks_are_filled_in():
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    )
    assert render_chat(template, USER, bos_token="<s>", eos_token="</s>") == "<s>[user] Hi {{ 1 }}</s>"


def test_the_extras_that_templates_use():
    template = "{% for m in messages %}{% if loop.first %}{% break %}{% endif %}{% endfor %}{{ [1, 'é'] | tojson }}"
    assert render_chat(template + "{{ strftime_now('%%') }}", USER) == '[1, "é"]%'


def test_same_text_as_transformers(smollm2):
    tokenizer = smollm2[1]
    messages = [{"role": "system", "content": "Be brief."}, *USER, {"role": "assistant", "content": "Hello."}, *USER]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render_chat(tokenizer.chat_template, messages) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for x in range(10**9) %}{% endfor %}",
        "{{ undefined.field }}",
        "{% if %}",
        "{{ 1 // 0 }}",
        "{{ messages[9].role }}",
        300_000 * "a",
    ],
)
def test_hostile_templates_are_refused(template):
    with pytest.raises(FormatError):
        render_chat(template, USER)


def test_messages_are_checked():
    for bad in ([], [{"role": "user"}], [{"role": 3, "content": "x"}], [{"content": "x"}]):
        with pytest.raises(UsageError):
            render_chat("x", bad)
    with pytest.raises(UsageError, match="roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", USER)

"""Chat templates: rendered as written, and harmless whoever wrote them."""

from __future__ import annotations

import pytest

from edgewright.errors import FormatError, UsageError
from edgewright.runtime.chat_template import render_chat
from tests.toy_chat_templates import CHATS, TEMPLATES, TOOLS

USER = [{"role": "user", "content": "Hi {{ 1 }}"}]


def test_messages_and_marks_are_filled_in():
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    )
    assert render_chat(template, USER, marks={"bos_token": "<s>", "eos_token": "</s>"}) == "<s>[user] Hi {{ 1 }}</s>"


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


def tokenizer_with(template: str):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    plain = Tokenizer(models.BPE(vocab={mark: i for i, mark in enumerate(marks.values())}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **marks)
    tokenizer.chat_template = template
    return tokenizer, marks


def drops_none():
    """Whether transformers takes None in a message for an absent value; 5.0 did not yet."""
    message = {"role": "user", "content": None}
    tokenizer, _ = tokenizer_with("{{ 'content' in messages[0] }}")
    return tokenizer.apply_chat_template([message], tokenize=False) == "False"


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(name, tools):
    tokenizer, marks = tokenizer_with(TEMPLATES[name])
    rendered = 0
    for chat in CHATS:
        for answer in (True, False):
            call = {"tools": tools, "tokenize": False, "add_generation_prompt": answer}
            said = [{key: value for key, value in message.items() if value is not None} for message in chat]
            try:
                expected = tokenizer.apply_chat_template(chat if drops_none() else said, **call)
            except Exception as error:  # the template itself refuses
                with pytest.raises((UsageError, FormatError), match=str(error)[:20]):
                    render_chat(TEMPLATES[name], chat, tools=tools, answer=answer, marks=marks)
                continue
            assert render_chat(TEMPLATES[name], chat, tools=tools, answer=answer, marks=marks) == expected
            rendered += 1
    assert rendered >= 4


def test_namespaces_hold_no_names_that_lead_into_python():
    with pytest.raises(FormatError, match="may not store"):
        render_chat("{% set n = namespace(__class__=1) %}x", USER)
    with pytest.raises(FormatError, match="may not store"):
        render_chat("{% set n = namespace(a=1) %}{% set n._b = 2 %}x", USER)
    assert render_chat("{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}{{ dict(b=3) }}", USER) == "2{'b': 3}"

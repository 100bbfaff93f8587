"""Templates render as Hugging Face's do; what they object to reaches the caller as a request error."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.text.template import ChatTemplate

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "é"]}'}}


def test_renders_a_real_template() -> None:
    got = ChatTemplate(CHATML).render(USER)
    assert (
        got == "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ChatTemplate(CHATML).render([{"role": "system", "content": "S"}], add_generation_prompt=False) == (
        "<|im_start|>system\nS<|im_end|>\n"
    )


def test_default_template_with_and_without_tools() -> None:
    template = ChatTemplate("")
    assert template.is_default
    assert template.uses_tools
    assert template.render(USER) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    messages = [
        {"role": "system", "content": "Be brief."},
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]
    assert template.render(messages, tools=[TOOL]) == (
        "<|im_start|>system\nBe brief.\n\nYou may call these functions:\n<tools>\n"
        '{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}\n'
        '</tools>\nTo call one, answer with\n<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n\n<tool_call>\n"
        '{"name": "f", "arguments": {"a": [1, "é"]}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.render(USER, tools=[TOOL]).startswith("<|im_start|>system\nYou may call")


def test_whitespace_control_loop_controls_and_generation_tag() -> None:
    source = (
        "{{ bos_token }}\n{% for m in messages %}\n    {% if m.role == 'x' %}{% continue %}{% endif %}\n"
        "    {% generation %}\n{{ m.content }}{{ eos_token }}\n    {% endgeneration %}\n{% endfor %}\n"
    )
    got = ChatTemplate(source, "<s>", "</s>").render([{"role": "x", "content": "no"}, *USER])
    assert got == "<s>\nHi</s>\n"


def test_clock_is_injected_and_optional() -> None:
    source = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %}"
    assert ChatTemplate(source).render(USER) == "26 Jul 2024"
    assert ChatTemplate(source, now=lambda: datetime(2025, 2, 3, tzinfo=UTC)).render(USER) == "03 Feb 2025"


def test_tojson_keeps_unicode_and_html() -> None:
    source = "{{ tools | tojson }}|{{ tools[0] | tojson(indent=2) }}"
    got = ChatTemplate(source).render(USER, tools=[{"a": "é<&>'"}])
    assert got == '[{"a": "é<&>\'"}]|{\n  "a": "é<&>\'"\n}'


def test_kwargs_and_documents_reach_the_template_but_cannot_replace_messages() -> None:
    source = "{{ enable_thinking }}{{ documents }}{{ messages[0].content }}"
    got = ChatTemplate(source).render(
        USER, documents=["d"], chat_template_kwargs={"enable_thinking": False, "messages": [{"content": "no"}]}
    )
    assert got == "False['d']Hi"
    hostile = {"tools": 1, "add_generation_prompt": False, "bos_token": "x", "messages": [], "raise_exception": 1}
    assert ChatTemplate(CHATML).render(USER, chat_template_kwargs=hostile) == ChatTemplate(CHATML).render(USER)
    assert ChatTemplate("{{ enable_thinking }}").render(USER, enable_thinking=True) == "True"


def test_content_parts() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert template.render([{"role": "user", "content": parts}]) == "a\nb"
    with pytest.raises(UnsupportedFeature, match=r"messages\[0\].content\[1\] has type 'image_url'"):
        template.render([{"role": "user", "content": [parts[0], {"type": "image_url", "image_url": {}}]}])
    for content in (5, [5], [{"type": "text"}], {"type": "text", "text": "x"}):
        with pytest.raises(InvalidRequest):
            template.render([{"role": "user", "content": content}])
    for message in ({"content": "x"}, {"role": 1}, "x"):
        with pytest.raises(InvalidRequest, match="role"):
            template.render([message])  # type: ignore[list-item]
    with pytest.raises(InvalidRequest, match="empty"):
        template.render([])


def test_missing_content_stays_none_only_for_templates_that_ask() -> None:
    call_only = [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
    assert ChatTemplate("{{ messages[0].content is none }}").render(call_only) == "True"
    assert ChatTemplate("[{{ messages[0].content }}]").render(call_only) == "[]"
    assert ChatTemplate("{{ messages[0].content is none }}").render([{"role": "user", "content": None}]) == "False"


def test_arguments_arrive_as_objects_and_broken_ones_as_they_are() -> None:
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments | tojson }}")
    broken = {**CALL, "function": {"name": "f", "arguments": "{oops"}}
    assert template.render([{"role": "assistant", "tool_calls": [CALL]}]) == '{"a": [1, "é"]}'
    assert template.render([{"role": "assistant", "tool_calls": [broken]}]) == '"{oops"'
    assert CALL["function"]["arguments"] == '{"a": [1, "é"]}'  # type: ignore[index] # the caller's own is untouched


def test_templates_with_other_conventions() -> None:
    glued = ChatTemplate(
        "{{ messages[0].tool_calls[0].function.name + '(' + messages[0].tool_calls[0].function.arguments + ')' }}"
    )
    assert glued.render([{"role": "assistant", "content": None, "tool_calls": [CALL]}]) == 'f({"a": [1, "é"]})'
    loops = ChatTemplate(
        "{% if tools is defined %}{% for t in tools %}{{ t }}{% endfor %}{% endif %}{{ messages[0].content }}"
    )
    assert loops.render(USER) == "Hi"
    both = ChatTemplate("{{ tools + 1 }}")
    with pytest.raises(InvalidRequest, match="NoneType"):  # the first reason is the one that is told
        both.render(USER)
    with pytest.raises(InvalidRequest, match="tool_calls must be a list"):
        loops.render([{"role": "assistant", "tool_calls": "x"}])


def test_continue_final_message() -> None:
    template = ChatTemplate(CHATML)
    messages = [*USER, {"role": "assistant", "content": "The answer is "}]
    got = template.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert got.endswith("<|im_start|>assistant\nThe answer is ")
    assert messages[-1]["content"] == "The answer is "  # the caller's own is untouched
    with pytest.raises(InvalidRequest, match="exclude each other"):
        template.render(messages, continue_final_message=True)
    with pytest.raises(InvalidRequest, match="exactly once"):
        ChatTemplate("x").render(messages, add_generation_prompt=False, continue_final_message=True)


def test_objections_and_failures_are_request_errors_without_message_text() -> None:
    with pytest.raises(InvalidRequest, match="objects: roles must alternate") as caught:
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(USER)
    assert caught.value.status == 400
    for source in (
        "{{ messages[9].content }}",
        "{{ 1 + messages[0].content }}",
        "{{ messages[0].content | int + x.y }}",
    ):
        with pytest.raises(InvalidRequest, match="cannot render") as caught:
            ChatTemplate(source).render([{"role": "user", "content": "SECRET"}])
        assert "SECRET" not in caught.value.message


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages[0].__class__.__init__.__globals__['sys'] }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source + "{{ raise_exception('reached') if false }}").render(USER)


def test_a_template_that_does_not_compile_is_named_on_use() -> None:
    with pytest.raises(UnsupportedFeature, match="line 2"):
        ChatTemplate("ok\n{% if %}").render(USER)


def test_render_costs_microseconds() -> None:
    template = ChatTemplate(CHATML)
    rounds = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(500):
            template.render(USER)
        rounds.append((time.process_time() - start) / 500)
    assert min(rounds) < 40e-6


MACROS = """
{%- macro plain(a, b='-') %}{{ a }}{{ b }}{% endmacro %}
{%- macro many(a) %}{{ a }}{{ varargs | join }}{{ kwargs | length }}{% endmacro %}
{%- macro wrapped(a) %}<{{ a }}{{ caller() }}>{% endmacro %}
{%- macro nested(message) %}{{ plain(message.content, message.role) }}{{ plain(message.name) }}{% endmacro %}
{%- for message in messages %}
{{- plain(message.content) }}{{ plain(message.content, 'b') }}{{ plain(message.content, b='k') }}{{ nested(message) }}
{{- many(message.content, 1, 2, x=3) }}{% call wrapped(message.role) %}{{ message.content }}{% endcall %}
{%- endfor %}
{%- autoescape true %}{{ plain('<', '&') }}{% endautoescape %}"""


def test_macros_say_what_they_say_without_our_short_cuts() -> None:
    messages = [{"role": "user", "content": "<hi> & you"}, {"role": "system", "content": "é", "name": "items"}]
    expected = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(MACROS)
    assert ChatTemplate(MACROS).render(messages) == expected.render(messages=messages)


def test_a_macro_that_is_given_too_much_is_the_templates_fault() -> None:
    with pytest.raises(InvalidRequest, match="takes not more than 1 argument"):
        ChatTemplate("{% macro one(a) %}{{ a }}{% endmacro %}{{ one(1, 2) }}").render(USER)

"""Messages as chat templates read them, and the prompts of text completions."""

import json
from typing import Any

import pytest

from holdfast.base.errors import UnsupportedFeature
from holdfast.openai.parse import parse_chat, parse_completion
from holdfast.openai.prompt import completion_prompts, raw_prompt, template_messages


def plain(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return template_messages(parse_chat(json.dumps({"model": "m", "messages": messages}).encode()).messages)


def test_strings_go_through() -> None:
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b", "name": "u"},
        {"role": "assistant", "content": "c", "reasoning_content": "r"},
    ]
    assert plain(*messages) == messages


def test_roles_that_templates_do_not_know() -> None:
    assert [m["role"] for m in plain(
        {"role": "developer", "content": "a"},
        {"role": "function", "content": "b", "name": "f"},
        {"role": "tool", "content": "c", "tool_call_id": "1"},
    )] == ["system", "tool", "tool"]  # fmt: skip


def test_text_parts_become_one_string() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert plain({"role": "user", "content": parts}) == [{"role": "user", "content": "a\nb"}]


@pytest.mark.parametrize("arguments", ['{"x": 1}', "not json", "[1]", ""])
def test_tool_calls_carry_objects_where_possible(arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    [message] = plain({"role": "assistant", "tool_calls": [call]})
    assert message["content"] == ""
    expected = {"x": 1} if arguments.startswith("{") else arguments
    assert message["tool_calls"] == [{"id": "1", "type": "function", "function": {"name": "f", "arguments": expected}}]


def test_deprecated_function_call_is_a_tool_call() -> None:
    [message] = plain({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}})
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


def test_refusals_are_text() -> None:
    assert plain({"role": "assistant", "refusal": "no"})[0]["content"] == "no"
    assert plain({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]})[0]["content"] == "no"


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "image_url"),
        ({"type": "input_audio", "input_audio": {}}, "input_audio"),
        ({"type": "file", "file": {}}, "file"),
    ],
)
def test_other_parts_are_refused_by_name(part: dict[str, Any], kind: str) -> None:
    with pytest.raises(UnsupportedFeature, match=f"'messages\\[1\\].content\\[1\\]' is of type '{kind}'") as caught:
        plain({"role": "system", "content": ""}, {"role": "user", "content": [{"type": "text", "text": "a"}, part]})
    assert caught.value.param == "messages[1].content[1]"


def test_raw_prompt() -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"a"},{"role":"user","content":"b"}]}'
    assert raw_prompt(parse_chat(body)) == "ab"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("x", ["x"]), (["x", "y"], ["x", "y"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_completion_prompts(prompt: Any, prompts: Any) -> None:
    assert completion_prompts(parse_completion(json.dumps({"model": "m", "prompt": prompt}).encode())) == prompts

"""Bring chat messages into the shape that chat templates expect.

Must never change what was said: text parts are joined, arguments of tool calls may be parsed, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from holdfast.base.errors import InvalidRequest, UnsupportedFeature

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def normalise(messages: Sequence[Mapping[str, Any]], *, keep_none: bool = False) -> list[dict[str, Any]]:
    """Return the messages as plain dicts with string content.

    Args:
        messages: OpenAI chat messages.
        keep_none: whether a missing content stays None for messages with tool calls (for templates that ask
            ``is none``); otherwise it becomes an empty string.

    Raises:
        InvalidRequest: a message is not an object with a role, or its content has an unknown shape.
        UnsupportedFeature: a content part that is not text.
    """
    return [_message(message, index, keep_none) for index, message in enumerate(messages)]


def _message(message: Mapping[str, Any], index: int, keep_none: bool) -> dict[str, Any]:
    known = type(message) is dict or isinstance(message, Mapping)  # the second question costs more than all others
    if not known or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"messages[{index}] must be an object with a 'role'.", param=f"messages[{index}]")
    if type(message) is dict and isinstance(message.get("content"), str) and "tool_calls" not in message:
        return message  # as it should be; the sandbox lets no template change it
    result = dict(message)
    content = result.get("content")
    calls = result.get("tool_calls")
    if not isinstance(content, str):
        result["content"] = None if content is None and calls and keep_none else _text(content, index)
    if calls:
        if not isinstance(calls, list):
            raise InvalidRequest(f"messages[{index}].tool_calls must be a list.", param=f"messages[{index}].tool_calls")
    elif "tool_calls" in result:
        del result["tool_calls"]
    return result


def _text(content: Any, index: int) -> str:
    if content is None:
        return ""
    if not isinstance(content, list):
        raise InvalidRequest(
            f"messages[{index}].content must be a string or a list of parts, not {type(content).__name__}.",
            param=f"messages[{index}].content",
        )
    return "\n".join([_part(part, index, at) for at, part in enumerate(content)])


def _part(part: Any, index: int, at: int) -> str:
    param = f"messages[{index}].content[{at}]"
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise InvalidRequest(f"{param} must be an object with a 'type'.", param=param)
    kind = part.get("type")
    if kind not in _TEXT_PARTS:
        raise UnsupportedFeature(f"{param} has type {str(kind)[:40]!r}; this model takes text only.", param=param)
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{param} needs a string in 'text'.", param=param)
    return text


def with_objects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the arguments of tool calls as objects, not as the JSON text that the API carries.

    Most templates print arguments as JSON themselves and need the object; a few put the text in as it is.
    """
    return [
        {**message, "tool_calls": [_call(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = msgspec.json.decode(function["arguments"] or "{}")
    except msgspec.DecodeError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}

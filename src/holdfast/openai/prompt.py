"""What the prompt is made of: messages as a chat template reads them, or the prompts of a text completion.

Holds the few conventions between the API and Hugging Face chat templates. Must never render a
template or tokenize: that is `text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from holdfast.base.errors import UnsupportedFeature
from holdfast.openai.messages import (
    AssistantMessage,
    Content,
    ContentRefusal,
    ContentText,
    DeveloperMessage,
    FunctionMessage,
    Message,
    MessageToolCall,
    SystemMessage,
    ToolMessage,
)
from holdfast.openai.types import ChatCompletionRequest, CompletionRequest

Prompt = str | list[int]
"""Text to be tokenized, or token ids."""


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages in the form that Hugging Face chat templates expect.

    Content is always a string (text parts are joined by newlines, as vLLM does); ``developer`` becomes
    ``system`` and ``function`` becomes ``tool``, because templates know only those; the arguments of
    earlier tool calls are objects where their text is JSON, because templates print them with ``tojson``.

    Raises:
        UnsupportedFeature: a part that is not text; ``param`` names it.
    """
    return [_plain(i, message) for i, message in enumerate(messages)]


def raw_prompt(request: ChatCompletionRequest) -> str:
    """Return the messages' text one after the other, for ``nvext.use_raw_prompt``."""
    return "".join(_text(i, m.content) for i, m in enumerate(request.messages))


def completion_prompts(request: CompletionRequest) -> list[Prompt]:
    """Return the prompts of a text completion, in order; there is at least one."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [entry for entry in prompt if not isinstance(entry, int)]


_ROLES: dict[type[Message], str] = {
    DeveloperMessage: "system",
    SystemMessage: "system",
    AssistantMessage: "assistant",
    ToolMessage: "tool",
    FunctionMessage: "tool",
}


def _plain(i: int, message: Message) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": _ROLES.get(type(message), "user"), "content": _text(i, message.content)}
    if message.name is not None:
        plain["name"] = message.name
    if isinstance(message, AssistantMessage):
        _add_assistant(plain, message)
    elif isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _add_assistant(plain: dict[str, Any], message: AssistantMessage) -> None:
    if message.reasoning_content is not None:
        plain["reasoning_content"] = message.reasoning_content
    if not plain["content"] and message.refusal:
        plain["content"] = message.refusal
    calls = message.tool_calls or ()
    if calls:
        plain["tool_calls"] = [_call(call) for call in calls]
    elif message.function_call is not None:
        plain["tool_calls"] = [_call(MessageToolCall(message.function_call))]


def _call(call: MessageToolCall) -> dict[str, Any]:
    arguments: Any = call.function.arguments
    try:
        decoded = msgspec.json.decode(arguments)
    except ValueError:
        decoded = None
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": decoded if isinstance(decoded, dict) else arguments},
    }


def _text(i: int, content: Content | None) -> str:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for j, part in enumerate(content or ()):
        if isinstance(part, ContentText):
            texts.append(part.text)
        elif isinstance(part, ContentRefusal):
            texts.append(part.refusal)
        else:
            kind = part.__struct_config__.tag
            raise UnsupportedFeature(
                f"'messages[{i}].content[{j}]' is of type '{kind}'; this model reads only text.",
                param=f"messages[{i}].content[{j}]",
            )
    return "\n".join(texts)

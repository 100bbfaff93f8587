"""Chat messages as the OpenAI API defines them: one Struct per role, told apart by ``role``.

The shapes are those of the public API reference; text lives only in these objects. Must never
render a prompt (that is `text`) and never log what it holds.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class ContentText(msgspec.Struct, tag_field="type", tag="text", gc=False):
    """A piece of text."""

    text: str


class ContentRefusal(msgspec.Struct, tag_field="type", tag="refusal", gc=False):
    """A refusal that an assistant gave earlier."""

    refusal: str


class ImageUrl(msgspec.Struct, gc=False):
    """Where an image is."""

    url: str
    detail: str | None = None


class ContentImage(msgspec.Struct, tag_field="type", tag="image_url", gc=False):
    """An image; understood, and refused by models that only read text."""

    image_url: ImageUrl


class ContentAudio(msgspec.Struct, tag_field="type", tag="input_audio", gc=False):
    """Audio; understood, and refused by models that only read text."""

    input_audio: dict[str, Any]


class ContentFile(msgspec.Struct, tag_field="type", tag="file", gc=False):
    """A file; understood, and refused by models that only read text."""

    file: dict[str, Any]


ContentPart = ContentText | ContentRefusal | ContentImage | ContentAudio | ContentFile
Content = str | list[ContentPart]


class FunctionCall(msgspec.Struct, gc=False):
    """Which function to call. ``arguments`` is JSON text, as the model wrote it."""

    name: str
    arguments: str = ""


class MessageToolCall(msgspec.Struct, gc=False):
    """A call that an assistant made earlier."""

    function: FunctionCall
    id: str = ""
    type: Literal["function"] = "function"


class DeveloperMessage(msgspec.Struct, tag_field="role", tag="developer", gc=False):
    """Instructions that outrank the user's; rendered as ``system``."""

    content: Content
    name: str | None = None


class SystemMessage(msgspec.Struct, tag_field="role", tag="system", gc=False):
    """Instructions that outrank the user's."""

    content: Content
    name: str | None = None


class UserMessage(msgspec.Struct, tag_field="role", tag="user", gc=False):
    """What the user says."""

    content: Content
    name: str | None = None


class AssistantMessage(msgspec.Struct, tag_field="role", tag="assistant", gc=False):
    """What the model said earlier."""

    content: Content | None = None
    refusal: str | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    function_call: FunctionCall | None = None
    reasoning_content: str | None = None


class ToolMessage(msgspec.Struct, tag_field="role", tag="tool", gc=False):
    """The result of a tool call."""

    content: Content
    tool_call_id: str
    name: str | None = None


class FunctionMessage(msgspec.Struct, tag_field="role", tag="function", gc=False):
    """The result of a function call in the deprecated form; rendered as ``tool``."""

    content: Content | None
    name: str


Message = DeveloperMessage | SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage

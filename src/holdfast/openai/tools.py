"""Which tools the model sees, whether it must call one, and the schema that forces it to.

A forced call (``required``, or a named function) is produced under a JSON schema for one object
``{"name": …, "arguments": {…}}``: the body of a Hermes ``<tool_call>`` without its tags, and what the
Llama-3 JSON format looks like but for the key ``arguments``. The whole text of such an answer is that one
call; nothing else can appear in it. Must never parse generated text: that is `text`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from holdfast.openai.types import (
    AllowedToolChoice,
    ChatCompletionRequest,
    FunctionTool,
    NamedToolChoice,
)

ToolMode = Literal["none", "auto", "forced"]
"""``none``: text is text; ``auto``: look for calls in the text; ``forced``: the text is one JSON call."""


class ToolUse(msgspec.Struct, frozen=True, omit_defaults=True):
    """The tools of one request, after its ``tool_choice`` has been applied."""

    mode: ToolMode = "none"
    tools: tuple[dict[str, Any], ...] = ()
    """For the chat template: ``{"type": "function", "function": {…}}``; empty when none may be called."""
    names: frozenset[str] = frozenset()
    """Functions that may be called."""
    parallel: bool = True
    """False: at most one call per answer."""

    def forced_schema(self) -> str:
        """Return, as JSON text, the schema of the one call that a forced answer consists of."""
        calls = [_call_schema(tool["function"]) for tool in self.tools if tool["function"]["name"] in self.names]
        return msgspec.json.encode(calls[0] if len(calls) == 1 else {"anyOf": calls}).decode()


NO_TOOLS = ToolUse()


def tool_use(request: ChatCompletionRequest) -> ToolUse:
    """Return what a checked request (`parse.parse_chat`) says about tools.

    With ``tool_choice: "none"`` the template does not see the tools either. With one named function the
    template sees all of them, so that the prompt stays the same and its prefix cached.
    """
    choice = request.tool_choice
    functions = [tool.function for tool in request.tools or () if isinstance(tool, FunctionTool)]
    if not functions or choice == "none":
        return NO_TOOLS
    names = frozenset(function.name for function in functions)
    mode: ToolMode = "auto"
    if choice == "required":
        mode = "forced"
    elif isinstance(choice, NamedToolChoice):
        mode, names = "forced", frozenset({choice.function.name})
    elif isinstance(choice, AllowedToolChoice):
        mode = "forced" if choice.allowed_tools.mode == "required" else "auto"
        names = frozenset(tool.function.name for tool in choice.allowed_tools.tools)
        functions = [function for function in functions if function.name in names]
    tools = tuple({"type": "function", "function": msgspec.to_builtins(function)} for function in functions)
    return ToolUse(mode, tools, names, request.parallel_tool_calls is not False)


def _call_schema(function: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"type": "string", "enum": [function["name"]]},
            "arguments": function.get("parameters") or {"type": "object"},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }

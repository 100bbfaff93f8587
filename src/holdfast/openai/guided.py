"""Which one constraint the output is under, out of the several ways in which a client can ask for one.

OpenAI's ``response_format``, vLLM's ``guided_*`` and ``structured_outputs``, and a forced tool call all
become one `Guided`. Must never enforce it: that is the engine's work.
"""

from __future__ import annotations

from typing import Any

import msgspec

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.engines.contract import Guided, GuidedKind
from holdfast.openai.tools import ToolUse
from holdfast.openai.types import CommonRequest, JsonObjectFormat, JsonSchemaFormat

_KINDS: dict[str, GuidedKind] = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}


def guided_of(request: CommonRequest, tools: ToolUse, supported: tuple[str, ...]) -> Guided | None:
    """Return the constraint on the output, or None.

    Args:
        request: a checked request.
        tools: what it says about tools.
        supported: the kinds that the model's engine can do (`ModelCard.guided`).

    Raises:
        InvalidRequest: two constraints at once, or a schema that is not JSON.
        UnsupportedFeature: the engine can't do this kind; ``param`` names the field that asked for it.
    """
    wanted = _from_response_format(request)
    wanted += _from_guided_keys(request)
    wanted += _from_structured_outputs(request)
    if tools.mode == "forced":
        wanted.append(("tool_choice", Guided("json_schema", tools.forced_schema())))
    if not wanted:
        return None
    param, guided = wanted[0]
    if len(wanted) > 1:
        raise InvalidRequest(
            f"'{param}' and '{wanted[1][0]}' both constrain the output; send only one of them.", param=wanted[1][0]
        )
    if tools.mode == "auto":
        raise UnsupportedFeature(
            f"'{param}' together with 'tools' is not supported: the constraint would forbid tool calls; "
            "set 'tool_choice' to \"none\" or leave one of them out.",
            param=param,
        )
    _check_supported(param, guided, supported)
    return guided


def _check_supported(param: str, guided: Guided, supported: tuple[str, ...]) -> None:
    if guided.kind not in supported:
        able = ", ".join(supported) or "none"
        raise UnsupportedFeature(
            f"'{param}' needs constrained output of kind '{guided.kind}'; this model's engine supports: {able}.",
            param=param,
        )


Wanted = list[tuple[str, Guided]]


def _from_response_format(request: CommonRequest) -> Wanted:
    wish = request.response_format
    if isinstance(wish, JsonObjectFormat):
        return [("response_format", Guided("json_object"))]
    if isinstance(wish, JsonSchemaFormat):
        schema = wish.json_schema.schema
        if schema is None:
            return [("response_format", Guided("json_object"))]
        return [("response_format", Guided("json_schema", _as_text(schema)))]
    return []


def _from_guided_keys(request: CommonRequest) -> Wanted:
    wanted: Wanted = []
    if request.guided_json is not None:
        wanted.append(("guided_json", _guided("json", request.guided_json, "guided_json")))
    if request.guided_regex is not None:
        wanted.append(("guided_regex", Guided("regex", request.guided_regex)))
    if request.guided_choice is not None:
        wanted.append(("guided_choice", _guided("choice", request.guided_choice, "guided_choice")))
    if request.guided_grammar is not None:
        wanted.append(("guided_grammar", Guided("grammar", request.guided_grammar)))
    return wanted


def _from_structured_outputs(request: CommonRequest) -> Wanted:
    wish = request.structured_outputs
    if wish is None:
        return []
    wanted: Wanted = []
    for key in _KINDS:
        value = getattr(wish, key)
        if value is not None:
            param = f"structured_outputs.{key}"
            wanted.append((param, _guided(key, value, param)))
    if wish.json_object:
        wanted.append(("structured_outputs.json_object", Guided("json_object")))
    return wanted


def _guided(key: str, value: Any, param: str) -> Guided:
    if key == "json" and isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except ValueError as error:
            raise InvalidRequest(f"'{param}' is not valid JSON; send the schema as an object.", param=param) from error
    return Guided(_KINDS[key], value if isinstance(value, str) else _as_text(value))


def _as_text(value: Any) -> str:
    return msgspec.json.encode(value).decode()

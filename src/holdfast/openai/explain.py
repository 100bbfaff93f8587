"""Turns a decoder's complaint into a sentence for the person who wrote the request.

Works only on the error path, so it may decode the body again. It names the field, what was expected
and the kind of value that came; numbers and words of closed lists are quoted, free text never is.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from holdfast.base.errors import InvalidRequest

_COMPLAINT = re.compile(r"^(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$\.?(?P<path>.*)`)?$", re.DOTALL)
_GOT = re.compile(r"^Expected `(?P<expected>[^`]*)`, got `(?P<got>[^`]*)`$")
_BOUND = re.compile(r"^Expected `(?P<kind>[^`]*)` (?P<length>of length )?(?P<op>>=|<=|>|<) (?P<bound>\S+)$")
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]*)`$")
_BYTE = re.compile(r"^JSON is malformed: (?P<why>.*) \(byte (?P<byte>\d+)\)$")

_KINDS = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_GOT_KINDS = {**_KINDS, "bool": "a boolean", "float": "a number with a fraction"}
_OPS = {">=": "at least", "<=": "at most", ">": "greater than", "<": "less than"}
_UNITS = {"array": "entries", "object": "entries", "str": "characters"}

_ALLOWED = {
    "messages[].role": "'developer', 'system', 'user', 'assistant', 'tool' or 'function'",
    "messages[].content[].type": "'text', 'refusal', 'image_url', 'input_audio' or 'file'",
    "messages[].tool_calls[].type": "'function'",
    "tools[].type": "'function'",
    "tool_choice": "'none', 'auto', 'required' or an object that names a function",
    "tool_choice.type": "'function' or 'allowed_tools'",
    "tool_choice.allowed_tools.mode": "'auto' or 'required'",
    "tool_choice.allowed_tools.tools[].type": "'function'",
    "response_format.type": "'text', 'json_object' or 'json_schema'",
    "nvext.session_control.action": "'bind', 'open' or 'close'",
}

_ADVICE = {
    "messages": 'Send a list such as [{"role": "user", "content": "Hello"}].',
    "prompt": "Send a string, a list of strings, a list of token ids or a list of such lists.",
    "model": "GET /v1/models lists what is served.",
    "tools[].type": 'Write {"type": "function", "function": {"name": …, "parameters": {…}}}.',
    "logprobs": "In chat it is a boolean with 'top_logprobs' for the count; in completions it is the count.",
    "logit_bias": "Its keys are token ids written as strings, its values numbers from -100 to 100.",
    "response_format": 'Write {"type": "json_object"} or {"type": "json_schema", "json_schema": {…}}.',
    "response_format.json_schema": 'Write {"name": "answer", "schema": {…}}.',
    "max_tokens": "Leave it out to let the model finish on its own.",
    "max_completion_tokens": "Leave it out to let the model finish on its own.",
    "messages[].content": "Send a string or a list of content parts.",
}


def explain(error: Exception, body: bytes) -> InvalidRequest:
    """Return the error for a body that could not be decoded.

    Args:
        error: what the decoder raised: `msgspec.MsgspecError`, `UnicodeDecodeError` or `RecursionError`.
        body: the whole HTTP body.
    """
    if not body.strip():
        return InvalidRequest("The request body is empty; send a JSON object with content-type application/json.")
    if isinstance(error, RecursionError):
        return InvalidRequest("The JSON is nested too deeply; flatten it.")
    if isinstance(error, UnicodeDecodeError):
        return _bad_utf8(body)
    if isinstance(error, msgspec.ValidationError):
        return _invalid(str(error), body)
    return _malformed(str(error), body)


def missing_field(error: Exception) -> str | None:
    """Return the field that the request's top level lacks, when that is the complaint."""
    found = _MISSING.match(str(error)) if isinstance(error, msgspec.ValidationError) else None
    return found["field"] if found else None


def _position(body: bytes, offset: int) -> str:
    line = body.count(b"\n", 0, offset) + 1
    column = offset - (body.rfind(b"\n", 0, offset) + 1) + 1
    return f"line {line}, column {column}"


def _bad_utf8(body: bytes) -> InvalidRequest:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return InvalidRequest(
            f"The request body is not valid UTF-8 at {_position(body, error.start)} "
            f"(byte 0x{body[error.start]:02x}); encode the JSON as UTF-8."
        )
    return InvalidRequest("The request body is not valid UTF-8; encode the JSON as UTF-8.")


def _malformed(text: str, body: bytes) -> InvalidRequest:
    if body.startswith(b"\xef\xbb\xbf"):
        return InvalidRequest("The request body starts with a byte order mark; send UTF-8 without one.")
    found = _BYTE.match(text)
    if found:
        where, why = _position(body, int(found["byte"])), found["why"]
    else:
        where, why = _position(body, len(body)), "it ends too early"
    return InvalidRequest(f"The request body is not valid JSON at {where}: {why}. Correct it and send it again.")


def _invalid(text: str, body: bytes) -> InvalidRequest:
    found = _COMPLAINT.match(text)
    what, path = (found["what"], found["path"] or "") if found else (text, "")
    of_key = bool(found and found["key"])
    param = path.removesuffix("[...]")
    general = re.sub(r"\[\d+\]", "[]", param)
    missing = _MISSING.match(what)
    if missing:
        field = missing["field"]
        param = f"{param}.{field}" if param else field
        general = f"{general}.{field}" if general else field
        sentence = f"'{param}' is required."
    elif not param:
        sentence = "The request body must be a JSON object."
    else:
        sentence = _sentence(what, param, general, "key" if of_key else "value" if path != param else "", body)
    advice = _ADVICE.get(general, "")
    if not missing and general == "messages[].content[]":
        advice = _ADVICE["messages[].content"]
    return InvalidRequest(f"{sentence} {advice}".strip(), param=param or None)


def _sentence(what: str, param: str, general: str, part: str, body: bytes) -> str:
    name = f"Each {part} of '{param}'" if part else f"'{param}'"
    got = _GOT.match(what)
    if got:
        return f"{name} must be {_kinds(got['expected'])}, not {_GOT_KINDS.get(got['got'], got['got'])}."
    bound = _BOUND.match(what)
    if bound:
        limit = bound["bound"].removesuffix(".0")
        if bound["length"]:
            return f"{name} must have {_OPS[bound['op']]} {limit} {_UNITS.get(bound['kind'], 'entries')}."
        actual = _number_at(body, param) if not part else None
        measured = f", not {actual}" if actual is not None else ""
        return f"{name} must be {_OPS[bound['op']]} {limit}{measured}."
    if what.startswith("Invalid"):
        return f"{name} must be {_ALLOWED.get(general, 'one of the documented values')}, not {_quoted(what)}."
    if "out of range" in what:
        return f"{name} is too large a number."
    return f"{name} must be {_ALLOWED.get(general, 'of another type')}."


def _kinds(expected: str) -> str:
    kinds = [_KINDS.get(kind, kind) for kind in expected.split(" | ") if kind != "null"] or ["null"]
    return kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])} or {kinds[-1]}"


def _quoted(what: str) -> str:
    word = what.partition("'")[2].rpartition("'")[0]
    return f"'{word[:40]}'"


def _number_at(body: bytes, param: str) -> int | float | None:
    """Return the number at this path of the body, or None when there is none or it is absurdly long.

    What comes after the value at fault has not been read before, so it may be malformed.
    """
    try:
        value: Any = msgspec.json.decode(body)
        for step in re.findall(r"[^.\[\]]+", param):
            value = value[int(step)] if isinstance(value, list) else value[step]
    except (LookupError, ValueError, TypeError, RecursionError):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 1e30 else None

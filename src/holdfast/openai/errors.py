"""Errors as HTTP answers and as events of a stream.

The body is the one that OpenAI clients understand (`HoldfastError.openai_body`). Must never add a text of
its own: what to say is decided where the error is raised.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from holdfast.base.errors import CapacityExhausted, HoldfastError

_encode = msgspec.json.Encoder(enc_hook=str).encode
Headers = list[tuple[bytes, bytes]]
"""As ASGI wants them: lower-case names."""


class ErrorResponse(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: Headers
    body: bytes


def error_response(
    error: HoldfastError, request_id: str = "", *, overload_status: int = 503, trace_id: str = ""
) -> ErrorResponse:
    """Return the HTTP answer for an error; ``overload_status`` is what lack of room is answered with.

    ``Retry-After`` is in whole seconds, at least 1. ``x-should-retry: false`` keeps OpenAI's clients from
    repeating by themselves what can't succeed (they repeat 408, 409, 429 and 5xx otherwise).
    """
    body = _encode(error.openai_body())
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if request_id:
        headers.append((b"x-request-id", request_id.encode("latin-1", "replace")))
    if trace_id:
        headers.append((b"x-trace-id", trace_id.encode()))
    if error.retry_after is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after))))
    if error.retry == "never":
        headers.append((b"x-should-retry", b"false"))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    overload = isinstance(error, CapacityExhausted) and error.details.get("knob") != "shutdown"
    return ErrorResponse(overload_status if overload else error.status, headers, body)


def error_event(error: HoldfastError) -> bytes:
    """Return the event that ends a stream with an error; OpenAI's clients raise ``APIError`` on it."""
    return b"data: %b\n\n" % _encode(error.openai_body())


def annotation_event(name: str, value: object) -> bytes:
    """Return an ``nvext.annotations`` event: a name, and its value as JSON in a comment.

    Send it only to clients that asked for it: OpenAI's own client can't read events without data.
    """
    return b"event: %b\n: %b\n\n" % (name.encode(), _encode(value))

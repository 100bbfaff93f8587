"""Reading a request body within its limit. Must never interpret it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from holdfast.base.errors import Cancelled, PayloadTooLarge

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Any]


async def read_body(receive: Receive, limit: int, declared: int | None) -> bytes:
    """Return the whole body.

    Args:
        receive: the ASGI callable.
        limit: largest body in bytes.
        declared: the content-length header, when there is one: too large a body is refused before it is read.

    Raises:
        PayloadTooLarge: naming limit and actual size.
        Cancelled: the client left before the end.
    """
    if declared is not None and declared > limit:
        raise _too_large(limit, declared)
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Cancelled("The client left while it sent the request.")
    body: bytes = message["body"]
    if not message.get("more_body"):
        if len(body) > limit:
            raise _too_large(limit, len(body))
        return body
    parts = [body]
    size = len(body)
    while message.get("more_body"):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("The client left while it sent the request.")
        parts.append(message["body"])
        size += len(parts[-1])
        if size > limit:
            raise _too_large(limit, size)
    return b"".join(parts)


def _too_large(limit: int, actual: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"The request body has at least {actual} bytes; the limit is {limit} (DYN_HTTP_BODY_LIMIT_MB).",
        limit=limit,
        actual=actual,
    )

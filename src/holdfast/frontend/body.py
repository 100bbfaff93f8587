"""Reading request bodies within their limits: of one, and of all that are being read at the same time.

Must never interpret them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from holdfast.base.errors import Cancelled, CapacityExhausted, PayloadTooLarge

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Any]

ALL_BODIES_BYTES = 1024 * 1024 * 1024
"""Bytes of all bodies in parts that are being read or prepared; at least two of the largest allowed size fit."""


class LargeBody:
    """A body that came in parts. ``join`` it off the event loop: touching that much memory takes its time."""

    __slots__ = ("_parts", "size")

    def __init__(self, first: bytes):
        self._parts = [first]
        self.size = len(first)

    def add(self, part: bytes) -> None:
        """Append a part."""
        self._parts.append(part)
        self.size += len(part)

    def join(self) -> bytes:
        """Return the whole; the parts are given up."""
        parts, self._parts = self._parts, []
        return b"".join(parts)


class Bodies:
    """Reads bodies.

    Args:
        limit: largest body in bytes.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._all = max(ALL_BODIES_BYTES, 2 * limit)
        self.held = 0
        """Bytes of bodies in parts that have not been released."""

    async def read(self, receive: Receive, declared: int | None) -> bytes | LargeBody:
        """Return the whole body; give a `LargeBody` to `release` when it has been dealt with.

        Args:
            receive: the ASGI callable.
            declared: the content-length header, when there is one: too large a body is refused before it is read.

        Raises:
            PayloadTooLarge: naming limit and actual size.
            CapacityExhausted: all bodies together are over the bound.
            Cancelled: the client left before the end.
        """
        if declared is not None and declared > self._limit:
            raise self._too_large(declared)
        message = await _next(receive)
        first: bytes = message["body"]
        return await self._rest(LargeBody(first), receive) if message.get("more_body") else self.whole(first)

    def whole(self, body: bytes) -> bytes:
        """Return a body that has come in one part.

        Raises:
            PayloadTooLarge: naming limit and actual size.
        """
        if len(body) > self._limit:
            raise self._too_large(len(body))
        return body

    async def _rest(self, body: LargeBody, receive: Receive) -> LargeBody:
        self.held += body.size
        try:
            more = True
            while more:
                message = await _next(receive)
                part = message["body"]
                body.add(part)
                self.held += len(part)
                more = message.get("more_body", False)
                self._check(body.size)
        except BaseException:
            self.release(body)
            raise
        return body

    def release(self, body: bytes | LargeBody) -> None:
        """The body is no longer needed."""
        if isinstance(body, LargeBody):
            self.held -= body.size
            body.size = 0

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise self._too_large(size)
        if self.held > self._all:
            raise CapacityExhausted(
                f"This frontend is reading {self.held} bytes of large requests, over its limit of {self._all}.",
                retry_after=2.0,
                layer="frontend",
                knob="ALL_BODIES_BYTES",
                threshold=self._all,
                measured=self.held,
            )

    def _too_large(self, actual: int) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"The request body has at least {actual} bytes; the limit is {self._limit} (DYN_HTTP_BODY_LIMIT_MB).",
            limit=self._limit,
            actual=actual,
        )


async def _next(receive: Receive) -> Any:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Cancelled("The client left while it sent the request.")
    return message

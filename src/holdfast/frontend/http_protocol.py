"""Uvicorn's HTTP/1.1 protocol with bounds on what clients may leave unfinished.

A connection that brings no complete request head, or whose body pauses, is closed; the number of connections is
bounded; the kernel's send buffer is bounded so that a client which does not read is noticed. Each request gets a
`ClientWire` (``scope["holdfast.wire"]``): what a client has taken can be measured, and the middle chunks of a
started stream go straight to the transport (0.8 us a token less than through ASGI's `send`).

Must never look into requests.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any, ClassVar

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

log = logging.getLogger(__name__)

SEND_BUFFER_BYTES = 256 * 1024
"""Kernel send buffer per client. Autotuning would hide up to 4 MB of unread tokens per stalled client."""
WRITE_HIGH_WATER = 64 * 1024

_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 2\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b"
)
_SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b"
)


class ClientWire:
    """The way to one request's client, below ASGI.

    Uses of uvicorn's `RequestResponseCycle` what its own `send` uses; the dependency is locked and
    `tests/frontend/test_http_protocol.py` holds both ways to the same bytes.
    """

    __slots__ = ("_cycle", "_flow", "_transport")

    def __init__(self, cycle: RequestResponseCycle, flow: FlowControl, transport: asyncio.Transport):
        self._cycle = cycle
        self._flow = flow
        self._transport = transport

    def write(self, data: bytes) -> bool:
        """Write a middle chunk of a started, chunked body; False: not possible now, use ASGI's `send`."""
        cycle = self._cycle
        if self._flow.write_paused or cycle.disconnected or not cycle.chunked_encoding or cycle.response_complete:
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def unsent(self) -> int:
        """Return the bytes that the kernel has not taken yet."""
        return self._transport.get_write_buffer_size()

    def abort(self) -> None:
        """Drop the connection."""
        self._transport.abort()


class HttpProtocol(HttpToolsProtocol):
    """See the module; use `protocol_class` to set the bounds (seconds)."""

    head_timeout: ClassVar[float] = 20.0
    body_timeout: ClassVar[float] = 30.0
    max_connections: ClassVar[int] = 8192

    _timer: asyncio.TimerHandle | None = None
    _in_head = True
    _in_body = False
    _idle = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, or turn it away."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        raw = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if len(self.connections) > self.max_connections:
            log.warning("client turned away: %d connections (DYN_HTTP_MAX_CONNECTIONS)", self.max_connections)
            self._answer(
                _BUSY, "capacity_exhausted", f"This frontend has {self.max_connections} connections, its limit."
            )
            return
        self._watch(self.head_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser and keep the clock that fits what is still missing."""
        super().data_received(data)
        if self._in_head:
            if self._timer is None and not self._idle:
                self._watch(self.head_timeout)
        elif self._in_body:
            self._unwatch()
            self._watch(self.body_timeout)
        elif self._timer is not None:
            self._unwatch()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._idle = False
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._in_head = False
        self._in_body = True
        super().on_headers_complete()
        wire = ClientWire(self.cycle, self.flow, self.transport)
        self.scope["holdfast.wire"] = wire  # type: ignore[typeddict-unknown-key]

    def on_message_complete(self) -> None:
        """The whole request is there; the next one may take its time (keep-alive bound)."""
        self._in_body = False
        super().on_message_complete()

    def _watch(self, seconds: float) -> None:
        self._timer = self.loop.call_later(seconds, self._overdue)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _overdue(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self._idle:
            self.transport.close()
            return
        what, bound = ("head", self.head_timeout) if self._in_head else ("body", self.body_timeout)
        self._answer(_SLOW, "request_timeout", f"The rest of the request's {what} did not come within {bound:g} s.")

    def _answer(self, template: bytes, code: str, message: str) -> None:
        body = b'{"error":{"message":"%b","type":"invalid_request_error","param":null,"code":"%b"}}' % (
            message.encode(),
            code.encode(),
        )
        if self.cycle is not None and not self.cycle.response_complete and self.cycle.response_started:
            self.transport.abort()
            return
        self.transport.write(template % (len(body), body))
        self.transport.close()


def protocol_class(*, head_timeout: float, body_timeout: float, max_connections: int) -> type[HttpProtocol]:
    """Return the protocol with these bounds (seconds, count), for uvicorn's ``http=``."""
    bounds: dict[str, Any] = {
        "head_timeout": head_timeout,
        "body_timeout": body_timeout,
        "max_connections": max_connections,
    }
    return type("BoundedHttpProtocol", (HttpProtocol,), bounds)

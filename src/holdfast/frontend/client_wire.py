"""The way to one request's client, below ASGI, and what HTTP/1.0 clients get instead of chunks.

Uses of uvicorn's `RequestResponseCycle` what its own `send` uses; the dependency is locked and
`tests/frontend/test_client_wire.py` holds both ways to the same bytes. Must never look into requests.
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

_INT = struct.Struct("i")


class ClientWire:
    """What a client has taken can be measured, and the middle chunks of a started stream skip ASGI's `send`."""

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
        """Return the bytes that the client's machine has not acknowledged, here and in the kernel."""
        return self._transport.get_write_buffer_size() + _unacknowledged(self._transport)

    def abort(self) -> None:
        """Drop the connection."""
        self._transport.abort()


def _unacknowledged(transport: asyncio.Transport) -> int:
    """Return what lies in the kernel's send queue. A slow reader moves it long before our own buffer moves."""
    sock = transport.get_extra_info("socket")
    if sock is None:
        return 0
    try:
        queued: int = _INT.unpack(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(_INT.size)))[0]
    except (OSError, ValueError):
        return 0
    return queued


class UnchunkedSend:
    """ASGI's `send` for HTTP/1.0 clients, who know no chunks: a body without a length ends with the connection."""

    __slots__ = ("_cycle", "_plain")

    def __init__(self, cycle: RequestResponseCycle):
        self._cycle = cycle
        self._plain = False
        """Whether the body's end is the connection's."""

    async def __call__(self, message: Any) -> None:
        """Send one message."""
        cycle = self._cycle
        starts = message["type"] == "http.response.start"
        if starts and not any(name == b"content-length" for name, _ in message["headers"]):
            self._plain = True
        if not self._plain:
            await RequestResponseCycle.send(cycle, message)
            return
        if not cycle.disconnected:
            await _drained(cycle)
        if cycle.disconnected or cycle.response_complete:
            return
        if starts:
            self._start(message)
        else:
            self._body(message)

    def _start(self, message: Any) -> None:
        cycle = self._cycle
        cycle.response_started, cycle.keep_alive, cycle.chunked_encoding = True, False, False
        lines = [b"%b: %b\r\n" % header for header in message["headers"]]
        cycle.transport.write(b"".join([STATUS_LINE[message["status"]], *lines, b"connection: close\r\n\r\n"]))

    def _body(self, message: Any) -> None:
        cycle = self._cycle
        if cycle.scope["method"] != "HEAD":
            cycle.transport.write(message.get("body", b""))
        if not message.get("more_body"):
            cycle.response_complete = True
            cycle.message_event.set()
            cycle.transport.close()
            cycle.on_response()


async def _drained(cycle: RequestResponseCycle) -> None:
    """Wait until the client takes bytes again."""
    if cycle.flow.write_paused:
        await cycle.flow.drain()

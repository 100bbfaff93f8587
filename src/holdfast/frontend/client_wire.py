"""The way to one request's client, below ASGI: whole responses in as few writes as there are reasons to write.

A write is a system call, which costs more than everything else that a token does here. So the response's head
waits for the first bytes after it, and its end goes out with the last ones. Uses of uvicorn's
`RequestResponseCycle` what its own `send` uses; the dependency is locked and `tests/frontend/test_client_wire.py`
holds both ways to the same bytes. Must never look into requests.
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from collections.abc import Callable, Iterable
from typing import Protocol

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

_INT = struct.Struct("i")
_NO_BODY = bytearray()


class Watched(Protocol):
    """The connection, as far as its present response cares."""

    watcher: ClientWire | None


class Sink(Protocol):
    """Where one response goes, as the application sees it; `ClientWire` is the one with a socket behind it."""

    def watch(
        self, on_lost: Callable[[], None], on_blocked: Callable[[], None], on_writable: Callable[[], None]
    ) -> None:
        """Be told what happens to the client from now on."""

    def unwatch(self) -> None:
        """Be told nothing more."""

    def start(self, head: bytes, length: int | None = None) -> None:
        """Begin the response; the head leaves with the first bytes after it."""

    def write(self, data: bytes) -> None:
        """Write a part of the body."""

    def end(self, data: bytes) -> None:
        """Write the last part of the body and complete the response."""

    @property
    def raw(self) -> Callable[[bytes], object] | None:
        """What takes whole chunks, framed by the caller; None while, or where, only `write` will do."""

    @property
    def socket(self) -> tuple[int, asyncio.Transport] | None:
        """Descriptor and transport of a socket to which whole chunks may be sent past the transport, while that has
        nothing to send and `raw` is there; None: there is no such socket."""

    def unsent(self) -> int:
        """Return the bytes that the client has not taken."""

    def abort(self) -> None:
        """Drop the connection."""


def head_of(status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return status line and headers; the values must be free of line ends."""
    return STATUS_LINE[status] + b"".join([b"%b: %b\r\n" % header for header in headers])


class ClientWire:
    """Of one request. `watch` it, `start`, `write` any number of times, `end`."""

    __slots__ = (
        "_chunked", "_cycle", "_flow", "_head", "_protocol", "_transport", "on_blocked", "on_lost", "on_writable",
    )  # fmt: skip

    def __init__(self, protocol: Watched, cycle: RequestResponseCycle, flow: FlowControl, transport: asyncio.Transport):
        self._protocol = protocol
        self._cycle = cycle
        self._flow = flow
        self._transport = transport
        self._head = b""
        self._chunked = False

    def watch(
        self, on_lost: Callable[[], None], on_blocked: Callable[[], None], on_writable: Callable[[], None]
    ) -> None:
        """Be told what happens to the client from now on; what has happened already is told at once.

        Args:
            on_lost: it has gone, and its answer was not complete.
            on_blocked: it takes no more bytes for now.
            on_writable: it takes bytes again.
        """
        self.on_lost, self.on_blocked, self.on_writable = on_lost, on_blocked, on_writable
        self._protocol.watcher = self
        if not self._cycle.more_body:
            self._flow.resume_reading()  # or nobody would notice that it goes
        if self._cycle.disconnected:
            on_lost()
        elif self._flow.write_paused:
            on_blocked()

    def unwatch(self) -> None:
        """Be told nothing more."""
        if self._protocol.watcher is self:
            self._protocol.watcher = None
        self.on_lost = self.on_blocked = self.on_writable = _nothing  # they hold the whole answer

    def body(self) -> bytes | None:
        """Take the request's body, if all of it is here already; None: it has to be received the usual way."""
        cycle = self._cycle
        if cycle.more_body or cycle.disconnected:
            return None
        body, cycle.body = bytes(cycle.body), _NO_BODY
        return body

    def start(self, head: bytes, length: int | None = None) -> None:
        """Begin the response; the head leaves with the first bytes after it.

        Args:
            head: from `head_of`, without anything about length or connection.
            length: of the body, in bytes; None: not known, it goes out in chunks.
        """
        cycle = self._cycle
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        if length is not None:
            framing = b"content-length: %d\r\n" % length
        elif cycle.scope["http_version"] == "1.0":
            framing = b""
        else:
            framing = b"transfer-encoding: chunked\r\n"
            self._chunked = cycle.chunked_encoding = True
        closing = b"" if cycle.keep_alive else b"connection: close\r\n"
        self._head = b"%b%b%b\r\n" % (head, closing, framing)

    def write(self, data: bytes) -> None:
        """Write a part of the body, not empty; hot path."""
        if self._head:
            data, self._head = self._head + self._framed(data), b""
            self._transport.write(data)
        elif self._chunked:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            self._transport.write(data)

    def end(self, data: bytes) -> None:
        """Write the last part of the body and complete the response."""
        cycle = self._cycle
        if cycle.disconnected or cycle.response_complete:
            return
        body = self._framed(data) if data else b""
        self._transport.write(b"%b%b%b" % (self._head, body, b"0\r\n\r\n" if self._chunked else b""))
        self._head = b""
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self._transport.close()
        cycle.on_response()

    @property
    def raw(self) -> Callable[[bytes], object] | None:
        """See `Sink.raw`."""
        return self._transport.write if self._chunked and not self._head else None

    @property
    def socket(self) -> tuple[int, asyncio.Transport] | None:
        """See `Sink.socket`.

        Both asyncio and uvloop close it after `connection_lost`, which calls `on_lost`; so it is this client's as long
        as nobody was told that the client has gone.
        """
        transport = self._transport
        sock = transport.get_extra_info("socket")
        if sock is None or not self._chunked or transport.get_extra_info("ssl_object") is not None:
            return None
        return sock.fileno(), transport

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    def unsent(self) -> int:
        """Return the bytes that the client's machine has not acknowledged, here and in the kernel."""
        return self._transport.get_write_buffer_size() + _unacknowledged(self._transport)

    def abort(self) -> None:
        """Drop the connection."""
        self._transport.abort()


def _nothing() -> None:
    return


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

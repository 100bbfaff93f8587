"""One caller's connection as a worker serves it: ties the wire's state machine to the network.

Must never decide who may connect or when a caller is lost; that is the server's business.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol, cast

from holdfast.base.errors import Cancelled, Disconnected, HoldfastError
from holdfast.runtime.call import Call
from holdfast.runtime.flush import Flusher
from holdfast.runtime.streams import TokenItem
from holdfast.runtime.transport import ByteStream
from holdfast.runtime.upload import UploadStore
from holdfast.wire.frames import Hello, Load, Part, Ping, Progress
from holdfast.wire.worker import Joined, WorkerConnection, WorkerEvent
from holdfast.wire.worker_stream import WorkerStream

log = logging.getLogger(__name__)

BURST_RELEASES = 8
"""Batches of waiting tokens that are let go before the event loop gets its turn."""


class ServerSide(Protocol):
    """What a served connection asks of its server."""

    def greet(self, connection: ServedConnection) -> WorkerConnection:
        """A connection was made: return its state machine."""

    def joined(self, connection: ServedConnection, hello: Hello) -> None:
        """The caller has proved itself: welcome it or turn it away."""

    def opened(self, call: Call) -> None:
        """A call has its payload: hand it to its endpoint."""

    def pong_facts(self) -> tuple[Progress, Load, str]:
        """What goes into a pong."""

    def gone(self, connection: ServedConnection) -> None:
        """The connection is lost; its streams have been told."""


class ServedConnection(asyncio.Protocol):
    """One TCP connection of a caller (`streams.ServerConnection`)."""

    core: WorkerConnection

    def __init__(self, server: ServerSide, loop: asyncio.AbstractEventLoop):
        self.caller = ""
        """The id the caller gave itself."""
        self.heard = False
        """Bytes came since the server last looked."""
        self.greeting_timer: asyncio.TimerHandle | None = None
        self.uploads: UploadStore | None = None
        """The uploads of this caller, shared by its connections."""
        self._server = server
        self._loop = loop
        self._stream: ByteStream | None = None
        self._flusher: Flusher | None = None

    @property
    def channel(self) -> str:
        """``control`` or ``bulk``; empty before the hello."""
        return self.core.hello.channel if self.core.hello is not None else ""

    @property
    def open(self) -> bool:
        """Whether the connection is there."""
        return self._stream is not None

    def send_items(self, items: Sequence[TokenItem]) -> None:
        """Send the tokens of one engine step as one frame; ends announced right after leave in the same write."""
        self.core.send_items(items)

    # -- asyncio's callbacks -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody connected."""
        self.core = self._server.greet(self)
        self._stream = cast(ByteStream, transport)
        self._flusher = Flusher(self._loop, self.core.outbox)
        self._flusher.attach(self._stream)
        if self.core.state == "closed":
            self.close()

    def data_received(self, data: bytes) -> None:
        """All frames of one read are handled, then everything they caused leaves in one write."""
        if self._stream is None or self._flusher is None:
            return
        self.heard = True
        try:
            for event in self.core.receive(data):
                self._handle(event)
        except HoldfastError as error:
            log.warning("connection of caller %s closed: %s", self.caller or "(unknown)", error)
            self.close()
            return
        self._flusher.flush()
        self._release()
        if self._flusher.overfull:
            log.warning("connection of caller %s closed: it sends but does not read", self.caller)
            self.abort()
        elif self.core.state == "closed":
            self.close()

    def pause_writing(self) -> None:
        """The network takes no more: tokens wait in their streams."""
        self.core.paused = True

    def resume_writing(self) -> None:
        """The network takes more again."""
        self.core.paused = False
        self._release()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """The caller is gone."""
        self._over("caller_lost")

    # -- events --------------------------------------------------------------------------------------

    def _handle(self, event: WorkerEvent) -> None:
        if isinstance(event, Part):
            if self.uploads is not None:
                self.uploads.part(event)
        elif isinstance(event, Ping):
            self.core.pong(event.sequence, *self._server.pong_facts())
        elif isinstance(event, Joined):
            self.caller = event.hello.caller
            self._server.joined(self, event.hello)
        else:
            self._opened(cast(Call, event.stream))

    def _opened(self, call: Call) -> None:
        if call.arriving and self.uploads is not None and not call.over:
            self.uploads.claim(call.opened_by.upload, lambda result: self._uploaded(call, result))
        else:
            self._deliver(call)

    def _uploaded(self, call: Call, result: bytes | HoldfastError) -> None:
        if isinstance(result, HoldfastError):
            call.refuse(result)
        else:
            call.payload = result
            self._deliver(call)

    def _deliver(self, call: Call) -> None:
        call.arriving = False
        if call.stop_reason is not None:
            call.refuse(Cancelled("the stream was stopped before its endpoint saw it"))
        if not call.over:
            self.core.delivered(call)
            self._server.opened(call)

    def stopped(self, stream: WorkerStream, reason: str) -> None:
        """The state machine says that nobody wants this stream any more."""
        call = cast(Call, stream)
        if call.arriving and self.uploads is not None:
            self.uploads.drop(call.opened_by.upload)
            call.refuse(Cancelled("the stream was stopped before its request was complete"))
        call.tell_stopped(reason)

    # -- writing and closing -------------------------------------------------------------------------

    def _release(self) -> None:
        for _ in range(BURST_RELEASES):
            if self.core.paused or not self.core.releasable or self._flusher is None:
                return
            self.core.release()
            self._flusher.flush()
        self._loop.call_soon(self._release)

    def close(self) -> None:
        """Close once everything said has gone out; streams that are open are stopped. Idempotent."""
        self._end("connection_closed", politely=True)

    def abort(self) -> None:
        """Close now; streams that are open are stopped. Idempotent."""
        self._end("caller_lost", politely=False)

    def _end(self, reason: str, *, politely: bool) -> None:
        stream = self._stream
        if stream is None:
            return
        if self._flusher is not None:
            self._flusher.flush()
        if politely and not self.core.paused:
            stream.close()
        else:
            stream.abort()
        self._over(reason)

    def _over(self, reason: str) -> None:
        if self._stream is None or self._flusher is None:
            return
        self._stream = None
        self._flusher.detach()
        self.core.fail(reason)
        if self.channel == "bulk" and self.uploads is not None:
            self.uploads.fail(Disconnected("the bulk connection was lost while the request was arriving"))
        self._server.gone(self)

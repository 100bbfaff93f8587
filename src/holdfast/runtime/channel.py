"""One connection of a `Link`: ties the wire's state machine for callers to the network.

Must never decide what a lost connection means; that is the link's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

from holdfast.base.errors import Disconnected, HoldfastError
from holdfast.runtime.flush import Flusher
from holdfast.runtime.transport import ByteStream
from holdfast.telemetry.traffic import TRAFFIC
from holdfast.wire.caller import CallerConnection
from holdfast.wire.frames import Draining, Pong, Welcome


class ChannelOwner(Protocol):
    """What a channel reports to."""

    @property
    def peer(self) -> str:
        """The worker's name for messages."""

    def heard(self, now: float) -> None:
        """A byte came, at this loop time."""

    def read_done(self) -> None:
        """All frames of one read went to their handlers."""

    def connection_event(self, channel: Channel, event: Pong | Draining) -> None:
        """A pong or the worker's draining."""

    def channel_over(self, channel: Channel, error: HoldfastError) -> None:
        """The connection is gone after its handshake; its streams have been told."""


class Channel(asyncio.Protocol):
    """A connection to a worker, ``control`` or ``bulk``."""

    def __init__(self, owner: ChannelOwner, name: str, core: CallerConnection, loop: asyncio.AbstractEventLoop):
        self.name = name
        self.core = core
        self.greeted: asyncio.Future[Welcome] = loop.create_future()
        self.error: HoldfastError | None = None
        self.paused = False
        """The network takes no more at the moment."""
        self.on_resume: Callable[[], None] | None = None
        self._owner = owner
        self._loop = loop
        self._flusher = Flusher(loop, core.outbox)
        self._stream: ByteStream | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The hello goes out."""
        self._stream = cast(ByteStream, transport)
        self._flusher.attach(self._stream)

    def data_received(self, data: bytes) -> None:
        """All frames go to their streams, then the owner flushes what they touched, then events are told."""
        owner = self._owner
        TRAFFIC.received += len(data)
        owner.heard(self._loop.time())
        try:
            events = self.core.receive(data)
        except HoldfastError as error:
            owner.read_done()
            self.over(error)
            return
        owner.read_done()
        for event in events:
            if not isinstance(event, Welcome):
                owner.connection_event(self, event)
            elif not self.greeted.done():
                self.greeted.set_result(event)
        self._flusher.flush()

    def pause_writing(self) -> None:
        """The network takes no more."""
        self.paused = True

    def resume_writing(self) -> None:
        """The network takes more again."""
        self.paused = False
        if self.on_resume is not None:
            self.on_resume()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone: reset, closed by the worker, or aborted by us."""
        peer = self._owner.peer
        why = f": {exc}" if exc is not None else " (closed by the worker)"
        if self.core.state == "greeting":
            why += (
                "; it said nothing before: if only one side speaks TLS, or a certificate is wanted, see DYN_TCP_TLS_*"
            )
        self.over(Disconnected(f"the connection to worker {peer} was lost{why}", worker=peer))

    def flush_is_paused(self) -> bool:
        """Write what waits and return whether the network is full."""
        self._flusher.flush()
        return self.paused

    def take_written(self) -> bool:
        """Whether anything was written since the last call."""
        return self._flusher.take_written()

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run a callback in the loop's next iteration if the connection is still there."""
        self._loop.call_soon(lambda: callback() if self._stream is not None else None)

    def over(self, error: HoldfastError) -> None:
        """The connection is of no more use: close it once what was said has gone out. Idempotent."""
        stream, self._stream = self._stream, None
        if stream is None:
            return
        self.error = error
        TRAFFIC.errors += 1
        self._flusher.flush()
        self._flusher.detach()
        if self.paused:
            stream.abort()
        else:
            stream.close()
        self.core.fail(error)
        if self.greeted.done():
            self._owner.channel_over(self, error)
        else:
            self.greeted.set_exception(error)

    def abort(self) -> None:
        """Drop the connection without a word."""
        self.greeted.cancel()
        if self._stream is not None:
            self._stream.abort()

"""Writes an outbox to the network once per loop iteration, and respects the network's back-pressure.

Everything that is put into the outbox during one iteration leaves in one write. Must never hold frames
back longer than to the end of the iteration unless the network takes nothing.
"""

from __future__ import annotations

import asyncio

from holdfast.base.limits import WRITE_BUFFER_BYTES
from holdfast.runtime.transport import ByteStream
from holdfast.telemetry.traffic import TRAFFIC
from holdfast.wire.outbox import Outbox


class Flusher:
    """Ties one outbox to one connection."""

    __slots__ = ("_loop", "_outbox", "_scheduled", "_stream", "_written")

    def __init__(self, loop: asyncio.AbstractEventLoop, outbox: Outbox):
        self._loop = loop
        self._outbox = outbox
        self._stream: ByteStream | None = None
        self._scheduled = False
        self._written = False
        outbox.on_fill = self._schedule

    def attach(self, stream: ByteStream) -> None:
        """The connection is there: what waits goes out now."""
        self._stream = stream
        self.flush()

    def detach(self) -> None:
        """The connection is gone; what is put from now on is forgotten."""
        self._stream = None
        self._outbox.clear()

    def _schedule(self) -> None:
        if not self._scheduled and self._stream is not None:
            self._scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        self.flush()

    def flush(self) -> None:
        """Write what waits now."""
        stream = self._stream
        if stream is not None and self._outbox:
            self._written = True
            data = self._outbox.take()
            TRAFFIC.sent += len(data)
            stream.write(data)

    def take_written(self) -> bool:
        """Whether anything was written since the last call."""
        written, self._written = self._written, False
        return written

    @property
    def overfull(self) -> bool:
        """Whether the peer does not read: more waits in the write buffer than `limits.WRITE_BUFFER_BYTES`."""
        return self._stream is not None and self._stream.get_write_buffer_size() > WRITE_BUFFER_BYTES

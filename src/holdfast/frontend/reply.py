"""The answer to one HTTP request: bytes from the workers' read callbacks to the client, without a task in between.

What one read of a worker's connection brings leaves in one write. When the client does not take it, the
response is blocked: everything that arrives meanwhile stays with the streams, bounded by their credit. Headers are
held until a worker has accepted, so that an early error keeps its HTTP status; a silent stream gets comments
(`keepalive`), which may start the response early.

Must never know what the bytes mean.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from holdfast.frontend.client_wire import Sink
from holdfast.openai.encode import KEEP_ALIVE
from holdfast.requests.flusher import Flusher

log = logging.getLogger(__name__)


class Reply:
    """One HTTP response, streamed or whole. `write` and `finish` may be called from any callback of the loop."""

    __slots__ = (
        "_buffer", "_drained", "_flusher", "_gone", "_head", "_length", "_loop", "_stall", "_unsent", "_wire",
        "blocked_since", "direct", "dropped", "finished", "idle_ticks", "later", "on_unblocked", "started",
    )  # fmt: skip

    def __init__(self, wire: Sink, flusher: Flusher, stall_timeout: float):
        """Create it; nothing is sent before `start`.

        Args:
            wire: the way to the client.
            flusher: where responses with bytes to write wait for the end of the read.
            stall_timeout: seconds after which a client that does not even take the end is dropped; 0: never.
        """
        self._wire = wire
        self._flusher = flusher
        self._stall = stall_timeout
        self.on_unblocked: Callable[[], None] = _nothing
        """Called when a blocked client takes bytes again."""
        self._loop = asyncio.get_running_loop()
        self._buffer: list[bytes] = []
        self._head = b""
        self._length: int | None = None
        self._unsent = 0
        self._gone = False
        self._drained: asyncio.Future[None] | None = None
        self.started = False
        """Whether the head is on its way."""
        self.finished = False
        """Whether everything has been written, or nothing will be any more."""
        self.dropped = False
        """Whether the client stalled over the last bytes and was dropped."""
        self.blocked_since: float | None = None
        self.idle_ticks = 0
        self.direct: Callable[[bytes], object] | None = None
        """Takes a framed chunk when nothing stands before it, by way of `later`; None: use `write`."""
        self.later = flusher.writes.append

    def hold(self, head: bytes, length: int | None = None) -> None:
        """Keep the response's head for `start`; see `Sink.start`."""
        self._head, self._length = head, length

    def start(self) -> None:
        """Let the head go, with the first bytes after it; idempotent."""
        if not self.started:
            self.started = True
            self._wire.start(self._head, self._length)

    def write(self, data: bytes) -> None:
        """Collect bytes, not empty; they leave in one write when the present read is done."""
        if not self._buffer:
            self.direct = None
            self._flusher.writers.append(self)
        self._buffer.append(data)

    def finish(self) -> None:
        """Everything has been written: end the response with the next write."""
        self.finished = True
        self.direct = None
        if not self._buffer:
            self.write(b"")

    def push(self) -> None:
        """Write what has been collected, unless the client is blocked; hot path.

        In the middle of a flush it waits for its turn, behind the chunks that took the short way (`direct`).
        """
        buffer = self._buffer
        if self.blocked_since is not None or not buffer or self._flusher.delivering:
            return
        self._buffer = []
        if self._gone:
            return
        if not self.started:
            self.start()
        self.idle_ticks = 0
        data = buffer[0] if len(buffer) == 1 else b"".join(buffer)
        if not self.finished:
            self._wire.write(data)
            if self.blocked_since is None:
                self.direct = self._wire.raw
            return
        self._wire.end(data)
        self._gone = True
        self._tell_drained()

    @property
    def socket(self) -> tuple[int, asyncio.Transport] | None:
        """See `Sink.socket`."""
        return self._wire.socket

    def comment(self) -> None:
        """Show a sign of life."""
        if not self.finished and self.blocked_since is None and self._head and self._length is None:
            self.write(KEEP_ALIVE)
            self.push()

    # the client

    def block(self) -> None:
        """The client takes no more bytes for now."""
        self.direct = None
        self.blocked_since = self._loop.time()
        self._unsent = self._wire.unsent()

    def resume(self) -> None:
        """The client takes bytes again."""
        if self.blocked_since is not None:
            self.blocked_since = None
            try:
                self.on_unblocked()
            except Exception:
                log.exception("a client takes bytes again, and its streams could not go on")
            self.push()

    def abort(self) -> None:
        """Drop the connection: the client takes nothing, so it cannot be told anything either."""
        self.abandon()
        self._wire.abort()

    def abandon(self) -> None:
        """Nobody is there any more: nothing is written from now on."""
        self.finished = self._gone = True
        self.direct = None
        self._buffer.clear()
        self._tell_drained()

    def look(self, now: float) -> None:
        """Restart the clock of a blocked client that has taken something since the last look.

        A client that stalls over the last bytes has no stream left that could notice: it is dropped here.
        """
        if self.blocked_since is None or self._gone:
            return
        unsent = self._wire.unsent()
        if unsent != self._unsent:
            self._unsent = unsent
            self.blocked_since = now
        elif self.finished and self._stall and now - self.blocked_since > self._stall:
            log.info("client dropped: it did not take the end of its answer for %g s", self._stall)
            self.dropped = True
            self.abort()

    @property
    def over(self) -> bool:
        """Whether the end has been written, or nobody is there to take it."""
        return self._gone

    async def drained(self) -> None:
        """Wait until the end has been written, or nobody is there to take it."""
        if not self.finished:
            log.error("a response was left without an end; its connection is dropped")
            self.abort()
        self.push()
        if not self._gone:
            self._drained = self._loop.create_future()
            await self._drained

    def _tell_drained(self) -> None:
        waiting, self._drained = self._drained, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)


def _nothing() -> None:
    return

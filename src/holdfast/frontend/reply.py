"""The answer to one HTTP request: bytes from the workers' read callbacks to the client, without a task in between.

Uvicorn's own `send` coroutine is driven right from the callback (middle chunks skip even that); as long as the
client takes what is written it finishes at once. When it does not, the response is blocked: one task finishes
that write, and everything that arrives meanwhile stays with the streams, bounded by their credit. Headers are
held until a worker has accepted, so that an early error keeps its HTTP status; a silent stream gets comments,
which may start the response early.

Must never know what the bytes mean.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from holdfast.frontend.body import Send
from holdfast.frontend.client_wire import ClientWire
from holdfast.requests.flusher import Flusher

COMMENT = b": keep-alive\n\n"


@types.coroutine
def _resume(first: Any, rest: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
    """Finish a coroutine whose first yield has been taken already."""
    yield first
    yield from rest


class Reply:
    """One HTTP response, streamed or whole. `write` and `finish` may be called from any callback of the loop."""

    __slots__ = (
        "_buffer", "_flusher", "_head", "_loop", "_send", "_spawn", "_stall", "_unsent", "_wire",
        "blocked_since", "finished", "idle_ticks", "on_unblocked", "started",
    )  # fmt: skip

    def __init__(
        self,
        send: Send,
        flusher: Flusher,
        spawn: Callable[[Coroutine[Any, Any, None]], Any],
        wire: ClientWire | None,
        stall_timeout: float,
    ):
        """Create it; nothing is sent before `start`.

        Args:
            send: the ASGI callable.
            flusher: where responses with bytes to write wait for the end of the read.
            spawn: runs the write of a blocked client to its end, owned by the request.
            wire: the short way to the client, and what it has taken; None: ASGI only.
            stall_timeout: seconds after which a client that does not even take the end is dropped; 0: never.
        """
        self._send = send
        self._flusher = flusher
        self._spawn = spawn
        self._wire = wire
        self._stall = stall_timeout
        self.on_unblocked: Callable[[], None] = _nothing
        """Called when a blocked client has taken everything that was written."""
        self._loop = asyncio.get_running_loop()
        self._buffer: list[bytes] = []
        self._head: dict[str, Any] | None = None
        self._unsent = 0
        self.started = False
        self.finished = False
        self.blocked_since: float | None = None
        self.idle_ticks = 0

    def hold(self, head: dict[str, Any]) -> None:
        """Keep the response's head for `start`."""
        self._head = head

    def start(self) -> None:
        """Send the head; idempotent."""
        if not self.started:
            self.started = True
            self._drive(self._head)

    def write(self, data: bytes) -> None:
        """Collect bytes; they leave in one write when the present read is done."""
        if not self._buffer:
            self._flusher.writers.append(self)
        self._buffer.append(data)

    def emit(self, data: bytes) -> None:
        """Write now, if nothing stands before it: for answers whose streams are flushed once per read anyway."""
        if self._buffer or self.blocked_since is not None or not self.started or self.finished:
            self.write(data)
        else:
            self.idle_ticks = 0
            self._middle(data)

    def finish(self) -> None:
        """Everything has been written: end the response with the next write."""
        self.finished = True
        if not self._buffer:
            self._buffer.append(b"")
            self._flusher.writers.append(self)

    def push(self) -> None:
        """Write what has been collected, unless the client is blocked; hot path."""
        buffer = self._buffer
        if self.blocked_since is not None or not buffer:
            return
        if not self.started:
            self.start()
            if self.blocked_since is not None:
                return
        self.idle_ticks = 0
        data = buffer[0] if len(buffer) == 1 else b"".join(buffer)
        self._buffer = []
        if self.finished:
            self._drive({"type": "http.response.body", "body": data})
        else:
            self._middle(data)

    def comment(self) -> None:
        """Show a sign of life; not in answers that are one JSON body, whose head comes with their end."""
        if self._head is not None and not self.finished and self.blocked_since is None:
            self.write(COMMENT)
            self.push()

    def abort(self) -> None:
        """Drop the connection: the client takes nothing, so it cannot be told anything either."""
        self.abandon()
        if self._wire is not None:
            self._wire.abort()

    def abandon(self) -> None:
        """Nobody is there any more: nothing is written from now on."""
        self.finished = True
        self._buffer.clear()

    def look(self, now: float) -> None:
        """Restart the clock of a blocked client that has taken something since the last look.

        A client that stalls over the last bytes has no stream left that could notice: it is dropped here.
        """
        if self.blocked_since is None or self._wire is None:
            return
        if self.finished and self._stall and now - self.blocked_since > self._stall:
            self.abort()
            return
        unsent = self._wire.unsent()
        if unsent != self._unsent:
            self._unsent = unsent
            self.blocked_since = now

    def _middle(self, data: bytes) -> None:
        if data and (self._wire is None or not self._wire.write(data)):
            self._drive({"type": "http.response.body", "body": data, "more_body": True})

    def _drive(self, message: Any) -> None:
        sending = self._send(message)
        try:
            waits_for = sending.send(None)
        except StopIteration:
            return
        self.blocked_since = self._loop.time()
        self._spawn(self._finish_blocked(waits_for, sending))

    async def _finish_blocked(self, waits_for: Any, sending: Coroutine[Any, Any, None]) -> None:
        try:
            await _resume(waits_for, sending)
        finally:
            self.blocked_since = None
        self.on_unblocked()
        self.push()


def _nothing() -> None:
    return


class KeepAlive:
    """Gives every silent event stream a comment about once per interval; the one owner of that clock.

    Args:
        interval: seconds; 0: never.
    """

    TICKS = 5

    def __init__(self, interval: float):
        self._tick = interval / self.TICKS
        self._live: dict[Reply, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, response: Reply) -> None:
        """Watch a response."""
        self._live[response] = None
        if self._timer is None:
            self._arm(asyncio.get_running_loop())

    def remove(self, response: Reply) -> None:
        """Stop watching it."""
        self._live.pop(response, None)

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        tick = min(self._tick, 1.0) if self._tick else 1.0
        self._timer = loop.call_later(tick, self._look, loop, tick)

    def _look(self, loop: asyncio.AbstractEventLoop, tick: float) -> None:
        self._timer = None
        now = loop.time()
        for response in list(self._live):
            response.look(now)
            response.idle_ticks += 1
            if self._tick and response.idle_ticks * tick >= self._tick * self.TICKS:
                response.comment()
        if self._live:
            self._arm(loop)

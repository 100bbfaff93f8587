"""A call as the endpoint's handler in a worker sees it (`streams.IncomingCall`).

Must never outlive its stream's rules: after the end, a kill or the loss of the caller it says nothing more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from holdfast.base.errors import HoldfastError
from holdfast.runtime.streams import ServerConnection
from holdfast.wire.frames import Open
from holdfast.wire.worker_stream import WorkerStream

if TYPE_CHECKING:
    from holdfast.runtime.served import ServedConnection

log = logging.getLogger(__name__)


class Call(WorkerStream):
    """One incoming call. ``stop_reason`` is None until the caller stops, kills or is lost."""

    __slots__ = ("_core", "_on_stop", "_writable", "arriving", "connection", "endpoint", "headers", "payload", "stream")

    def __init__(self, frame: Open, connection: ServedConnection):
        super().__init__(frame)
        self.connection: ServerConnection = connection
        self._core = connection.core
        self.stream = frame.stream
        self.endpoint = frame.endpoint
        self.headers = frame.headers
        self.payload = frame.payload
        self.arriving = frame.upload != 0
        """The payload is not complete yet; the endpoint has not seen the call."""
        self._on_stop: Callable[[str], None] | None = None
        self._writable: asyncio.Future[None] | None = None

    @property
    def on_stop(self) -> Callable[[str], None] | None:
        """Set by the handler; called at most once with the reason, at once when it has happened already."""
        return self._on_stop

    @on_stop.setter
    def on_stop(self, callback: Callable[[str], None] | None) -> None:
        self._on_stop = callback
        if callback is not None and self.stop_reason is not None:
            self.tell_stopped(self.stop_reason)

    def tell_stopped(self, reason: str) -> None:
        """Call `on_stop`; what it raises is logged and contained."""
        callback, self._on_stop = self._on_stop, None
        if callback is None:
            return
        try:
            callback(reason)
        except Exception:
            log.exception("on_stop of a call to endpoint %r raised (reason %s)", self.endpoint, reason)

    def accept(self) -> None:
        """Take ownership; must happen before any item. Raises InternalError the second time."""
        self._core.accept(self)

    def refuse(self, error: HoldfastError) -> None:
        """Decline; the stream is over."""
        self._core.refuse(self, error)

    def send_data(self, payload: bytes) -> None:
        """Send one message. Raises PayloadTooLarge over `limits.PAYLOAD_BYTES`, InternalError before `accept`."""
        self._core.send_data(self, payload)

    def end(self, finish: str, error: HoldfastError | None = None, cached_tokens: int = 0, tokens: int = 0) -> None:
        """End the stream. Tokens still waiting for credit are delivered before the end.

        Args:
            finish: why, as in `wire.frames.End`.
            error: what went wrong, if anything.
            cached_tokens: prompt tokens that came from a prefix cache.
            tokens: how many were sent in all, for the caller to compare; 0: not said.
        """
        self._core.end(self, finish, error, cached_tokens, tokens)

    async def writable(self) -> None:
        """Wait until nothing of this stream waits for credit, or until it is stopped or over.

        The caller decides how long that is; whoever calls this has a deadline, or ends with the stream.
        """
        while self.waiting and self.stop_reason is None:
            if self._writable is None:
                self._writable = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._writable)

    def flow_changed(self) -> None:
        """Wake whoever waits in `writable`."""
        future, self._writable = self._writable, None
        if future is not None and not future.done():
            future.set_result(None)

"""The clocks of one client's connection: for what the client owes, and for what it does not take.

One timer at a time, because a client owes one thing at a time. Must never write to the client.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from holdfast.base.errors import HoldfastError

log = logging.getLogger(__name__)

SECOND_LOOK = 0.02
"""Seconds from the end of a bound to its verdict: what came while this process was held up is read first."""


class Bounds(msgspec.Struct):
    """What clients may do; times in seconds."""

    head_timeout: float = 20.0
    body_timeout: float = 30.0
    keep_alive: float = 75.0
    stall_timeout: float = 60.0
    """Bound for taking nothing of a complete answer; 0: as long as idle connections are kept."""
    max_connections: int = 8192
    overload_status: int = 503
    """HTTP status of the answer to a connection too many."""
    on_turned_away: Callable[[HoldfastError], None] = lambda _: None
    """Counts such connections."""
    lingering: int = 0
    """Connections that have been answered for the last time."""
    leaving: bool = False
    """This frontend drains: every answer is the last one on its connection."""


class Clocked(HttpToolsProtocol):
    """What `HttpProtocol` knows about time; it says when something is owed, and what happens when it does not come."""

    bounds: Bounds = Bounds()

    _timer: asyncio.TimerHandle | None = None
    _in_head = True
    _in_body = False
    _idle = True
    """No byte of a request has come on this connection yet."""
    _warned = False
    _since = 0.0
    """When the present body began, and when it has to have gone on."""
    _due = 0.0
    _unsent = 0

    def _give_up(self) -> None:
        """What is owed has not come."""
        raise NotImplementedError

    def _watch(self, seconds: float) -> None:
        self._warned = False
        self._timer = self.loop.call_later(seconds, self._overdue)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _overdue(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self._in_body and self.flow.read_paused:
            self._due = self.loop.time() + self.bounds.body_timeout
        left = self._due - self.loop.time() if self._in_body else 0.0
        if left > 0:
            self._watch(left)
        elif not self._warned:
            self._watch(SECOND_LOOK)
            self._warned = True
        else:
            self._give_up()

    def _await_rest(self) -> None:
        """Start the clock of a request that has been waiting behind others."""
        if self._in_body:
            self._since = self.loop.time()
            self._due = 0.0
            self._watch(self.bounds.body_timeout)
        elif self._in_head:
            self._unset_keepalive_if_required()
            self._watch(self.bounds.head_timeout)

    # what the client does not take

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, unless the client still has to take something."""
        if self.transport.get_write_buffer_size():
            self._watch_flush()
        else:
            super().timeout_keep_alive_handler()

    def _watch_flush(self) -> None:
        self._unwatch()
        self._unsent = self.transport.get_write_buffer_size()
        self._timer = self.loop.call_later(self.bounds.stall_timeout or self.bounds.keep_alive, self._look_at_flush)

    def _look_at_flush(self) -> None:
        self._timer = None
        left = self.transport.get_write_buffer_size()
        if left and left >= self._unsent:
            log.info("client dropped: it took nothing of the last %d bytes of its answer", left)
            self.transport.abort()
        elif left:
            self._watch_flush()
        elif not self.transport.is_closing() and self.timeout_keep_alive_task is None:
            self._keep_alive_again()

    def _keep_alive_again(self) -> None:
        """Stray line ends between requests have stopped uvicorn's clock."""
        self.timeout_keep_alive_task = self.loop.call_later(self.bounds.keep_alive, self.timeout_keep_alive_handler)

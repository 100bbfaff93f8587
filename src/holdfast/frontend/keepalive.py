"""Comments on silent event streams, and a regular look at blocked clients: the one owner of that clock.

Must never decide what is written.
"""

from __future__ import annotations

import asyncio
import logging

from holdfast.frontend.reply import Reply

log = logging.getLogger(__name__)


class KeepAlive:
    """Gives every silent event stream a comment about once per interval.

    Args:
        interval: seconds; 0: never.
        stall_timeout: bound for blocked clients in seconds, which needs several looks; 0: none.
    """

    TICKS = 5
    """Looks per interval and per bound."""
    LONGEST_TICK = 1.0
    """Seconds between two looks at most: blocked clients have a bound of their own."""

    def __init__(self, interval: float, stall_timeout: float = 0.0):
        self._interval = interval
        bounds = [bound / self.TICKS for bound in (interval, stall_timeout) if bound]
        self._tick = min([*bounds, self.LONGEST_TICK])
        self._live: dict[Reply, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, response: Reply) -> None:
        """Watch a response."""
        self._live[response] = None
        if self._timer is None:
            self._arm()

    def remove(self, response: Reply) -> None:
        """Stop watching it."""
        self._live.pop(response, None)

    def close(self) -> None:
        """Stop the clock."""
        self._live.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._tick, self._look_at_all, loop)

    def _look_at_all(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for response in list(self._live):
            try:
                self._look(response, now)
            except Exception:
                log.exception("a response could not be looked at; the others go on")
        if self._live:
            self._arm()

    def _look(self, response: Reply, now: float) -> None:
        response.look(now)
        response.idle_ticks += 1
        if self._interval and response.idle_ticks * self._tick >= self._interval:
            response.comment()

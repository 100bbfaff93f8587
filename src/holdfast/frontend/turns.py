"""How many requests are prepared between two looks at the network: a crowd that comes at once must not hold up tokens.

Preparing and sending one request takes a good tenth of a millisecond, all of it in one go. A hundred that arrive
together would keep the tokens of all running streams waiting for tens of milliseconds. Must never turn anybody away.
"""

from __future__ import annotations

import asyncio
from collections import deque

AT_ONCE = 8
"""Requests per turn of the event loop: what comes meanwhile waits for a millisecond or two."""


class Turns:
    """First come, first served; the first few of each turn of the loop do not wait at all."""

    __slots__ = ("_armed", "_loop", "_taken", "_waiting")

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._taken = 0
        self._armed = False
        self._waiting: deque[asyncio.Future[None]] = deque()
        """Bounded by the requests that a frontend has in hand."""

    def take(self) -> bool:
        """Take a turn if there is one now; otherwise `wait` for it."""
        if self._taken >= AT_ONCE or self._waiting:
            return False
        self._taken += 1
        if not self._armed:
            self._arm()
        return True

    async def wait(self) -> None:
        """Wait for a turn: as many turns of the loop as there are crowds before this one."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        turn = self._loop.create_future()
        self._waiting.append(turn)
        if not self._armed:
            self._arm()
        await turn

    def _arm(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        self._armed = True
        self._loop.call_soon(self._next)

    def _next(self) -> None:
        """The loop has looked at the network: the next few."""
        self._armed = False
        self._taken = 0
        while self._waiting and self._taken < AT_ONCE:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._taken += 1
        if self._taken:
            self._arm()

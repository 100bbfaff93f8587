"""The fleet-wide budget of repeated attempts (promise P7).

Retries multiply load exactly when a fleet has least of it to spare. Every new request deposits a fraction of a
retry; every repeated attempt withdraws one. The first move of a stream after its worker's death is never
refused, only paced, oldest first, because that stream is a promise already given.

Must never look at workers or errors.
"""

from __future__ import annotations

import asyncio
import heapq
from itertools import count

_TICK = 0.001
"""Seconds between two releases at least: a wait that rounds to nothing would spin the loop."""


class RetryBudget:
    """A token bucket fed by traffic, with a floor that a quiet fleet may always spend.

    Args:
        ratio: retries earned per new request.
        floor_per_second: retries earned per second without any traffic.
        burst: most retries that can be saved up.
    """

    def __init__(self, ratio: float = 0.2, floor_per_second: float = 10.0, burst: float = 100.0):
        self._ratio = ratio
        self._floor = floor_per_second
        self._burst = burst
        self._saved = burst
        self._at = 0.0

    def deposit(self) -> None:
        """A new request arrived."""
        self._saved = min(self._burst, self._saved + self._ratio)

    def withdraw(self, now: float) -> bool:
        """Take one retry; False when there is none left."""
        self._accrue(now)
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True

    def left(self, now: float) -> float:
        """Return how many retries could be withdrawn now."""
        self._accrue(now)
        return self._saved

    def wait_hint(self, now: float) -> float:
        """Return the seconds until the floor alone would have earned one retry."""
        self._accrue(now)
        return max(0.0, (1.0 - self._saved) / self._floor)

    def _accrue(self, now: float) -> None:
        if now > self._at:
            self._saved = min(self._burst, self._saved + (now - self._at) * self._floor)
            self._at = now


class Pacer:
    """Lets moves of streams through at a bounded rate, oldest request first.

    Args:
        rate: moves a second once the burst is used up.
        burst: moves that go at once.
    """

    def __init__(self, rate: float = 2_000.0, burst: int = 256):
        self._rate = rate
        self._burst = float(burst)
        self._saved = float(burst)
        self._at = 0.0
        self._queue: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = count()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """Moves that wait for their turn; those that were given up count until it comes."""
        return len(self._queue)

    async def pass_through(self, age_key: float) -> None:
        """Wait for a turn; smaller keys (older requests) go first. Cancel-safe."""
        loop = asyncio.get_running_loop()
        self._accrue(loop.time())
        if not self._queue and self._saved >= 1.0:
            self._saved -= 1.0
            return
        turn: asyncio.Future[None] = loop.create_future()
        heapq.heappush(self._queue, (age_key, next(self._order), turn))
        self._arm(loop)
        await turn

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is None and self._queue:
            self._timer = loop.call_later(max(_TICK, (1.0 - self._saved) / self._rate), self._release, loop)

    def _release(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self._accrue(loop.time())
        while self._queue and self._saved >= 1.0:
            turn = heapq.heappop(self._queue)[2]
            if not turn.done():
                self._saved -= 1.0
                turn.set_result(None)
        self._arm(loop)

    def _accrue(self, now: float) -> None:
        if now > self._at:
            self._saved = min(self._burst, self._saved + (now - self._at) * self._rate)
            self._at = now

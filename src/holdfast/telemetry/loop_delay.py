"""How late the event loop is: what every token waits for at least.

A timer of ten milliseconds, and how much more than that it took. Must never judge.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

INTERVAL = 0.01
STALL = 0.005


async def watch_loop(clock: Callable[[], int], late: Callable[[float], None], stalled: Callable[[], None]) -> None:
    """Measure until cancelled.

    Args:
        clock: a stopwatch in nanoseconds.
        late: told by how many seconds each timer was late.
        stalled: told when that was more than `STALL`.
    """
    before = clock()
    while True:
        await asyncio.sleep(INTERVAL)
        now = clock()
        delay = max(0.0, (now - before) / 1e9 - INTERVAL)
        late(delay)
        if delay > STALL:
            stalled()
        before = clock()

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
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[None] = loop.create_future()
    timer: asyncio.TimerHandle | None = None

    def look(before: int) -> None:
        """A plain callback: a task that sleeps would need a second turn of the loop, a hundred times a second."""
        nonlocal timer
        try:
            delay = max(0.0, (clock() - before) / 1e9 - INTERVAL)
            late(delay)
            if delay > STALL:
                stalled()
            timer = loop.call_later(INTERVAL, look, clock())
        except Exception as error:
            failed.set_exception(error)

    timer = loop.call_later(INTERVAL, look, clock())
    try:
        await failed
    finally:
        timer.cancel()

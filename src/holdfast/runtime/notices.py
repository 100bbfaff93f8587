"""Who wants to know what happens in the pool, and who waits for it.

Must never let one listener hurt the others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Literal

from holdfast.runtime.member import Worker

log = logging.getLogger(__name__)

PoolEvent = Literal["added", "changed", "state", "pong", "removed"]
"""``added`` and ``removed``: membership; ``changed``: record or cards; ``state``: state, draining or lifecycle;
``pong``: fresh load and progress."""
PoolSink = Callable[[PoolEvent, Worker], None]


class Notices:
    """Subscribers and waiters of one pool."""

    def __init__(self) -> None:
        self._sinks: list[PoolSink] = []
        self._waiters: dict[asyncio.Event, None] = {}
        """In the order of their coming: a set would wake them in that of their addresses."""

    def subscribe(self, callback: PoolSink) -> Callable[[], None]:
        """Call back on every event; returns the way to stop it."""
        self._sinks.append(callback)

        def unsubscribe() -> None:
            if callback in self._sinks:
                self._sinks.remove(callback)

        return unsubscribe

    def tell(self, event: PoolEvent, worker: Worker) -> None:
        """Tell everybody, in order of subscription."""
        for sink in list(self._sinks):
            try:
                sink(event, worker)
            except Exception:
                log.exception("a subscriber of the worker pool failed on %r; the others go on", event)
        if event != "pong":
            self.wake()

    def wake(self) -> None:
        """Let every waiter look again."""
        for waiter in self._waiters:
            waiter.set()

    async def until(self, condition: Callable[[], bool], timeout: float) -> bool:  # noqa: ASYNC109
        """Wait until a condition holds, looking again at every event; returns whether it did within ``timeout`` s."""
        waiter = asyncio.Event()
        self._waiters[waiter] = None
        try:
            async with asyncio.timeout(timeout):
                while not condition():
                    waiter.clear()
                    await waiter.wait()
        except TimeoutError:
            return condition()
        finally:
            self._waiters.pop(waiter, None)
        return True

"""Small helpers of the worker's process: what it says while it loads, and how it makes sure of an end.

Must never know a worker.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Coroutine
from typing import Any

from holdfast.engines.contract import LoadProgress
from holdfast.runtime.shutdown import EXIT_OVERRUN
from holdfast.worker.leaving import contained

log = logging.getLogger(__name__)

_PROGRESS_LINE_SECONDS = 5.0


def end_after(seconds: float) -> None:
    """Make sure that the process is gone by then, even if the event loop hangs in something that is being closed."""

    def overrun() -> None:
        log.critical("leaving took more than its budget of %g s; the process ends itself", seconds)
        os._exit(EXIT_OVERRUN)

    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), overrun)
    timer.daemon = True
    timer.start()


class ProgressLines:
    """Turns load progress into a log line per stage, and one every few seconds in between."""

    def __init__(self, also: LoadProgress) -> None:
        self._also = also
        self._stage = ""
        self._said = 0.0

    def __call__(self, what: str, share: float) -> None:
        """See `engines.contract.LoadProgress`."""
        self._also(what, share)
        now = asyncio.get_running_loop().time()
        if what != self._stage or now - self._said >= _PROGRESS_LINE_SECONDS:
            self._stage, self._said = what, now
            log.info("engine: %s %.0f %%", what, share * 100)


async def cancelled(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks and wait until they are over; one that had failed is logged."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled() and task.exception() is not None:
            log.error("%s had failed", task.get_name(), exc_info=task.exception())


async def bounded(step: Coroutine[Any, Any, None], what: str, until: float) -> None:
    """Run one step of closing until a time of the loop; what goes wrong is logged, because the next must happen."""
    try:
        async with asyncio.timeout_at(until):
            await contained(step, what)
    except TimeoutError:
        log.warning("%s took too long and was given up", what)

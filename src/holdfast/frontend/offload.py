"""Work that would hold up every stream goes through here: one bounded executor for large bodies.

Must never run anything that touches the event loop's objects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from holdfast.base.errors import CapacityExhausted

P = ParamSpec("P")
R = TypeVar("R")

THREADS = 2
WAITING = 64
"""Large bodies that may wait for a thread."""


class Offload:
    """Runs functions on a few threads, at most `WAITING` at once."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="holdfast-large-body")
        self._pending = 0

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Return what ``work`` returns, computed off the loop.

        Raises:
            CapacityExhausted: too many large bodies are being worked on.
        """
        if self._pending >= WAITING:
            raise CapacityExhausted(
                f"{self._pending} large request bodies are being worked on, which is the limit.",
                retry_after=2.0,
                layer="frontend",
                knob="offload.WAITING",
                threshold=WAITING,
                measured=self._pending,
            )
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(*args, **kwargs))
        finally:
            self._pending -= 1

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)

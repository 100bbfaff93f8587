"""How a worker leaves, step by step: out of discovery, callers told, streams finished or handed over.

Follows `runtime.shutdown`, which holds the stages and their deadlines. Nothing moves to another worker before its
time here is over, and nothing that moves is lost: its caller is told to go on elsewhere, from the token it has.

Must never leave a stream without an end while the process still can say one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from holdfast.base.errors import HoldfastError
from holdfast.runtime.server import WorkerServer
from holdfast.runtime.shutdown import Shutdown, ShutdownBudget, Stage
from holdfast.worker.host import EngineHost

log = logging.getLogger(__name__)

_POLL = 0.005


class Leaving:
    """See the module.

    Args:
        budget: bounds of the stages.
        host: hosts the engine; told to accept nothing.
        server: tells callers.
        withdraw: takes the record out of discovery.
        not_ready: called at once with the reason why nothing new should come.
    """

    def __init__(
        self,
        budget: ShutdownBudget,
        host: EngineHost,
        server: WorkerServer,
        withdraw: Callable[[], Coroutine[Any, Any, None]],
        not_ready: Callable[[str], None],
    ):
        self.shutdown = Shutdown(budget)
        self._host, self._server = host, server
        self._withdraw, self._not_ready = withdraw, not_ready
        self._patience: asyncio.Timeout | None = None
        """The wait that a second signal cuts short, while there is one."""

    def hurry(self) -> None:
        """Wait for nothing any more: hand over what still runs."""
        now = asyncio.get_running_loop().time()
        self.shutdown.hurry(now)
        if self._patience is not None:
            self._patience.reschedule(now)

    async def run(self) -> None:
        """Leave; afterwards nothing is in flight and cleaning up may begin."""
        died = self._host.death is not None
        reason = "the engine died" if died else "shutdown"
        self._enter("unregistered")
        self._not_ready("the engine died" if died else "this worker is draining")
        if died:
            self.shutdown.ended("engine died")
            self._tell(reason)  # before anything that could take its time
        if not await self._patiently(contained(self._withdraw(), "leaving discovery")):
            log.warning("leaving discovery takes its time; callers are told on their connections")
        self._enter("draining")
        self._tell(reason)
        await self._patiently(self._finished())
        self._enter("migrating")
        await self._hand_over()
        self._enter("cleanup")

    def _tell(self, reason: str) -> None:
        """Accept nothing any more and say so to every caller, present and future."""
        if self._server.draining is not None:
            return
        seconds = 0.0 if self._host.death is not None else max(0.0, self.shutdown.until() - _now())
        self._host.drain()
        self._server.drain(reason, int(seconds * 1e3))
        log.info(
            "worker drains (%s): %d streams in flight have %.1f s to finish here", reason, self._host.in_flight, seconds
        )

    async def _finished(self) -> None:
        """Until the engine has nothing in hand and callers have taken everything."""
        await self._host.idle()
        await self._taken()

    async def _taken(self) -> None:
        # the server counts streams and has no event for it; once per exit, a poll will do
        while self._server.open_streams:  # noqa: ASYNC110
            await asyncio.sleep(_POLL)

    async def _hand_over(self) -> None:
        """End what is left so that its callers go on at other workers, and see that they hear it."""
        seconds = self.shutdown.took.get("draining", 0.0)
        left = self._host.send_elsewhere(f"This worker is shutting down; its streams had {seconds:.1f} s to finish.")
        if left:
            log.info("worker hands its last %d streams over to other workers after %.1f s", left, seconds)
            self.shutdown.ended("handed over")
        if not await self._patiently(self._taken()):
            log.warning("%d streams were cut: their callers did not take the end", self._server.open_streams)
            self.shutdown.ended("cut")

    async def _patiently(self, step: Awaitable[None]) -> bool:
        """Wait for a step until the stage is over or somebody hurries; returns whether it was done."""
        self._patience = asyncio.timeout_at(self.shutdown.until())
        try:
            async with self._patience:
                await step
        except TimeoutError:
            return False
        finally:
            self._patience = None
        return True

    def _enter(self, stage: Stage) -> None:
        self.shutdown.enter(stage, _now())
        log.debug("shutdown: %s, %.1f s left of the budget", stage, self.shutdown.remaining(_now()))


async def contained(step: Coroutine[Any, Any, None], what: str) -> None:
    """Run one step of leaving; what goes wrong is logged, because the next steps must happen all the same."""
    try:
        await step
    except HoldfastError as error:
        log.warning("%s failed: %s", what, error.message)
    except Exception:
        log.exception("%s failed", what)


def _now() -> float:
    return asyncio.get_running_loop().time()

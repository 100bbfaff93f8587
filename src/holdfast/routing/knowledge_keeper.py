"""Follows the KV events of every worker that tells them, for as long as it is known.

One task for each such worker: it subscribes when the worker can be reached, again after every end, with growing pauses
while that does not last. A worker that is suspect, silent or lost keeps the blocks it was known to hold, because it may
come back with them; one that has started anew, or is gone, loses them at once.

Must never judge a worker's health, and never hold anything up: nobody waits for what happens here.
"""

from __future__ import annotations

import asyncio
import logging

from holdfast.base.errors import HoldfastError
from holdfast.kv.feed import ENDPOINT
from holdfast.routing.knowledge import PrefixKnowledge
from holdfast.routing.knowledge_feed import WINDOW, Feed
from holdfast.runtime.member import Worker
from holdfast.runtime.notices import PoolEvent
from holdfast.runtime.pool import WorkerPool
from holdfast.wire.frames import OpenHeaders

log = logging.getLogger(__name__)

SILENT_SECONDS = 5.0
"""A worker that tells nothing for so long, not even that nothing has changed, is asked anew."""
OPEN_SECONDS = 5.0
"""How long connecting and asking may take."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 10.0
LASTING_SECONDS = 10.0
"""A subscription that follows for so long makes the next pause a short one."""


class KnowledgeKeeper:
    """See the module. Give `run` a task.

    Args:
        knowledge: what is kept.
        pool: the workers.
        follow: whether to subscribe to events; without, only membership is kept.
    """

    def __init__(self, knowledge: PrefixKnowledge, pool: WorkerPool, *, follow: bool = True) -> None:
        self._knowledge, self._pool = knowledge, pool
        self._follow = follow
        self._followers: dict[str, _Follower] = {}
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Keep what is known until cancelled."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                unsubscribe = self._pool.subscribe(self._pool_event)
                try:
                    for worker in self._pool.all_workers():
                        self._pool_event("added", worker)
                    await asyncio.get_running_loop().create_future()
                finally:
                    unsubscribe()
                    for follower in self._followers.values():
                        follower.stop()  # in this order, which a group would not keep
        finally:
            self._tasks = None

    def _pool_event(self, event: PoolEvent, worker: Worker) -> None:
        """Something has changed about a worker (a `PoolSink`)."""
        if event == "pong":
            return
        if event == "removed":
            self._drop(worker)
            return
        known = self._knowledge.attach(worker)
        if known is None:
            return
        if known.process not in (0, worker.epoch):
            known.restarted()
        known.process = worker.epoch
        follower, tasks = self._followers.get(worker.instance), self._tasks
        if follower is not None:
            follower.poke.set()
        elif self._follow and ENDPOINT in worker.record.endpoints and tasks is not None:
            follower = self._followers[worker.instance] = _Follower(worker, self._knowledge)
            follower.task = tasks.create_task(follower.run(), name=f"kv-events-{worker.instance}")

    def _drop(self, worker: Worker) -> None:
        follower = self._followers.pop(worker.instance, None)
        if follower is not None:
            follower.stop()
        self._knowledge.detach(worker)


class _Follower:
    """One worker's subscription, again and again."""

    def __init__(self, worker: Worker, knowledge: PrefixKnowledge) -> None:
        self._worker, self._knowledge = worker, knowledge
        self._feed: Feed | None = None
        self._pause = FIRST_PAUSE
        self.poke = asyncio.Event()
        """Something may have changed about the worker."""
        self.task: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """The worker is gone."""
        if self._feed is not None:
            self._feed.close()
        if self.task is not None:
            self.task.cancel()

    async def run(self) -> None:
        """Follow until cancelled."""
        worker = self._worker
        while not worker.gone:
            self.poke.clear()
            if not _can_tell(worker):
                await self.poke.wait()
                continue
            try:
                await self._subscribe()
            except HoldfastError as error:
                log.debug("worker %s tells nothing about its KV cache: %s", worker.instance, error.message)
            except TimeoutError:
                log.debug("worker %s took more than %g s to be asked for KV events", worker.instance, OPEN_SECONDS)
            except Exception:
                log.exception("following the KV events of worker %s failed; it will be tried again", worker.instance)
            await asyncio.sleep(self._pause)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)

    async def _subscribe(self) -> None:
        known = self._knowledge.attach(self._worker)
        if known is None:
            return
        loop = asyncio.get_running_loop()
        if known.state == "approximate":
            known.lost_track("joined", "what it holds is being fetched")
        feed = self._feed = Feed(known, loop.time)
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                headers = OpenHeaders(request_id="kv-events")
                handle = await self._worker.open_bulk(ENDPOINT, headers, feed.request(), feed, credit=WINDOW)
            feed.handle = handle
            await feed.run(SILENT_SECONDS)
        finally:
            self._feed = None
            feed.close()
        if feed.synchronised_at is not None and loop.time() - feed.synchronised_at > LASTING_SECONDS:
            self._pause = FIRST_PAUSE
        if feed.error is not None:
            known.interrupted(feed.error.message)


def _can_tell(worker: Worker) -> bool:
    connected = worker.link is not None and worker.link.connected
    return connected and worker.state == "usable" and not worker.draining and ENDPOINT in worker.record.endpoints

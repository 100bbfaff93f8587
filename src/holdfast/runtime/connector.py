"""Connects workers, again and again with growing pauses, for as long as discovery lists them.

One short-lived task per worker that has no connection (or an outdated one). Must never judge a worker, and
never take away a connection that works: what was achieved is handed to the owner, who decides.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import Callable
from typing import Protocol

import msgspec

from holdfast.base.errors import HoldfastError
from holdfast.base.ids import Epoch
from holdfast.runtime.discovery.contract import InstanceRecord
from holdfast.runtime.member import PoolLink, Trigger, Worker
from holdfast.wire.frames import Draining, Pong

log = logging.getLogger(__name__)

LinkFactory = Callable[[InstanceRecord], PoolLink]


class ConnectSettings(msgspec.Struct, frozen=True):
    """Times in seconds."""

    timeout: float = 2.0
    """For connecting and shaking hands once."""
    retry_first: float = 0.05
    """Wait after the first failed attempt; doubles with each further one …"""
    retry_ceiling: float = 2.0
    """… up to this. Attempts go on for as long as discovery lists the worker."""


class LinkOwner(Protocol):
    """Who gets the connections: the pool."""

    def move(self, worker: Worker, trigger: Trigger | None) -> None:
        """Something happened to the worker's connection."""

    def connected(self, worker: Worker, link: PoolLink, epoch: Epoch) -> None:
        """A new connection is there; it may replace one."""

    def not_connected(self, worker: Worker, error: HoldfastError) -> None:
        """An attempt failed."""

    def on_lost(self, worker: Worker, link: PoolLink, error: HoldfastError) -> None:
        """See `Link.on_lost`."""

    def on_pong(self, worker: Worker, link: PoolLink, pong: Pong) -> None:
        """See `Link.on_pong`."""

    def on_draining(self, worker: Worker, link: PoolLink, frame: Draining) -> None:
        """See `Link.on_draining`."""


class Connector:
    """See the module."""

    def __init__(
        self,
        owner: LinkOwner,
        settings: ConnectSettings,
        make_link: LinkFactory,
        rng: random.Random,
        on_read_done: Callable[[], None] | None,
    ):
        self._owner = owner
        self._settings = settings
        self._make_link = make_link
        self._rng = rng
        self._on_read_done = on_read_done
        self._tasks: asyncio.TaskGroup | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """From now on `ensure` makes its tasks in this group, whose end cancels them."""
        self._tasks = tasks

    def ensure(self, worker: Worker) -> None:
        """See to it that somebody is connecting this worker, if it is listed."""
        if worker.connector is None and worker.listed and self._tasks is not None:
            worker.connector = self._tasks.create_task(self._connect(worker), name=f"connect-{worker.instance}")

    async def _connect(self, worker: Worker) -> None:
        try:
            wait = self._settings.retry_first
            while worker.listed:
                wanted = worker.record.epoch
                self._owner.move(worker, "connecting" if worker.link is None else None)
                if not await self._attempt(worker):
                    await self._pause(worker, wait)
                    wait = min(self._settings.retry_ceiling, wait * 2)
                elif worker.record.epoch in (wanted, worker.epoch):
                    return
        except Exception:
            log.exception("connecting to worker %s failed for a reason of our own", worker.instance)
        finally:
            worker.connector = None

    async def _pause(self, worker: Worker, seconds: float) -> None:
        """Wait before the next attempt; news from discovery cut it short."""
        worker.poke.clear()
        try:
            await asyncio.wait_for(worker.poke.wait(), seconds * self._rng.uniform(0.8, 1.2))
        except TimeoutError:
            return

    async def _attempt(self, worker: Worker) -> bool:
        """Connect once; returns whether the worker has a connection to its running epoch now."""
        owner = self._owner
        link = self._make_link(worker.record)
        link.on_lost = functools.partial(owner.on_lost, worker, link)
        link.on_pong = functools.partial(owner.on_pong, worker, link)
        link.on_draining = functools.partial(owner.on_draining, worker, link)
        link.on_read_done = self._on_read_done
        kept = False
        try:
            welcome = await link.connect(self._settings.timeout)
            if worker.link is not None and worker.link.connected and welcome.epoch == worker.epoch:
                return True
            kept = link.connected and worker.listed
        except HoldfastError as error:
            owner.not_connected(worker, error)
        finally:
            if not kept:
                self.close_later(link)
        if kept:
            owner.connected(worker, link, Epoch(welcome.epoch))
        return kept

    def close_later(self, link: PoolLink) -> None:
        """Close a link without waiting here; `close` waits for all of them."""
        link.on_lost = link.on_pong = link.on_draining = None
        task = asyncio.get_running_loop().create_task(link.close(), name="close-link")
        self._closing.add(task)
        task.add_done_callback(self._closed)

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._closing.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("closing a link failed", exc_info=task.exception())

    async def close(self) -> None:
        """Wait, boundedly, until every link that was to be closed is."""
        if self._closing:
            await asyncio.wait(self._closing, timeout=self._settings.timeout)

"""All workers that this process can reach: connected, watched, and offered to whoever places work.

Discovery says whom to try; the data path says who is there (architecture, sections 4 to 6). One loop checks
and pings, one short-lived task per worker connects. A silent or hung worker's streams are broken, so that
their owners move them; it stays connected and comes back as soon as it answers again.

Must never choose a worker for a request, retry one, or hold a stream.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

from holdfast.base.errors import Disconnected, HoldfastError, WorkerDraining
from holdfast.base.ids import Epoch, InstanceId
from holdfast.models.card import ModelCard
from holdfast.runtime.catalogue import Catalogue
from holdfast.runtime.departures import Departures
from holdfast.runtime.detector import DetectorSettings, FailureDetector, Judgement
from holdfast.runtime.discovery.contract import SUPERVISOR, Discovery, DiscoveryEvent, InstanceRecord
from holdfast.runtime.inhibition import Inhibition, InhibitionSettings
from holdfast.runtime.link import Link
from holdfast.runtime.member import LEAVING_STATES, PoolLink, Trigger, Worker
from holdfast.runtime.transport import Transport
from holdfast.wire.frames import Draining, Pong

log = logging.getLogger(__name__)

__all__ = ["PoolEvent", "PoolSettings", "PoolSink", "Worker", "WorkerPool"]

PoolEvent = Literal["added", "changed", "state", "pong", "removed"]
"""``added`` and ``removed``: membership; ``changed``: record or cards; ``state``: state, draining or lifecycle;
``pong``: fresh load and progress."""
PoolSink = Callable[[PoolEvent, Worker], None]
LinkFactory = Callable[[InstanceRecord], PoolLink]


class PoolSettings(msgspec.Struct, frozen=True):
    """Times in seconds."""

    detector: DetectorSettings = DetectorSettings()
    inhibition: InhibitionSettings = InhibitionSettings()
    connect_timeout: float = 2.0
    """For connecting and shaking hands once."""
    retry_first: float = 0.05
    """Wait after the first failed connection attempt; doubles with each further one …"""
    retry_ceiling: float = 2.0
    """… up to this. Attempts go on for as long as discovery lists the worker."""
    unlisted: float = 60.0
    """A connected worker that vanished from discovery without a word gets new work for this long."""


class WorkerPool:
    """See the module. `start` it, read `usable`, `subscribe`, `close` it."""

    def __init__(
        self,
        discovery: Discovery,
        transport: Transport,
        *,
        caller: str,
        rng: random.Random,
        namespace: str = "",
        namespace_prefix: str = "",
        secret: bytes = b"",
        settings: PoolSettings | None = None,
        on_read_done: Callable[[], None] | None = None,
        link_factory: LinkFactory | None = None,
    ):
        """Wire it up; nothing happens before `start`.

        Args:
            discovery: started by its owner.
            transport: the way to the network.
            caller: name of this process in workers' logs.
            rng: for handshakes and jitter.
            namespace: only workers of this namespace; empty: all.
            namespace_prefix: wins over ``namespace``: all whose namespace begins like this.
            secret: shared with the workers; empty: none.
            on_read_done: called after all frames of one read of any worker's connection were delivered.
            link_factory: makes the link to a record; None: `runtime.link.Link` over ``transport``.
        """
        self.settings = settings or PoolSettings()
        self._discovery = discovery
        self._transport, self._caller, self._secret = transport, caller, secret
        self._rng = rng
        self._namespace, self._prefix = namespace, namespace_prefix
        self._on_read_done = on_read_done
        self._make_link = link_factory or self._default_link
        self._detector = FailureDetector(self.settings.detector)
        self._catalogue = Catalogue()
        self._departures = Departures()
        self._workers: dict[InstanceId, Worker] = {}
        self._sinks: list[PoolSink] = []
        self._waiters: set[asyncio.Event] = set()
        self._arrivals = 0
        self._tasks: asyncio.TaskGroup | None = None
        self._runner: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._clock: Callable[[], float] = lambda: 0.0
        self._unsubscribe: Callable[[], None] = lambda: None

    # -- what rooms above ask --------------------------------------------------------------------------

    def all_workers(self) -> list[Worker]:
        """Return every known worker, in order of arrival."""
        return list(self._workers.values())

    def worker(self, instance: str) -> Worker | None:
        """Return one worker by its instance id."""
        return self._workers.get(InstanceId(instance))

    def workers(self, model: str) -> list[Worker]:
        """Return those that serve a model (or alias), whatever their state."""
        return list(self._catalogue.workers(model))

    def usable(self, model: str) -> list[Worker]:
        """Return those that may get new work for a model now.

        Recently failed workers are left out, unless nobody else is there: then the least bad of them is returned.
        """
        eligible = [worker for worker in self._catalogue.workers(model) if worker.eligible]
        free = [worker for worker in eligible if not worker.inhibited]
        if free or not eligible:
            return free
        return [min(eligible, key=lambda w: (w.inhibition.failures, w.inhibition.until))]

    def models(self) -> dict[str, list[ModelCard]]:
        """Return the agreed cards by model name and alias.

        A model without a worker at the moment keeps its last card here while a replacement is expected.
        """
        found: dict[str, list[ModelCard]] = {}
        for name in self._catalogue.names():
            cards = [card for w in self._catalogue.workers(name) if (card := w.card(name)) is not None]
            last = self._catalogue.card(name)
            if not cards and last is not None and self.replacement_expected(name):
                cards = [last]
            if cards:
                found[name] = cards
        return found

    def replacement_expected(self, model: str) -> bool:
        """Say whether it makes sense to wait for a worker of this model when none is usable.

        False at once when the last one was withdrawn on purpose, or when the supervisors here have given up on
        all their workers.
        """
        staying = any(not w.leaving and not w.draining for w in self._catalogue.workers(model))
        return staying or self._departures.replacement_expected(model)

    @property
    def discovery_reachable(self) -> bool:
        """Whether discovery answers; while it does not, the last view stays in force."""
        return self._discovery.reachable

    def subscribe(self, callback: PoolSink) -> Callable[[], None]:
        """Call back on every change; returns the way to stop it. Callbacks must not block."""
        self._sinks.append(callback)

        def unsubscribe() -> None:
            if callback in self._sinks:
                self._sinks.remove(callback)

        return unsubscribe

    async def wait_usable(self, model: str, timeout: float) -> list[Worker]:  # noqa: ASYNC109
        """Wait until a model has a usable worker.

        Args:
            model: name or alias.
            timeout: seconds to wait at most.

        Returns:
            The usable workers; empty when the time is over, or at once when no replacement is expected.
        """
        changed = asyncio.Event()
        self._waiters.add(changed)
        deadline = self._clock() + timeout
        try:
            while not (found := self.usable(model)) and self.replacement_expected(model):
                left = deadline - self._clock()
                if left <= 0:
                    return []
                changed.clear()
                try:
                    await asyncio.wait_for(changed.wait(), left)
                except TimeoutError:
                    continue
            return found
        finally:
            self._waiters.discard(changed)

    # -- life ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take discovery's view, begin to connect and to watch."""
        loop = asyncio.get_running_loop()
        self._clock = loop.time
        started = asyncio.Event()
        self._runner = loop.create_task(self._run(started), name="worker-pool")
        await started.wait()

    async def _run(self, started: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as self._tasks:
            self._unsubscribe = self._discovery.subscribe(self._on_discovery)
            for record in self._discovery.snapshot():
                self._upsert(record)
            started.set()
            while True:
                try:
                    self._check()
                except Exception:
                    log.exception("a turn of the worker pool failed; watching goes on")
                await asyncio.sleep(self.settings.detector.check_interval)

    async def close(self) -> None:
        """Break what is left and close all links. Idempotent."""
        self._unsubscribe()
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.cancel()
            await asyncio.wait([runner])
            if not runner.cancelled() and runner.exception() is not None:
                log.error("the worker pool had failed", exc_info=runner.exception())
        for worker in self.all_workers():
            self._forget(worker, purposeful=False)
        if self._closing:
            await asyncio.wait(self._closing, timeout=self.settings.connect_timeout)

    # -- discovery -------------------------------------------------------------------------------------

    def _on_discovery(self, event: DiscoveryEvent) -> None:
        record = event.record
        if record is None:
            level, what = (logging.INFO, "reachable") if event.kind == "known" else (logging.WARNING, "unreachable")
            log.log(level, "discovery is %s %s; %d workers in view", what, event.reason, len(self._workers))
        elif event.kind == "removed":
            self._unlist(record, event)
        elif event.kind != "unknown":
            self._upsert(record)

    def _upsert(self, record: InstanceRecord) -> None:
        if record.component == SUPERVISOR:
            self._departures.supervisor(record)
            self._wake()
            return
        if not record.address or not self._in_scope(record.namespace):
            return
        worker = self._workers.get(record.instance)
        if worker is None:
            self._add(record)
            return
        restarted = record.epoch != worker.epoch
        worker.adopt(record)
        worker.poke.set()
        self._detector.expect_progress(worker.instance, _shows_progress(record.cards))
        self._catalogue_changed()
        if restarted or worker.link is None:
            self._ensure_connecting(worker)
        self._tell("changed", worker)

    def _in_scope(self, namespace: str) -> bool:
        if self._prefix:
            return namespace.startswith(self._prefix)
        return not self._namespace or namespace == self._namespace

    def _add(self, record: InstanceRecord) -> None:
        self._arrivals += 1
        worker = Worker(
            record,
            arrival=self._arrivals,
            detector=self._detector,
            inhibition=Inhibition(self.settings.inhibition),
            clock=self._clock,
        )
        worker.draining = record.state in LEAVING_STATES
        self._workers[record.instance] = worker
        self._catalogue_changed()
        self._tell("added", worker)
        self._ensure_connecting(worker)

    def _unlist(self, record: InstanceRecord, event: DiscoveryEvent) -> None:
        """Removed from discovery: on purpose it leaves; otherwise what still answers is kept for a while."""
        if record.component == SUPERVISOR:
            self._departures.supervisor_left(record)
            self._wake()
            return
        worker = self._workers.get(record.instance)
        if worker is None or not worker.listed:
            return
        worker.listed = False
        worker.poke.set()
        if worker.link is None or not worker.link.connected:
            log.info("worker %s left discovery (%s)", worker.instance, event.reason)
            self._forget(worker, purposeful=event.purposeful)
        elif event.purposeful or worker.draining:
            self._retire(worker, purposeful=event.purposeful)
        else:
            worker.unlisted_until = self._clock() + self.settings.unlisted
            log.warning(
                "worker %s vanished from discovery (%s) but its connection lives; using it for up to %g s more",
                worker.instance,
                event.reason,
                self.settings.unlisted,
            )

    def _retire(self, worker: Worker, *, purposeful: bool) -> None:
        """No new work; it is forgotten when its streams are over (`_check`) or its connection ends."""
        worker.leaving = True
        worker.unlisted_until = None
        self._departures.left(worker.record.cards, purposeful=purposeful)
        self._catalogue_changed()
        self._tell("state", worker)

    def _forget(self, worker: Worker, *, purposeful: bool) -> None:
        if worker.gone:
            return
        worker.gone, worker.listed = True, False
        if not worker.leaving:
            worker.leaving = True
            self._departures.left(worker.record.cards, purposeful=purposeful or worker.draining)
        worker.poke.set()
        self._workers.pop(worker.instance, None)
        self._detector.remove(worker.instance)
        self._drop_link(worker)
        if worker.connector is not None:
            worker.connector.cancel()
        self._catalogue_changed()
        self._tell("removed", worker)

    def _catalogue_changed(self) -> None:
        self._catalogue.rebuild(self._workers.values())

    # -- connecting ------------------------------------------------------------------------------------

    def _default_link(self, record: InstanceRecord) -> PoolLink:
        return Link(
            self._transport,
            record.address,
            caller=self._caller,
            rng=self._rng,
            secret=self._secret,
            instance=record.instance,
            keepalive=None,
        )

    def _ensure_connecting(self, worker: Worker) -> None:
        if worker.connector is None and worker.listed and self._tasks is not None:
            worker.connector = self._tasks.create_task(self._connect(worker), name=f"connect-{worker.instance}")

    async def _connect(self, worker: Worker) -> None:
        """Try until connected to the epoch that discovery knows, or until it is listed no more."""
        try:
            wait = self.settings.retry_first
            while worker.listed:
                self._move(worker, "connecting" if worker.link is None else None)
                epoch = worker.record.epoch
                if await self._connect_once(worker):
                    if worker.record.epoch in (epoch, worker.epoch):
                        return
                    continue
                await self._pause(worker, wait)
                wait = min(self.settings.retry_ceiling, wait * 2)
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

    async def _connect_once(self, worker: Worker) -> bool:
        link = self._make_link(worker.record)
        link.on_lost = functools.partial(self._on_lost, worker, link)
        link.on_pong = functools.partial(self._on_pong, worker, link)
        link.on_draining = functools.partial(self._on_draining, worker, link)
        link.on_read_done = self._on_read_done
        kept = False
        try:
            welcome = await link.connect(self.settings.connect_timeout)
            if worker.link is not None and worker.link.connected and welcome.epoch == worker.epoch:
                return True
            kept = link.connected and worker.listed
        except HoldfastError as error:
            self._not_connected(worker, error)
        finally:
            if not kept:
                self._close_later(link)
        if kept:
            self._connected(worker, link, welcome.epoch)
        return kept

    def _not_connected(self, worker: Worker, error: HoldfastError) -> None:
        if worker.last_error is None or worker.last_error.message != error.message:
            log.warning("cannot use worker %s at %s: %s", worker.instance, worker.record.address, error.message)
        worker.last_error = error
        if isinstance(error, WorkerDraining):
            worker.draining = True
        if worker.link is None:
            self._move(worker, "lost")

    def _connected(self, worker: Worker, link: PoolLink, epoch: int) -> None:
        before, worker.link = worker.link, link
        now = self._clock()
        if before is not None:
            error = Disconnected(f"worker {worker.instance} was started anew", worker=worker.instance)
            worker.struck = error
            before.abandon(error)
            self._close_later(before)
            self._move(worker, "lost")
            self._move(worker, "connecting")
        if epoch != worker.epoch or before is not None:
            worker.inhibition.succeeded()
        worker.epoch = Epoch(epoch)
        worker.pong, worker.last_error = None, None
        worker.draining = worker.record.epoch == epoch and worker.record.state in LEAVING_STATES
        worker.heard_at = link.last_heard
        self._detector.add(worker.instance, now, shows_progress=_shows_progress(worker.record.cards))
        self._ping(worker, now)

    def _drop_link(self, worker: Worker) -> None:
        link, worker.link = worker.link, None
        if link is not None:
            self._close_later(link)

    def _close_later(self, link: PoolLink) -> None:
        """Close without waiting here; `close` of the pool waits for all of them."""
        link.on_lost = link.on_pong = link.on_draining = None
        task = asyncio.get_running_loop().create_task(link.close(), name="close-link")
        self._closing.add(task)
        task.add_done_callback(self._closed)

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._closing.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("closing a link failed", exc_info=task.exception())

    # -- the data path speaks --------------------------------------------------------------------------

    def _on_lost(self, worker: Worker, link: PoolLink, error: HoldfastError) -> None:
        if worker.link is not link:
            return
        log.warning("lost the connection to worker %s: %s", worker.instance, error.message)
        worker.link, worker.last_error, worker.struck = None, error, error
        self._detector.remove(worker.instance)
        self._move(worker, "lost")
        if not worker.listed:
            self._forget(worker, purposeful=worker.leaving)
        else:
            self._ensure_connecting(worker)

    def _on_draining(self, worker: Worker, link: PoolLink, frame: Draining) -> None:
        if worker.link is link and not worker.draining:
            log.info(
                "worker %s is draining (%s); its streams have %d ms", worker.instance, frame.reason, frame.remaining_ms
            )
            worker.draining = True
            self._catalogue_changed()
            self._tell("state", worker)

    def _on_pong(self, worker: Worker, link: PoolLink, pong: Pong) -> None:
        if worker.link is not link:
            return
        before, worker.pong = worker.pong, pong
        judgement = self._detector.pong(worker.instance, pong, self._clock())
        if judgement is not None:
            self._act(judgement)
        elif worker.state == "probing":
            worker.inhibition.answered()
            log.info("worker %s at %s is usable (%s)", worker.instance, worker.record.address, worker.lifecycle)
            self._move(worker, "answered")
        if before is not None and before.state != pong.state:
            self._tell("state", worker)
        self._tell("pong", worker)

    # -- watching --------------------------------------------------------------------------------------

    def _check(self) -> None:
        """One turn: note who was heard, judge, ping, let go of those that left."""
        now = self._clock()
        for worker in self._workers.values():
            if worker.link is not None and worker.link.last_heard != worker.heard_at:
                worker.heard_at = worker.link.last_heard
                self._detector.heard(worker.instance, now)
        for judgement in self._detector.check(now):
            self._act(judgement)
        for instance in self._detector.due_pings(now):
            self._ping(self._workers[instance], now)
        for worker in self.all_workers():
            self._let_go(worker, now)
        self._wake()

    def _ping(self, worker: Worker, now: float) -> None:
        if worker.link is None:
            return
        try:
            self._detector.pinged(worker.instance, worker.link.ping(), now)
        except HoldfastError as error:
            log.debug("no ping to worker %s: %s", worker.instance, error.message)

    def _let_go(self, worker: Worker, now: float) -> None:
        if worker.unlisted_until is not None and now >= worker.unlisted_until:
            log.warning("worker %s did not come back to discovery; no more new work for it", worker.instance)
            self._retire(worker, purposeful=False)
        if worker.leaving and not worker.listed and worker.in_flight == 0:
            self._forget(worker, purposeful=False)

    def _act(self, judgement: Judgement) -> None:
        """State first, so that whoever is told about a broken stream no longer finds this worker usable."""
        worker = self._workers.get(judgement.instance)
        if worker is None or worker.link is None:
            return
        if judgement.error is None:
            log.info("worker %s answers again", worker.instance)
            worker.inhibition.answered()
            self._move(worker, "connecting" if worker.state == "ejected" else None)
            self._move(worker, "answered")
            return
        error = worker.struck = worker.last_error = judgement.error
        streams = worker.link.streams
        log.warning("%s; moving its %d streams elsewhere", error.message, streams)
        self._move(worker, "silent" if judgement.state == "silent" else "stalled")
        worker.link.abandon(error)

    def _move(self, worker: Worker, trigger: Trigger | None) -> None:
        if trigger is not None and worker.move(trigger):
            self._tell("state", worker)

    # -- telling ---------------------------------------------------------------------------------------

    def _tell(self, event: PoolEvent, worker: Worker) -> None:
        for sink in list(self._sinks):
            try:
                sink(event, worker)
            except Exception:
                log.exception("a subscriber of the worker pool failed on %r; the others go on", event)
        if event != "pong":
            self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            waiter.set()


def _shows_progress(cards: Iterable[ModelCard]) -> bool:
    """Counters mean something when any model of the worker comes from an engine that moves them."""
    return any(card.progress in ("step", "token") for card in cards)

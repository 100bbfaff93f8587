"""All workers that this process can reach: connected, watched, and offered to whoever places work.

Discovery says whom to try; the data path says who is there (architecture, sections 4 to 6). One loop checks
and pings, one short-lived task per worker connects. A silent or hung worker's streams are broken, so that
their owners move them; it stays connected and comes back as soon as it answers again.

Must never choose a worker for a request, retry one, or hold a stream.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping

import msgspec

from holdfast.base.ids import InstanceId
from holdfast.models.card import ModelCard
from holdfast.runtime.catalogue import Catalogue
from holdfast.runtime.connector import Connector, ConnectSettings, LinkFactory
from holdfast.runtime.departures import Departures
from holdfast.runtime.detector import DetectorSettings, FailureDetector
from holdfast.runtime.discovery.contract import SUPERVISOR, Discovery, DiscoveryEvent, InstanceRecord
from holdfast.runtime.inhibition import Inhibition, InhibitionSettings
from holdfast.runtime.link import Link
from holdfast.runtime.member import LEAVING_STATES, PoolLink, Worker
from holdfast.runtime.notices import Notices, PoolEvent, PoolSink
from holdfast.runtime.transport import Transport
from holdfast.runtime.watch import Watch, shows_progress
from holdfast.wire.frames import OLDEST_VERSION, VERSION

log = logging.getLogger(__name__)

__all__ = ["PoolEvent", "PoolSettings", "PoolSink", "Worker", "WorkerPool"]


class PoolSettings(msgspec.Struct, frozen=True):
    """Times in seconds."""

    detector: DetectorSettings = DetectorSettings()
    connect: ConnectSettings = ConnectSettings()
    inhibition: InhibitionSettings = InhibitionSettings()
    unlisted: float = 60.0
    """A connected worker that vanished from discovery without a word gets new work for this long."""
    versions: tuple[int, int] = (OLDEST_VERSION, VERSION)
    """Oldest and newest protocol version to offer to workers."""


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
        self._detector = FailureDetector(self.settings.detector)
        self._catalogue = Catalogue()
        self._departures = Departures()
        self._workers: dict[InstanceId, Worker] = {}
        self._notices = Notices()
        self._watch = Watch(
            self._workers,
            self._detector,
            self._notices,
            self._clock,
            on_unlisted_lost=lambda worker: self._forget(worker, purposeful=worker.leaving),
            on_roles_changed=self._catalogue_changed,
        )
        make_link = link_factory or self._default_link
        self._connector = Connector(self._watch, self.settings.connect, make_link, rng, on_read_done)
        self._watch.connector = self._connector
        self._arrivals = 0
        self._runner: asyncio.Task[None] | None = None
        self._loop_time: Callable[[], float] = lambda: 0.0
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
        """Return those that may get new streams of a model now; never those that compute prompts only.

        Recently failed workers are left out, unless nobody else is there: then the least bad of them is returned.
        """
        eligible = [worker for worker in self._catalogue.workers(model) if worker.eligible]
        free = [worker for worker in eligible if not worker.inhibited]
        if free or not eligible:
            return free
        return [min(eligible, key=lambda w: (w.inhibition.failures, w.inhibition.until))]

    def has_prefill(self, model: str) -> bool:
        """Return whether somebody computes prompts of a model for others, whatever their state; asked per attempt."""
        return bool(self._catalogue.prefill(model))

    def needs_prefill(self, model: str) -> bool:
        """Return whether somebody who serves a model computes no prompts of it; asked per attempt."""
        return self._catalogue.needs_prefill(model)

    def prefill(self, model: str) -> list[Worker]:
        """Return those that may get prompts of a model now, and never a client's stream.

        Recently failed ones are left out: what they would do can be done elsewhere.
        """
        return [worker for worker in self._catalogue.prefill(model) if worker.eligible and not worker.inhibited]

    def prefill_workers(self, model: str) -> list[Worker]:
        """Return those that compute prompts of a model, whatever their state."""
        return list(self._catalogue.prefill(model))

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

    @property
    def supervised(self) -> Mapping[InstanceId, Mapping[str, str]]:
        """What supervisors say about their slots: states by slot name, by the supervisor's instance id."""
        return self._departures.supervised

    @property
    def doubts_itself(self) -> bool:
        """Whether so many workers look silent that nobody is judged yet."""
        return self._detector.doubts_itself

    @property
    def discarded_intervals(self) -> int:
        """Checks that came too late to judge anybody by them, since the start."""
        return self._detector.discarded

    def subscribe(self, callback: PoolSink) -> Callable[[], None]:
        """Call back on every change; returns the way to stop it. Callbacks must not block."""
        return self._notices.subscribe(callback)

    async def wait_usable(self, model: str, timeout: float) -> list[Worker]:  # noqa: ASYNC109
        """Wait until a model has a usable worker.

        Args:
            model: name or alias.
            timeout: seconds to wait at most.

        Returns:
            The usable workers; empty when the time is over, or at once when no replacement is expected.
        """
        await self._notices.until(lambda: bool(self.usable(model)) or not self.replacement_expected(model), timeout)
        return self.usable(model)

    # -- life ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take discovery's view, begin to connect and to watch."""
        loop = asyncio.get_running_loop()
        self._loop_time = loop.time
        started = asyncio.Event()
        self._runner = loop.create_task(self._run(started), name="worker-pool")
        await started.wait()

    async def _run(self, started: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            self._connector.start(tasks)
            self._unsubscribe = self._discovery.subscribe(self._on_discovery)
            for record in self._discovery.snapshot():
                self._upsert(record)
            started.set()
            while True:
                try:
                    self._turn()
                except Exception:
                    log.exception("a turn of the worker pool failed; watching goes on")
                await asyncio.sleep(self.settings.detector.check_interval)

    def _clock(self) -> float:
        return self._loop_time()

    def _turn(self) -> None:
        now = self._clock()
        self._watch.check(now)
        for worker in self.all_workers():
            self._let_go(worker, now)
        self._notices.wake()

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
        await self._connector.close()

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
            self._notices.wake()
            return
        if not record.address or not self._in_scope(record.namespace):
            return
        worker = self._workers.get(record.instance)
        if worker is None:
            self._add(record)
            return
        restarted = record.epoch != worker.epoch
        self._departures.offers(record, worker.record.cards)
        worker.adopt(record)
        worker.poke.set()
        self._detector.expect_progress(worker.instance, shows_progress(record.cards))
        self._catalogue_changed()
        if restarted or worker.link is None:
            self._connector.ensure(worker)
        self._notices.tell("changed", worker)

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
        self._departures.offers(record)
        self._workers[record.instance] = worker
        self._catalogue_changed()
        self._notices.tell("added", worker)
        self._connector.ensure(worker)

    def _unlist(self, record: InstanceRecord, event: DiscoveryEvent) -> None:
        """Removed from discovery: on purpose it leaves; otherwise what still answers is kept for a while.

        So is a new start that is connected already, when discovery only now tells that the one before it has left.
        """
        if record.component == SUPERVISOR:
            self._departures.supervisor_left(record)
            self._notices.wake()
            return
        worker = self._workers.get(record.instance)
        if worker is None or not worker.listed:
            return
        worker.listed = False
        worker.poke.set()
        if worker.link is None or not worker.link.connected:
            log.info("worker %s left discovery (%s)", worker.instance, event.reason)
            self._forget(worker, purposeful=event.purposeful)
        elif (event.purposeful and record.epoch == worker.epoch) or worker.draining:
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
        """No new work; it is forgotten when its streams are over (`_let_go`) or its connection ends."""
        worker.leaving = True
        worker.unlisted_until = None
        self._departures.left(worker.record.cards, purposeful=purposeful, instance=worker.instance)
        self._catalogue_changed()
        self._notices.tell("state", worker)

    def _forget(self, worker: Worker, *, purposeful: bool) -> None:
        if worker.gone:
            return
        worker.gone, worker.listed = True, False
        if not worker.leaving:
            worker.leaving = True
            self._departures.left(
                worker.record.cards, purposeful=purposeful or worker.draining, instance=worker.instance
            )
        worker.poke.set()
        self._workers.pop(worker.instance, None)
        self._detector.remove(worker.instance)
        self._watch.readmissions.drop(worker)
        self._drop_link(worker)
        if worker.connector is not None:
            worker.connector.cancel()
        self._catalogue_changed()
        self._notices.tell("removed", worker)

    def _let_go(self, worker: Worker, now: float) -> None:
        if worker.unlisted_until is not None and now >= worker.unlisted_until:
            log.warning("worker %s did not come back to discovery; no more new work for it", worker.instance)
            self._retire(worker, purposeful=False)
        if worker.leaving and not worker.listed and worker.in_flight == 0:
            self._forget(worker, purposeful=False)

    def _drop_link(self, worker: Worker) -> None:
        link, worker.link = worker.link, None
        if link is not None:
            self._connector.close_later(link)

    def _default_link(self, record: InstanceRecord) -> PoolLink:
        return Link(
            self._transport,
            record.address,
            caller=self._caller,
            rng=self._rng,
            secret=self._secret,
            instance=record.instance,
            keepalive=None,
            versions=self.settings.versions,
        )

    def _catalogue_changed(self) -> None:
        self._catalogue.rebuild(self._workers.values())

"""Watches the connections of all workers: who answers, who is silent, who hangs; and acts on the links.

What the detector finds becomes a state of the worker first and a broken stream second, so that whoever is told
about a broken stream no longer finds that worker usable. Must never decide who is a member.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from holdfast.base.errors import Disconnected, HoldfastError, WorkerDraining
from holdfast.base.ids import Epoch, InstanceId
from holdfast.models.card import ModelCard
from holdfast.runtime.connector import Connector
from holdfast.runtime.detector import FailureDetector, Judgement
from holdfast.runtime.member import LEAVING_STATES, PoolLink, Trigger, Worker
from holdfast.runtime.notices import Notices
from holdfast.runtime.readmission import Readmissions
from holdfast.wire.frames import Draining, Pong

log = logging.getLogger(__name__)


class Watch:
    """See the module; a `connector.LinkOwner`."""

    def __init__(
        self,
        workers: Mapping[InstanceId, Worker],
        detector: FailureDetector,
        notices: Notices,
        clock: Callable[[], float],
        *,
        on_unlisted_lost: Callable[[Worker], None],
        on_roles_changed: Callable[[], None],
    ):
        """Wire it up.

        Args:
            workers: the pool's members, kept up to date by the pool.
            detector: judges.
            notices: whom to tell about states and pongs.
            clock: the loop's time.
            on_unlisted_lost: called with a worker that discovery does not list and whose connection is gone too.
            on_roles_changed: called when who serves what may have changed.
        """
        self._workers = workers
        self._detector = detector
        self._notices = notices
        self._clock = clock
        self._on_unlisted_lost = on_unlisted_lost
        self._on_roles_changed = on_roles_changed
        self.readmissions = Readmissions(clock, lambda worker: self.move(worker, "answered"))
        self.connector: Connector
        """Set by the pool: the two need each other."""

    # -- connections (`connector.LinkOwner`) -----------------------------------------------------------

    def not_connected(self, worker: Worker, error: HoldfastError) -> None:
        """An attempt failed; said once per reason."""
        if worker.last_error is None or worker.last_error.message != error.message:
            log.warning("cannot use worker %s at %s: %s", worker.instance, worker.record.address, error.message)
        worker.last_error = error
        if isinstance(error, WorkerDraining):
            worker.draining = True
        if worker.link is None:
            self.move(worker, "lost")

    def connected(self, worker: Worker, link: PoolLink, epoch: Epoch) -> None:
        """A new connection is there: watch it, and let go of the one that it replaces."""
        before, worker.link = worker.link, link
        now = self._clock()
        if before is not None:
            error = Disconnected(f"worker {worker.instance} was started anew", worker=worker.instance)
            worker.struck = error
            before.abandon(error)
            self.connector.close_later(before)
            self.move(worker, "lost")
        self.move(worker, "connecting")  # also when the old connection was lost while this one was being made
        self.readmissions.drop(worker)
        if epoch != worker.epoch or before is not None:
            worker.inhibition.succeeded()
        if epoch != worker.epoch:
            worker.doubted = ""  # another process, which has proved itself before it registered
        worker.epoch = epoch
        worker.pong, worker.last_error = None, None
        recorded = worker.record.epoch == epoch and worker.record.state in LEAVING_STATES
        worker.draining = recorded or link.draining is not None
        worker.heard_at = link.last_heard
        self._detector.add(worker.instance, now, shows_progress=shows_progress(worker.record.cards))
        self._ping(worker, now)

    def on_lost(self, worker: Worker, link: PoolLink, error: HoldfastError) -> None:
        """The connection broke; its streams know already."""
        if worker.link is not link:
            return
        log.warning("lost the connection to worker %s: %s", worker.instance, error.message)
        worker.link, worker.last_error, worker.struck = None, error, error
        self._detector.remove(worker.instance)
        self.readmissions.drop(worker)
        self.move(worker, "lost")
        if not worker.listed:
            self._on_unlisted_lost(worker)
        else:
            self.connector.ensure(worker)

    def on_draining(self, worker: Worker, link: PoolLink, frame: Draining) -> None:
        """The worker accepts nothing from now on."""
        if worker.link is link and not worker.draining:
            log.info(
                "worker %s is draining (%s); its streams have %d ms", worker.instance, frame.reason, frame.remaining_ms
            )
            worker.draining = True
            self._on_roles_changed()
            self._notices.tell("state", worker)

    def on_pong(self, worker: Worker, link: PoolLink, pong: Pong) -> None:
        """Take in progress, load and state; the first pong makes a worker usable."""
        if worker.link is not link:
            return
        before, worker.pong = worker.pong, pong
        judgement = self._detector.pong(worker.instance, pong, self._clock())
        if judgement is not None:
            self._act(judgement)
        elif worker.state == "probing" and self._detector.state(worker.instance) == "ok":
            worker.inhibition.answered()
            if not worker.doubted:
                log.info("worker %s at %s is usable (%s)", worker.instance, worker.record.address, worker.lifecycle)
            self.readmissions.begin(worker)
        if before is not None and before.state != pong.state:
            self._notices.tell("state", worker)
        self._notices.tell("pong", worker)

    # -- judging ---------------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """One turn: note who was heard, judge, ping."""
        for worker in self._workers.values():
            if worker.link is not None and worker.link.last_heard != worker.heard_at:
                worker.heard_at = worker.link.last_heard
                self._detector.heard(worker.instance, now)
        for judgement in self._detector.check(now):
            self._act(judgement)
        self.readmissions.check(now)
        for instance in self._detector.due_pings(now):
            self._ping(self._workers[instance], now)

    def _ping(self, worker: Worker, now: float) -> None:
        if worker.link is None:
            return
        try:
            self._detector.pinged(worker.instance, worker.link.ping(), now)
        except HoldfastError as error:
            log.debug("no ping to worker %s: %s", worker.instance, error.message)

    def _act(self, judgement: Judgement) -> None:
        """State first, so that whoever is told about a broken stream no longer finds this worker usable."""
        worker = self._workers.get(judgement.instance)
        if worker is None or worker.link is None:
            return
        if judgement.error is None:
            log.info("worker %s answers again", worker.instance)
            worker.inhibition.answered()
            self.move(worker, "connecting" if worker.state == "ejected" else None)
            self.readmissions.begin(worker)
            return
        error = worker.struck = worker.last_error = judgement.error
        self.readmissions.drop(worker)
        if judgement.state == "stalled" or not worker.doubted:
            worker.doubted = "stalled" if judgement.state == "stalled" else "silent"
        streams = worker.link.streams
        log.warning("%s; moving its %d streams elsewhere", error.message, streams)
        self.move(worker, "silent" if judgement.state == "silent" else "stalled")
        worker.link.abandon(error)

    def move(self, worker: Worker, trigger: Trigger | None) -> None:
        """Follow the state table and tell of a change."""
        if trigger is not None and worker.move(trigger):
            self._notices.tell("state", worker)


def shows_progress(cards: Iterable[ModelCard]) -> bool:
    """Counters mean something when any model of the worker comes from an engine that moves them."""
    return any(card.progress in ("step", "token") for card in cards)

"""Finding a worker for an attempt, and waiting for one within bounds.

Takes the usable workers from the pool, sets aside those that this stream must not get, asks the policy. When
nobody is left the stream waits for a replacement, bounded in time and number, and at once gives up when none
can come. A stream whose worker died under it before it made progress is put on trial: one at a time per
worker, so that a killer prompt is told from its innocent neighbours (see `docs/explanation`).

Must never open a stream or judge a failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from holdfast.base.errors import CapacityExhausted, HoldfastError, NoWorkers, WorkerSaturated
from holdfast.models.card import ModelCard
from holdfast.requests.leases import Lease, LeaseBook
from holdfast.routing.policy import Candidate, Policy, Wish
from holdfast.runtime.streams import StreamHandle, StreamHandler
from holdfast.wire.frames import OpenHeaders

_LOOK_AGAIN = 0.25
"""Seconds after which a waiting stream looks again without being called: supervisors' verdicts and
saturation change without an event of the pool."""


class ServingWorker(Candidate, Protocol):
    """A worker as the request lifecycle needs it (`runtime.pool.Worker`)."""

    @property
    def epoch(self) -> int:
        """Of the running process."""

    def card(self, model: str) -> ModelCard | None:
        """Return its card of that model."""

    def open(self, endpoint: str, headers: OpenHeaders, payload: bytes, handler: StreamHandler) -> StreamHandle:
        """Start a stream. Raises TransportFault when there is no connection."""

    def report_failure(self, error: HoldfastError) -> None:
        """Count a fault of the worker or of the way to it; ignores all others."""

    def report_success(self) -> None:
        """A stream went well."""


class Pool(Protocol):
    """The workers as this process sees them (`runtime.pool.WorkerPool`)."""

    def usable(self, model: str) -> Sequence[ServingWorker]:
        """Return those that may get new work now."""

    def replacement_expected(self, model: str) -> bool:
        """Return whether it makes sense to wait for one."""

    def subscribe(self, callback: Callable[[str, object], None]) -> Callable[[], None]:
        """Call back on every change; returns the way to stop it."""


class Placed:
    """A worker for one attempt, with what is counted for it. `release` when the attempt is over."""

    __slots__ = ("lease", "trial", "worker")

    def __init__(self, worker: ServingWorker, lease: Lease, trial: Lease | None):
        self.worker = worker
        self.lease = lease
        self.trial = trial

    def release(self) -> None:
        """Give back what was counted."""
        self.lease.release()
        if self.trial is not None:
            self.trial.release()


class Need:
    """What one stream needs of its next worker; kept by the stream, changed by its failures."""

    __slots__ = ("avoid", "fingerprint", "model", "refused", "started", "suspect")

    def __init__(self, model: str):
        self.model = model
        self.avoid: set[tuple[str, int]] = set()
        """(instance, epoch) that failed this stream."""
        self.refused: dict[str, HoldfastError] = {}
        """Instances that had no room in this round."""
        self.fingerprint = ""
        self.suspect = False
        self.started = False
        """Some worker has accepted this stream: it waits for room instead of being rejected."""


class Placement:
    """Finds workers for all streams of one process."""

    def __init__(self, pool: Pool, policy: Policy, leases: LeaseBook, max_waiting: int):
        self._pool = pool
        self._policy = policy
        self._leases = leases
        self._max_waiting = max_waiting
        self._waiters: set[asyncio.Future[None]] = set()
        self._unsubscribe = pool.subscribe(lambda _kind, _worker: self.wake())

    def close(self) -> None:
        """Stop listening to the pool."""
        self._unsubscribe()

    def wake(self) -> None:
        """Let every waiting stream look again."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def find(self, need: Need, wait: float) -> Placed:
        """Return a worker for the next attempt.

        Args:
            need: see `Need`.
            wait: seconds to wait for a worker (or for room, once accepted) at most.

        Raises:
            NoWorkers: nobody usable came in time, or nobody can come.
            WorkerSaturated: every usable worker refused this new request for lack of room.
            CapacityExhausted: too many streams wait already.
        """
        placed = self._now(need)
        if placed is not None:
            return placed
        loop = asyncio.get_running_loop()
        began = loop.time()
        lease = self._may_wait(need)
        try:
            while True:
                self._give_up(need, loop.time() - began, wait)
                await self._change(loop, min(_LOOK_AGAIN, max(0.0, began + wait - loop.time())))
                need.refused.clear()
                placed = self._now(need)
                if placed is not None:
                    return placed
        finally:
            lease.release()

    def others(self, need: Need, but: ServingWorker) -> bool:
        """Return whether some other usable worker, not tried yet, could take this stream."""
        return any(
            w.instance != but.instance
            and not w.hesitant
            and w.instance not in need.refused
            and (w.instance, w.epoch) not in need.avoid
            for w in self._pool.usable(need.model)
        )

    def _now(self, need: Need) -> Placed | None:
        usable = self._pool.usable(need.model)
        candidates = [w for w in usable if w.instance not in need.refused] if need.refused else usable
        if usable and not candidates and not need.started:
            raise self._saturated(need)
        if need.suspect:
            candidates = [w for w in candidates if not self._leases.held("trial", w.instance)]
        avoid = (
            frozenset(w.instance for w in candidates if (w.instance, w.epoch) in need.avoid) if need.avoid else _NOBODY
        )
        worker = self._policy.choose(need.model, candidates, Wish(avoid, need.fingerprint))
        if worker is None:
            return None
        trial = self._leases.take("trial", worker.instance) if need.suspect else None
        return Placed(worker, self._leases.take("attempt", worker.instance), trial)

    def _saturated(self, need: Need) -> HoldfastError:
        errors = list(need.refused.values())
        first = errors[-1]
        after = max((e.retry_after or 1.0) for e in errors)
        return WorkerSaturated(
            f"All {len(errors)} usable workers of model '{need.model}' are full; the last one said: {first.message}",
            retry_after=after,
            layer="worker",
            workers=len(errors),
            **{k: v for k, v in first.details.items() if k in ("knob", "threshold", "measured")},
        )

    def _may_wait(self, need: Need) -> Lease:
        waiting = self._leases.held("waiting")
        if waiting >= self._max_waiting:
            raise CapacityExhausted(
                f"No worker of model '{need.model}' is usable and {waiting} streams wait for one already.",
                retry_after=5.0,
                layer="frontend",
                knob="DYN_MIGRATION_MAX_WAITING",
                threshold=self._max_waiting,
                measured=waiting,
            )
        return self._leases.take("waiting")

    def _give_up(self, need: Need, waited: float, wait: float) -> None:
        if self._pool.usable(need.model):
            if waited < wait:
                return
            why = f"the usable ones had no room for {waited:.1f} s"
        elif not self._pool.replacement_expected(need.model):
            why = "the last one left for good and no replacement is expected"
        elif waited < wait:
            return
        else:
            why = f"none came within {wait:g} s (DYN_MIGRATION_WAIT_SECS)"
        raise NoWorkers(
            f"No worker for model '{need.model}': {why}.",
            model=need.model,
            waited_seconds=round(waited, 3),
            retry_after=5.0,
        )

    async def _change(self, loop: asyncio.AbstractEventLoop, at_most: float) -> None:
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters.add(waiter)
        timer = loop.call_later(at_most, _resolve, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiters.discard(waiter)


_NOBODY: frozenset[str] = frozenset()


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)

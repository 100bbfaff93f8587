"""Finding a worker for an attempt, and waiting for one within bounds.

Takes the usable workers from the pool, sets aside those that this stream must not get, asks the policy. When
nobody is left the stream waits for a replacement, bounded in time and number, and at once gives up when none
can come. A suspect, whose worker died under it before it made progress, is put on trial: one at a time per
worker, so that a killer prompt is told from its innocent neighbours (see `docs/explanation/poison.md`).

Must never open a stream or judge a failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import count

from holdfast.base.errors import CapacityExhausted, HoldfastError, NoWorkers, WorkerSaturated
from holdfast.requests.fleet import Pool, ServingWorker
from holdfast.requests.leases import Lease, LeaseBook
from holdfast.requests.need import Need, Placed, Watch
from holdfast.routing.policy import Policy, Wish

LOOK_AGAIN = 0.25
"""Seconds after which a waiting stream looks again without being called: supervisors' verdicts and inhibition
change without an event of the pool."""
TRIAL_PATIENCE = 5.0
"""Seconds that a suspect waits for its trial at most: most suspects are innocent."""
LEAST_SEARCH = 5.0
"""Seconds for which a stream that nobody takes may ask around even when it may not wait."""


class Placement:
    """Finds workers for all streams of one process."""

    def __init__(self, pool: Pool, policy: Policy, leases: LeaseBook, max_waiting: int):
        self._pool = pool
        self._policy = policy
        self._leases = leases
        self._max_waiting = max_waiting
        self._waiters: dict[asyncio.Future[None], None] = {}
        self._trials: dict[asyncio.Future[None], tuple[int, int]] = {}
        """Those waiters that wait for a trial; the most suspected has the least value, then the oldest."""
        self._order = count()
        self._unsubscribe = pool.subscribe(self._on_pool)

    def close(self) -> None:
        """Stop listening to the pool."""
        self._unsubscribe()

    def wake(self) -> None:
        """Let every waiting stream look again, in order of arrival."""
        waiters, self._waiters = self._waiters, {}
        self._trials.clear()
        for waiter in waiters:
            _resolve(waiter)

    async def find(self, need: Need, wait: float) -> Placed:
        """Return a worker for the next attempt.

        Args:
            need: see `Need`.
            wait: seconds from the moment when nobody owned the stream any more that it may stay so.

        Raises:
            NoWorkers: nobody usable came in time, or nobody can come, or nobody took the stream in time.
            WorkerSaturated: every usable worker refused this new request for lack of room.
            CapacityExhausted: too many streams wait already.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        if need.since is not None and now - need.since >= max(wait, LEAST_SEARCH):
            raise self._nobody(need, now - need.since, wait)
        placed = self._now(need, now)
        if placed is not None:
            return placed
        need.since = now if need.since is None else need.since
        patience, ticket = now + min(TRIAL_PATIENCE, wait / 2), next(self._order)
        lease = self._may_wait()
        if lease is None:
            return self._now(need, now, alone=False) or self._crowded(need)
        try:
            while True:
                self._give_up(need, loop.time() - need.since, wait)
                rank = (-need.suspicion.blamed, ticket) if need.suspicion.suspect else None
                await self._change(loop, rank, min(LOOK_AGAIN, max(0.0, need.since + wait - loop.time())))
                now = loop.time()
                placed = self._now(need, now, alone=now < patience)
                if placed is not None:
                    return placed
        finally:
            lease.release()

    def others(self, need: Need, but: ServingWorker) -> bool:
        """Return whether some other usable worker, not tried yet, could take this stream."""
        return any(
            w.instance != but.instance
            and not w.hesitant
            and (w.instance, w.epoch) not in need.refused
            and (w.instance, w.epoch) not in need.avoid
            for w in self._pool.usable(need.model)
        )

    def _now(self, need: Need, now: float, *, alone: bool = True) -> Placed | None:
        candidates = self._pool.usable(need.model)
        if need.refused and candidates:
            candidates = self._willing(need, candidates, now)
        record = need.suspicion
        suspect = record.suspect
        if suspect and alone:
            candidates = [w for w in candidates if self._quiet(w)]
        avoid = _NOBODY
        if need.avoid or record.deaths:
            avoid = frozenset(w.instance for w in candidates if self._bad_for(need, w))
        worker = self._policy.choose(need.model, candidates, Wish(avoid, need.fingerprint))
        if worker is None:
            return None
        watch = None
        if suspect or record.known:
            watch = Watch(self._leases.take("trial" if suspect else "probation", worker.instance), self._trial_over)
        return Placed(worker, self._leases.take("attempt", worker.instance), watch)

    def _quiet(self, worker: ServingWorker) -> bool:
        """Return whether nobody else on that worker has lost one before without having proven its innocence."""
        held = self._leases.held
        return not held("trial", worker.instance) and not held("probation", worker.instance)

    def _bad_for(self, need: Need, worker: ServingWorker) -> bool:
        """Return whether that worker failed this stream, or this stream would blur a trial there."""
        if (worker.instance, worker.epoch) in need.avoid:
            return True
        return bool(need.suspicion.deaths) and self._leases.held("trial", worker.instance) > 0

    def _willing(self, need: Need, usable: Sequence[ServingWorker], now: float) -> Sequence[ServingWorker]:
        """Leave out those that did not take the stream lately; a new request that nobody has room for is rejected."""
        refused = need.refused
        willing = [w for w in usable if refused.get((w.instance, w.epoch), _NEVER)[0] <= now]
        if not willing and not need.started:
            errors = [refused[(w.instance, w.epoch)][1] for w in usable]
            if all(error.fault == "capacity" for error in errors):
                raise _saturated(need, errors)
        return willing

    def _may_wait(self) -> Lease | None:
        waiting = self._leases.held("waiting")
        return self._leases.take("waiting") if waiting < self._max_waiting else None

    def _crowded(self, need: Need) -> Placed:
        waiting = self._leases.held("waiting")
        raise CapacityExhausted(
            f"No worker of model '{need.model}' can take the request now and {waiting} streams wait for one already.",
            retry_after=5.0,
            layer="frontend",
            knob="DYN_MIGRATION_MAX_WAITING",
            threshold=self._max_waiting,
            measured=waiting,
        )

    def _give_up(self, need: Need, waited: float, wait: float) -> None:
        """Raise when it makes no sense to wait any longer."""
        if waited >= wait or not (self._pool.usable(need.model) or self._pool.replacement_expected(need.model)):
            raise self._nobody(need, waited, wait)

    def _nobody(self, need: Need, waited: float, wait: float) -> NoWorkers:
        bound = f"{wait:g} s (DYN_MIGRATION_WAIT_SECS)"
        last = need.last_refusal()
        if self._pool.usable(need.model):
            why = f"none of the usable ones took the request within {bound}"
        elif waited < wait:
            why = "the last one left for good and no replacement is expected"
        else:
            why = f"none came within {bound}"
        if last is not None:
            why += f"; the last one said {last.code}: {last.message.rstrip('.')}"
        return NoWorkers(
            f"No worker for model '{need.model}': {why}.",
            model=need.model,
            waited_seconds=round(waited, 3),
            retry_after=5.0,
        )

    def _on_pool(self, kind: str, _worker: object) -> None:
        if kind != "pong":
            self.wake()

    def _trial_over(self) -> None:
        """One suspect more may be tried: call the most suspected, first come first."""
        if self._trials:
            waiter = min(self._trials, key=self._trials.__getitem__)
            del self._trials[waiter]
            _resolve(waiter)

    async def _change(self, loop: asyncio.AbstractEventLoop, rank: tuple[int, int] | None, at_most: float) -> None:
        """Wait for a change in the fleet or, given a rank, for a trial."""
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters[waiter] = None
        if rank is not None:
            self._trials[waiter] = rank
        timer = loop.call_later(at_most, _resolve, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiters.pop(waiter, None)
            self._trials.pop(waiter, None)


_NOBODY: frozenset[str] = frozenset()
_NEVER: tuple[float, HoldfastError | None] = (0.0, None)


def _saturated(need: Need, errors: Sequence[HoldfastError]) -> HoldfastError:
    last = errors[-1]
    return WorkerSaturated(
        f"All {len(errors)} usable workers of model '{need.model}' are full; the last one said: {last.message}",
        retry_after=max((e.retry_after or 1.0) for e in errors),
        layer="worker",
        workers=len(errors),
        **{k: v for k, v in last.details.items() if k in ("knob", "threshold", "measured")},
    )


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)

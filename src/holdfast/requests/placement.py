"""Finding a worker for an attempt, and waiting for one within bounds.

Takes the usable workers from the pool, sets aside those that have no room or that this stream must not get, asks
the policy. When all are full a new request queues or is rejected (`routing.admission`, `line`). When nobody is left
the stream waits for a replacement, bounded in time and number, and at once gives up when none can come. A suspect,
whose worker died under it before it made progress, is put on trial, as soon as all other victims have a worker again:
one at a time per worker, so that a killer prompt is told from its innocent neighbours (`docs/explanation/poison.md`).

Must never open a stream or judge a failure.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import Any

from holdfast.base.errors import CapacityExhausted, HoldfastError, NoWorkers
from holdfast.requests.fleet import Pool, ServingWorker
from holdfast.requests.leases import Lease, LeaseBook
from holdfast.requests.line import Line
from holdfast.requests.need import ASK_AGAIN, Need, Placed, Watch, computes
from holdfast.requests.poison import POISON_DEATHS, Inquest
from holdfast.requests.router import Router
from holdfast.routing.admission import Admission
from holdfast.routing.config import AdmissionSettings
from holdfast.routing.policy_classes import policy_classes

TrialRank = tuple[int, bool, int, int]
LOOK_AGAIN = 0.25
"""Seconds after which a waiting stream looks again without being called: supervisors' verdicts and inhibition
change without an event of the pool."""
TRIAL_PATIENCE = 5.0
"""Seconds that a suspect of one death waits for its trial at most, counted while there is a worker: most suspects are
innocent. After a second death there is a killer, in all likelihood: then it is half the bound of waiting."""
ROOM_PATIENCE = 5.0
"""Seconds that a stream which moves waits for a worker below its thresholds; after that any that takes it will do."""
LEAST_SEARCH = 5.0
"""Seconds for which a stream that nobody takes may ask around even when it may not wait."""


class Placement:
    """Finds workers for all streams of one process."""

    def __init__(
        self,
        pool: Pool,
        router: Router,
        leases: LeaseBook,
        *,
        max_waiting: int,
        admission: Admission,
        settings: AdmissionSettings,
        inquest: Inquest,
    ):
        self._pool = pool
        self._inquest = inquest
        inquest.on_still = self._trial_over
        self._admission = admission
        wanted = router.settings
        classes = policy_classes(wanted.router_policy_config)
        self.line = Line(settings, leases, admission.drain, wanted.router_queue_policy, classes)
        self.line.workers_of = lambda model: len(pool.usable(model))
        self.line.tokens_of = self._new_tokens
        self._router = router
        self._leases = leases
        self._max_waiting = max_waiting
        self._room_at: dict[tuple[str, int], float] = {}
        """When a stream ended on a worker (instance, epoch) last."""
        self._waiters: dict[asyncio.Future[None], None] = {}
        self._trials: dict[asyncio.Future[None], TrialRank] = {}
        """Those waiters that wait for a trial; the most suspected has the least value (`Record.rank`)."""
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
            CapacityExhausted: no usable worker has room for this new request, or too many streams wait already.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self.line.open and not need.promised and self.line.overtakes(need, now):
            return await self.line.stand(need, None, partial(self._look, need))
        if need.queued_at is None and need.since is not None and now - need.since >= max(wait, LEAST_SEARCH):
            raise self._nobody(need, now - need.since, wait)
        placed = self._now(need, now) or await self._room(need, wait)
        if placed is not None:
            return placed
        now = loop.time()
        need.since = now if need.since is None else need.since
        trial = _Patience(need, wait, next(self._order))
        lease = self._may_wait()
        if lease is None:
            return self._now(need, now, alone=False) or self._crowded(need)
        try:
            while True:
                self._give_up(need, loop.time() - need.since, wait)
                await self._change(loop, trial.rank, min(LOOK_AGAIN, max(0.0, need.since + wait - loop.time())))
                now = loop.time()
                alone = trial.lasts(now, bool(self._pool.usable(need.model)))
                placed = self._now(need, now, alone=alone) or await self._room(need, wait)
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
        candidates = self._with_room(need, self._usable(need, now), now)
        record = need.suspicion
        suspect = bool(record.deaths) and record.suspect
        if suspect and alone:
            self._inquest.still(record)
            candidates = [] if self._inquest.moving else [w for w in candidates if self._quiet(w)]
        avoid = _NOBODY
        if need.avoid or record.deaths:
            avoid = frozenset(w.instance for w in candidates if self._bad_for(need, w))
        choice = self._router.choose(need, candidates, avoid, now)
        if choice is None:
            return None
        worker = choice.worker
        watch = None
        if suspect or (record.deaths and record.known):
            watch = Watch(self._leases.take("trial" if suspect else "probation", worker.instance), self._trial_over)
        claim = self._router.claim(self._admission.ledger, need, choice)
        need.party.admit()
        if record.deaths:
            self._inquest.still(record)
            if suspect:
                self._trial_over()
        lease = self._leases.take("attempt", worker.instance)
        return Placed(worker, lease, claim, watch, rank=choice.rank, decision=choice.decision)

    def _new_tokens(self, need: Need) -> int:
        return self._router.new_tokens(need, self._pool.usable(need.model), asyncio.get_running_loop().time())

    def _usable(self, need: Need, now: float) -> Sequence[ServingWorker]:
        found = self._router.eligible(need, self._pool.usable(need.model), now)
        return [w for w in found if computes(w, need.model)] or found if need.whole else found

    def release(self, need: Need, placed: Placed, *, worked: bool) -> None:
        """An attempt is over: there may be room for somebody else.

        Args:
            need: of its stream.
            placed: what it had.
            worked: whether the worker had accepted it.
        """
        placed.release(need.tokens)
        if worked:
            now = self._room_at[placed.key] = asyncio.get_running_loop().time()
            self._admission.drain.ended(need.model, now)
        self.line.offer(need.model)

    async def _room(self, need: Need, wait: float) -> Placed | None:
        """Wait for room if that is what is missing; None: there is nobody, or waiting has become pointless."""
        if need.full is None:
            return None
        if not need.promised:
            return await self.line.stand(need, need.full, partial(self._look, need))
        now = asyncio.get_running_loop().time()
        need.since = now if need.since is None else need.since
        until = need.since + min(ROOM_PATIENCE, wait / 2)
        placed = await self.line.stand_first(need, until, partial(self._look, need))
        if placed is None:
            need.crowded = True
            placed = self._look(need)
        return placed

    def _look(self, need: Need) -> Placed | None:
        placed = self._now(need, asyncio.get_running_loop().time())
        if placed is None:
            self._give_up(need, 0.0, math.inf)
        return placed

    def _quiet(self, worker: ServingWorker) -> bool:
        """Return whether nobody else on that worker has lost one before without having proven its innocence."""
        held = self._leases.held
        return not held("trial", worker.instance) and not held("probation", worker.instance)

    def _bad_for(self, need: Need, worker: ServingWorker) -> bool:
        """Return whether that worker failed this stream, or this stream would blur a trial there."""
        if (worker.instance, worker.epoch) in need.avoid:
            return True
        return bool(need.suspicion.deaths) and self._leases.held("trial", worker.instance) > 0

    def _with_room(self, need: Need, usable: Sequence[ServingWorker], now: float) -> Sequence[ServingWorker]:
        """Leave out those that are full or did not take the stream lately; ``need.full`` says why nobody is left.

        Raises:
            CapacityExhausted: a new request that nobody has room for, and there is no queue.
        """
        need.full = None
        refused = self._unwilling(need, now) if need.refused else {}
        if need.promised or (need.party.admitted and need.party.size > 1):
            return self._for_the_promised(need, [w for w in usable if (w.instance, w.epoch) not in refused], now)
        spot = self.line.spot(need)
        thresholds = spot.policy_class.thresholds(self._admission.book.of(need.model)) if spot is not None else None
        if not refused:
            free = self._admission.with_room(need.model, usable, thresholds)
            if free or not usable:  # as `judge` would say, to whom there is much to tell
                return free
        verdict = self._admission.judge(
            need.model,
            usable,
            refused,
            queueing=self.line.open,
            ahead=self.line.waiting(need.model),
            now=now,
            thresholds=thresholds,
        )
        need.full = verdict.error
        if verdict.decision == "reject" and verdict.error is not None:
            raise need.party.refuse(verdict.error)
        return verdict.free

    def _unwilling(self, need: Need, now: float) -> dict[tuple[str, int], HoldfastError]:
        """Return those that did not take it lately; where a stream has ended since there is room to ask for."""
        return {
            key: error
            for key, (until, error) in need.refused.items()
            if until > now and (error.fault != "capacity" or until - ASK_AGAIN >= self._room_at.get(key, 0.0))
        }

    def _for_the_promised(self, need: Need, willing: Sequence[ServingWorker], now: float) -> Sequence[ServingWorker]:
        """Thresholds make them wait for a while, and never turn them away."""
        if need.crowded or not need.started or not willing:
            return willing
        free = self._admission.with_room(need.model, willing)
        if not free:
            need.full = self._admission.judge(need.model, willing, {}, queueing=True, ahead=0, now=now).error
        return free

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

    def _on_pool(self, kind: str, worker: Any) -> None:
        if kind == "removed":
            self._room_at.clear()
            self._router.forget(worker.instance)
        if kind != "pong":
            self.wake()
        self.line.offer()

    def _trial_over(self) -> None:
        """One suspect more may be tried: call the most suspected, first come first."""
        if self._trials:
            waiter = min(self._trials, key=self._trials.__getitem__)
            del self._trials[waiter]
            _resolve(waiter)

    async def _change(self, loop: asyncio.AbstractEventLoop, rank: TrialRank | None, at_most: float) -> None:
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


class _Patience:
    """How long one stream that waits may be kept for its trial."""

    __slots__ = ("_record", "_seconds", "_ticket", "_until")

    def __init__(self, need: Need, wait: float, ticket: int):
        self._record = need.suspicion
        longest = TRIAL_PATIENCE if self._record.blamed < POISON_DEATHS else math.inf
        self._seconds = min(longest, wait / 2)
        self._ticket = ticket
        self._until: float | None = None

    @property
    def rank(self) -> TrialRank | None:
        """Its place among those who wait for a trial; None: it does not."""
        return (*self._record.rank, self._ticket) if self._record.suspect else None

    def lasts(self, now: float, anybody: bool) -> bool:
        """Return whether it goes on waiting for a worker of its own; ``anybody``: there are workers at all."""
        if not anybody:
            self._until = None
            return True
        if self._until is None:
            self._until = now + self._seconds
        return now < self._until


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)

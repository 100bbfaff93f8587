"""The queue in front of saturated workers, brought to life: who waits, is called, is displaced, gives up.

Only the first of each model looks for room, when something has changed: a pong, the end of a stream, a threshold.
When it found room the next one looks. Streams that were admitted before stand here too, before all others and outside
the bound. With policy classes (`lanes`) the first one of each class looks, in the order in which it is their turn.

Must never choose a worker or decide who is important (`routing.queue`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import Literal

from holdfast.base.errors import CapacityExhausted, HoldfastError, InvalidRequest
from holdfast.requests.lanes import Excess, Lanes, Spot, model_of
from holdfast.requests.leases import LeaseBook
from holdfast.requests.need import Need, Placed
from holdfast.routing.config import AdmissionSettings
from holdfast.routing.drain import DrainMeter
from holdfast.routing.policy_classes import PolicyClasses
from holdfast.routing.queue import Rank, Waiting, WaitQueue
from holdfast.routing.router_config import QueuePolicy

Outcome = Literal["placed", "rejected", "cancelled", "failed"]
"""How a wait ended: with a place, turned away, by the client, or because nobody can come any more."""

LOOK_AGAIN = 1.0
"""Seconds after which the first one looks without being called."""


class _Call:
    """How one waiting stream is called."""

    __slots__ = ("cost", "error", "future")

    def __init__(self, cost: int = 1) -> None:
        self.cost = cost
        """What its class pays for it."""
        self.error: HoldfastError | None = None
        self.future: asyncio.Future[None] | None = None

    def call(self) -> None:
        if self.future is not None and not self.future.done():
            self.future.set_result(None)

    async def wait(self, until: float) -> None:
        """Wait to be called, at most until then (loop time)."""
        self.future = asyncio.get_running_loop().create_future()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self.future


class Line:
    """All waiting streams of one process."""

    def __init__(
        self,
        settings: AdmissionSettings,
        leases: LeaseBook,
        drain: DrainMeter,
        policy: QueuePolicy = "fcfs",
        classes: PolicyClasses | None = None,
    ):
        self._queue: WaitQueue[_Call] = WaitQueue(settings.admission_queue_limit, policy)
        self._timeout = settings.admission_queue_timeout
        self._models = _points(settings.model_priorities)
        self._leases = leases
        self._drain = drain
        self.on_waited: Callable[[str, Outcome, float], None] = _nothing
        """Called after each wait of a new request with its model, how it ended and the seconds that it took."""
        self.tokens_of: Callable[[Need], int] = _tokens
        """Tells how many tokens would have to be computed for a new request; asked when the order depends on it."""
        self.workers_of: Callable[[str], int] = _one
        """Tells how many workers a model has: the limits of classes grow with them."""
        self._lanes = Lanes(classes)

    @property
    def limit(self) -> int:
        """Most new requests that may wait here; 0: there is no queue."""
        return self._queue.limit

    def models(self) -> list[str]:
        """Return the models for which somebody waits."""
        return list(dict.fromkeys(map(model_of, self._queue.models())))

    @property
    def open(self) -> bool:
        """Whether there is a queue for new requests."""
        return self._queue.limit > 0

    def waiting(self, model: str) -> int:
        """Return how many wait for room of a model."""
        return sum(map(self._queue.waiting, self._lanes.of(model)))

    def spot(self, need: Need) -> Spot | None:
        """Return where a new request stands, found out once; None: there are no classes for its model."""
        if self._lanes.any and need.spot is None:
            need.spot = self._lanes.spot(need, self.tokens_of(need))
        return need.spot

    def offer(self, model: str | None = None) -> None:
        """There may be room: let the first of the model (None: of each) look."""
        if self._queue.empty:
            return
        for name in self.models() if model is None else (model,):
            for lane in self._lanes.order(name, self._heads(name)) if self._lanes.any else (name,):
                head = self._queue.head(lane)
                if head is not None:
                    head.item.call()

    def overtakes(self, need: Need, now: float) -> bool:
        """Return whether others who wait must be served before this newcomer."""
        if need.queued_at is not None:
            return False
        spot = self.spot(need)
        if spot is not None:
            own = self._queue.before(spot.lane, self._rank(need), now, spot.cost, spot.policy_class.queue_policy)
            return own or self._queue.head(need.model) is not None
        if self._queue.head(need.model) is None:
            return False
        return self._queue.before(need.model, self._rank(need), now, self._tokens(need))

    async def stand(self, need: Need, full: CapacityExhausted | None, look: Callable[[], Placed | None]) -> Placed:
        """Wait for a place on a worker as a new request.

        Args:
            need: of the stream.
            full: why there is no room; None: others are to be served first.
            look: tries to get one; it may raise what ends the request.

        Raises:
            CapacityExhausted: the queue is full, or somebody more important came, or the wait took too long.
            HoldfastError: from ``look``, or because another choice of the same request was turned away.
        """
        began = asyncio.get_running_loop().time()
        outcome: Outcome = "failed"
        try:
            placed = await self._stand(need, full, look, began)
            outcome = "placed"
        except CapacityExhausted:
            outcome = "rejected"
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self.on_waited(need.model, outcome, asyncio.get_running_loop().time() - began)
        return placed

    async def _stand(
        self, need: Need, full: CapacityExhausted | None, look: Callable[[], Placed | None], now: float
    ) -> Placed:
        loop = asyncio.get_running_loop()
        if need.queued_at is None:
            need.queued_at = now
        until = need.queued_at + self._timeout
        spot = self.spot(need)
        call = _Call(spot.cost if spot is not None else 1)
        with self._place(need, call, full) as place:
            while True:
                self._check(need, call)
                if need.party.admitted or self._first(need, place):
                    heads = self._heads(need.model) if spot is not None else {}
                    placed = look()
                    if placed is not None:
                        if spot is not None:
                            self._lanes.served(need.model, spot.lane, {**heads, spot.lane: spot.cost})
                        return placed
                if loop.time() >= until:
                    raise need.party.refuse(self._overdue(need, loop.time() - need.queued_at))
                await call.wait(min(until, loop.time() + LOOK_AGAIN))

    async def stand_first(self, need: Need, until: float, look: Callable[[], Placed | None]) -> Placed | None:
        """Wait for a place as a stream that was admitted before; None when the time (loop time) is over."""
        loop = asyncio.get_running_loop()
        call = _Call()
        place, _ = self._queue.join(call, need.model, Rank(), loop.time(), promised=True)
        assert place is not None
        try:
            while loop.time() < until:
                await call.wait(until)
                placed = look()
                if placed is not None:
                    return placed
        finally:
            self._queue.leave(place)
            self.offer(need.model)
        return None

    @contextlib.contextmanager
    def _place(self, need: Need, call: _Call, full: CapacityExhausted | None) -> Generator[Waiting[_Call], None, None]:
        assert need.queued_at is not None
        place, loser = self._join(need, call)
        if place is None:
            raise need.party.refuse(self._crowded(need.model, full))
        if loser is not None:
            loser.error = self._displaced(need.model)
            loser.call()
        lease = self._leases.take("queued")
        spot = need.spot
        if spot is not None:
            self._lanes.joined(spot)
        need.party.calls.append(call.call)
        try:
            yield place
        finally:
            need.party.calls.remove(call.call)
            lease.release()
            if spot is not None:
                self._lanes.left(spot)
            self._queue.leave(place)
            self.offer(need.model)

    def _join(self, need: Need, call: _Call) -> tuple[Waiting[_Call] | None, _Call | None]:
        assert need.queued_at is not None
        spot = need.spot
        if spot is None:
            return self._queue.join(call, need.model, self._rank(need), need.queued_at, tokens=self._tokens(need))
        excess = self._lanes.full(spot, max(1, self.workers_of(need.model)))
        if excess is not None:
            raise need.party.refuse(self._over(need.model, spot, excess))
        return self._queue.join(
            call,
            spot.lane,
            self._rank(need),
            need.queued_at,
            tokens=spot.cost,
            policy=spot.policy_class.queue_policy,
        )

    def _first(self, need: Need, place: Waiting[_Call]) -> bool:
        """Return whether it is for this one to look: the first of its lane, and nobody was promised a place before."""
        if need.spot is None:
            return self._queue.head(need.model) is place
        return self._queue.head(need.spot.lane) is place and self._queue.head(need.model) is None

    def _heads(self, model: str) -> dict[str, int]:
        """Return what the first one of each lane costs in which somebody waits."""
        heads = {lane: self._queue.head(lane) for lane in self._lanes.of(model)}
        return {lane: head.item.cost for lane, head in heads.items() if head is not None}

    def _check(self, need: Need, call: _Call) -> None:
        if call.error is not None:
            raise need.party.refuse(call.error)
        if need.party.error is not None:
            raise need.party.error

    def _tokens(self, need: Need) -> int:
        return self.tokens_of(need) if self._queue.policy == "wspt" else 0

    def _rank(self, need: Need) -> Rank:
        return Rank(need.rank.strict, need.rank.priority + self._models.get(need.model, 0))

    # why somebody is turned away

    def _crowded(self, model: str, full: CapacityExhausted | None) -> CapacityExhausted:
        why = full.message if full is not None else f"Others wait for room on the workers of model '{model}' already."
        return self._error(
            model,
            f"{why} The queue is full: {len(self._queue)} streams at least as important wait, its limit is "
            f"{self._queue.limit} (DYN_ADMISSION_QUEUE_LIMIT).",
            "DYN_ADMISSION_QUEUE_LIMIT",
            self._queue.limit,
            len(self._queue),
        )

    def _over(self, model: str, spot: Spot, excess: Excess) -> CapacityExhausted:
        name = spot.policy_class.name
        error = self._error(
            model,
            f"Too much waits in policy class '{name}' of model '{model}': {excess.current}, and its "
            f"{excess.limit} allows {excess.bound} with the workers that there are (DYN_ROUTER_POLICY_CONFIG).",
            excess.limit,
            excess.bound,
            excess.current,
        )
        error.details["policy_class"] = name
        return error

    def _displaced(self, model: str) -> CapacityExhausted:
        return self._error(
            model,
            f"A more important request took the place in the queue; all {self._queue.limit} are taken "
            "(DYN_ADMISSION_QUEUE_LIMIT).",
            "DYN_ADMISSION_QUEUE_LIMIT",
            self._queue.limit,
            len(self._queue),
        )

    def _overdue(self, need: Need, waited: float) -> CapacityExhausted:
        why = f" {need.full.message}" if need.full is not None else ""
        return self._error(
            need.model,
            f"No worker of model '{need.model}' had room within {self._timeout:g} s "
            f"(DYN_ADMISSION_QUEUE_TIMEOUT_SECS).{why}",
            "DYN_ADMISSION_QUEUE_TIMEOUT_SECS",
            self._timeout,
            round(waited, 3),
        )

    def _error(self, model: str, message: str, knob: str, threshold: float, measured: float) -> CapacityExhausted:
        now = asyncio.get_running_loop().time()
        return CapacityExhausted(
            message,
            retry_after=self._drain.retry_after(model, self.waiting(model), now),
            layer="frontend queue",
            knob=knob,
            threshold=threshold,
            measured=measured,
        )


def _nothing(_model: str, _outcome: Outcome, _seconds: float) -> None:
    return


def _tokens(need: Need) -> int:
    return need.tokens


def _one(_model: str) -> int:
    return 1


def _points(texts: tuple[str, ...]) -> Mapping[str, int]:
    """Return ``name=points`` as a mapping. Raises InvalidRequest naming what is wrong."""
    points = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            points[name] = int(number)
        except ValueError:
            name = ""
        if not name:
            raise InvalidRequest(
                f"DYN_MODEL_PRIORITIES: {text!r} is not name=points with a whole number of points.",
                param="DYN_MODEL_PRIORITIES",
            )
    return points

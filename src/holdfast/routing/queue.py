"""Who waits in front of saturated workers, who is next, and who is turned away when the queue is full.

Service order: what was promised before, then strict priority; below it first come first served, where each point of
priority counts as having come one second earlier. So within a priority nobody is overtaken, a more important request
goes first, and none can be overtaken for longer than its priority is behind: without strict priorities there is no
starvation. Strict priorities are meant to starve those below them; every wait has a deadline anyway.

With the policy ``wspt`` what is quickly computed goes first: each request counts as having come so much later as its
uncached tokens, divided by 1 + priority, take at `TOKENS_PER_SECOND`, `LONGEST_HANDICAP` at most. Among those that come
together this is the reference's order, (1 + priority) / tokens; and nobody is overtaken by a request that comes later
than its own handicap after it, so that nobody starves.

The policy ``lcfs`` is the reference's, for experiments that compare: the last goes first, each point of priority
counts as having come one second later. It starves by design: while more come than are served, the first ones wait
until their time is over, and that bound (`AdmissionSettings.admission_queue_timeout`) is all that protects them.

Shedding order is another one: the least important goes first (strict priority, then priority, negative ones count
here too), and among equals the one that came last, so that a newcomer never displaces its equal.

Must never know a worker, an event loop or what is waiting.
"""

from __future__ import annotations

import heapq
from itertools import count
from typing import Generic, TypeVar

import msgspec

from holdfast.routing.router_config import QueuePolicy

T = TypeVar("T")
Key = tuple[float, ...]
SECONDS_PER_PRIORITY = 1.0
TOKENS_PER_SECOND = 2_000.0
LONGEST_HANDICAP = 30.0
"""Seconds by which later requests can overtake one with ``wspt``."""


class Rank(msgspec.Struct, frozen=True, order=True):
    """How important a request is: of itself plus its model's share. Greater is more important."""

    strict: int = 0
    priority: int = 0


class Waiting(Generic[T]):
    """One place in the queue."""

    __slots__ = ("arrived", "gone", "item", "model", "promised", "rank", "service", "shedding")

    def __init__(self, item: T, model: str, rank: Rank, arrived: float, number: int, *, promised: bool, turn: float):
        self.item = item
        self.model = model
        self.rank = rank
        self.arrived = arrived
        """Seconds; a place that is taken again keeps its first time."""
        self.promised = promised
        self.service: Key = (not promised, -rank.strict, turn, number)
        """Smaller goes first."""
        self.shedding: Key = (rank.strict, rank.priority, -arrived, -number)
        """Smaller is turned away first."""
        self.gone = False


class WaitQueue(Generic[T]):
    """Bounded over all models; served per model.

    Args:
        limit: places; 0: the queue is off.
        policy: the order within a strict priority.
    """

    def __init__(self, limit: int, policy: QueuePolicy = "fcfs"):
        self.limit = limit
        self.policy = policy
        self._lines: dict[str, list[tuple[Key, Waiting[T]]]] = {}
        self._shed: list[tuple[Key, Waiting[T]]] = []
        self._numbers = count()
        self._size = 0
        self._alive = 0
        """Promised places included."""

    def __len__(self) -> int:
        """Return how many wait within the bound."""
        return self._size

    @property
    def empty(self) -> bool:
        """Whether nobody waits, not even outside the bound."""
        return not self._alive

    def waiting(self, model: str) -> int:
        """Return how many wait for one model."""
        return sum(not place.gone for _, place in self._lines.get(model, ()))

    def models(self) -> list[str]:
        """Return the models for which somebody waits."""
        return [model for model in list(self._lines) if self.head(model) is not None]

    def join(
        self,
        item: T,
        model: str,
        rank: Rank,
        arrived: float,
        *,
        promised: bool = False,
        tokens: int = 0,
        policy: QueuePolicy | None = None,
    ) -> tuple[Waiting[T] | None, T | None]:
        """Ask for a place.

        Args:
            item: who asks.
            model: for whose workers; any name of a line that is served by itself.
            rank: its importance.
            arrived: when it asked for a place for the first time, in seconds.
            promised: it was admitted before: goes first, takes no place of the bound and is never turned away.
            tokens: that would have to be computed for it (``wspt``).
            policy: the order of its line, when it has one of its own.

        Returns:
            The place, or None when the queue is full of others at least as important; and who lost its place to it.
        """
        turn = self._turn(rank, arrived, tokens, policy)
        place = Waiting(item, model, rank, arrived, next(self._numbers), promised=promised, turn=turn)
        loser: T | None = None
        if not promised and self._size >= self.limit:
            least = self._least()
            if least is None or least.shedding[:2] >= place.shedding[:2]:
                return None, None
            self.leave(least)
            loser = least.item
        heapq.heappush(self._lines.setdefault(model, []), (place.service, place))
        if not promised:
            heapq.heappush(self._shed, (place.shedding, place))
            self._size += 1
        self._alive += 1
        return place, loser

    def leave(self, place: Waiting[T]) -> None:
        """Give a place back; idempotent."""
        if place.gone:
            return
        place.gone = True
        self._alive -= 1
        self._size -= not place.promised
        self._tidy(self._lines[place.model])
        self._tidy(self._shed)
        if not self._lines[place.model]:
            del self._lines[place.model]

    def head(self, model: str) -> Waiting[T] | None:
        """Return who is next for a model."""
        line = self._lines.get(model)
        return line[0][1] if line else None

    def before(self, model: str, rank: Rank, now: float, tokens: int = 0, policy: QueuePolicy | None = None) -> bool:
        """Return whether somebody who waits goes before a newcomer of this rank, with so many tokens to compute."""
        head = self.head(model)
        if head is None:
            return False
        return head.service[:3] <= (True, -rank.strict, self._turn(rank, now, tokens, policy))

    def _turn(self, rank: Rank, arrived: float, tokens: int, policy: QueuePolicy | None) -> float:
        """Return the moment by which it is ordered: when it came, and what is for or against it."""
        points = max(0, rank.priority)
        policy = policy or self.policy
        if policy == "fcfs":
            return arrived - points * SECONDS_PER_PRIORITY
        if policy == "lcfs":
            return -arrived - points * SECONDS_PER_PRIORITY
        return arrived + min(LONGEST_HANDICAP, tokens / TOKENS_PER_SECOND / (1 + points))

    def _least(self) -> Waiting[T] | None:
        return self._shed[0][1] if self._shed else None

    def _tidy(self, heap: list[tuple[Key, Waiting[T]]]) -> None:
        """Keep a live place at the top, and do not let the dead pile up below it."""
        while heap and heap[0][1].gone:
            heapq.heappop(heap)
        if len(heap) > 2 * self._alive + 16:
            heap[:] = [entry for entry in heap if not entry[1].gone]
            heapq.heapify(heap)

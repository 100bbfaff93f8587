"""Who waits in front of saturated workers, who is next, and who is turned away when the queue is full.

Service order: what was promised before, then strict priority; below it first come first served, where each point of
priority counts as having come one second earlier. So within a priority nobody is overtaken, a more important request
goes first, and none can be overtaken for longer than its priority is behind: without strict priorities there is no
starvation. Strict priorities are meant to starve those below them; every wait has a deadline anyway.

Shedding order is another one: the least important goes first (strict priority, then priority, negative ones count
here too), and among equals the one that came last, so that a newcomer never displaces its equal.

Must never know a worker, an event loop or what is waiting.
"""

from __future__ import annotations

import heapq
from itertools import count
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")
Key = tuple[float, ...]
SECONDS_PER_PRIORITY = 1.0


class Rank(msgspec.Struct, frozen=True, order=True):
    """How important a request is: of itself plus its model's share. Greater is more important."""

    strict: int = 0
    priority: int = 0


class Waiting(Generic[T]):
    """One place in the queue."""

    __slots__ = ("arrived", "gone", "item", "model", "promised", "rank", "service", "shedding")

    def __init__(self, item: T, model: str, rank: Rank, arrived: float, number: int, *, promised: bool):
        self.item = item
        self.model = model
        self.rank = rank
        self.arrived = arrived
        """Seconds; a place that is taken again keeps its first time."""
        self.promised = promised
        self.service: Key = (not promised, -rank.strict, arrived - max(0, rank.priority) * SECONDS_PER_PRIORITY, number)
        """Smaller goes first."""
        self.shedding: Key = (rank.strict, rank.priority, -arrived, -number)
        """Smaller is turned away first."""
        self.gone = False


class WaitQueue(Generic[T]):
    """Bounded over all models; served per model.

    Args:
        limit: places; 0: the queue is off.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._lines: dict[str, list[tuple[Key, Waiting[T]]]] = {}
        self._shed: list[tuple[Key, Waiting[T]]] = []
        self._numbers = count()
        self._size = 0
        self._alive = 0
        """Promised places included."""

    def __len__(self) -> int:
        """Return how many wait within the bound."""
        return self._size

    def waiting(self, model: str) -> int:
        """Return how many wait for one model."""
        return sum(not place.gone for _, place in self._lines.get(model, ()))

    def models(self) -> list[str]:
        """Return the models for which somebody waits."""
        return [model for model in list(self._lines) if self.head(model) is not None]

    def join(
        self, item: T, model: str, rank: Rank, arrived: float, *, promised: bool = False
    ) -> tuple[Waiting[T] | None, T | None]:
        """Ask for a place.

        Args:
            item: who asks.
            model: for whose workers.
            rank: its importance.
            arrived: when it asked for a place for the first time, in seconds.
            promised: it was admitted before: goes first, takes no place of the bound and is never turned away.

        Returns:
            The place, or None when the queue is full of others at least as important; and who lost its place to it.
        """
        place = Waiting(item, model, rank, arrived, next(self._numbers), promised=promised)
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

    def before(self, model: str, rank: Rank, now: float) -> bool:
        """Return whether somebody who waits goes before a newcomer of this rank."""
        head = self.head(model)
        if head is None:
            return False
        return head.service[:3] <= (True, -rank.strict, now - max(0, rank.priority) * SECONDS_PER_PRIORITY)

    def _least(self) -> Waiting[T] | None:
        return self._shed[0][1] if self._shed else None

    def _tidy(self, heap: list[tuple[Key, Waiting[T]]]) -> None:
        """Keep a live place at the top, and do not let the dead pile up below it."""
        while heap and heap[0][1].gone:
            heapq.heappop(heap)
        if len(heap) > 2 * self._alive + 16:
            heap[:] = [entry for entry in heap if not entry[1].gone]
            heapq.heapify(heap)

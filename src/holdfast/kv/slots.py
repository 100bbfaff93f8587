"""Small numbers for (worker, data-parallel rank), as the prefix index and the load table use them.

A number is free for another as soon as its worker is released; whoever releases must clear it in the index first or at
once after, before the next `assign`. Must never know what the numbers are used for.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from heapq import heappop, heappush
from typing import Generic, TypeVar

from holdfast.base.errors import CapacityExhausted
from holdfast.kv.index import MAX_SLOTS

W = TypeVar("W", bound=Hashable)


class SlotTable(Generic[W]):
    """Hands out slots, the smallest free one first."""

    __slots__ = ("_free", "_of_worker", "_owners")

    def __init__(self) -> None:
        self._owners: list[tuple[W, int] | None] = []
        self._of_worker: dict[W, dict[int, int]] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._owners) - len(self._free)

    def __iter__(self) -> Iterator[tuple[int, W, int]]:
        """Yield (slot, worker, rank), by ascending slot."""
        for slot, owner in enumerate(self._owners):
            if owner is not None:
                yield slot, *owner

    def assign(self, worker: W, rank: int = 0) -> int:
        """Return the slot of a worker's rank, a new one if it has none.

        Raises:
            CapacityExhausted: `MAX_SLOTS` are in use.
        """
        ranks = self._of_worker.get(worker)
        if ranks is not None and rank in ranks:
            return ranks[rank]
        if self._free:
            slot = heappop(self._free)
            self._owners[slot] = (worker, rank)
        elif len(self._owners) < MAX_SLOTS:
            slot = len(self._owners)
            self._owners.append((worker, rank))
        else:
            raise CapacityExhausted(f"{MAX_SLOTS} slots for workers and their ranks are in use, the most there can be")
        self._of_worker.setdefault(worker, {})[rank] = slot
        return slot

    def find(self, worker: W, rank: int = 0) -> int | None:
        """Return the slot of a worker's rank, or None."""
        return self._of_worker.get(worker, {}).get(rank)

    def owner(self, slot: int) -> tuple[W, int] | None:
        """Return (worker, rank) of a slot, or None for one that nobody has."""
        return self._owners[slot] if 0 <= slot < len(self._owners) else None

    def of_worker(self, worker: W) -> dict[int, int]:
        """Return slots by rank."""
        return dict(self._of_worker.get(worker, {}))

    def release(self, worker: W) -> tuple[int, ...]:
        """Take a worker's slots back and return them, ascending; empty when it has none."""
        slots = tuple(sorted(self._of_worker.pop(worker, {}).values()))
        for slot in slots:
            self._owners[slot] = None
            heappush(self._free, slot)
        return slots

"""What a worker probably holds, when it does not say: from the routing decisions alone.

A decision for a worker is taken as "it now holds these blocks", for a time (``ttl``), or as long as they are among the
last that fit into the capacity it advertised (least recently used, the end of a prompt before its beginning, as engines
evict), or both. Because the index underneath counts how often a block was stored, a block lives exactly as long as the
last decision that mentions it.

The same thing serves as the short memory beside an exact index: decisions whose events have not come yet.

Must never read a clock: the time is passed in, in seconds, and never goes back.
"""

from __future__ import annotations

from array import array
from collections import deque

from holdfast.kv.index import Buffer, Overlap, PrefixIndex
from holdfast.kv.tiers import Tier

TTL = 120.0
"""Seconds that a decision counts, as in other KV routers."""

REMEMBERED_HASHES = 8 * 1024 * 1024
"""Most hashes kept in decisions, 8 bytes each; beyond it the oldest decisions end early."""

_COMPACT_FROM = 4_096
_COMPACT_AT = 4


class _Decision:
    __slots__ = ("ends", "hashes", "slot")

    def __init__(self, slot: int, hashes: array[int], ends: float) -> None:
        self.slot = slot
        self.hashes = hashes
        self.ends = ends


class ApproximateIndex:
    """An index fed by decisions. It owns `index`, which nobody else may feed."""

    __slots__ = ("_by_slot", "_capacity", "_empty", "_index", "_kept", "_limit", "_order", "_queued", "_ttl")

    def __init__(self, index: PrefixIndex, *, ttl: float | None = TTL, limit: int = REMEMBERED_HASHES) -> None:
        """Start without any knowledge.

        Args:
            index: an empty one, without a limit.
            ttl: seconds that a decision counts; None: until it is evicted.
            limit: most hashes that decisions may hold together.
        """
        self._index = index
        self._ttl = ttl
        self._limit = limit
        self._capacity: dict[int, int] = {}
        self._order: deque[_Decision] = deque()
        self._by_slot: dict[int, deque[_Decision]] = {}
        self._queued: dict[int, int] = {}
        self._kept = 0
        self._empty = 0

    @property
    def remembered(self) -> int:
        """Hashes in decisions that still count."""
        return self._kept

    def set_capacity(self, slot: int, blocks: int | None) -> None:
        """Note how many blocks a worker has room for (None or 0: unknown, then only the time counts)."""
        if blocks:
            self._capacity[slot] = blocks
            self._evict(slot)
        else:
            self._capacity.pop(slot, None)

    def decided(self, slot: int, hashes: Buffer, now: float) -> None:
        """Take it that a worker holds these blocks from `now` on."""
        self.expire(now)
        copy = array("Q")
        copy.frombytes(memoryview(hashes).cast("B"))
        if not copy:
            return
        decision = _Decision(slot, copy, now + self._ttl if self._ttl is not None else float("inf"))
        self._order.append(decision)
        self._by_slot.setdefault(slot, deque()).append(decision)
        self._count(slot, len(copy))
        self._index.apply_stored(slot, Tier.DEVICE, copy)
        self._evict(slot)
        while self._kept > self._limit:
            self._end_oldest()

    def expire(self, now: float) -> None:
        """Forget the decisions whose time is over."""
        while self._order and self._order[0].ends <= now:
            self._end_oldest()

    def lookup(self, hashes: Buffer, now: float) -> Overlap:
        """Return what each slot probably holds of a prompt; see `PrefixIndex.lookup`."""
        self.expire(now)
        return self._index.lookup(hashes)

    def blocks(self, slot: int) -> int:
        """Return how many distinct blocks a slot is taken to hold."""
        return self._index.counts(slot).device

    def remove_worker(self, slot: int) -> None:
        """Forget everything about a slot."""
        for decision in self._by_slot.pop(slot, ()):
            self._drop(decision, len(decision.hashes))
        self._queued.pop(slot, None)
        self._capacity.pop(slot, None)
        self._index.remove_worker(slot)

    def _count(self, slot: int, hashes: int) -> None:
        self._kept += hashes
        self._queued[slot] = self._queued.get(slot, 0) + hashes

    def _drop(self, decision: _Decision, last: int) -> None:
        """Take the last hashes out of a decision; one without any waits for its turn in the order, or for tidying."""
        del decision.hashes[len(decision.hashes) - last :]
        self._count(decision.slot, -last)
        if not decision.hashes:
            self._empty += 1
            if self._empty > _COMPACT_FROM and self._empty * 2 > len(self._order):
                self._order = deque(one for one in self._order if one.hashes)
                self._empty = 0

    def _end_oldest(self) -> None:
        decision = self._order.popleft()
        if not decision.hashes:
            self._empty -= 1
            return
        self._by_slot[decision.slot].popleft()
        self._index.apply_removed(decision.slot, Tier.DEVICE, decision.hashes)
        self._count(decision.slot, -len(decision.hashes))

    def _evict(self, slot: int) -> None:
        """Take the least recently used blocks of a slot away that its capacity has no room for."""
        capacity = self._capacity.get(slot, 0)
        if not capacity:
            return
        decisions = self._by_slot.get(slot, ())
        while (excess := self.blocks(slot) - capacity) > 0 and decisions:
            oldest = decisions[0]
            last = oldest.hashes[-excess:]
            if len(last) == len(oldest.hashes):
                decisions.popleft()
            self._index.apply_removed(slot, Tier.DEVICE, last)
            self._drop(oldest, len(last))
        if self._queued.get(slot, 0) > max(_COMPACT_FROM, _COMPACT_AT * capacity):
            self._compact(slot)

    def _compact(self, slot: int) -> None:
        """Keep each block in the youngest decision that mentions it only: the others do not matter for eviction."""
        seen: set[int] = set()
        kept: deque[_Decision] = deque()
        for decision in reversed(self._by_slot[slot]):
            hashes = decision.hashes
            first = array("Q", [key for key in hashes if key not in seen])
            again = array("Q", [key for key in hashes if key in seen])
            seen.update(first)
            self._index.apply_removed(slot, Tier.DEVICE, again)
            decision.hashes = array("Q", first + again)
            self._drop(decision, len(again))
            if decision.hashes:
                kept.appendleft(decision)
        self._by_slot[slot] = kept

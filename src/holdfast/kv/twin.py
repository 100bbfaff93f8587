"""The prefix index in Python: what runs where no kernel could be compiled, and what the kernel is tested against.

A dictionary from hash to a bit mask of *columns*, one column for each slot and tier in use. Equal masks of neighbouring
blocks are one object, so a walk along a prompt compares by identity. With a limit there are three dictionaries by last
use: *young*, *old*, and *dying*, which count as absent and are given back piece by piece.

Must never answer differently from ``native/``; ``tests/kv/test_kv_fuzz.py`` compares the two.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator

from holdfast.kv.columns import Columns, Runs
from holdfast.kv.index import (
    CLEARED,
    REMOVED,
    STORED,
    SWEEP_FLOOR,
    SWEEP_PER_BLOCK,
    TIERS,
    Buffer,
    Counts,
    Overlap,
    Snapshot,
)
from holdfast.kv.tiers import Tier

_INTERNED_MASKS = 65_536
_INT_BYTES = 32
"""Of a Python integer of 64 bits."""


class TwinIndex:
    """`holdfast.kv.index.PrefixIndex` without a compiler."""

    __slots__ = ("_columns", "_dying", "_half", "_limit", "_masks", "_old", "_pass", "_young")

    def __init__(self, *, limit: int = 0) -> None:
        """Make an empty index; ``limit``: most distinct blocks (at least 2), 0 for no limit."""
        if limit < 0 or limit == 1:
            raise ValueError(f"limit is {limit}; it must be 0 (none) or at least 2")
        self._limit = limit
        self._half = limit // 2
        self._columns = Columns()
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}
        self._dying: dict[int, int] = {}
        self._masks: dict[int, int] = {}
        self._pass: Iterator[int] | None = None

    @property
    def blocks(self) -> int:
        """See `PrefixIndex.blocks`."""
        return len(self._young) + len(self._old) + len(self._dying)

    @property
    def bytes_used(self) -> int:
        """See `PrefixIndex.bytes_used`. Counts every hash as an object of its own."""
        tables = sum(map(sys.getsizeof, (self._young, self._old, self._dying, self._masks)))
        masks = sum(map(sys.getsizeof, self._masks))
        return tables + masks + _INT_BYTES * self.blocks + self._columns.bytes_used

    # ---- events ----

    def apply_stored(self, slot: int, tier: int, hashes: Buffer, /) -> None:
        """See `PrefixIndex.apply_stored`."""
        self._columns.check(slot, tier)
        numbers = view(hashes)
        if not len(numbers):
            return
        column = self._columns.assign(slot, tier)
        if self._limit:
            self._store_limited(column, numbers)
        else:
            self._store(column, numbers)
        self._give_back(len(numbers))

    def _store(self, column: int, hashes: Iterable[int]) -> None:
        blocks, bit = self._young, self._columns.bits[column]
        get, intern = blocks.get, self._intern
        before: int | None = None
        after = bit
        stored = 0
        for key in hashes:
            mask = get(key)
            if mask is not before:
                if mask is not None and mask & bit:
                    self._columns.repeat(column, key)
                    continue
                before, after = mask, bit if mask is None else intern(mask | bit)
            blocks[key] = after
            stored += 1
        self._columns.blocks[column] += stored

    def _store_limited(self, column: int, hashes: Iterable[int]) -> None:
        bit = self._columns.bits[column]
        for key in hashes:
            if self._dying and (mask := self._dying.pop(key, 0)):
                self._columns.forget(key, mask)
            mask = self._held(key)
            if mask & bit:
                self._columns.repeat(column, key)
            else:
                self._columns.blocks[column] += 1
                mask = self._intern(mask | bit) if mask else bit
            self._use(key, mask)

    def _use(self, key: int, mask: int) -> None:
        """Count a block as used now. Half of the limit used since the last turn: the older half has passed its time."""
        if key not in self._young:
            self._old.pop(key, 0)
            self._dying.pop(key, 0)
            if len(self._young) >= self._half:
                self._sweep_dying(None)
                self._dying, self._old, self._young = self._old, self._young, {}
        self._young[key] = mask

    def _held(self, key: int) -> int:
        return self._young.get(key) or self._old.get(key, 0)

    def apply_removed(self, slot: int, tier: int, hashes: Buffer, /) -> None:
        """See `PrefixIndex.apply_removed`."""
        self._columns.check(slot, tier)
        numbers = view(hashes)
        column = self._columns.find(slot, tier)
        if column is None:
            self._remove_unknown(slot, numbers)
        else:
            self._remove(slot, column, numbers)
        self._give_back(len(numbers))

    def _remove_unknown(self, slot: int, hashes: Iterable[int]) -> None:
        for key in hashes:
            if self._dying and (mask := self._dying.pop(key, 0)):
                self._columns.forget(key, mask)
            self._columns.miss(slot)

    def _remove(self, slot: int, column: int, hashes: Iterable[int]) -> None:
        columns, young = self._columns, self._young
        bit, repeats = columns.bits[column], columns.repeats[column]
        before, rest, removed = 0, 0, 0
        for key in hashes:
            blocks = young
            mask = young.get(key, 0)
            if not mask and self._limit:
                if self._dying and (mask := self._dying.pop(key, 0)):
                    self._columns.forget(key, mask)
                blocks, mask = self._old, self._old.get(key, 0)
            if not mask & bit:
                columns.miss(slot)
            elif repeats and key in repeats:
                columns.unrepeat(column, key)
            else:
                if mask is not before:
                    before, rest = mask, self._intern(mask ^ bit)
                if rest:
                    blocks[key] = rest
                else:
                    del blocks[key]
                removed += 1
        columns.blocks[column] -= removed

    def apply(self, events: Buffer, hashes: Buffer, /) -> None:
        """See `PrefixIndex.apply`."""
        numbers, keys = view(events).tolist(), view(hashes)
        rows = list(zip(*[iter(numbers)] * 4, strict=False))
        for operation, slot, tier, count in rows:
            self._columns.check(slot, tier)
            if operation > CLEARED or (operation == CLEARED and count):
                raise ValueError(f"event is not stored, removed or cleared: {(operation, slot, tier, count)}")
        if len(numbers) % 4 or sum(row[3] for row in rows) != len(keys):
            raise ValueError(f"{len(numbers)} numbers of events do not fit {len(keys)} hashes")
        at = 0
        for operation, slot, tier, count in rows:
            if operation == STORED:
                self.apply_stored(slot, tier, keys[at : at + count])
            elif operation == REMOVED:
                self.apply_removed(slot, tier, keys[at : at + count])
            else:
                self._columns.retire(slot, tier)
            at += count

    def clear(self, slot: int, tier: int | None = None, /) -> None:
        """See `PrefixIndex.clear`."""
        self._columns.check(slot, tier or 0)
        if tier is not None:
            self._columns.retire(slot, tier)
            return
        for one in range(TIERS):
            self._columns.retire(slot, one)
        self._columns.forget_slot(slot)

    def remove_worker(self, slot: int, /) -> None:
        """See `PrefixIndex.remove_worker`."""
        self.clear(slot)

    # ---- lookups ----

    def lookup(self, hashes: Buffer, /, *, anywhere: bool = False) -> Overlap:
        """See `PrefixIndex.lookup`."""
        keys = view(hashes)
        if not len(keys):
            return Overlap(array("I"))
        runs = self._columns.counter()
        used = self._find_anywhere(keys, runs) if anywhere else self._find_run(keys, runs)
        if self._limit:
            self._use_all(used)
        return Overlap(runs.rows())

    def _masks_of(self, keys: Iterable[int]) -> Iterator[int | None]:
        return map(self._held if self._limit else self._young.get, keys)

    def _find_run(self, keys: array[int] | memoryview, runs: Runs) -> list[int]:
        current: int | None = None
        at, active = 0, 0
        for mask in self._masks_of(keys):
            if mask is not current:
                current = mask
                active = runs.begin(mask or 0) if at == 0 else runs.advance(active, mask or 0, at)
            if not active:
                break
            at += 1
        runs.advance(active, 0, at)
        return list(keys[:at]) if self._limit else []

    def _find_anywhere(self, keys: array[int] | memoryview, runs: Runs) -> list[int]:
        current: int | None = None
        times = 0
        for mask in self._masks_of(keys):
            if mask is not current:
                runs.add(current or 0, times)
                current, times = mask, 0
            times += 1
        runs.add(current or 0, times)
        return [key for key in keys if self._held(key)] if self._limit else []

    def _use_all(self, keys: list[int]) -> None:
        """Count blocks as used, the last first: the beginning of a prompt is never older than its continuation."""
        for key in reversed(keys):
            mask = self._held(key) or self._dying.get(key, 0)
            if mask:
                self._use(key, mask)

    def snapshot(self, slot: int, /) -> Snapshot:
        """See `PrefixIndex.snapshot`."""
        self._columns.check(slot, 0)
        return self._dump(slot, Tier.DEVICE), self._dump(slot, Tier.HOST), self._dump(slot, Tier.DISK)

    def _dump(self, slot: int, tier: int) -> array[int]:
        column = self._columns.find(slot, tier)
        if column is None:
            return array("Q")
        bit, repeats = self._columns.bits[column], self._columns.repeats[column]
        keys = [key for blocks in (self._old, self._young) for key, mask in blocks.items() if mask & bit]
        if repeats:
            keys = [key for key in keys for _ in range(1 + repeats.get(key, 0))]
        return array("Q", keys)

    def slices(self, slot: int, tier: int, budget: int, /) -> Iterator[array[int]]:
        """See `PrefixIndex.slices`. The list of all keys is made in one go, 10 ns for each."""
        self._columns.check(slot, tier)
        if self._columns.find(slot, tier) is None:
            return
        keys = [*self._old, *self._young]
        for at in range(0, len(keys), budget):
            column = self._columns.find(slot, tier)
            bit = 0 if column is None else self._columns.bits[column]
            yield array("Q", [key for key in keys[at : at + budget] if self._held(key) & bit])

    def load(self, slot: int, snapshot: Snapshot, /) -> None:
        """See `PrefixIndex.load`."""
        self.clear(slot)
        for tier, hashes in zip(Tier, snapshot, strict=True):
            self.apply_stored(slot, tier, hashes)

    def counts(self, slot: int, /) -> Counts:
        """See `PrefixIndex.counts`."""
        self._columns.check(slot, 0)
        return self._columns.counts(slot)

    # ---- giving back ----

    def sweep(self, budget: int | None = None, /) -> bool:
        """See `PrefixIndex.sweep`."""
        left = self._sweep_dying(budget)
        while self._columns.retired and (left is None or left > 0):
            left = self._sweep_retired(left)
        return bool(self._dying or self._columns.retired)

    def _give_back(self, blocks: int) -> None:
        if self._dying or self._columns.retired:
            self.sweep(SWEEP_FLOOR + SWEEP_PER_BLOCK * blocks)

    def _sweep_dying(self, budget: int | None) -> int | None:
        dying = self._dying
        count = len(dying) if budget is None else min(budget, len(dying))
        for _ in range(count):
            self._columns.forget(*dying.popitem())
        return None if budget is None else budget - count

    def _sweep_retired(self, budget: int | None) -> int | None:
        """Take retired columns out of the masks; a whole pass over the blocks sets them free."""
        if self._pass is None:
            self._columns.begin_pass()
            self._pass = iter([*self._old, *self._young])
        visited = 0
        for key in self._pass:
            blocks = self._young if key in self._young else self._old
            mask = blocks.get(key, 0)
            if mask & self._columns.dead:
                if rest := self._intern(mask & ~self._columns.dead):
                    blocks[key] = rest
                else:
                    del blocks[key]
            visited += 1
            if budget is not None and visited >= budget:
                return 0
        self._pass = None
        self._columns.end_pass()
        return None if budget is None else budget - visited

    def _intern(self, mask: int) -> int:
        """Return one object for equal masks, as far as a bounded table remembers them."""
        if len(self._masks) >= _INTERNED_MASKS:
            self._masks.clear()
        return self._masks.setdefault(mask, mask)


def view(numbers: Buffer) -> array[int] | memoryview:
    """Return u64 numbers as something that yields integers.

    Raises:
        ValueError: not a whole number of 64-bit numbers.
    """
    if isinstance(numbers, array) and numbers.typecode == "Q":
        return numbers
    plain = memoryview(numbers).cast("B")
    if plain.nbytes % 8:
        raise ValueError(f"expected 64-bit numbers, got {plain.nbytes} bytes, which is no multiple of 8")
    return plain.cast("Q")

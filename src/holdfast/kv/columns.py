"""The twin's bookkeeping of columns: one bit for each slot and tier that holds anything, and what is counted for it.

A column that is retired (its slot was cleared) is dead at once, but blocks still mention it: it is used again only
after a pass over all blocks. Must never look at blocks itself.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator

from holdfast.kv.index import MAX_SLOTS, TIERS, Counts

_COLUMN_BYTES = 200
"""Rough size of the entries that one column has in the lists below."""


def bits_of(mask: int) -> Iterator[int]:
    """Yield the numbers of the bits that are set, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class Columns:
    """Columns by (slot, tier)."""

    __slots__ = (
        "_before_pass", "_forgotten", "_of", "_owner", "_spare", "_unknown",
        "alive", "bits", "blocks", "dead", "near", "repeats", "retired",
    )  # fmt: skip

    def __init__(self) -> None:
        self._of: dict[tuple[int, int], int] = {}
        self._owner: list[tuple[int, int]] = []
        self._spare: list[int] = []
        self._before_pass = 0
        self._forgotten: dict[int, int] = {}
        self._unknown: dict[int, int] = {}
        self.bits: list[int] = []
        self.blocks: list[int] = []
        self.repeats: list[dict[int, int]] = []
        self.retired: list[int] = []
        self.alive = 0
        self.dead = 0
        self.near = 0

    @staticmethod
    def check(slot: int, tier: int) -> None:
        """Raise `ValueError` for a slot or tier that cannot be."""
        if not 0 <= slot < MAX_SLOTS:
            raise ValueError(f"slot {slot} is not in 0..{MAX_SLOTS - 1}")
        if not 0 <= tier < TIERS:
            raise ValueError(f"tier {tier} is not in 0..{TIERS - 1}")

    @property
    def bytes_used(self) -> int:
        """Memory in bytes, roughly."""
        return len(self.bits) * _COLUMN_BYTES + sum(sys.getsizeof(one) + 64 * len(one) for one in self.repeats)

    def find(self, slot: int, tier: int) -> int | None:
        """Return the column of a slot's tier, None where nothing was stored."""
        return self._of.get((slot, tier))

    def assign(self, slot: int, tier: int) -> int:
        """Return the column of a slot's tier, a new one if need be."""
        column = self._of.get((slot, tier))
        if column is not None:
            return column
        if self._spare:
            column = self._spare.pop()
        else:
            column = len(self.bits)
            self.bits.append(1 << column)
            self.blocks.append(0)
            self.repeats.append({})
            self._owner.append((slot, tier))
        self._owner[column] = (slot, tier)
        self._of[slot, tier] = column
        self.alive |= self.bits[column]
        self.near = self.near & ~self.bits[column] if tier else self.near | self.bits[column]
        return column

    def retire(self, slot: int, tier: int) -> None:
        """Let a slot's tier hold nothing."""
        column = self._of.pop((slot, tier), None)
        if column is None:
            return
        self.alive &= ~self.bits[column]
        self.repeats[column] = {}
        if self.blocks[column]:
            self.blocks[column] = 0
            self.dead |= self.bits[column]
            self.retired.append(column)
        else:
            self._spare.append(column)

    def begin_pass(self) -> None:
        """Note which columns the pass over the blocks that begins now sets free."""
        self._before_pass = len(self.retired)

    def end_pass(self) -> None:
        """Set free what no block mentions any more."""
        done, self.retired = self.retired[: self._before_pass], self.retired[self._before_pass :]
        self._spare += done
        for column in done:
            self.dead &= ~self.bits[column]

    # ---- counts ----

    def repeat(self, column: int, key: int) -> None:
        """Count a block that was stored once more."""
        repeats = self.repeats[column]
        repeats[key] = repeats.get(key, 0) + 1

    def unrepeat(self, column: int, key: int) -> None:
        """Take one of the repeats back."""
        repeats = self.repeats[column]
        repeats[key] -= 1
        if not repeats[key]:
            del repeats[key]

    def miss(self, slot: int) -> None:
        """Count the removal of a block that is not there: one of those forgotten, as long as there are any."""
        forgotten = self._forgotten.get(slot, 0)
        if forgotten:
            self._forgotten[slot] = forgotten - 1
        else:
            self._unknown[slot] = self._unknown.get(slot, 0) + 1

    def forget(self, key: int, mask: int) -> None:
        """Count a block that the limit dropped, for every column that held it."""
        for column in bits_of(mask & self.alive):
            extra = self.repeats[column].pop(key, 0)
            self.blocks[column] -= 1
            slot = self._owner[column][0]
            self._forgotten[slot] = self._forgotten.get(slot, 0) + 1 + extra

    def forget_slot(self, slot: int) -> None:
        """Begin a slot's other counts anew."""
        self._forgotten.pop(slot, None)
        self._unknown.pop(slot, None)

    def counts(self, slot: int) -> Counts:
        """Return what is counted for a slot."""
        columns = [self._of.get((slot, tier)) for tier in range(TIERS)]
        device, host, disk = (0 if one is None else self.blocks[one] for one in columns)
        repeats = sum(sum(self.repeats[one].values()) for one in columns if one is not None)
        return Counts(device, host, disk, repeats, self._forgotten.get(slot, 0), self._unknown.get(slot, 0))

    # ---- one lookup ----

    def counter(self) -> Runs:
        """Return an empty count for one lookup."""
        return Runs(self._of, self._owner, self.alive, self.near)


class Runs:
    """The runs of one lookup: which columns still hold every block so far, and how far the others came."""

    __slots__ = ("_alive", "_far", "_found", "_near", "_of", "_owner", "_start")

    def __init__(self, of: dict[tuple[int, int], int], owner: list[tuple[int, int]], alive: int, near: int) -> None:
        self._of = of
        self._owner = owner
        self._alive = alive
        self._near = near
        self._far = bool(alive & ~near)
        self._found: dict[int, list[int]] = {}
        self._start: dict[int, int] = {}

    def begin(self, mask: int) -> int:
        """Start runs at the first block; returns the active columns."""
        mask &= self._alive
        active = mask & self._near
        found = self._found
        for column in bits_of(active):
            found[self._owner[column][0]] = [0] * TIERS
        if mask != active:
            for column in bits_of(mask ^ active):
                slot = self._owner[column][0]
                if slot not in found:
                    found[slot] = [0] * TIERS
                    active |= self._go_on(slot, 0, mask, 0)
        return active

    def _go_on(self, slot: int, tier: int, mask: int, at: int) -> int:
        """Return the bit of the nearest tier below `tier` that holds this block, 0 if none does."""
        for below in range(tier + 1, TIERS):
            column = self._of.get((slot, below))
            if column is not None and mask >> column & 1:
                self._start[column] = at
                return 1 << column
        return 0

    def advance(self, active: int, mask: int, at: int) -> int:
        """End the runs of columns that lack block `at`; returns the columns still active."""
        ended = active & ~mask
        active &= mask
        for column in bits_of(ended):
            slot, tier = self._owner[column]
            self._found[slot][tier] = at - self._start.get(column, 0)
            if self._far:
                active |= self._go_on(slot, tier, mask, at)
        return active

    def add(self, mask: int, times: int) -> None:
        """Count blocks held by these columns, wherever they are in the prompt."""
        for column in bits_of(mask & self._alive):
            slot, tier = self._owner[column]
            self._found.setdefault(slot, [0] * TIERS)[tier] += times

    def rows(self) -> array[int]:
        """Return slot and blocks for each tier, by ascending slot."""
        rows = array("I")
        for slot in sorted(self._found):
            rows.append(slot)
            rows.extend(self._found[slot])
        return rows

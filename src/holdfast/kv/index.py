"""The prefix index as its users see it: which slot holds which blocks of a prompt, in which tier.

A *slot* is a small number for one (worker, data-parallel rank), handed out by `SlotTable`. Hashes travel as flat u64
arrays (``array('Q')``, or any buffer of native 64-bit numbers), from hashing to lookup, never as lists::

    index = new_index()                                   # holdfast.kv.choice
    slots = SlotTable()
    slot = slots.assign(worker, rank=0)
    index.apply_stored(slot, Tier.DEVICE, hashes)         # an event, or one tier of a snapshot
    overlap = index.lookup(block_hashes(tokens, 16))      # examines every block
    for slot, device, host, disk in overlap: ...

Two implementations, `holdfast.kv.kernel` (compiled) and `holdfast.kv.twin` (Python), give the same answers, in the
same order, and forget the same blocks; ``docs/explanation/kv-index.md`` has the reasons.

What both promise:

* *Exact.* `lookup` walks the prompt block by block; it never infers an inner block from a later one, because engines
  evict inner blocks.
* *Counted.* A block that one slot stored twice in one tier is held until it was removed twice (vLLM keeps copies).
  A publisher that repeats events must be made to say each once, by its sequence numbers.
* *Bounded.* With a ``limit`` the index holds at most that many distinct blocks. The ``limit // 2`` blocks that were
  stored or matched last are never forgotten; blocks not used for longer than that are, and `Counts.forgotten` says how
  many of a slot's, so that "held + forgotten" still equals the engine's own count.
* *No long call.* `clear` and `remove_worker` are O(1); what they leave behind is freed piece by piece with later
  events.

Everything belongs to one thread. Must never know about events' sequence numbers, epochs or networks: who feeds the
index decides what is true.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple, Protocol, TypeAlias

from holdfast.kv.tiers import Tier

Buffer: TypeAlias = "bytes | bytearray | memoryview | array[int]"
"""Flat numbers in native byte order."""

TIERS = len(Tier)
MAX_SLOTS = 65_536
SWEEP_FLOOR = 64
"""Entries that every event visits to give back what is gone, plus `SWEEP_PER_BLOCK` for each of its blocks."""
SWEEP_PER_BLOCK = 4

STORED, REMOVED, CLEARED = 0, 1, 2
"""Operations of `PrefixIndex.apply`."""

Snapshot: TypeAlias = "tuple[array[int], array[int], array[int]]"
"""What a slot holds: one ``array('Q')`` for each tier, a hash as often as it is stored."""

_COLUMNS = 1 + TIERS


class Counts(NamedTuple):
    """What the index has of one slot, to be compared with the engine's own count."""

    device: int
    host: int
    disk: int
    repeats: int
    """Times a block was stored beyond the first."""
    forgotten: int
    """Blocks that the limit made the index forget, less those that the engine has removed since."""
    unknown: int
    """Removals of blocks that were not held: a sign of lost events when it grows."""


class Overlap:
    """How much of a prompt each slot holds; only slots with at least one block, by ascending slot.

    ``rows``: ``array('I')`` with, for each slot, four numbers: slot, then blocks matched in device, host and disk.
    """

    __slots__ = ("rows",)

    def __init__(self, rows: array[int]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows) // _COLUMNS

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        numbers = iter(self.rows)
        return zip(numbers, numbers, numbers, numbers, strict=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Overlap) and self.rows == other.rows

    __hash__ = None  # type: ignore[assignment]  # holds an array, which can change

    def __repr__(self) -> str:
        return f"Overlap({list(self)})"

    @property
    def slots(self) -> array[int]:
        """Slots, ascending."""
        return self.rows[0::_COLUMNS]

    def blocks(self, tier: Tier) -> array[int]:
        """Return the matched blocks in one tier, in the order of `slots`."""
        return self.rows[1 + tier :: _COLUMNS]

    def of(self, slot: int) -> tuple[int, int, int]:
        """Return (device, host, disk) of one slot, zeros when it holds nothing."""
        for number, *tiers in self:
            if number == slot:
                return tiers[0], tiers[1], tiers[2]
        return 0, 0, 0


class PrefixIndex(Protocol):
    """Exact index of blocks by slot and tier. All hashes: u64, native byte order, in prefix order.

    Slots outside 0..`MAX_SLOTS` - 1, tiers outside `Tier` and buffers that are not whole numbers raise `ValueError`
    before anything has changed.
    """

    @property
    def bytes_used(self) -> int:
        """Memory in bytes, counted from the sizes of its tables."""

    @property
    def blocks(self) -> int:
        """Distinct blocks, including those not yet given back (`sweep`)."""

    def apply_stored(self, slot: int, tier: int, hashes: Buffer, /) -> None:
        """Note that a slot now holds these blocks, once more if it held them already."""

    def apply_removed(self, slot: int, tier: int, hashes: Buffer, /) -> None:
        """Note that a slot gave up these blocks; those it did not hold are counted (`Counts.unknown`)."""

    def apply(self, events: Buffer, hashes: Buffer, /) -> None:
        """Apply many events in one call.

        Args:
            events: u64, four for each event: operation (`STORED`, `REMOVED`, `CLEARED`), slot, tier, number of hashes.
                `CLEARED` is for the one tier and has no hashes.
            hashes: u64, the hashes of all events one after the other.
        """

    def clear(self, slot: int, tier: int | None = None, /) -> None:
        """Drop all blocks of a slot, or of one tier of it; with all tiers its other counts begin anew too."""

    def remove_worker(self, slot: int, /) -> None:
        """Drop everything about a slot, which may then be used for another worker."""

    def lookup(self, hashes: Buffer, /, *, anywhere: bool = False) -> Overlap:
        """Return how many blocks of a prompt each slot holds.

        By default the leading run: blocks from the first on without a gap in the device tier; from where that ends,
        without a gap in the host tier; then disk. This is what the engine itself will reuse. With ``anywhere``: blocks
        held at any position, counted in every tier that has them (a measure of what a gap costs, not of reuse).
        """

    def snapshot(self, slot: int, /) -> Snapshot:
        """Return what a slot holds; an engine's sidecar sends it, `load` takes it."""

    def slices(self, slot: int, tier: int, budget: int, /) -> Iterator[array[int]]:
        """Yield what a slot holds in one tier, each block once, looking at no more than `budget` blocks for each array.

        The index may change in between: a block that is held all the while is in exactly one of the arrays, one that
        comes or goes meanwhile in one or in none.
        """

    def load(self, slot: int, snapshot: Snapshot, /) -> None:
        """Replace what a slot holds."""

    def counts(self, slot: int, /) -> Counts:
        """Return what the index has of a slot."""

    def sweep(self, budget: int | None = None, /) -> bool:
        """Give back up to `budget` entries' worth of what is gone (None: all); returns whether more is left.

        Events do this by themselves; an owner with idle time may do it earlier.
        """

"""What a worker's log held at one moment, read in slices while the engine goes on.

Reading a million blocks in one piece would hold up the event loop for longer than a token may wait. A `Cut` therefore
belongs to the moment at which it was begun (`Cut.sequence`), and is read some thousand blocks at a time. Between two
slices the log may change; of each change the cut is told, and remembers only which blocks were touched:

* a block that nobody touches is found by exactly one slice (`PrefixIndex.slices`);
* one that came after the beginning does not belong to the cut, and is left out wherever it is found;
* one that was there and went may have been handed out before or not: those that were not follow at the end.

So what comes out is exactly what was held at the beginning, each block once, and the batches after `Cut.sequence`
follow as they are. A rank whose cache is cleared, or more changes than the log keeps, make a cut useless (`broken`): a
new one must be begun. Must never wait, and never look at more than `VISITS` blocks for one slice.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

from holdfast.kv.feed import PART_HASHES
from holdfast.kv.index import CLEARED, REMOVED
from holdfast.kv.tiers import Tier

if TYPE_CHECKING:
    from holdfast.worker.kv_log import KvLog

VISITS = 2 * PART_HASHES
"""Blocks that are looked at for one slice: a tenth of a millisecond, less than one when many of them have changed."""
Slice: TypeAlias = "tuple[int, int, array[int]]"
"""Rank, tier, hashes."""
Place: TypeAlias = "tuple[int, int]"
"""Rank and tier."""


class Cut:
    """See the module. Made by `KvLog.cut`, which tells it of changes until it is closed.

    Args:
        log: what is read.
        ranks: those that hold anything, ascending.
    """

    def __init__(self, log: KvLog, ranks: list[int]) -> None:
        self.sequence = log.sequence
        """The batch after which this is what was held."""
        self.blocks = log.blocks
        """How many there are."""
        self.broken = False
        """It cannot be completed."""
        self._log = log
        self._ranks = ranks
        self._came: dict[Place, set[int]] = defaultdict(set)
        """Blocks that changed and were not there at the beginning."""
        self._went: dict[Place, set[int]] = defaultdict(set)
        """Blocks that changed and were there, back again or not."""
        self._changes = 0
        self._handed_out: dict[Place, list[array[int]]] = {}

    def __enter__(self) -> Cut:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Be told nothing more. Idempotent."""
        self._log.cuts.pop(self, None)

    def touch(self, operation: int, place: Place, hashes: array[int]) -> None:
        """The log has changed."""
        self._changes += len(hashes)
        if operation == CLEARED or self._changes > self._log.kept_limit:
            self.broken = True
            self.close()
            return
        came, went = self._came[place], self._went[place]
        if operation == REMOVED:
            went.update(set(hashes).difference(came))
        else:
            came.update(set(hashes).difference(went))

    def slices(self) -> Iterator[Slice]:
        """Yield everything that was held; how many slices are taken in one turn is the caller's choice.

        Empty arrays stand for work that was done without finding anything. When the cut is `broken`, this ends early.
        """
        places = [(rank, tier) for rank in self._ranks for tier in Tier]
        for place in places:
            yield from self._present(place)
        for place in places:
            yield from self._gone(place)

    def _present(self, place: Place) -> Iterator[Slice]:
        """Yield what is still there of one tier, or goes while this runs."""
        handed_out = self._handed_out[place] = []
        for found in self._log.index.slices(*place, VISITS):
            if self.broken:
                return
            came, went = self._came[place], self._went[place]
            if (came and not came.isdisjoint(found)) or (went and not went.isdisjoint(found)):
                found = array("Q", [h for h in found if h not in came and h not in went])  # noqa: PLW2901  less of it
            handed_out.append(found)
            yield (*place, found)

    def _gone(self, place: Place) -> Iterator[Slice]:
        """Yield what went before it was found: when all is found, nothing more can be missed."""
        missing = self._went.pop(place, set())
        for found in self._handed_out.pop(place):
            if self.broken or not missing:
                return
            missing.difference_update(found)
            yield (*place, array("Q"))
        left = iter(missing)
        while rest := array("Q", islice(left, VISITS)):
            yield (*place, rest)

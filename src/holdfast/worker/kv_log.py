"""What this worker's engine holds in its KV cache, as numbered batches of hashes that routers can follow.

An engine speaks of blocks by hashes of its own, stores the same block in several copies, and may name a parent that it
has dropped. Here that becomes what `kv.feed` promises: our sequence hashes, each stored once and removed once, in
batches numbered without gaps. Hashing is done here, beside the engine, once, not in every frontend.

The last batches are kept for subscribers that are behind, up to a number of hashes; the present contents always.

Must never wait, and never know who subscribes.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from operator import xor
from typing import Literal, TypeAlias

from holdfast.kv.choice import new_index
from holdfast.kv.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from holdfast.kv.feed import MESSAGE_NUMBERS, PART_HASHES
from holdfast.kv.hashes import block_hashes, local_hashes, sequence_hashes
from holdfast.kv.index import CLEARED, REMOVED, STORED
from holdfast.kv.tiers import Tier, tier_of
from holdfast.worker.kv_config import KEPT_HASHES
from holdfast.worker.kv_snapshot import Cut

log = logging.getLogger(__name__)

KEPT_BATCHES = 65_536

EventStatus = Literal["ok", "parent_block_not_found", "block_not_found", "invalid_block", "not_indexed"]
"""What became of an engine's event; the last: blocks of a medium that belongs to no worker."""
Counts: TypeAlias = "tuple[tuple[int, int, int, int], ...]"
"""(rank, device, host, disk) for each rank."""


class Batch:
    """Changes that belong together; ``events`` as in `kv.feed.Deltas`."""

    __slots__ = ("events", "hashes", "last")

    def __init__(self, last: int) -> None:
        self.last = last
        """Its number; of several that were joined: the last one's."""
        self.events = array("Q")
        self.hashes = array("Q")

    @property
    def numbers(self) -> int:
        """How much it is to send."""
        return len(self.events) + len(self.hashes)

    def add(self, operation: int, rank: int, tier: int, hashes: array[int]) -> None:
        """Append an event; one that goes on like the last is joined with it."""
        if len(self.events) and tuple(self.events[-4:-1]) == (operation, rank, tier):
            self.events[-1] += len(hashes)
        else:
            self.events.extend((operation, rank, tier, len(hashes)))
        self.hashes.extend(hashes)

    def join(self, other: Batch) -> None:
        """Append the batch that follows."""
        self.events.extend(other.events)
        self.hashes.extend(other.hashes)
        self.last = other.last


class KvLog:
    """See the module.

    Args:
        epoch: of this start of the worker.
        block_size: tokens per block.
        native: the engine's block hashes are our sequence hashes (`Capabilities.kv_hashes`), nothing is to be hashed.
        kept: hashes in batches that are kept.
    """

    def __init__(self, epoch: int, block_size: int, *, native: bool, kept: int = KEPT_HASHES) -> None:
        self.epoch = epoch
        self.block_size = block_size
        self.sequence = 0
        """Number of the last batch."""
        self.outcomes: Counter[tuple[str, EventStatus]] = Counter()
        """Engine events by kind and what became of them."""
        self.kept_limit = kept
        self.index = new_index()
        """What is held, by rank in place of a slot; for `kv_snapshot`."""
        self.cuts: dict[Cut, None] = {}
        """Those that are being read, to be told of changes."""
        self._native = native
        self._ranks: set[int] = {0}
        self._digests: dict[int, int] = {}
        self._names: dict[int, Names] = {}
        self._batches: dict[int, Batch] = {}
        self._kept = 0
        self._open: Batch | None = None

    @property
    def oldest(self) -> int:
        """Number of the oldest batch that is kept; one more than `sequence` when none is."""
        return self.sequence - len(self._batches) + 1

    # ---- what the engine says ----

    def take(self, events: Sequence[KvEvent]) -> bool:
        """Take over what an engine's step changed; returns whether there is a new batch."""
        for event in events:
            try:
                status = self._take(event)
            except (ValueError, OverflowError, TypeError) as error:
                log.warning("the engine reported a KV event that cannot be used: %s", error)
                status = "invalid_block"
            self.outcomes[(type(event).__struct_config__.tag, status)] += 1  # type: ignore[index]
        return self._seal()

    def _take(self, event: KvEvent) -> EventStatus:
        self._ranks.add(event.dp_rank)
        if isinstance(event, AllBlocksCleared):
            return self._cleared(event.dp_rank)
        tier = tier_of(event.medium)
        if tier is None:
            return "not_indexed"
        if isinstance(event, BlockStored):
            return self._stored(event, tier)
        return self._removed(event, tier)

    def _stored(self, event: BlockStored, tier: Tier) -> EventStatus:
        hashes: array[int] | None = array("Q", event.block_hashes) if self._native else self._named(event)
        if hashes is None:
            return "parent_block_not_found"
        for piece in _pieces(hashes):
            self._store(event.dp_rank, tier, piece)
        return "ok"

    def _named(self, event: BlockStored) -> array[int] | None:
        """Return our names of an engine's blocks and remember them; None when it is not known what they follow."""
        if event.block_size != self.block_size:
            raise ValueError(f"a block of {event.block_size} tokens; this engine's have {self.block_size}")
        if len(event.token_ids) != len(event.block_hashes) * event.block_size:
            raise ValueError(f"{len(event.token_ids)} tokens for {len(event.block_hashes)} blocks")
        names = self._names.setdefault(event.dp_rank, Names())
        if event.parent_hash is None:
            hashes = block_hashes(event.token_ids, self.block_size, lora=event.lora, salt=event.salt)
        else:
            parent = names.ours.get(event.parent_hash)
            if parent is None:
                return None
            local = local_hashes(event.token_ids, self.block_size, lora=event.lora, salt=event.salt)
            hashes = sequence_hashes(local, parent)
        names.learn(event.block_hashes, hashes)
        return hashes

    def _store(self, rank: int, tier: Tier, hashes: array[int]) -> None:
        before = self._count(rank, tier)
        self.index.apply_stored(rank, tier, hashes)
        if self._count(rank, tier) - before == len(hashes):
            self._note(STORED, rank, tier, hashes)
            return
        self.index.apply_removed(rank, tier, hashes)  # some are copies of what is there: which ones?
        fresh = array("Q", [one for one in hashes if self._changes(rank, tier, one, store=True)])
        self._note(STORED, rank, tier, fresh)

    def _removed(self, event: BlockRemoved, tier: Tier) -> EventStatus:
        if self._native:
            hashes = array("Q", event.block_hashes)
        else:
            names = self._names.setdefault(event.dp_rank, Names())
            hashes = array("Q", [ours for one in event.block_hashes if (ours := names.forget(one)) is not None])
        gone = 0
        for piece in _pieces(hashes):
            gone += self._remove(event.dp_rank, tier, piece)
        return "ok" if gone == len(event.block_hashes) else "block_not_found"

    def _remove(self, rank: int, tier: Tier, hashes: array[int]) -> int:
        """Return how many blocks, or copies of blocks, were there."""
        index = self.index
        before = index.counts(rank)
        if before.repeats or index.lookup(hashes, anywhere=True).of(rank)[tier] != len(hashes):
            gone = array("Q", [one for one in hashes if self._changes(rank, tier, one, store=False)])
        else:
            index.apply_removed(rank, tier, hashes)
            gone = hashes
        after = index.counts(rank)
        if not before.repeats and before[tier] - after[tier] != len(gone):
            gone = array("Q", dict.fromkeys(gone))  # one was named twice
        self._note(REMOVED, rank, tier, gone)
        return len(hashes) - (after.unknown - before.unknown)

    def _changes(self, rank: int, tier: Tier, one: int, *, store: bool) -> bool:
        """Apply one block; returns whether it is the first or the last copy."""
        before = self._count(rank, tier)
        (self.index.apply_stored if store else self.index.apply_removed)(rank, tier, array("Q", (one,)))
        return self._count(rank, tier) != before

    def _cleared(self, rank: int) -> EventStatus:
        self._names.pop(rank, None)
        self.index.clear(rank)
        self._digests[rank] = 0
        for tier in Tier:
            self._note(CLEARED, rank, tier, array("Q"))
        return "ok"

    def _count(self, rank: int, tier: Tier) -> int:
        return self.index.counts(rank)[tier]

    # ---- batches ----

    def _note(self, operation: int, rank: int, tier: Tier, hashes: array[int]) -> None:
        if not hashes and operation != CLEARED:
            return
        if self.cuts:
            for cut in list(self.cuts):
                cut.touch(operation, (rank, tier), hashes)
        if tier == Tier.DEVICE and hashes:
            self._digests[rank] = reduce(xor, hashes, self._digests.get(rank, 0))
        if self._open is not None and self._open.numbers + len(hashes) + 4 > MESSAGE_NUMBERS:
            self._seal()
        if self._open is None:
            self._open = Batch(self.sequence + 1)
        self._open.add(operation, rank, tier, hashes)

    def _seal(self) -> bool:
        """Number the batch that is being made; returns whether there was one."""
        batch, self._open = self._open, None
        if batch is None:
            return False
        self.sequence = batch.last
        self._batches[batch.last] = batch
        self._kept += len(batch.hashes)
        while self._batches and (self._kept > self.kept_limit or len(self._batches) > KEPT_BATCHES):
            self._kept -= len(self._batches.pop(self.oldest).hashes)
        return True

    def has(self, sequence: int) -> bool:
        """Whether everything after that batch is kept."""
        return self.oldest - 1 <= sequence <= self.sequence

    def after(self, sequence: int) -> Batch:
        """Return the batches after that one, joined up to `MESSAGE_NUMBERS`; there must be one (`has`)."""
        first = self._batches[sequence + 1]
        if first.last == self.sequence:
            return first
        joined = Batch(sequence)
        for number in range(sequence + 1, self.sequence + 1):
            batch = self._batches[number]
            if joined.numbers and joined.numbers + batch.numbers > MESSAGE_NUMBERS:
                break
            joined.join(batch)
        return joined

    # ---- contents ----

    def cut(self) -> Cut:
        """Begin to read everything that is held after the last batch; close it when it has been read."""
        cut = Cut(self, sorted(self._ranks))
        self.cuts[cut] = None
        return cut

    def counts(self) -> Counts:
        """Return distinct blocks by rank and tier."""
        found = ((rank, self.index.counts(rank)) for rank in sorted(self._ranks))
        return tuple((rank, one.device, one.host, one.disk) for rank, one in found)

    def digest(self, rank: int) -> tuple[int, int]:
        """Return how many blocks a rank holds on the device, and the XOR of their hashes."""
        return self._count(rank, Tier.DEVICE), self._digests.get(rank, 0)

    @property
    def blocks(self) -> int:
        """Distinct blocks, over all ranks and tiers."""
        return sum(sum(counts[1:]) for counts in self.counts())


class Names:
    """One rank's engine hashes and ours, while the engine holds the block, counted by copies."""

    __slots__ = ("_more", "ours")

    def __init__(self) -> None:
        self.ours: dict[int, int] = {}
        self._more: Counter[int] = Counter()
        """Copies beyond the first."""

    def learn(self, theirs: Sequence[int], ours: Sequence[int]) -> None:
        """Note blocks that were stored."""
        known = self.ours
        for their, our in zip(theirs, ours, strict=True):
            if their in known:
                self._more[their] += 1
            else:
                known[their] = our

    def forget(self, their: int) -> int | None:
        """Return our name of a block of which a copy was removed; None for one that is not known."""
        if self._more.get(their):
            self._more[their] -= 1
            if not self._more[their]:
                del self._more[their]
            return self.ours[their]
        return self.ours.pop(their, None)


def _pieces(hashes: array[int]) -> list[array[int]]:
    if len(hashes) <= PART_HASHES:
        return [hashes]
    return [hashes[at : at + PART_HASHES] for at in range(0, len(hashes), PART_HASHES)]

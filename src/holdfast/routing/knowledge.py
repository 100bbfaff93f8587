"""Which worker holds which blocks, as far as this process knows: from the workers' events, else from decisions.

One `Space` for each block size: an exact index fed by events (`knowledge_feed`), an approximate one fed by decisions
for workers that tell nothing, and a short memory of decisions whose events have not come yet. Models and adapters
share a space: hashes differ where KV values differ (adapter and salt are hashed), and whoever asks considers only
workers that serve the model.

::

    knowledge = PrefixKnowledge(settings)
    knowledge.attach(worker)                                  # a member of the pool
    overlaps = knowledge.lookup(hashes, block_size, now)      # array('Q') of `kv.hashes.block_hashes`
    device, host, disk = overlaps.of(worker.instance, rank)   # blocks
    knowledge.decided(worker.instance, rank, hashes, now)     # after the choice

What a worker was said to hold stays as long as the worker is known and has not started anew, be it suspect or silent;
a worker that is gone is forgotten in O(1). Must never do I/O, read a clock, or judge a worker's health.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Literal, Protocol

import msgspec

from holdfast.kv.approximate import ApproximateIndex
from holdfast.kv.choice import new_index
from holdfast.kv.index import Buffer, Counts, Overlap
from holdfast.kv.slots import SlotTable
from holdfast.models.card import ModelCard
from holdfast.routing.knowledge_config import KnowledgeSettings
from holdfast.runtime.discovery.contract import InstanceRecord

KnowledgeState = Literal["exact", "resynchronising", "approximate", "none"]
"""``exact``: every event of the worker up to a moment ago is in the index. ``resynchronising``: events are missing and
on their way; decisions count meanwhile. ``approximate``: the worker tells nothing. ``none``: not known, or without
blocks."""
KV_EVENTS = "kv_events"
"""Endpoint of workers that tell about their KV cache."""

Tiers = tuple[int, int, int]


class Member(Protocol):
    """What of a pool's worker is needed here."""

    @property
    def instance(self) -> str:
        """Its id."""

    record: InstanceRecord


class Overlaps:
    """How many leading blocks of one prompt each worker's rank holds: on the device, then in host memory, then on disk.

    Only those with at least one. Iterating yields (instance, rank, device, host, disk).
    """

    __slots__ = ("_found",)

    def __init__(self, found: dict[tuple[str, int], Tiers]) -> None:
        self._found = found

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[tuple[str, int, int, int, int]]:
        for (instance, rank), tiers in self._found.items():
            yield instance, rank, *tiers

    def __repr__(self) -> str:
        return f"Overlaps({list(self)})"

    def of(self, instance: str, rank: int = 0) -> Tiers:
        """Return (device, host, disk) of one rank, zeros when it holds nothing."""
        return self._found.get((instance, rank), _NOTHING)


_NOTHING: Tiers = (0, 0, 0)
_NOBODY = Overlaps({})


class Space:
    """All knowledge about blocks of one size."""

    __slots__ = ("approximate", "index", "predicted", "slots")

    def __init__(self, settings: KnowledgeSettings) -> None:
        self.index = new_index(limit=settings.router_index_limit)
        self.slots: SlotTable[str] = SlotTable()
        most = settings.router_max_tree_size
        self.approximate = ApproximateIndex(new_index(), ttl=settings.router_ttl, limit=most)
        self.predicted = ApproximateIndex(new_index(), ttl=settings.router_predicted_ttl or None, limit=most)

    def lookup(self, hashes: Buffer, now: float) -> Overlaps:
        """Return who holds how much of a prompt."""
        found: dict[tuple[str, int], Tiers] = {}
        owner = self.slots.owner
        for slot, device, host, disk in self.index.lookup(hashes):
            who = owner(slot)
            if who is not None:
                found[who] = (device, host, disk)
        for side in (self.approximate, self.predicted):
            if side.remembered:
                self._add(found, side.lookup(hashes, now))
        return Overlaps(found)

    def _add(self, found: dict[tuple[str, int], Tiers], guessed: Overlap) -> None:
        """Take the larger of what is known and what is guessed, for each rank."""
        for slot, blocks, _, _ in guessed:
            who = self.slots.owner(slot)
            if who is not None:
                found[who] = _at_least(found.get(who, _NOTHING), blocks)

    def forget(self, instance: str) -> None:
        """Drop everything about a worker."""
        for slot in self.slots.release(instance):
            self.index.remove_worker(slot)
            self.approximate.remove_worker(slot)
            self.predicted.remove_worker(slot)


def _at_least(tiers: Tiers, blocks: int) -> Tiers:
    """Return a leading run of which the first `blocks` are on the device, whatever else is known."""
    device, host, disk = tiers
    if blocks <= device:
        return tiers
    return blocks, max(0, device + host - blocks), max(0, disk - max(0, blocks - device - host))


class WorkerKnowledge:
    """What is known of one worker; `knowledge_feed` feeds it."""

    __slots__ = (
        "_tally", "capacity", "epoch", "heard_at", "instance", "problem", "process", "resynchronisations", "sequence",
        "space", "state",
    )  # fmt: skip

    def __init__(self, instance: str, space: Space, tally: Tally, capacity: int) -> None:
        self.instance = instance
        self.space = space
        self.capacity = capacity
        """Blocks it has room for on the device, of each rank; 0: unknown."""
        self.state: KnowledgeState = "approximate"
        self.epoch = 0
        """The start of the worker that the index speaks of; 0: of none."""
        self.sequence = 0
        """The last batch of events that is in the index."""
        self.process = 0
        """The start of the worker that decisions were made for; 0: not seen yet."""
        self.problem = ""
        """Why it is not ``exact``, for people."""
        self.resynchronisations = 0
        self.heard_at = 0.0
        """Loop time of its last word."""
        self._tally = tally

    def apply(self, events: Buffer, hashes: Buffer) -> None:
        """Apply one batch of events.

        Args:
            events: u64, four for each: operation, rank, tier, number of hashes (see `PrefixIndex.apply`).
            hashes: u64, of all events one after the other.

        Raises:
            ValueError: the numbers do not fit each other; nothing has changed.
        """
        translated = array("Q")
        translated.frombytes(memoryview(events).cast("B"))
        for at in range(1, len(translated), 4):
            translated[at] = self._slot(translated[at])
        self.space.index.apply(translated, hashes)
        for at in range(0, len(translated), 4):
            self._tally.applied[translated[at]] += 1

    def store(self, rank: int, tier: int, hashes: Buffer) -> None:
        """Add blocks, as one piece of a snapshot."""
        self.space.index.apply_stored(self._slot(rank), tier, hashes)

    def clear(self) -> None:
        """Drop what events have said; decisions stay."""
        for slot in self.space.slots.of_worker(self.instance).values():
            self.space.index.clear(slot)
        self.epoch = self.sequence = 0

    def restarted(self) -> None:
        """Drop everything: the worker has started anew, with an empty cache."""
        self.space.forget(self.instance)
        self.epoch = self.sequence = 0

    def synchronised(self) -> None:
        """Everything is in the index."""
        self.state, self.problem = "exact", ""
        for slot in self.space.slots.of_worker(self.instance).values():
            self.space.approximate.remove_worker(slot)

    def lost_track(self, reason: str, problem: str) -> None:
        """Events are missing: decisions count until they are here.

        Args:
            reason: one of `REASONS`, for counting.
            problem: for people.
        """
        self.state, self.problem = "resynchronising", problem
        self.resynchronisations += 1
        self._tally.resynchronisations[reason] += 1

    def interrupted(self, problem: str) -> None:
        """Its events do not come at the moment; what it holds is taken for what it held."""
        if self.state == "exact":
            self.lost_track("broken", problem)

    def repeated(self) -> None:
        """Batches came that are in the index already."""
        self._tally.repeated += 1

    def rejected(self) -> None:
        """A message could not be read or applied."""
        self._tally.rejected += 1

    def counts(self) -> dict[int, Counts]:
        """Return what the index has of each rank that holds, or held, anything."""
        slots = self.space.slots.of_worker(self.instance)
        return {rank: self.space.index.counts(slot) for rank, slot in slots.items()}

    @property
    def blocks(self) -> int:
        """Blocks that it is known to hold, in all tiers."""
        return sum(sum(counts[:3]) for counts in self.counts().values())

    def decided(self, rank: int, hashes: Buffer, now: float, *, predict: bool) -> None:
        """Take a decision for one of its ranks as news about what it will hold."""
        if self.state != "exact":
            slot = self._slot(rank)
            self.space.approximate.set_capacity(slot, self.capacity)
            self.space.approximate.decided(slot, hashes, now)
        elif predict:
            self.space.predicted.decided(self._slot(rank), hashes, now)

    def _slot(self, rank: int) -> int:
        return self.space.slots.assign(self.instance, rank)


REASONS = ("joined", "new_epoch", "gap", "mismatch", "overrun", "silent", "broken")
"""Why a worker was resynchronised: first contact; it started anew; batches were missing or out of order; its own counts
differed; this subscriber was too slow; it said nothing; the connection broke or the message could not be read."""


class Tally:
    """Counts since the start, for metrics."""

    __slots__ = ("applied", "rejected", "repeated", "resynchronisations")

    def __init__(self) -> None:
        self.applied: Counter[int] = Counter()
        """Events in the index, by operation (`kv.index.STORED` …)."""
        self.rejected = 0
        """Batches that could not be read or applied."""
        self.repeated = 0
        """Batches that came again and were left out."""
        self.resynchronisations: Counter[str] = Counter()
        """By reason."""


class KnowledgeStatus(msgspec.Struct, frozen=True):
    """What is known about one worker, for people."""

    state: KnowledgeState
    blocks: int
    sequence: int
    resynchronisations: int
    problem: str


class PrefixKnowledge:
    """See the module."""

    def __init__(self, settings: KnowledgeSettings | None = None) -> None:
        self.settings = settings or KnowledgeSettings()
        self.tally = Tally()
        self._spaces: dict[int, Space] = {}
        self._workers: dict[str, WorkerKnowledge] = {}

    # ---- who is there ----

    def attach(self, worker: Member) -> WorkerKnowledge | None:
        """Begin to know a worker, or go on; None for one that reuses nothing. A new block size begins anew."""
        card = _speaking(worker.record.cards)
        if card is None:
            self.detach(worker)
            return None
        space = self._spaces.get(card.block_size)
        if space is None:
            space = self._spaces[card.block_size] = Space(self.settings)
        known = self._workers.get(worker.instance)
        if known is not None and known.space is not space:
            self.detach(worker)
            known = None
        if known is None:
            known = WorkerKnowledge(worker.instance, space, self.tally, card.total_kv_blocks)
            self._workers[worker.instance] = known
        known.capacity = card.total_kv_blocks
        return known

    def detach(self, worker: Member) -> None:
        """Forget a worker. Idempotent."""
        known = self._workers.pop(worker.instance, None)
        if known is not None:
            known.space.forget(worker.instance)

    def known(self, instance: str) -> WorkerKnowledge | None:
        """Return what is known of one worker."""
        return self._workers.get(instance)

    def all_known(self) -> list[WorkerKnowledge]:
        """Return what is known of every worker, in order of attaching."""
        return list(self._workers.values())

    # ---- what routers ask and tell ----

    def lookup(self, hashes: Buffer, block_size: int, now: float) -> Overlaps:
        """Return who holds how much of a prompt.

        Args:
            hashes: sequence hashes of its complete blocks (`kv.hashes.block_hashes`), flat u64.
            block_size: tokens per block, from the model's card.
            now: loop time.
        """
        space = self._spaces.get(block_size)
        return _NOBODY if space is None else space.lookup(hashes, now)

    def decided(self, instance: str, rank: int, hashes: Buffer, now: float) -> None:
        """Note that a prompt went to a rank of a worker; call it once per attempt that was sent.

        For workers that tell about their blocks themselves this matters only with `router_predicted_ttl`.
        """
        known = self._workers.get(instance)
        if known is not None:
            known.decided(rank, hashes, now, predict=self.settings.router_predicted_ttl > 0)

    def state_of(self, instance: str) -> KnowledgeState:
        """Return how well a worker's cache is known."""
        known = self._workers.get(instance)
        return "none" if known is None else known.state

    # ---- what people and metrics ask ----

    def status_of(self, instance: str) -> KnowledgeStatus:
        """Return what is known of one worker, for people."""
        known = self._workers.get(instance)
        if known is None:
            return KnowledgeStatus("none", 0, 0, 0, "")
        return KnowledgeStatus(known.state, known.blocks, known.sequence, known.resynchronisations, known.problem)

    @property
    def blocks(self) -> int:
        """Distinct blocks in the exact indexes."""
        return sum(space.index.blocks for space in self._spaces.values())

    @property
    def bytes_used(self) -> int:
        """Memory of the exact indexes."""
        return sum(space.index.bytes_used for space in self._spaces.values())

    @property
    def remembered(self) -> int:
        """Hashes of decisions that count as knowledge."""
        return sum(space.approximate.remembered + space.predicted.remembered for space in self._spaces.values())


def _speaking(cards: tuple[ModelCard, ...]) -> ModelCard | None:
    """Return the card that speaks for the worker's cache: a worker has one, whatever the number of its models."""
    return next((card for card in cards if card.block_size > 0 and card.prefix_cache), None)

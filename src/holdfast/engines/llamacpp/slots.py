"""The KV cache as slots: who holds which tokens, what can be reused, and what the router is told about it.

A slot holds one sequence's KV cache. When the sequence ends the slot is *parked*: its tokens stay until the room is
needed, and later sequences take the slot over or copy the common prefix from it (or from a running one).
Blocks are only accounting: full runs of ``block_size`` tokens, named by their chained hash. The same block may
be in several slots; it is announced as stored once and as removed when the last copy is gone.

Must never decide which sequence runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from holdfast.kv.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from holdfast.kv.hashes import local_hashes, sequence_hashes

EVENTS_KEPT = 16_384
"""KV events kept for the worker to fetch; when it does not, they are replaced by a snapshot."""


class KvOperations(Protocol):
    """What `context.LlamaContext` does to slots."""

    def truncate(self, slot: int, length: int) -> None:
        """Forget everything from position ``length`` on."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Make ``target`` hold the first ``length`` positions of ``source``."""


class Slot:
    """One llama.cpp sequence id."""

    __slots__ = ("busy", "hashes", "index", "scope", "tokens", "used")

    def __init__(self, index: int):
        self.index = index
        self.tokens: list[int] = []
        """Tokens whose KV is here, from position 0."""
        self.hashes: list[int] = []
        """Sequence hashes of its full blocks."""
        self.scope: str | None = None
        self.busy = False
        self.used = 0


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many leading elements two sequences share."""
    end, at = min(len(a), len(b)), 0
    while at < end and a[at : at + 64] == b[at : at + 64]:
        at += 64
    at = min(at, end)
    while at < end and a[at] == b[at]:
        at += 1
    return at


class SlotCache:
    """All slots of one context. Used by the engine thread; `take_events` and `used_blocks` by anyone."""

    def __init__(self, operations: KvOperations, *, slots: int, block_size: int):
        self._operations = operations
        self._block_size = block_size
        self._slots = [Slot(index) for index in range(slots)]
        self._copies: dict[int, int] = {}  # block hash -> slots that hold it
        self._clock = 0
        self._events: list[KvEvent] = []
        self._events_lock = threading.Lock()

    @property
    def used_blocks(self) -> int:
        """Blocks of running sequences, begun ones included."""
        return sum(-(-len(slot.tokens) // self._block_size) for slot in self._slots if slot.busy)

    def acquire(self, tokens: Sequence[int], scope: str | None) -> Slot | None:
        """Return a slot for these tokens, holding as long a prefix of them as can be had; None: all are busy.

        At least the last token is left to compute: its logits are needed.
        """
        if all(slot.busy for slot in self._slots):
            return None
        source, shared = self._best_match(tokens, scope)
        slot = self._choose(source, shared)
        if slot is not source:
            self._cut(slot, 0)
            slot.scope = scope
            if source is not None:
                self._operations.copy(source.index, slot.index, shared)
                self._hold(slot, source.tokens[:shared])
        else:
            self._cut(slot, shared)
        slot.busy = True
        return slot

    def extend(self, slot: Slot, tokens: Sequence[int]) -> None:
        """Note that the KV of these tokens has been computed."""
        self._hold(slot, tokens)

    def release(self, slot: Slot) -> None:
        """Park a slot: its tokens stay until the room is needed."""
        self._clock += 1
        slot.used = self._clock
        slot.busy = False

    def drop_parked(self) -> int:
        """Forget every parked slot; returns how many tokens that freed."""
        freed = 0
        for slot in self._slots:
            if not slot.busy and slot.tokens:
                freed += len(slot.tokens)
                self._cut(slot, 0)
        return freed

    def take_events(self) -> list[KvEvent]:
        """Return and forget the events so far."""
        with self._events_lock:
            events, self._events = self._events, []
        return events

    def _best_match(self, tokens: Sequence[int], scope: str | None) -> tuple[Slot | None, int]:
        best, shared = None, self._block_size - 1
        usable = tokens[:-1]
        for slot in self._slots:
            if slot.scope == scope and len(slot.tokens) > shared:
                length = common_prefix(slot.tokens, usable)
                if length > shared or (length == shared and best is not None and best.busy and not slot.busy):
                    best, shared = slot, length
        return best, shared if best is not None else 0

    def _choose(self, source: Slot | None, shared: int) -> Slot:
        """Pick the slot to use: the source itself when that loses no block, else an empty or the oldest parked one."""
        idle = [slot for slot in self._slots if not slot.busy]
        if source is not None and not source.busy and shared // self._block_size == len(source.hashes):
            return source
        others = [slot for slot in idle if slot is not source]
        if not others:
            return idle[0]
        # Neighbouring slots are computed together, so empty ones are taken from the low end.
        return min(others, key=lambda slot: (slot.used if slot.tokens else 0, slot.index))

    def _hold(self, slot: Slot, tokens: Sequence[int]) -> None:
        slot.tokens.extend(tokens)
        size, known = self._block_size, len(slot.hashes)
        full = len(slot.tokens) // size
        if full == known:
            return
        fresh = slot.tokens[known * size : full * size]
        parent = slot.hashes[-1] if slot.hashes else None
        slot.hashes.extend(sequence_hashes(local_hashes(fresh, size, salt=slot.scope), parent))
        self._publish_stored(slot, known)

    def _publish_stored(self, slot: Slot, start: int) -> None:
        """Announce the blocks from number ``start`` on that no slot held before, in contiguous runs."""
        run: list[int] = []
        for number in range(start, len(slot.hashes)):
            name = slot.hashes[number]
            self._copies[name] = self._copies.get(name, 0) + 1
            if self._copies[name] == 1:
                run.append(number)
            elif run:
                self._publish(self._stored(slot, run))
                run = []
        if run:
            self._publish(self._stored(slot, run))

    def _stored(self, slot: Slot, numbers: list[int]) -> BlockStored:
        first, last, size = numbers[0], numbers[-1] + 1, self._block_size
        return BlockStored(
            tuple(slot.hashes[first:last]),
            slot.hashes[first - 1] if first else None,
            tuple(slot.tokens[first * size : last * size]),
            size,
        )

    def _cut(self, slot: Slot, length: int) -> None:
        if length < len(slot.tokens):
            self._operations.truncate(slot.index, length)
            del slot.tokens[length:]
        keep = length // self._block_size
        gone = []
        for name in reversed(slot.hashes[keep:]):
            self._copies[name] -= 1
            if not self._copies[name]:
                del self._copies[name]
                gone.append(name)
        del slot.hashes[keep:]
        if gone:
            self._publish(BlockRemoved(tuple(gone)))

    def _publish(self, event: KvEvent) -> None:
        with self._events_lock:
            if len(self._events) < EVENTS_KEPT:
                self._events.append(event)
                return
            # Nobody fetches: whoever comes later gets the present state, which already includes this event.
            self._events = [AllBlocksCleared(), *self._snapshot()]

    def _snapshot(self) -> Iterator[BlockStored]:
        announced: set[int] = set()
        for slot in self._slots:
            fresh = [n for n, name in enumerate(slot.hashes) if name not in announced]
            if fresh:  # a prefix is announced before what follows it, so the fresh blocks are the tail
                announced.update(slot.hashes)
                yield self._stored(slot, list(range(fresh[0], len(slot.hashes))))

"""The simulated KV cache: blocks that are in use, kept for reuse, or free, and what changed about them.

A *sealed* block is complete and named by its sequence hash; equal prefixes share one. A *private* block
is being filled by one sequence. Sealed blocks that nobody holds stay, least recently used out first.

Invariant: sealed + private + free = total, and a block that is held is never evicted.

Must never know about sequences or time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from holdfast.kv.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent

_PENDING_LIMIT = 8_192
"""Event runs kept for a consumer that is late; beyond, it gets a fresh snapshot instead."""


class _Block:
    __slots__ = ("holders", "parent", "tokens")

    def __init__(self, parent: int | None, tokens: Sequence[int]):
        self.parent = parent
        self.tokens = tokens
        self.holders = 1


class BlockPool:
    """All blocks of one engine."""

    def __init__(self, total: int, block_size: int, *, reuse: bool = True, events: bool = True):
        self.total = total
        self.block_size = block_size
        self._reuse = reuse
        self._events = events
        self._sealed: dict[int, _Block] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Sealed blocks that nobody holds, least recently used first."""
        self.digest = 0
        """XOR of the names of all sealed blocks."""
        self._private = 0
        self._pending: list[KvEvent] = []
        self._missed = False
        """The consumer was so late that it gets a snapshot instead."""

    @property
    def used(self) -> int:
        """Blocks that running sequences hold."""
        return len(self._sealed) - len(self._idle) + self._private

    @property
    def cached(self) -> int:
        """Sealed blocks, held or not."""
        return len(self._sealed)

    @property
    def available(self) -> int:
        """Blocks that can be had, by eviction if need be."""
        return self.total - self.used

    def match(self, hashes: Sequence[int]) -> int:
        """Return how many leading blocks of these are in the cache."""
        sealed = self._sealed
        for count, name in enumerate(hashes):
            if name not in sealed:
                return count
        return len(hashes)

    def hold(self, hashes: Sequence[int]) -> None:
        """Take a share in sealed blocks that `match` has found."""
        for name in hashes:
            block = self._sealed[name]
            if block.holders == 0:
                del self._idle[name]
            block.holders += 1

    def take(self, count: int) -> bool:
        """Take private blocks, evicting idle ones; returns False, and takes none, when there are not enough."""
        if count > self.available:
            return False
        excess = len(self._sealed) + self._private + count - self.total
        if excess > 0:
            self._evict(excess)
        self._private += count
        return True

    def seal(self, names: Sequence[int], parent: int | None, tokens: Sequence[int]) -> None:
        """Turn private blocks that are complete into shared ones, in prefix order.

        A block that another sequence has sealed meanwhile is shared instead, and the private one is free again.

        Args:
            names: sequence hashes.
            parent: sequence hash of the block before the first.
            tokens: the tokens of all of them.
        """
        size = self.block_size
        self._private -= len(names)
        run = 0
        for at, name in enumerate(names):
            block = self._sealed.get(name)
            if block is None:
                self._sealed[name] = _Block(parent, tokens[at * size : (at + 1) * size])
                self.digest ^= name
                run += 1
            else:
                self._stored(names, at - run, at, tokens)
                run = 0
                if block.holders == 0:
                    del self._idle[name]
                block.holders += 1
            parent = name
        self._stored(names, len(names) - run, len(names), tokens)

    def release(self, hashes: Sequence[int], private: int) -> None:
        """Give back shares and private blocks. The ends of prefixes become evictable before their beginnings."""
        self._private -= private
        for name in reversed(hashes):
            block = self._sealed[name]
            block.holders -= 1
            if block.holders == 0:
                self._idle[name] = None
        if not self._reuse:
            self._evict(len(self._idle))

    def clear(self) -> None:
        """Forget every block that nobody holds, as engines do when their cache is reset."""
        for name in self._idle:
            del self._sealed[name]
            self.digest ^= name
        self._idle.clear()
        if self._events:
            self._pending, self._missed = self._snapshot(), False

    @property
    def contents(self) -> frozenset[int]:
        """Sequence hashes of all sealed blocks: the truth that indexes are compared with."""
        return frozenset(self._sealed)

    def resend(self) -> None:
        """Let the next `take_events` tell of everything."""
        if self._events:
            self._pending, self._missed = [], True

    def take_events(self) -> list[KvEvent]:
        """Return and forget what changed."""
        if self._missed:
            self._missed = False
            return self._snapshot()
        events, self._pending = self._pending, []
        return events

    def _evict(self, count: int) -> None:
        if count <= 0:
            return
        gone = [self._idle.popitem(last=False)[0] for _ in range(count)]
        for name in gone:
            del self._sealed[name]
            self.digest ^= name
        self._note(BlockRemoved(tuple(gone)))

    def _stored(self, names: Sequence[int], start: int, end: int, tokens: Sequence[int]) -> None:
        if start == end or not self._events:
            return
        size = self.block_size
        parent = self._sealed[names[start]].parent
        self._note(BlockStored(tuple(names[start:end]), parent, tuple(tokens[start * size : end * size]), size))

    def _note(self, event: KvEvent) -> None:
        if not self._events:
            return
        if self._missed or len(self._pending) >= _PENDING_LIMIT:
            self._missed = True
            self._pending.clear()
        else:
            self._pending.append(event)

    def _snapshot(self) -> list[KvEvent]:
        """The whole cache as events; blocks were sealed after their parents, so the order is right."""
        stored = [
            BlockStored((name,), block.parent, tuple(block.tokens), self.block_size)
            for name, block in self._sealed.items()
        ]
        return [AllBlocksCleared(), *stored]

"""The prefix index without any thought for speed: what the real ones are compared with; and random events for them."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from typing import TypeAlias

from holdfast.kv.index import CLEARED, REMOVED, STORED, TIERS, PrefixIndex

Op: TypeAlias = "tuple[int, int, int, list[int]]"
"""Operation, slot, tier, hashes."""


class Naive:
    """Counters by slot and tier."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, int], Counter[int]] = {}
        self.unknown: Counter[int] = Counter()

    def tier(self, slot: int, tier: int) -> Counter[int]:
        return self.held.setdefault((slot, tier), Counter())

    def apply(self, op: Op) -> None:
        operation, slot, tier, hashes = op
        held = self.tier(slot, tier)
        if operation == STORED:
            held.update(hashes)
        elif operation == CLEARED:
            held.clear()
        else:
            for key in hashes:
                if held[key] > 1:
                    held[key] -= 1
                elif held.pop(key, 0) == 0:
                    self.unknown[slot] += 1

    def clear(self, slot: int) -> None:
        for tier in range(TIERS):
            self.tier(slot, tier).clear()
        self.unknown.pop(slot, None)

    def slots(self) -> list[int]:
        return sorted({slot for slot, _ in self.held})

    def run(self, hashes: list[int]) -> list[tuple[int, ...]]:
        rows = []
        for slot in self.slots():
            at, found = 0, []
            for tier in range(TIERS):
                begin = at
                while at < len(hashes) and hashes[at] in self.tier(slot, tier):
                    at += 1
                found.append(at - begin)
            if at:
                rows.append((slot, *found))
        return rows

    def anywhere(self, hashes: list[int]) -> list[tuple[int, ...]]:
        rows = []
        for slot in self.slots():
            found = [sum(key in self.tier(slot, tier) for key in hashes) for tier in range(TIERS)]
            if any(found):
                rows.append((slot, *found))
        return rows

    def counts(self, slot: int) -> tuple[int, int, int, int, int]:
        """Return (device, host, disk, repeats, unknown)."""
        tiers = [self.tier(slot, tier) for tier in range(TIERS)]
        device, host, disk = map(len, tiers)
        return device, host, disk, sum(map(Counter.total, tiers)) - device - host - disk, self.unknown[slot]

    def blocks(self) -> int:
        return len(set().union(*self.held.values())) if self.held else 0


def do(index: PrefixIndex, op: Op) -> None:
    operation, slot, tier, hashes = op
    if operation == STORED:
        index.apply_stored(slot, tier, array("Q", hashes))
    elif operation == REMOVED:
        index.apply_removed(slot, tier, array("Q", hashes))
    else:
        index.clear(slot, tier)


def batch(ops: list[Op]) -> tuple[array[int], array[int]]:
    """Return what `PrefixIndex.apply` takes."""
    events, hashes = array("Q"), array("Q")
    for operation, slot, tier, wanted in ops:
        keys = [] if operation == CLEARED else wanted
        events.extend((operation, slot, tier, len(keys)))
        hashes.extend(keys)
    return events, hashes


def chains(rng: random.Random, count: int, longest: int) -> list[list[int]]:
    """Return prompts as hashes; most share a prefix with another."""
    made: list[list[int]] = []
    for _ in range(count):
        start: list[int] = []
        if made and rng.random() < 0.7:
            start = rng.choice(made)
            start = start[: rng.randrange(len(start) + 1)]
        made.append(start + [rng.getrandbits(64) for _ in range(rng.randrange(1, longest))])
    return made


def random_op(rng: random.Random, prompts: list[list[int]], slots: int, tiers: int = TIERS) -> Op:
    """Return an event as an engine makes them: stored in order, removed at either end or inside, rarely cleared."""
    chain = rng.choice(prompts)
    slot, tier, dice = rng.randrange(slots), rng.randrange(tiers), rng.random()
    if dice < 0.55:
        begin = rng.randrange(len(chain)) if rng.random() < 0.3 else 0
        return STORED, slot, tier, chain[begin : rng.randrange(begin, len(chain) + 1)]
    if dice < 0.98:
        begin = rng.randrange(len(chain))
        part = chain[begin : begin + rng.choice((1, 5, 60))]
        return REMOVED, slot, tier, part[::-1] if rng.random() < 0.5 else part
    return CLEARED, slot, tier, []

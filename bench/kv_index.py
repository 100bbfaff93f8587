"""What the prefix index and hashing cost, kernel and twin side by side: ``python -m bench kv_index``.

CPU time of one core, best of several. Prompts are 1,000 blocks that share prefixes in a tree, as system prompts and
conversations do; every worker stores, evicts from the end, and is asked for.
"""

from __future__ import annotations

import gc
import random
import time
from array import array
from collections.abc import Callable
from typing import TypeAlias

from bench.table import Row
from holdfast.kv import kernel
from holdfast.kv.choice import Implementation, new_index
from holdfast.kv.hashes import block_hashes, pack_tokens
from holdfast.kv.index import REMOVED, STORED, PrefixIndex
from holdfast.kv.tiers import Tier

SLOTS = (1, 8, 64, 1000)
CHUNK = 32
LONG = 6250
Events: TypeAlias = "tuple[array[int], array[int]]"


async def kv_index(quick: bool) -> list[Row]:
    """Hashing, events, lookups, memory, snapshots and removal of workers, against the goals."""
    rows = []
    for use in uses():
        rows += hashing(use)
        for slots in SLOTS:
            rows += traffic(use, slots, 200_000 if quick or use == "python" else 1_000_000)
        rows += long_prompts(use)
        rows += snapshots(use, 100_000 if quick else 1_000_000)
        rows += limited(use, 50_000 if quick else 200_000)
        if not quick:
            rows += large(use, 10_000_000 if use == "kernel" else 2_000_000)
    return rows


def uses() -> list[Implementation]:
    """Return the implementations that there are."""
    return ["python"] if kernel.UNAVAILABLE else ["kernel", "python"]


def cpu(work: Callable[[], object], repeat: int = 3) -> float:
    """Return CPU seconds of the best run."""
    best = float("inf")
    for _ in range(repeat):
        gc.collect()
        begin = time.process_time()
        work()
        best = min(best, time.process_time() - begin)
    return best


def drawn(rng: random.Random, count: int) -> array[int]:
    """Return random hashes."""
    return array("Q", rng.randbytes(8 * count))


def prompts(rng: random.Random, count: int, length: int = 1000) -> list[array[int]]:
    """Return prompts that begin like another one for three quarters of them."""
    made: list[array[int]] = []
    for _ in range(count):
        start = rng.choice(made)[: rng.randrange(length)] if made and rng.random() < 0.75 else array("Q")
        made.append(start + drawn(rng, length - len(start)))
    return made


def hashing(use: Implementation) -> list[Row]:
    """100,000 tokens in blocks of 16, from packed tokens."""
    packed = pack_tokens([i % 150_000 for i in range(100_000)])
    native = kernel.native
    try:
        if use == "python":
            kernel.native = None
        seconds = cpu(lambda: block_hashes(packed, 16), 30)
    finally:
        kernel.native = native
    goal = "100 us" if use == "kernel" else "1 ms"
    return [Row(f"{use}: hash 100,000 tokens (6,250 blocks)", us(seconds), f"goal {goal}")]


def traffic(use: Implementation, slots: int, blocks: int) -> list[Row]:
    """Stored and removed events, batched and single; lookups of 1,000 blocks; memory."""
    rng = random.Random(slots)
    pool = prompts(rng, blocks // 1000)
    batch, singles = events(rng, pool, slots, blocks)
    count = len(batch[1])

    def batched() -> PrefixIndex:
        index = new_index(use=use)
        index.apply(*batch)
        return index

    def one_by_one() -> None:
        index = new_index(use=use)
        for stored, slot, hashes in singles:
            (index.apply_stored if stored else index.apply_removed)(slot, 0, hashes)

    together, single = cpu(batched), cpu(one_by_one, 1)
    index = batched()
    held = sum(index.counts(slot).device for slot in range(slots))
    asked = [rng.choice(pool) for _ in range(2000 if use == "kernel" else 200)]
    lookup = cpu(lambda: [index.lookup(prompt) for prompt in asked]) / len(asked)
    short = [prompt[:100] for prompt in asked]
    brief = cpu(lambda: [index.lookup(prompt) for prompt in short]) / len(asked)
    name = f"{use}, {slots} workers, {held / 1e6:.2f} M held"
    goal, mean, memory = ("25 M", "5 us at 64", "40 B") if use == "kernel" else ("4 M", "-", "120 B")
    return [
        Row(f"{name}: stored + removed, batched", rate(count, together), f"goal {goal} blocks/s"),
        Row(f"{name}: the same, a call each event", rate(count, single)),
        Row(f"{name}: lookup of 1,000 blocks", us(lookup), f"goal {mean}"),
        Row(f"{name}: lookup of 100 blocks", us(brief)),
        Row(f"{name}: memory per (block, worker)", f"{index.bytes_used / held:.1f} B", f"goal {memory}"),
    ]


def events(
    rng: random.Random, pool: list[array[int]], slots: int, blocks: int
) -> tuple[Events, list[tuple[bool, int, array[int]]]]:
    """Return the same events for `PrefixIndex.apply` and for single calls; up to four workers hold a prompt.

    As engines do: only what a worker does not hold yet is stored, in pieces; who has all of a prompt evicts a fifth of
    it, from the end.
    """
    rows, hashes = array("Q"), array("Q")
    singles: list[tuple[bool, int, array[int]]] = []
    held: list[set[int]] = [set() for _ in range(slots)]
    holders = [[rng.randrange(slots) for _ in range(4)] for _ in pool]
    stored = 0
    while stored < blocks:
        number = rng.randrange(len(pool))
        slot = rng.choice(holders[number])
        missing = [key for key in pool[number] if key not in held[slot]][: rng.randrange(CHUNK, 20 * CHUNK)]
        if missing:
            part = array("Q", missing)
            held[slot].update(part)
            stored += len(part)
        else:
            part = pool[number][: -len(pool[number]) // 5 - 1 : -1]
            held[slot].difference_update(part)
        singles.append((bool(missing), slot, part))
        rows.extend((STORED if missing else REMOVED, slot, 0, len(part)))
        hashes.extend(part)
    return (rows, hashes), singles


def long_prompts(use: Implementation) -> list[Row]:
    """A prompt of 6,250 blocks: stored in one piece, in pieces between others, and block by block in random order."""
    rng = random.Random(7)
    rows = []
    count = 64 if use == "kernel" else 16
    index = new_index(use=use)
    whole = drawn(rng, LONG)
    for slot in range(64):
        index.apply_stored(slot, 0, whole)
    mixed = [drawn(rng, LONG) for _ in range(count)]
    for at in range(0, LONG, CHUNK):
        for number, prompt in enumerate(mixed):
            index.apply_stored(number % 64, 0, prompt[at : at + CHUNK])
    scattered = [drawn(rng, LONG) for _ in range(count)]
    order = [(number, at) for number in range(count) for at in range(LONG)]
    rng.shuffle(order)
    for number, at in order:
        index.apply_stored(number % 64, 0, scattered[number][at : at + 1])
    staggered = drawn(rng, LONG)
    for slot in range(64):
        index.apply_stored(slot, 0, staggered[: (slot + 1) * LONG // 64])
    goal = "goal 500 us worst" if use == "kernel" else ""
    cases = (
        ("in one piece, held by 64 workers", [whole]),
        ("64 workers, each another prefix", [staggered]),
        ("stored in pieces between others", mixed),
        ("every block in a random place", scattered),
    )
    for name, asked in cases:
        seconds = cpu(lambda asked=asked: [index.lookup(prompt) for prompt in asked]) / len(asked)
        rows.append(Row(f"{use}: lookup of 6,250 blocks, {name}", us(seconds), goal))
    return rows


def snapshots(use: Implementation, blocks: int) -> list[Row]:
    """One worker's blocks written out and read in; a worker removed, and what it leaves freed."""
    rng = random.Random(8)
    index = new_index(use=use)
    for slot in range(8):
        for _ in range(blocks // 8000):
            index.apply_stored(slot, 0, drawn(rng, 1000))
    one = new_index(use=use)
    one.apply_stored(0, 0, drawn(rng, blocks))
    snapshot = one.snapshot(0)
    out = cpu(lambda: one.snapshot(0))
    into = cpu(lambda: new_index(use=use).load(0, snapshot))
    remove = cpu(lambda: index.remove_worker(3), 1)
    free = cpu(index.sweep, 1)
    goal = "goal 50 ms" if use == "kernel" and blocks == 1_000_000 else ""
    return [
        Row(f"{use}: snapshot of {blocks:,} blocks, written", ms(out), goal),
        Row(f"{use}: snapshot of {blocks:,} blocks, loaded", ms(into), goal),
        Row(f"{use}: a worker removed", us(remove), "goal 1 ms"),
        Row(f"{use}: all that it leaves freed in one go", ms(free)),
    ]


def limited(use: Implementation, limit: int) -> list[Row]:
    """Ten times as many blocks as the limit allows."""
    rng = random.Random(9)
    parts = [drawn(rng, 1000) for _ in range(10 * limit // 1000)]

    def fill() -> PrefixIndex:
        index = new_index(limit=limit, use=use)
        for number, part in enumerate(parts):
            index.apply_stored(number % 64, 0, part)
        return index

    seconds = cpu(fill, 2)
    index = fill()
    return [
        Row(f"{use}: stored with a limit of {limit:,} blocks", rate(10 * limit, seconds)),
        Row(f"{use}: memory then, for a block of the limit", f"{index.bytes_used / limit:.1f} B"),
    ]


def large(use: Implementation, blocks: int) -> list[Row]:
    """Many blocks on 64 workers: the time to take them, the longest call, memory, lookups."""
    rng = random.Random(10)
    index = new_index(use=use)
    longest = spent = 0.0
    asked = []
    for number in range(blocks // 1000):
        part = drawn(rng, 1000)
        if number % (blocks // 200_000) == 0:
            asked.append(part)
        begin = time.process_time()
        index.apply_stored(number % 64, Tier.DEVICE, part)
        took = time.process_time() - begin
        spent += took
        longest = max(longest, took)
    lookup = cpu(lambda: [index.lookup(part) for part in asked]) / len(asked)
    name = f"{use}, {blocks / 1e6:.0f} M blocks, 64 workers"
    return [
        Row(f"{name}: stored, 1,000 a call", rate(blocks, spent), f"longest call {ms(longest)}"),
        Row(f"{name}: lookup of 1,000 blocks", us(lookup)),
        Row(f"{name}: memory per (block, worker)", f"{index.bytes_used / blocks:.1f} B"),
    ]


def us(seconds: float) -> str:
    """Return microseconds."""
    return f"{seconds * 1e6:,.1f} us"


def ms(seconds: float) -> str:
    """Return milliseconds."""
    return f"{seconds * 1e3:,.2f} ms"


def rate(count: int, seconds: float) -> str:
    """Return millions a second."""
    return f"{count / seconds / 1e6:.1f} M/s"

"""A cut is what was held at one moment, each block once, however the log changes while it is read in slices."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections import Counter

import pytest

from holdfast.kv.events import AllBlocksCleared, BlockRemoved, BlockStored
from holdfast.kv.feed import PART_HASHES, Complete, Opening, Part, from_wire
from holdfast.kv.kernel import UNAVAILABLE, KernelIndex
from holdfast.kv.twin import TwinIndex
from holdfast.runtime.context import Context
from holdfast.worker import kv_log, kv_snapshot
from holdfast.worker.kv_config import KvPublishConfig
from holdfast.worker.kv_log import KvLog
from holdfast.worker.kv_publish import MOST_BROKEN, KvPublisher
from tests.support.kv_world import Cache, info
from tests.support.virtual_time import virtual
from tests.worker.test_kv_log import Follower

INDEXES = [TwinIndex] if UNAVAILABLE else [TwinIndex, KernelIndex]
MEDIUMS = ("GPU", "CPU")


def stored(hashes: list[int], *, rank: int = 0, medium: str = "GPU") -> BlockStored:
    return BlockStored(tuple(hashes), None, (), 4, dp_rank=rank, medium=medium)


def removed(hashes: list[int], *, rank: int = 0, medium: str = "GPU") -> BlockRemoved:
    return BlockRemoved(tuple(hashes), dp_rank=rank, medium=medium)


def held_after(log: KvLog, sequence: int, follower: Follower) -> dict[tuple[int, int], set[int]]:
    """Return what a follower that has all batches up to a number holds."""
    assert follower.sequence == sequence
    return {place: set(blocks) for place, blocks in follower.held.items() if blocks}


def change(log: KvLog, rng: random.Random, known: dict[tuple[int, str], list[int]]) -> None:
    place = (rng.randrange(2), rng.choice(MEDIUMS))
    blocks = known.setdefault(place, [])
    rank, medium = place
    if blocks and rng.random() < 0.5:
        gone = [blocks.pop(rng.randrange(len(blocks))) for _ in range(min(len(blocks), rng.randrange(1, 5)))]
        log.take([removed(gone, rank=rank, medium=medium)])
        if rng.random() < 0.5:  # it comes back at once, in a place of its own
            blocks.extend(gone)
            log.take([stored(gone, rank=rank, medium=medium)])
    else:
        new = [rng.randrange(1, 1 << 62) for _ in range(rng.randrange(1, 6))]
        blocks.extend(new)
        log.take([stored(new, rank=rank, medium=medium)])


@pytest.mark.parametrize("make", INDEXES)
@pytest.mark.parametrize("seed", range(30))
def test_what_comes_out_is_one_moment_however_the_log_changes(
    make: type, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_snapshot, "VISITS", 7)
    monkeypatch.setattr(kv_log, "new_index", make)
    rng = random.Random(seed)
    log, follower = KvLog(1, 4, native=True), Follower()
    known: dict[tuple[int, str], list[int]] = {}
    for _ in range(rng.randrange(5, 80)):
        change(log, rng, known)
    follower.follow(log)
    with log.cut() as cut:
        truth = held_after(log, cut.sequence, follower)
        found: dict[tuple[int, int], Counter[int]] = {}
        for rank, tier, hashes in cut.slices():
            found.setdefault((rank, tier), Counter()).update(hashes)
            for _ in range(rng.randrange(4)):
                change(log, rng, known)
    assert {place: dict(blocks) for place, blocks in found.items() if blocks} == {
        place: dict.fromkeys(blocks, 1) for place, blocks in truth.items()
    }
    assert sum(len(blocks) for blocks in truth.values()) == cut.blocks
    assert not cut.broken
    assert not log.cuts, "nothing is told of changes any more"


@pytest.mark.parametrize("make", INDEXES)
def test_copies_are_told_once(make: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower that took a copy for a second block would hold it for ever once both have gone."""
    monkeypatch.setattr(kv_log, "new_index", make)
    log = KvLog(1, 4, native=True)
    log.take([stored([1, 2, 3]), stored([2, 3])])
    with log.cut() as cut:
        assert sorted(one for _, _, hashes in cut.slices() for one in hashes) == [1, 2, 3]
        assert cut.blocks == 3


@pytest.mark.parametrize("how", ["cleared", "too many changes"])
def test_a_cut_that_cannot_be_completed_says_so(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_snapshot, "VISITS", 2)
    log = KvLog(1, 4, native=True, kept=50)
    log.take([stored(list(range(1, 20)))])
    with log.cut() as cut:
        slices = cut.slices()
        next(slices)
        log.take([AllBlocksCleared()] if how == "cleared" else [stored(list(range(100, 151)))])
        assert cut.broken
        assert list(slices) == []


class Index:
    """Counts the blocks that are looked at between two turns of the event loop."""

    def __init__(self) -> None:
        self.inner = TwinIndex()
        self.budgets: list[int] = []

    def slices(self, slot: int, tier: int, budget: int) -> object:
        for found in self.inner.slices(slot, tier, budget):
            self.budgets.append(budget)
            yield found

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


@virtual
async def test_a_large_snapshot_leaves_the_loop_its_turns() -> None:
    """Counted in blocks: between two turns no more than one slice is looked at, encoded and sent."""
    publisher = KvPublisher(Cache(), 7, KvPublishConfig(kv_events_batch_ms=0.0))  # type: ignore[arg-type]
    publisher.begin(info())
    assert publisher.log is not None
    index = publisher.log.index = Index()  # type: ignore[assignment]
    blocks = 30 * PART_HASHES
    publisher.take([stored(list(range(1, blocks + 1)))])
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(others())
    told: set[int] = set()
    between: Counter[int] = Counter()
    async for message in publisher.serve([1, 0, 0], Context("c")):
        if isinstance(message, Part):
            told.update(array("Q", bytes(from_wire(message.hashes))))
            between[turns] += len(message.hashes) // 8
        elif isinstance(message, Complete):
            break
        else:
            assert isinstance(message, Opening)
            assert message.blocks == blocks
    other.cancel()
    assert told == set(range(1, blocks + 1))
    assert set(index.budgets) == {kv_snapshot.VISITS}
    assert max(between.values()) <= kv_snapshot.VISITS
    assert kv_snapshot.VISITS <= 10_000, "some tenths of a millisecond"
    assert turns >= blocks // kv_snapshot.VISITS


@virtual
async def test_a_cache_that_is_cleared_again_and_again_is_told_in_one_go_at_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_snapshot, "VISITS", 2)
    publisher = KvPublisher(Cache(), 7, KvPublishConfig(kv_events_batch_ms=0.0))  # type: ignore[arg-type]
    publisher.begin(info())
    everything = stored([1, 2, 3, 4, 5])
    publisher.take([everything])
    openings, told = 0, []
    async for message in publisher.serve([1, 0, 0], Context("c")):
        if isinstance(message, Opening):
            openings, told = openings + 1, []
        elif isinstance(message, Part):
            told += array("Q", bytes(from_wire(message.hashes)))
            publisher.take([AllBlocksCleared(), everything])
        else:
            assert isinstance(message, Complete)
            break
    assert (openings, sorted(told)) == (1 + MOST_BROKEN, [1, 2, 3, 4, 5])
    assert publisher.overruns == 0

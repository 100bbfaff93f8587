"""Whatever an engine says, the log tells each block once when it comes and once when it goes, numbered without gaps."""

from __future__ import annotations

import random
from array import array

import pytest

from holdfast.kv.events import AllBlocksCleared, BlockRemoved, BlockStored
from holdfast.kv.feed import MESSAGE_NUMBERS
from holdfast.kv.hashes import block_hashes
from holdfast.kv.index import CLEARED, REMOVED, STORED
from holdfast.worker.kv_log import KvLog
from holdfast.worker.kv_snapshot import Slice
from tests.support.kv_world import SIZE, Cache


class Follower:
    """Applies batches to plain sets; a block that comes twice or goes twice is a failure."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, int], set[int]] = {}
        self.sequence = 0

    def follow(self, log: KvLog) -> None:
        while self.sequence < log.sequence:
            assert log.has(self.sequence)
            batch = log.after(self.sequence)
            assert batch.numbers <= MESSAGE_NUMBERS
            self.apply(batch.events, batch.hashes)
            self.sequence = batch.last

    def apply(self, events: array[int], hashes: array[int]) -> None:
        at = 0
        for row in range(0, len(events), 4):
            operation, rank, tier, count = events[row : row + 4]
            held, some = self.held.setdefault((rank, tier), set()), hashes[at : at + count]
            at += count
            if operation == STORED:
                assert held.isdisjoint(some), "a block is stored once"
                assert len(set(some)) == count
                held.update(some)
            elif operation == REMOVED:
                assert held.issuperset(some), "only what is held is removed"
                held.difference_update(some)
            else:
                assert (operation, count) == (CLEARED, 0)
                held.clear()
        assert at == len(hashes)

    def of(self, rank: int = 0, tier: int = 0) -> set[int]:
        return self.held.get((rank, tier), set())


def contents(log: KvLog) -> list[Slice]:
    """All that a cut of this moment brings."""
    with log.cut() as cut:
        found = [one for one in cut.slices() if one[2]]
        assert sum(len(hashes) for _, _, hashes in found) == cut.blocks
        return found


class OpaqueEngine:
    """Names blocks as it likes, and keeps copies, as vLLM does. Holds (our hash → names of the copies)."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.names: dict[int, int] = {}
        self.blocks: list[int] = []

    def store(self, tokens: list[int], *, rank: int = 0) -> list[BlockStored]:
        """Store all blocks of a prompt, copies of those that are there included."""
        ours = block_hashes(tokens, SIZE)
        theirs = []
        for one in ours:
            theirs.append(self.names.setdefault(one, self.rng.getrandbits(64)))
            self.blocks.append(one)
        cut = self.rng.randrange(len(theirs) + 1)
        events = []
        for start, end in ((0, cut), (cut, len(theirs))):
            if start < end:
                parent = theirs[start - 1] if start else None
                some = tuple(tokens[start * SIZE : end * SIZE])
                events.append(BlockStored(tuple(theirs[start:end]), parent, some, SIZE, dp_rank=rank))
        return events

    def evict(self, count: int) -> BlockRemoved:
        gone = [self.blocks.pop(self.rng.randrange(len(self.blocks))) for _ in range(min(count, len(self.blocks)))]
        return BlockRemoved(tuple(self.names[one] for one in gone))


def tokens(blocks: int, first: int = 0) -> list[int]:
    return list(range(first, first + blocks * SIZE))


def test_an_engines_own_names_become_ours():
    log, follower = KvLog(1, SIZE, native=False), Follower()
    prompt = tokens(4)
    log.take([BlockStored((91, 92), None, tuple(prompt[: 2 * SIZE]), SIZE)])
    log.take([BlockStored((93, 94), 92, tuple(prompt[2 * SIZE :]), SIZE)])
    follower.follow(log)
    ours = block_hashes(prompt, SIZE)
    assert follower.of() == set(ours)
    log.take([BlockRemoved((92, 94))])
    follower.follow(log)
    assert follower.of() == {ours[0], ours[2]}
    assert log.outcomes == {("stored", "ok"): 2, ("removed", "ok"): 1}


def test_adapters_and_salts_name_other_blocks():
    prompt = tuple(tokens(1))
    names = []
    for how in ({}, {"lora": "a"}, {"salt": "t"}, {"lora": "a", "salt": "t"}):
        log = KvLog(1, SIZE, native=False)
        log.take([BlockStored((1,), None, prompt, SIZE, **how)])
        ((_, _, hashes),) = contents(log)
        assert list(hashes) == list(block_hashes(prompt, SIZE, **how))
        names.append(hashes[0])
    assert len(set(names)) == 4


def test_a_block_with_copies_goes_with_the_last_one():
    log, follower = KvLog(1, SIZE, native=False), Follower()
    stored = BlockStored((7, 8), None, tuple(tokens(2)), SIZE)
    log.take([stored, stored])
    log.take([BlockRemoved((8,))])
    follower.follow(log)
    assert len(follower.of()) == 2
    log.take([BlockRemoved((8,))])
    follower.follow(log)
    assert follower.of() == {block_hashes(tokens(2), SIZE)[0]}


def test_tiers_and_ranks_are_kept_apart_and_foreign_mediums_left_out():
    log, follower = KvLog(1, SIZE, native=True), Follower()
    log.take([
        BlockStored((1, 2), None, tuple(tokens(2)), SIZE),
        BlockStored((1,), None, tuple(tokens(1)), SIZE, medium="CPU"),
        BlockStored((3,), None, tuple(tokens(1)), SIZE, dp_rank=2),
        BlockStored((9,), None, tuple(tokens(1)), SIZE, medium="EXTERNAL"),
    ])  # fmt: skip
    follower.follow(log)
    assert (follower.of(), follower.of(tier=1), follower.of(rank=2)) == ({1, 2}, {1}, {3})
    assert log.counts() == ((0, 2, 1, 0), (2, 1, 0, 0))
    log.take([AllBlocksCleared()])
    follower.follow(log)
    assert (follower.of(), follower.of(tier=1), follower.of(rank=2)) == (set(), set(), {3})
    assert log.outcomes["stored", "not_indexed"] == 1


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (BlockStored((5,), 4711, tuple(tokens(1)), SIZE), "parent_block_not_found"),
        (BlockStored((5,), None, tuple(tokens(1)), SIZE + 1), "invalid_block"),
        (BlockStored((5, 6), None, tuple(tokens(1)), SIZE), "invalid_block"),
        (BlockStored((5,), None, (-1, 0, 0, 0), SIZE), "invalid_block"),
        (BlockRemoved((5,)), "block_not_found"),
        (BlockRemoved((5,), medium="TAPE"), "not_indexed"),
    ],
)
def test_what_cannot_be_used_is_counted_and_changes_nothing(event, status):
    log = KvLog(1, SIZE, native=False)
    assert not log.take([event])
    assert [key[1] for key in log.outcomes] == [status]
    assert (log.blocks, log.sequence) == (0, 0)


def test_batches_are_kept_up_to_a_bound():
    log = KvLog(1, SIZE, native=True, kept=100)
    for number in range(1, 61):
        log.take([BlockStored((number, number + 1000), None, tuple(tokens(2)), SIZE)])
    assert (log.sequence, log.oldest) == (60, 11)
    assert [log.has(number) for number in (9, 10, 60, 61)] == [False, True, True, False]
    assert log.after(10).last == 60
    assert log.blocks == 120


def test_a_large_step_becomes_several_batches_and_messages():
    log, follower = KvLog(1, SIZE, native=True), Follower()
    log.take([BlockStored(tuple(range(20_000)), None, (), SIZE)])
    assert log.sequence == 4
    log.take([BlockRemoved((number,)) for number in range(0, 20_000, 2)])
    follower.follow(log)
    assert follower.of() == set(range(1, 20_000, 2))


def test_a_removal_that_names_a_block_twice_tells_it_once():
    log, follower = KvLog(1, SIZE, native=True), Follower()
    log.take([BlockStored((1, 2, 3), None, (), SIZE)])
    log.take([BlockRemoved((2, 2, 9))])
    follower.follow(log)
    assert follower.of() == {1, 3}
    assert log.outcomes["removed", "block_not_found"] == 1


@pytest.mark.parametrize("seed", range(30))
def test_the_log_equals_an_engine_that_keeps_copies(seed):
    rng = random.Random(seed)
    engine, log, follower = OpaqueEngine(rng), KvLog(1, SIZE, native=False, kept=10_000), Follower()
    for _ in range(150):
        first = rng.choice([0, 0, 1000 * rng.randrange(5)])
        events = engine.store(tokens(rng.randrange(1, 6), first)) if rng.random() < 0.6 else [engine.evict(4)]
        if isinstance(events[0], BlockStored) and rng.random() < 0.1:
            events.append(engine.evict(2))
        log.take(events)
        if rng.random() < 0.3:
            follower.follow(log)
            assert follower.of() == set(engine.blocks)
    follower.follow(log)
    assert follower.of() == set(engine.blocks) == {one for _, _, hashes in contents(log) for one in hashes}
    assert log.counts() == ((0, len(set(engine.blocks)), 0, 0),)


def test_the_log_follows_the_mock_engines_cache():
    rng = random.Random(3)
    cache, log, follower = Cache(60), KvLog(1, SIZE, native=True), Follower()
    for _ in range(300):
        cache.fill(tokens(rng.randrange(1, 20), 1000 * rng.randrange(6)))
        if rng.random() < 0.02:
            cache.resend_kv_events()
        log.take(cache.take_kv_events())
        follower.follow(log)
        assert follower.of() == cache.pool.contents
